"""Activations of networks as maps of features, and their places in an image.

Shapes: B batch, D features, T tokens, n spatial axes, *S lengths of an image, *G those of a map.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets.base import Network
from patchdiffusion.patches import Size, size_name


@dataclass(frozen=True)
class TapMap:
    """An activation with features of every place of an image."""

    name: str
    features: int
    grid: Size
    """Places along each axis."""
    cell: tuple[float, ...]
    """Pixels of a place along each axis."""

    def places(self, size: Size) -> int:
        """Number of places of a crop of a size."""
        return math.prod(math.ceil(side / c) for side, c in zip(size, self.cell, strict=True))


def _grids(size: Size, tokens: Size) -> Iterator[tuple[Size, Size]]:
    """Grids of an image from the finest, of pixels or tokens, to a single place, and their cells.

    Each has half the resolution of the one before, rounded up.
    """
    cell = tokens or (1,) * len(size)
    grid = tuple(-(-side // c) for side, c in zip(size, cell, strict=True))
    yield grid, cell
    while max(grid) > 1:
        grid, cell = tuple(-(-g // 2) for g in grid), tuple(2 * c for c in cell)
        yield grid, cell


def as_map(h: Tensor, size: Size, tokens: Size = ()) -> Tensor:
    """An activation, [B, D, *G] or tokens [B, T, D], as a map [B, D, *G].

    `size` is that of the image, `tokens` the sides of the patches that become tokens. Raises
    `ValueError` if it has no features of every place.
    """
    if h.ndim == 3 and (tokens or len(size) > 1):
        for grid, _ in _grids(size, tokens):
            if math.prod(grid) == h.shape[1]:
                return h.mT.unflatten(-1, grid)
    elif h.ndim == 2 + len(size):
        return h
    raise ValueError(
        f"activations of the shape {list(h.shape)} are no map of features of images of "
        f"{size_name(size)}"
    )


def cell_of(size: Size, grid: Size, tokens: Size = ()) -> tuple[float, ...]:
    """Pixels of a place of a map along each axis; the last place may be beyond the image."""
    for base in (tokens, ()):
        for other, cell in _grids(size, base):
            if other == grid:
                return tuple(float(c) for c in cell)
    return tuple(side / g for side, g in zip(size, grid, strict=True))


def tap_maps(build: Callable[[], Network], size: Size) -> dict[str, TapMap]:
    """The taps of a network that are maps of an image of a size, by name; nothing is computed.

    Tokens that skip a block in training are not there, so the taps of such blocks are left out.
    `build` makes the network.
    """
    with torch.device("meta"):
        network = build()
        config = network.config
        x, noise = torch.empty(1, config.channels, *size), torch.empty(1)
        seed = torch.empty(1, dtype=torch.int64)
    passes: list[Mapping[str, Tensor]] = []
    for cond in (Cond(), Cond(seed=seed)):
        tape = Tape(wants=network.taps)
        network(x, noise, cond, tape=tape)
        passes.append(tape.activations)
    maps = {}
    for name in network.taps:
        always, trained = (each.get(name) for each in passes)
        if always is None or trained is None or always.shape != trained.shape:
            continue
        try:
            h = as_map(always, size, config.token_size)
        except ValueError:
            continue
        grid = tuple(h.shape[2:])
        maps[name] = TapMap(name, h.shape[1], grid, cell_of(size, grid, config.token_size))
    return maps


# ---- Which of them ----


def coarsens(maps: Mapping[str, TapMap]) -> bool:
    """True if some taps have a lower resolution than others."""
    return len({tap.cell for tap in maps.values()}) > 1


def middle(maps: Mapping[str, TapMap]) -> str:
    """The tap in the middle of those of lowest resolution (U-REPA, arXiv 2503.18414)."""
    coarsest = max(tap.cell for tap in maps.values())
    names = [name for name, tap in maps.items() if tap.cell == coarsest]
    return names[(len(names) - 1) // 2]


def at_depth(names: Sequence[str], maps: Mapping[str, TapMap], share: float) -> str:
    """The tap at a share of the depth of a network of one resolution, or the nearest before it.

    `names` are all taps; the stem does not count as a block.
    """
    blocks = [name for name in names if name != "stem"]
    place = max(1, round(share * len(blocks))) - 1
    before = [name for name in blocks[: place + 1] if name in maps]
    after = [name for name in blocks if name in maps]
    return (before or after[:1] or list(maps)[:1])[-1]


def halfway(names: Sequence[str], maps: Mapping[str, TapMap]) -> str:
    """The tap in the middle of a network, with down-sampling or without; `names` are all taps."""
    return middle(maps) if coarsens(maps) else at_depth(names, maps, 1 / 2)


def chosen(
    names: Sequence[str], maps: Mapping[str, TapMap], tap: str, default: Callable[[], str]
) -> TapMap:
    """The tap of a name, or the default if that is empty; `names` are all taps.

    Raises `ValueError` for a network that has no such tap.
    """
    if not maps:
        raise ValueError(
            "the network has no taps that are maps of features; use one such as --network dit, "
            "unet, adm or edm2"
        )
    tap = tap or default()
    if tap in maps:
        return maps[tap]
    wrong = "has only some of the tokens in training" if tap in names else "is none of the network"
    raise ValueError(f"the tap {tap} {wrong}; allowed are {', '.join(maps)}")
