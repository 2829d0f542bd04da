"""Memorization of training images, by distances of samples to their nearest neighbors in pixels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchdiffusion.data.space import Space

CHUNK = 2**24  # values of images at a time, 64 MiB of float32


@dataclass(frozen=True)
class Copies:
    """Samples compared with the training images."""

    rate: float
    """Share of samples that are copies."""
    nearest: Tensor
    """int64 [B], index of the nearest training image of each sample."""
    ratio: Tensor
    """float32 [B], distance to the nearest over distance to the second nearest image."""


def copy_rate(
    samples: Tensor, images: Tensor, indices: Tensor, *, space: Space, threshold: float = 1 / 3
) -> Copies:
    """Share of samples that are copies: the nearest image is `threshold` times as far as the next.

    samples float [B, C, *S] in the units of networks, images [N, *S, C] as stored, of which
    `indices` [M] were trained on, M >= 2. The criterion of Yoon et al. (ICML 2023 workshop) and Gu
    et al. (arXiv 2310.02664). Mirrored copies do not count, nor do samples near, but not equal to,
    an image that occurs twice.
    """
    if len(indices) < 2:
        raise ValueError(f"the copy rate needs at least 2 training images, not {len(indices)}")
    flat = samples.movedim(1, -1).flatten(1).to(torch.float32)
    best = torch.full((len(flat), 2), float("inf"))
    nearest = torch.zeros(len(flat), 2, dtype=torch.int64)
    chunk = max(1, CHUNK // flat.shape[1])
    for part in indices.split(chunk):
        training = _to_network(images[part], space).movedim(1, -1).flatten(1)
        values, rows = torch.cdist(flat, training).topk(min(2, len(part)), dim=1, largest=False)
        best, order = torch.cat([best, values], dim=1).topk(2, dim=1, largest=False)
        nearest = torch.cat([nearest, part[rows]], dim=1).gather(1, order)
    ratio = best[:, 0] / best[:, 1].clamp(min=1e-12)
    return Copies((ratio < threshold).double().mean().item(), nearest[:, 0], ratio)


def _to_network(images: Tensor, space: Space) -> Tensor:
    """Stored images [B, *S, C] in the units of networks: float32 [B, C, *S]."""
    return space.to_network(images.movedim(-1, 1).to(torch.float32, copy=True))


@dataclass(frozen=True)
class CopyCounter:
    """Counts copies among samples; the fields are those of `copy_rate`."""

    images: Tensor
    indices: Tensor
    space: Space

    @property
    def at_once(self) -> int:
        """Number of samples that are best compared together."""
        return max(1, -(-CHUNK // self.images[0].numel()))

    def __call__(self, samples: Tensor) -> int:
        """Number of copies among samples [B, *S, C] as stored."""
        moved = _to_network(samples, self.space)
        rate = copy_rate(moved, self.images, self.indices, space=self.space).rate
        return round(rate * len(samples))
