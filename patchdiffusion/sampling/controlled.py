"""Conditions of samples that are controlled by pictures of a user: their maps, or maps as such."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.data.controls import map_of
from patchdiffusion.data.latents import Latents
from patchdiffusion.data.space import Pixels
from patchdiffusion.model import Model
from patchdiffusion.nets.base import Network
from patchdiffusion.nets.controlbranch import ControlBranch
from patchdiffusion.nets.controlmaps import COLORS, ControlMap, in_color
from patchdiffusion.nets.layers import pad_to_multiple
from patchdiffusion.patches import Size, average_pool, size_name
from patchdiffusion.sampling.pictures import read_picture
from patchdiffusion.system import families

Picture = str | np.ndarray
"""A file, or pixels uint8 [H, W, 1 or 3]."""


def branches(network: Network) -> list[ControlBranch]:
    """The branches that control a network; `ValueError` without any."""
    found = [branch for branch, _ in network.controls]
    if not found:
        raise ValueError(
            "the model has no branch that pictures control: name one by --control RUN, trained by "
            "patchdiffusion adapt RUN DATA --adapter control"
        )
    return found


def controlled(
    model: Model,
    count: int,
    size: Size,
    *,
    images: Sequence[Picture] = (),
    maps: Sequence[Picture] = (),
    condition: str = "",
    instruction: str = "",
) -> Cond:
    """Condition of `count` samples of a size by pictures in turn, of which branches see their maps.

    `images` are cropped and resized to the size of the samples, and the maps of them computed;
    `maps` are used as they are, one for each branch, and must have that size. A branch of several
    maps is told by `condition` which one it is, by default its first; `instruction` says it in
    other words. Raises `ValueError` for pictures that do not fit.
    """
    network = model.network
    if bool(images) == bool(maps):
        raise ValueError("give pictures or their maps, and not both: --image FILE or --map FILE")
    factor = model.config.space.factor if isinstance(model.config.space, Latents) else 1
    pixels = _pixels(model, size)
    control = branches(network)
    if maps:
        if len(maps) % len(control):
            raise ValueError(
                f"there are {len(control)} branches, and {len(maps)} maps; give one for each branch"
            )
        each = [_ready(picture, pixels, factor) for picture in maps]
        groups = [each[i : i + len(control)] for i in range(0, len(each), len(control))]
    else:
        kinds = [branch.kind_of(condition) for branch in control]
        groups = [[_mapped(picture, kind, pixels, factor) for kind in kinds] for picture in images]
    rows = torch.stack([torch.cat(group) for group in groups])
    cond = Cond(control=rows[torch.arange(count) % len(rows)])
    return control[0].instructed(cond, condition, instruction)


def _pixels(model: Model, size: Size) -> Size:
    """Height and width of pictures of samples of a size."""
    return tuple(model.config.space.shape_of(size, model.config.network.channels))[:-1]


def _read(picture: Picture, size: Size, *, exact: bool) -> Tensor:
    """Pixels uint8 [1, H, W, 3] of a size."""
    if isinstance(picture, str):
        values = read_picture(picture, Pixels(), COLORS, size, exact=exact)
    else:
        values = np.asarray(picture)
        fits = values.dtype == np.uint8 and values.ndim == 3 and values.shape[2] in (1, COLORS)
        if not fits or values.shape[:2] != size:
            raise ValueError(
                f"a picture must be uint8 {[*size, COLORS]} or of one channel, not {values.dtype} "
                f"{list(values.shape)}"
            )
    return torch.from_numpy(np.ascontiguousarray(values))[None]


def _mapped(picture: Picture, kind: ControlMap, size: Size, factor: int) -> Tensor:
    """The map of a picture: [3, *S]."""
    if kind.column:
        word = families.word(type(kind))
        raise ValueError(
            f"{kind.column} is not computed of pictures: give that of a picture by --map "
            f"{word}.png, {size_name(size)}"
        )
    return in_color(map_of(kind, _read(picture, size, exact=False), factor))[0]


def _ready(picture: Picture, size: Size, factor: int) -> Tensor:
    """A picture that is a map itself: [3, *S]."""
    x = _read(picture, size, exact=True).movedim(-1, 1).float() / 255
    return average_pool(pad_to_multiple(in_color(x), (factor, factor)), factor)[0]
