"""Measures of reconstructions: PSNR, SSIM, and statistics of latents.

Shapes: B images, C channels, H and W sides.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from patchdiffusion.data.space import Space
from patchdiffusion.encoders.perceptual import laplacian


def psnr(x: Tensor, y: Tensor, peak: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, 10 log10(peak^2 / mse): float64 [B].

    `peak` is the range of the values, 2 for [-1, 1]. 100 dB at most.
    """
    mse = (x.double() - y.double()).square().flatten(1).mean(1)
    return (20 * math.log10(peak) - 10 * mse.clamp(min=1e-30).log10()).clamp(max=100.0)


def ssim(x: Tensor, y: Tensor, peak: float = 2.0) -> Tensor:
    """Structural similarity of each image (Wang et al., 2004): float64 [B].

    Of values in [-peak / 2, peak / 2], which count from 0. Gaussian windows of 11 x 11 with
    deviation 1.5, inside the image only; smaller ones for smaller images.
    """
    x, y = x.double() + peak / 2, y.double() + peak / 2
    side = min(11, *x.shape[2:])
    at = torch.arange(side, dtype=torch.float64, device=x.device) - (side - 1) / 2
    taps = (-(at**2) / (2 * 1.5**2)).exp()
    window = (taps / taps.sum()).expand(x.shape[1], 1, 1, side)

    def mean(image: Tensor) -> Tensor:
        rows = F.conv2d(image, window, groups=image.shape[1])
        return F.conv2d(rows, window.mT, groups=image.shape[1])

    a, b, c1, c2 = mean(x), mean(y), (0.01 * peak) ** 2, (0.03 * peak) ** 2
    var_x, var_y = mean(x * x) - a * a, mean(y * y) - b * b
    covariance = mean(x * y) - a * b
    upper = (2 * a * b + c1) * (2 * covariance + c2)
    return (upper / ((a * a + b * b + c1) * (var_x + var_y + c2))).flatten(1).mean(1)


def sharpness(x: Tensor, y: Tensor) -> Tensor:
    """Mean |Laplacian| of reconstructions y relative to that of images x, of all together."""
    return laplacian(y.double()).abs().mean() / laplacian(x.double()).abs().mean().clamp(min=1e-12)


def peak_of(space: Space, channels: int) -> float:
    """Range of values in the units of the network: 2 for pixels, of others from black to white."""
    low, high = getattr(space, "black", None), getattr(space, "white", None)
    if low is None or high is None:
        return 2.0
    ends = torch.tensor([low, high], dtype=torch.float32)[..., None, None]  # [2, C, 1, 1]
    black, white = space.to_network(ends.expand(2, channels, 1, 1).clone())
    return float((white - black).mean())
