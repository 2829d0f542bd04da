"""The maximum mean discrepancy of two samples, differentiable, with kernels (arXiv 0805.2368)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Features [N, D] and [M, D] -> similarities [N, M]."""
KernelName = Literal["cubic", "rbf", "energy"]
BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Bandwidths of the mixture, relative to the median distance of real features."""


def cubic(a: Tensor, b: Tensor) -> Tensor:
    """(a.b / D + 1)^3, the kernel of KID: it compares moments up to the third only."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def energy(a: Tensor, b: Tensor) -> Tensor:
    """-|a - b|, by which the squared discrepancy is the energy distance."""
    return -distances(a, b)


def rbf(a: Tensor, b: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """Mean of exp(-|a - b|^2 / (2 h^2)) over the bandwidths h."""
    square = distances(a, b).square()
    return torch.stack([(-square / (2 * h**2)).exp() for h in bandwidths]).mean(0)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances [N, M], without cancellation; the gradient is 0 where they are 0."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def median_distance(a: Tensor) -> float:
    """Median distance of different rows of [N, D]."""
    apart = ~torch.eye(len(a), dtype=torch.bool, device=a.device)
    return max(float(distances(a, a)[apart].median()), 1e-6)


def kernel_of(name: KernelName, real: Tensor) -> Kernel:
    """A kernel by name; the bandwidths of rbf are relative to distances of `real` [N, D]."""
    if name == "rbf":
        scale = median_distance(real[:1024])
        return partial(rbf, bandwidths=[scale * factor for factor in BANDWIDTHS])
    return cubic if name == "cubic" else energy


def within(a: Tensor, kernel: Kernel) -> Tensor:
    """Mean similarity of two different rows of [N, D]."""
    gram, count = kernel(a, a), len(a)
    return (gram.sum() - gram.trace()) / (count * (count - 1))


def mmd2(a: Tensor, b: Tensor, kernel: Kernel, within_b: Tensor | None = None) -> Tensor:
    """The unbiased squared discrepancy of [N, D] and [M, D], which may be negative: a scalar.

    `within_b` is `within(b, kernel)`, if that has been computed. Raises `ValueError` for fewer
    than two rows.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"the discrepancy needs 2 samples of each, not {len(a)} and {len(b)}")
    own = within(b, kernel) if within_b is None else within_b
    return within(a, kernel) + own - 2 * kernel(a, b).mean()
