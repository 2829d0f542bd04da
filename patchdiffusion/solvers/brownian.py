"""Noise of a Brownian path, so that a stochastic solver has the same limit for all grids."""

import math

import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.solvers.core import Noise

LOW, HIGH = 1e-4, 1e4  # range of the path in sigma, whatever the grid
DEPTH = 20  # halvings of that range; the path is linear between them


def brownian(
    key: Tensor, shape: tuple[int, ...], sigmas: Tensor, dtype: torch.dtype = torch.float32
) -> Noise:
    """Normalized increments of a path in ln sigma for each key [B]: step index -> [B, *shape].

    Runs with different numbers of steps then approximate the same image. The level 0 counts as
    1e-4; raises `ValueError` for levels above 1e4 or not above 1e-4.
    """
    outside = sigmas[(sigmas > HIGH) | ((sigmas <= LOW) & (sigmas != 0))]
    if len(outside):
        raise ValueError(
            f"a Brownian path runs from sigma {HIGH:g} to {LOW:g} and 0, not to {outside[0]:g}"
        )
    times = ((sigmas.clamp(min=LOW) / LOW).log() / math.log(HIGH / LOW)).tolist()

    def noise(i: int) -> Tensor:
        above, below = (_path(key, shape, t, dtype) for t in times[i : i + 2])
        return (above - below) / math.sqrt(times[i] - times[i + 1])

    return noise


def _path(key: Tensor, shape: tuple[int, ...], t: float, dtype: torch.dtype) -> Tensor:
    """W(t), t in [0, 1], as a sum of tents half as wide at each level (Levy, Ciesielski)."""
    w = t * rng.normal(rng.subkeys(key, "brownian"), shape, dtype)
    for level in range(DEPTH):
        cell, inside = divmod(t * 2**level, 1)
        height = (1 - abs(2 * inside - 1)) / 2 ** (level / 2 + 1)
        w += height * rng.normal(rng.subkeys(key, f"brownian {level} {cell:.0f}"), shape, dtype)
    return w
