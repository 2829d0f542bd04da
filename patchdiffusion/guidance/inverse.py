"""Inverse problems: sampling of images that fit a measurement y = A x0 + noise.

All of it are guides of `guidance.reward.GradientGuidance`: changes of the denoised image D, made
from products with C = Cov[x0 | x]. The images of a batch are solved for side by side.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from patchdiffusion.guidance.operators import transposed
from patchdiffusion.guidance.reward import Covariance
from patchdiffusion.paths import per_sample


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, iterations: int
) -> Tensor:
    """Approximate solution u of M u = right for a symmetric positive M, for each sample [B, ...].

    A sample stops where its residual is 0, or where M is not positive along its direction, as
    products with a network's Jacobian may be.
    """
    u = torch.zeros_like(right)
    residual, direction = right, right
    square = _dot(residual, residual)
    active = square > 0
    for _ in range(iterations):
        image = product(direction)
        curvature = _dot(direction, image)
        active = active & (curvature > 0) & (square > 0)
        step = torch.where(active, square / torch.where(active, curvature, 1.0), 0.0)
        u = u + per_sample(step, u) * direction
        residual = residual - per_sample(step, u) * image
        new = _dot(residual, residual)
        ratio = torch.where(active, new / torch.where(active, square, 1.0), 0.0)
        direction = residual + per_sample(ratio, u) * direction
        square = new
    return u


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Guide to p(x0 | y): C A^T (noise^2 I + A C A^T)^-1 (y - A D), by conjugate gradients.

    Exact for Gaussian data and enough iterations (arXiv 2310.06721); each costs a product with C, a
    backward pass. `reward.Measurement` is the same for a few measured numbers and any measurement.
    """

    operator: Callable[[Tensor], Tensor]
    """A: clean images [B, C, *S] -> measurements [B, ...], linear."""
    y: Tensor
    """Measurement, broadcast to that of the batch."""
    noise: float
    """Standard deviation of the error of y, positive."""
    iterations: int = 5

    def __post_init__(self) -> None:
        _check_noise(self.noise)

    def __call__(self, denoised: Tensor, covariance: Covariance) -> Tensor:
        def spread(u: Tensor) -> Tensor:
            return covariance(transposed(self.operator, u, denoised))

        residual = self.y.to(denoised) - self.operator(denoised)
        u = conjugate_gradients(
            lambda u: self.noise**2 * u + self.operator(spread(u)), residual, self.iterations
        )
        return spread(u)


@dataclass(frozen=True, kw_only=True)
class Project:
    """Guide to images whose measurement is y: A^T (A A^T + noise^2 I)^-1 (y - A D) (DDNM).

    arXiv 2212.00490. Needs no derivative of the network; for noise 0 what is measured is replaced.
    """

    operator: Callable[[Tensor], Tensor]
    y: Tensor
    noise: float = 0.0
    iterations: int = 20

    def __call__(self, denoised: Tensor, covariance: Covariance) -> Tensor:
        def product(u: Tensor) -> Tensor:
            return self.operator(transposed(self.operator, u, denoised)) + self.noise**2 * u

        residual = self.y.to(denoised) - self.operator(denoised)
        u = conjugate_gradients(product, residual, self.iterations)
        return transposed(self.operator, u, denoised)


@dataclass(frozen=True, kw_only=True)
class Descend:
    """Guide of diffusion posterior sampling (DPS, arXiv 2209.14687): C A^T (y - A D) / noise^2.

    Neglects C in the likelihood and is over-confident: use it with a `clip`.
    """

    operator: Callable[[Tensor], Tensor]
    y: Tensor
    noise: float

    def __post_init__(self) -> None:
        _check_noise(self.noise)

    def __call__(self, denoised: Tensor, covariance: Covariance) -> Tensor:
        residual = self.y.to(denoised) - self.operator(denoised)
        return covariance(transposed(self.operator, residual, denoised)) / self.noise**2


def _check_noise(noise: float) -> None:
    if not 0 < noise < math.inf:
        raise ValueError(f"noise of a measurement must be positive and finite, not {noise}")


def psnr(a: Tensor, b: Tensor, *, peak: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image: [B, ...] -> [B]; `peak` is white - black."""
    return 10 * torch.log10(peak**2 / (a - b).square().flatten(1).mean(1))
