"""Fidelity and diversity of samples: precision and recall, density and coverage."""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2**24  # distances at a time, 128 MiB


@dataclass(frozen=True)
class PRDC:
    """Precision, recall, density and coverage: 1 for equal distributions, 0 for remote ones."""

    precision: float
    """Share of samples inside of a ball around a real image (arXiv 1904.06991)."""
    recall: float
    """Share of real images inside of a ball around a sample."""
    density: float
    """Mean number of balls around real images that hold a sample, over k (arXiv 2002.09797)."""
    coverage: float
    """Share of real images with a sample in their ball."""


def prdc(real: Tensor, samples: Tensor, *, nearest: int = 5) -> PRDC:
    """Metrics of features [N, D] and [M, D]; a ball reaches to the k-th neighbor in its set.

    Distances equal to a radius count as inside in all four; published code of density and coverage
    excludes ties. Both sets must have more than k = `nearest` rows. Published precision and recall
    have 3, density and coverage 5; values depend on it, and on N and M.
    """
    if min(len(real), len(samples)) <= nearest:
        raise ValueError(f"{nearest} nearest neighbors need more than {nearest} images of each set")
    real, samples = real.double(), samples.double()
    around_real, around_samples = (_radii(x, nearest) for x in (real, samples))
    inside = torch.zeros(len(samples))  # balls around real images that hold this sample
    recalled, covered = [], []
    for rows, distance in _distances(real, samples):
        inside += (distance <= around_real[rows, None]).sum(0)
        recalled.append((distance <= around_samples).any(1))
        covered.append(distance.amin(1) <= around_real[rows])
    return PRDC(
        precision=(inside > 0).double().mean().item(),
        recall=torch.cat(recalled).double().mean().item(),
        density=inside.double().mean().item() / nearest,
        coverage=torch.cat(covered).double().mean().item(),
    )


def _distances(a: Tensor, b: Tensor):
    """Iterate over chunks of rows of a, and their distances to all rows of b."""
    size = max(1, CHUNK // len(b))
    for start in range(0, len(a), size):
        rows = torch.arange(start, min(start + size, len(a)))
        yield rows, torch.cdist(a[rows], b, compute_mode="use_mm_for_euclid_dist")


def _radii(x: Tensor, nearest: int) -> Tensor:
    """Distance of each row to its `nearest`-th neighbor, not counting itself: [N]."""
    parts = [d.kthvalue(nearest + 1, dim=1).values for _, d in _distances(x, x)]
    return torch.cat(parts)
