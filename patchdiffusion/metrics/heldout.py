"""The denoising loss on held-out images, with fixed noise."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.conditioners.base import Change, unchanged
from patchdiffusion.data.columns import Filled
from patchdiffusion.data.feed import gather
from patchdiffusion.data.space import Space
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.losses import Batch, denoising_error
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.patches import Size, size_name
from patchdiffusion.plans import Group
from patchdiffusion.weighting import Weighting

BANDS = (0.0, 0.1, 0.4, 1.5, float("inf"))
"""Edges of the bands of noise levels: texture, detail, shape, layout."""


@dataclass(frozen=True)
class HeldOut:
    """Mean weighted loss per pixel: of whole images, per band of noise levels, per crop size."""

    total: float
    bands: dict[str, float]
    sizes: dict[str, float]


def standard_error(values: Tensor) -> float | None:
    """Standard error of the mean of values [N]; None for fewer than two values."""
    return None if len(values) < 2 else float(values.std() / len(values) ** 0.5)


@torch.no_grad()
def held_out_losses(
    denoiser: Denoiser,
    images: Tensor,
    columns: Sequence[Filled],
    indices: Tensor,
    *,
    space: Space,
    law: NoiseLaw,
    weighting: Weighting,
    sizes: tuple[Size, ...],
    device: torch.device,
    batch: int = 64,
    part: range | None = None,
    change: Change = unchanged,
    progress: Callable[[int], object] = bool,
) -> dict[Size, Tensor]:
    """Losses on `indices` [M] of stored images [N, *S, C] for each crop size, largest first.

    Each image has one noise level, stratified over `law`, one noise and one corner per size, equal
    in every call: values of a run, and of runs on the same data, are comparable. `part` chooses
    some of the M images; `change` is that of conditioners, `progress` is called with the number of
    images of each batch. Float64 [2, len(part)] for each size: sigma and weighted loss.
    """
    part = range(len(indices)) if part is None else part
    # A fixed shuffle of the strata, so that neighboring images get different levels.
    levels = torch.from_numpy(rng.permutation(0, "held-out level", 0, len(indices)))
    losses = {}
    for size in sizes:
        rows = [torch.zeros(2, 0, dtype=torch.float64)]
        for start in range(part.start, part.stop, batch):
            rank = torch.arange(start, min(start + batch, part.stop))
            draws = rng.Draws(0, 0, indices[rank], rank, len(indices))
            group = Group(size, len(indices), 1.0)
            flip = torch.zeros(len(rank)).bool()
            key = draws.keys("held-out crop")
            crops = gather(images, columns, indices[rank], group, key, flip, space=space)
            sigma = law.icdf((levels[rank] + 0.5) / len(indices)).to(torch.float32).to(device)
            noise = draws.normal("held-out noise", tuple(crops.images.shape[1:])).to(device)
            crops = change(on_device(crops, device), draws.to(device))
            error = denoising_error(denoiser, crops.images, noise, sigma, crops.cond)
            rows.append(torch.stack([sigma, weighting(sigma) * error]).cpu().double())
            progress(len(rank))
        losses[size] = torch.cat(rows, dim=1)
    return losses


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Images, conditions and places of a batch on another device."""
    return replace(
        batch,
        images=batch.images.to(device),
        cond=batch.cond.to(device),
        box=batch.box.to(device),
        flip=batch.flip.to(device),
    )


def summarize(losses: dict[Size, Tensor]) -> HeldOut:
    """Means of the result of `held_out_losses`, over all noise levels and within bands."""
    sigma, loss = next(iter(losses.values()))
    bands = {}
    for low, high in itertools.pairwise(BANDS):
        inside = (sigma >= low) & (sigma < high)
        if inside.any():
            bands[f"{low:g}-{high:g}"] = loss[inside].mean().item()
    means = {size_name(size): rows[1].mean().item() for size, rows in losses.items()}
    return HeldOut(loss.mean().item(), bands, means)
