"""Kernel distance of two sets of features, unbiased for any number of images."""

import torch
from torch import Tensor

from patchdiffusion import rng

SUBSETS = 100
SUBSET = 1000


def kernel_distance(
    a: Tensor, b: Tensor, *, subsets: int = SUBSETS, size: int = SUBSET, seed: int = 0
) -> tuple[float, float]:
    """KID (arXiv 1801.01401): the squared maximum mean discrepancy of the kernel (x.y / D + 1)^3.

    a [N, D], b [M, D]. Mean and standard deviation of the unbiased estimate over random subsets of
    `size` from each, drawn by `seed`; sets of at most that size are compared as a whole, once.
    """
    a, b = a.double(), b.double()
    if min(len(a), len(b)) < 2:
        raise ValueError(f"the kernel distance needs 2 images of each, not {len(a)} and {len(b)}")
    if max(len(a), len(b)) <= size:
        return _discrepancy(a, b).item(), 0.0
    estimates = []
    for number in range(subsets):
        rows = (
            torch.from_numpy(rng.permutation(seed, f"kernel {name}", number, len(x))[:size])
            for name, x in (("a", a), ("b", b))
        )
        estimates.append(_discrepancy(*(x[r] for x, r in zip((a, b), rows, strict=True))))
    values = torch.stack(estimates)
    return values.mean().item(), values.std(correction=0).item()


def _discrepancy(a: Tensor, b: Tensor) -> Tensor:
    """The unbiased estimate of equation 4, which compares no sample with itself."""
    between = _kernel(a, b).mean()
    inside = [(_kernel(x, x), len(x)) for x in (a, b)]
    return sum((k.sum() - k.trace()) / (n * (n - 1)) for k, n in inside) - 2 * between


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3
