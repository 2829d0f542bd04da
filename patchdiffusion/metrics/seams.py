"""Seams of images that were made in tiles: steps between pixels, across borders and elsewhere."""

from collections.abc import Collection

import torch
from torch import Tensor


def seam_ratio(images: Tensor, borders: Collection[int], axis: int = -1) -> float:
    """Mean absolute difference of neighbors across the borders, relative to that inside of tiles.

    images [N, C, *S]; a border b lies between pixels b - 1 and b of a spatial axis. 1 is no seam.
    Raises `ValueError` for a border outside of the image, and if there are none, or only borders.
    """
    side = images.shape[axis]
    if wrong := [b for b in borders if not 0 < b < side]:
        raise ValueError(f"a border must lie in [1, {side - 1}], not at {wrong[0]}")
    steps = images.to(torch.float64).diff(dim=axis).abs().movedim(axis, 0).flatten(1).mean(1)
    at_border = torch.zeros(side - 1, dtype=torch.bool)
    at_border[[b - 1 for b in borders]] = True
    if at_border.all() or not at_border.any():
        raise ValueError(f"{side} pixels need at least one border and one step inside, not both")
    at_border = at_border.to(images.device)
    return float(steps[at_border].mean() / steps[~at_border].mean())
