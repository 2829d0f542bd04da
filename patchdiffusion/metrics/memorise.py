"""Is the model repeating its training images? Distances to nearest neighbours, in pixels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchdiffusion.data.space import Space

CHUNK = 2**24  # values of images at a time, 64 MiB of float32


@dataclass(frozen=True)
class Copies:
    """How near samples are to the training images."""

    rate: float
    """Share of samples that are copies."""
    nearest: Tensor
    """int64 [B], the nearest training image of each sample."""
    ratio: Tensor
    """float32 [B], distance to the nearest over distance to the second nearest image."""


def copy_rate(
    samples: Tensor, images: Tensor, indices: Tensor, *, space: Space, threshold: float = 1 / 3
) -> Copies:
    """Count a sample as a copy if its nearest image is `threshold` times nearer than the next one.

    samples float [B, C, *S] as networks make them, images [N, *S, C] as stored, of which `indices`
    [M] were trained on, M >= 2. The criterion of Yoon et al. (ICML 2023 workshop) and Gu et al.
    (arXiv 2310.02664). Mirrored copies do not count, nor do those that resemble an image which
    occurs twice without being equal to it.
    """
    if len(indices) < 2:
        raise ValueError(f"the copy rate needs at least 2 training images, not {len(indices)}")
    flat = samples.movedim(1, -1).flatten(1).to(torch.float32)
    best = torch.full((len(flat), 2), float("inf"))
    where = torch.zeros(len(flat), 2, dtype=torch.int64)
    chunk = max(1, CHUNK // flat.shape[1])
    for part in indices.split(chunk):
        known = _as_seen(images[part], space).movedim(1, -1).flatten(1)
        values, places = torch.cdist(flat, known).topk(min(2, len(part)), dim=1, largest=False)
        best, order = torch.cat([best, values], dim=1).topk(2, dim=1, largest=False)
        where = torch.cat([where, part[places]], dim=1).gather(1, order)
    ratio = best[:, 0] / best[:, 1].clamp(min=1e-12)
    return Copies((ratio < threshold).double().mean().item(), where[:, 0], ratio)


def _as_seen(images: Tensor, space: Space) -> Tensor:
    """Stored images [B, *S, C] in the units of networks: float32 [B, C, *S]."""
    return space.to_network(images.movedim(-1, 1).to(torch.float32, copy=True))


class CopyCounter:
    """Counts copies among samples that arrive in pieces, without keeping them."""

    def __init__(self, images: Tensor, indices: Tensor, space: Space):
        """As for `copy_rate`."""
        self.images = images
        self.indices = indices
        self.space = space
        self.copies = 0
        self.samples = 0
        self._waiting: list[Tensor] = []

    def add(self, samples: Tensor) -> None:
        """Samples [B, *S, C] as stored. Many at a time are compared, for each reads all images."""
        self._waiting.append(samples)
        if sum(part.numel() for part in self._waiting) >= CHUNK:
            self.finish()

    def finish(self) -> None:
        """Compare those that wait; `copies` and `samples` then count all."""
        if self._waiting:
            samples = _as_seen(torch.cat(self._waiting), self.space)
            rate = copy_rate(samples, self.images, self.indices, space=self.space).rate
            self.copies += round(rate * len(samples))
            self.samples += len(samples)
            self._waiting = []
