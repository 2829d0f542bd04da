"""The sliced distance of two sets of features: optimal transport along random directions."""

import torch
from torch import Tensor

from patchdiffusion import rng

PROJECTIONS = 1000
_CHUNK = 100  # directions at a time: 16 MiB of projections of 10,000 images each


def sliced_distance(
    a: Tensor, b: Tensor, *, projections: int = PROJECTIONS, seed: int = 0
) -> tuple[float, float]:
    """MIND (Berthet et al., arXiv 2605.06797): 3 D times the squared Wasserstein distance.

    The mean of W_2^2 of u.a and u.b over random unit vectors u, which is that of sorted values. Of
    features [N, D] and [M, D] the first min(N, M) of each are compared, at least 2. Also returns
    the standard error of the mean over directions. Larger for fewer images, as nothing is
    subtracted for those that are missing.
    """
    count, dims = min(len(a), len(b)), a.shape[1]
    if count < 2:
        raise ValueError(f"the sliced distance needs 2 images of each, not {len(a)} and {len(b)}")
    if projections < 2:
        raise ValueError(f"the sliced distance needs at least 2 projections, not {projections}")
    a, b = a[:count].double(), b[:count].double()
    squares = []
    for numbers in torch.arange(projections).split(_CHUNK):
        directions = rng.normal(rng.keys(seed, "sliced distance", 0, numbers), (dims,)).double()
        directions = directions / directions.norm(dim=1, keepdim=True)
        gaps = (a @ directions.T).sort(dim=0).values - (b @ directions.T).sort(dim=0).values
        squares.append(gaps.square().mean(0))
    values = 3 * dims * torch.cat(squares)
    return values.mean().item(), values.std().item() / projections**0.5
