"""The denoising loss on images that training never sees, with fixed noise."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.data.feed import gather
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.losses import denoising_error
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.patches import Group, Size
from patchdiffusion.weighting import Weighting

BANDS = (0.0, 0.1, 0.4, 1.5, float("inf"))
"""Edges of the bands of noise: texture, detail, shape, layout."""


@dataclass(frozen=True)
class HeldOut:
    """Mean weighted loss per pixel: of whole images, per band of noise, and per crop size."""

    total: float
    bands: dict[str, float]
    sizes: dict[str, float]


@torch.no_grad()
def held_out_loss(
    denoiser: Denoiser,
    images: Tensor,
    labels: Tensor | None,
    indices: Tensor,
    *,
    law: NoiseLaw,
    weighting: Weighting,
    sizes: tuple[Size, ...],
    device: torch.device,
    batch: int = 64,
) -> HeldOut:
    """Loss on `indices` [M] of uint8 images [N, H, W, C]; `sizes` are crop sizes, largest first.

    Each image has one noise level, spread evenly over `law`, one noise and one place per size, the
    same in every call: values of one run, and of runs on the same data, can be compared.
    """
    bands: dict[str, float] = {}
    means: dict[str, float] = {}
    total = float("nan")
    for size in sizes:
        losses, sigmas = [], []
        for start in range(0, len(indices), batch):
            rank = torch.arange(start, min(start + batch, len(indices)))
            draws = rng.Draws(0, 0, indices[rank], rank, len(indices))
            group = Group(size, len(indices), 1.0)
            flip = torch.zeros(len(rank)).bool()
            key = draws.keys("held-out crop")
            crops = gather(images, labels, indices[rank], group, key, flip)
            # A fixed shuffle of the strata, so that neighbouring images get different levels.
            place = torch.from_numpy(rng.permutation(0, "held-out level", 0, len(indices)))[rank]
            sigma = law.draw((place + 0.5) / len(indices)).to(torch.float32).to(device)
            noise = draws.normal("held-out noise", tuple(crops.images.shape[1:])).to(device)
            x = crops.images.to(device)
            error = denoising_error(denoiser, x, noise, sigma, crops.cond.to(device))
            losses.append((weighting(sigma) * error).cpu())
            sigmas.append(sigma.cpu())
        loss, sigma = torch.cat(losses).double(), torch.cat(sigmas)
        means["{}x{}".format(*size)] = loss.mean().item()
        if size == sizes[0]:
            total = loss.mean().item()
            for low, high in itertools.pairwise(BANDS):
                inside = (sigma >= low) & (sigma < high)
                if inside.any():
                    bands[f"{low:g}-{high:g}"] = loss[inside].mean().item()
    return HeldOut(total, bands, means)
