"""Maps of all images of a pack that control a network, computed once beside its other files.

| file        | content                                                     |
|-------------|-------------------------------------------------------------|
| control.bin | uint8 [N, *S, channels of all maps], image by image         |
| facts.json  | shape, maps, and the fingerprint of the images              |
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.data.columns import ColumnBase, Crops, Filled, Stored, used
from patchdiffusion.data.example import Example
from patchdiffusion.data.feed import conditions
from patchdiffusion.data.frame import Frame
from patchdiffusion.data.latents import Latents
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.whole import WholeImages
from patchdiffusion.encoders.features import over_white
from patchdiffusion.encoders.featurestore import folder_beside, read_beside
from patchdiffusion.nets.adapterbase import AdapterConfig
from patchdiffusion.nets.base import NetworkConfig
from patchdiffusion.nets.controlmaps import ControlMap, ControlMaps, in_color
from patchdiffusion.nets.layers import pad_to_multiple
from patchdiffusion.patches import average_pool
from patchdiffusion.system import families
from patchdiffusion.system.files import folder_atomic, lock, write_json
from patchdiffusion.system.place import place
from patchdiffusion.system.progress import progress_bar
from patchdiffusion.system.serialize import encode

_CHUNK = 256  # images


@dataclass(frozen=True, kw_only=True)
class ControlColumn(ColumnBase):
    """Maps of every pixel, cropped and mirrored with the image; `control_columns` computes them."""

    name: str = "control"
    fills: str | None = "control"
    spatial: ClassVar[bool] = True
    colors: tuple[int, ...] = ()
    """Channels of each map."""

    def value(self, example: Example, frame: Frame) -> Stored | None:
        """None: it is no part of a pack."""

    def take(self, stored: Tensor, crops: Crops) -> Tensor:
        """The part of the maps under each crop."""
        return crops.pixels(stored)

    def seen(self, taken: Tensor, pitch: int) -> Tensor:
        """In [0, 1] and color, averaged over `pitch` pixels: [B, *S, c] -> [B, 3 K, *S]."""
        x = average_pool(taken.movedim(-1, 1).float() / 255, pitch)
        return torch.cat([in_color(part) for part in x.split(self.colors, dim=1)], dim=1)


@dataclass(frozen=True, kw_only=True)
class InstructionColumn(ColumnBase):
    """Instruction that says which of several maps an image uses outside of training."""

    name: str = "instruction"
    fills: str | None = "instruction"

    def value(self, example: Example, frame: Frame) -> Stored | None:
        """None: it is no part of a pack."""


def control_columns(adapter: AdapterConfig, pack: Pack) -> tuple[Filled, ...]:
    """The columns that an adapter needs, computed unless they are there; mostly none.

    Raises `ValueError` for images that have no such maps.
    """
    if not adapter.maps:
        return ()
    _check(adapter.maps, pack)
    colors = tuple(kind.colors for kind in adapter.maps)
    columns = (Filled(ControlColumn(colors=colors), stored(adapter.maps, pack)),)
    if (table := adapter.table) is None:
        return columns
    return (*columns, Filled(InstructionColumn(), table[torch.arange(len(pack)) % len(table)]))


class Reads(Protocol):
    """Settings of a run, or the configuration of a model."""

    @property
    def network(self) -> NetworkConfig: ...
    @property
    def adapter(self) -> AdapterConfig: ...


def read_columns(columns: Iterable[Filled], by: Reads, pack: Pack) -> tuple[Filled, ...]:
    """Those `columns` of a pack that a network reads, and the maps that its adapter needs."""
    return (*used(columns, by.network.reads), *control_columns(by.adapter, pack))


def control_of(adapter: AdapterConfig, pack: Pack, numbers: range) -> Cond:
    """Condition of samples with these numbers: maps of held-out images, if there are any, in turn.

    Empty for an adapter that needs none.
    """
    columns = control_columns(adapter, pack)
    if not columns:
        return Cond()
    images = pack.heldout if len(pack.heldout) else pack.train
    index = images[torch.tensor(numbers) % len(images)]
    return conditions(columns, index, tuple(pack.images.shape[1:-1]))


def _check(maps: Sequence[ControlMaps], pack: Pack) -> None:
    axes = pack.images.ndim - 2
    if axes != 2:
        raise ValueError(f"maps that control are those of images, and {pack.name} has {axes} axes")
    if pack.space.varies:
        raise ValueError(
            f"{pack.name} has several variants of each image, whose maps are not known; prepare "
            f"{pack.space.word} with --variants 1"
        )
    for kind in maps:
        if kind.column and kind.column not in pack.arrays:
            raise ValueError(
                f"the images of {pack.name} have no {kind.column}: write cat.{kind.column}.png "
                f"beside cat.png, and add --data.columns {families.word(type(kind))}"
            )


def stored(maps: Sequence[ControlMaps], pack: Pack) -> Tensor:
    """Maps of all images of a pack: uint8 [N, *S, c], mapped from a file that is written once."""
    shape = (*pack.images.shape[:-1], sum(kind.colors for kind in maps))
    facts = encode(tuple(maps))
    key = json.dumps(facts)
    folder = folder_beside(pack.path, "control", key, pack.fingerprint)
    if (values := read_beside(folder, "control.bin", "|u1", shape)) is not None:
        return values
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder.with_name(f"{folder.name}.lock"), folder, patience=float("inf")):
        values = read_beside(folder, "control.bin", "|u1", shape)
        if values is None:  # nor by the process that was waited for
            with folder_atomic(folder) as temporary:
                _write(maps, pack, temporary)
                about = {"shape": list(shape), "maps": facts, "data": pack.fingerprint}
                write_json(temporary / "facts.json", about)
            values = read_beside(folder, "control.bin", "|u1", shape)
    assert values is not None
    return values


def _write(maps: Sequence[ControlMaps], pack: Pack, folder: Path) -> None:
    words = " ".join(families.word(type(kind)) for kind in maps)
    bar = progress_bar(len(pack), "image", name=words, disable=not place().is_main)
    side = math.prod(pack.pictures.shape[1:-1])
    with bar, open(folder / "control.bin", "wb") as stream:
        for index in torch.arange(len(pack)).split(max(1, min(_CHUNK, 2**22 // side))):
            values = torch.cat([_of_images(kind, pack, index) for kind in maps], dim=1)
            stream.write(as_bytes(values).movedim(1, -1).contiguous().numpy().tobytes())
            bar.update(len(index))


def _of_images(kind: ControlMaps, pack: Pack, index: Tensor) -> Tensor:
    """One map of some images: float32 [B, c, *S]."""
    if kind.column:
        return kind(pack.arrays[kind.column][index].movedim(-1, 1).float())
    factor = pack.space.factor if isinstance(pack.space, Latents) else 1
    return map_of(kind, WholeImages(pack).pictures(index), factor)


def map_of(kind: ControlMap, pictures: Tensor, factor: int = 1) -> Tensor:
    """A map of pictures, uint8 [B, H, W, 1, 3 or 4], whose pixels are `factor` wide: [B, c, *S]."""
    x = over_white(pictures) if pictures.shape[-1] == 4 else pictures
    x = kind(x.movedim(-1, 1).float() / 255)
    return average_pool(pad_to_multiple(x, (factor, factor)), factor)


def as_bytes(values: Tensor) -> Tensor:
    """Values in [0, 1] as uint8."""
    return torch.from_numpy(np.rint(values.numpy() * 255).clip(0, 255).astype(np.uint8))
