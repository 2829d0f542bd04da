"""A data set decoded once: a folder of named arrays, each in one memory-mapped file.

| file         | content                                                                        |
|--------------|--------------------------------------------------------------------------------|
| images.bin   | the array "images" [N, *S, C], row by row, in the type of the space            |
| labels.bin   | the array "labels", little-endian int32 [N], -1 = none; absent without labels  |
| captions.bin | texts one after another in UTF-8; captions_ends.bin, int64 [N], where each ends |
| NAME.bin     | any other column [N, ...]; see `columns`                                       |
| keys.jsonl   | one line per image: ["name", "group" or null]                                  |
| pack.json    | arrays and their checksums, space, classes, statistics, held-out images        |
| report.json, | what was read, what was refused and why                                        |
| report.txt   |                                                                                |
"""

import contextlib
import functools
import hashlib
import warnings
import weakref
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.data.columns import Caption, Filled, Label, Texts
from patchdiffusion.data.example import Example
from patchdiffusion.data.packinfo import (
    CAPTIONS,
    ENDS,
    IMAGES,
    LABELS,
    ArrayInfo,
    PackInfo,
    header,
    read_info,
)
from patchdiffusion.data.space import Space
from patchdiffusion.data.spacebase import PICTURES
from patchdiffusion.system.errors import Stop
from patchdiffusion.system.files import parse_json, read_json, share
from patchdiffusion.system.mapped import DAMAGED, Mapped, watch
from patchdiffusion.system.trust import open_regular

SMALL = 2**25
"""Size in bytes up to which an array is read instead of mapped."""


@dataclass(frozen=True, eq=False)
class Pack:
    """A pack on disk; also a `Source`. Open one with `Pack.open`, make one with `prepare`."""

    path: Path
    info: PackInfo
    arrays: Mapping[str, Tensor]
    """Memory-mapped on the CPU; writing to one crashes the process. See `check_sizes`."""
    labels: Tensor | None
    """int64 [N], -1 = none."""
    train: Tensor
    """int64, indices of the images to train on."""
    heldout: Tensor
    """int64, indices of the images kept for evaluation."""
    mapped: tuple[Mapped, ...] = ()
    """Files of the arrays that are mapped."""

    @classmethod
    def open(cls, path: str | Path) -> "Pack":
        """Map a pack without reading its arrays; `ValueError` unless files are as recorded."""
        path = Path(path)
        info = read_info(path / "pack.json")
        mapped: list[Mapped] = []
        arrays = {
            name: _mapped(path / f"{name}.bin", of, mapped) for name, of in info.arrays.items()
        }
        labels = arrays.get(LABELS)
        if labels is not None:
            if not bool(((labels >= -1) & (labels < len(info.classes))).all()):
                raise ValueError(f"{path}/labels.bin names classes that pack.json does not have")
            labels = labels.to(torch.int64)
        for name, array in arrays.items():
            ends = arrays.get(name + ENDS)
            if ends is not None and not _rises(ends, len(array)):
                raise ValueError(f"{path}/{name}{ENDS}.bin contradicts {name}.bin")
        count = info.shape[0]
        held = torch.zeros(count, dtype=torch.bool)
        held[list(info.heldout)] = True
        index = torch.arange(count)
        pack = cls(path, info, arrays, labels, index[~held], index[held], tuple(mapped))
        info.space.found_in(path)
        release = share(path / "pack.json")
        weakref.finalize(pack, release)  # until then nobody removes it, see `stored`
        return pack

    @property
    def images(self) -> Tensor:
        """[N, *S, C] in the type of the space."""
        return self.arrays[IMAGES]

    @property
    def pictures(self) -> Tensor:
        """The images as values of samples, [N, *S, C]: see `SpaceBase.to_values`."""
        return self.arrays.get(PICTURES, self.images)

    @property
    def channels(self) -> int:
        """Number of channels of a network for these images."""
        return self.space.channels(self.images.shape[-1])

    @property
    def columns(self) -> tuple[Filled, ...]:
        """Columns with the values of all images, labels first if there are any."""
        return tuple(
            Filled(column, self.arrays[column.name] if values is None else values)
            for column in self.info.columns
            for values in (self.labels if column.name == LABELS else None,)
        )

    @functools.cached_property
    def captions(self) -> Sequence[str | None]:
        """Caption of each image, None for an image without one."""
        ends = self.arrays.get(CAPTIONS + ENDS, torch.zeros(len(self), dtype=torch.int64))
        return Texts(self.arrays.get(CAPTIONS, torch.empty(0, dtype=torch.uint8)), ends)

    @property
    def name(self) -> str:
        """Name of the source."""
        return self.info.name

    @property
    def space(self) -> Space:
        """Meaning of the stored values of the images."""
        return self.info.space

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, or () without labels."""
        return self.info.classes

    @property
    def sigma_data(self) -> float:
        """Standard deviation of all values, in the units of the network."""
        return self.info.sigma_data

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content."""
        return self.info.fingerprint

    @property
    def stamp(self) -> str:
        """The fingerprint: a pack made from this pack is reused while the content is the same."""
        return self.info.fingerprint

    @functools.cached_property
    def _held(self) -> frozenset[int]:
        return frozenset(self.info.heldout)

    @functools.cached_property
    def trained_counts(self) -> tuple[int, ...]:
        """Number of training images of each class."""
        if self.labels is None:
            return ()
        labels = self.labels[self.train]
        return tuple(torch.bincount(labels[labels >= 0], minlength=len(self.classes)).tolist())

    @functools.cached_property
    def report(self) -> dict[str, Any]:
        """Report of `prepare`, see `Report.as_json`; empty if it is missing."""
        try:
            report = read_json(self.path / "report.json")
        except (OSError, ValueError):
            return {}
        return report if isinstance(report, dict) else {}

    @functools.cached_property
    def keys(self) -> list[tuple[str, str | None]]:
        """Name and group of each image, read on first use."""
        try:
            with open(self.path / "keys.jsonl", encoding="ascii") as lines:
                keys = [(key, group) for key, group in map(parse_json, lines)]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path}/keys.jsonl is damaged: {error}") from error
        if len(keys) != len(self):
            raise ValueError(f"{self.path}/keys.jsonl has {len(keys)} lines, not {len(self)}")
        return keys

    def some_held_out(self, most: int) -> Tensor:
        """Indices of at most `most` held-out images, evenly spaced: classes follow each other."""
        count = min(most, len(self.heldout))
        return self.heldout[torch.arange(count) * len(self.heldout) // max(count, 1)]

    def __len__(self) -> int:
        return self.info.shape[0]

    def __getitem__(self, index: int) -> Example:
        key, group = self.keys[index]
        label = -1 if self.labels is None else int(self.labels[index])
        image = self.pictures[index].numpy().copy()
        automatic = (Label().name, Caption().name)
        others = [c.column.name for c in self.columns if c.column.name not in automatic]
        columns = {name: self.arrays[name][index].numpy().copy() for name in others}
        caption = self.captions[index]
        self.check_sizes()
        return Example(
            image,
            None if label < 0 else label,
            key,
            group,
            alpha=self.space.alpha,
            held_out=index in self._held if self._held else None,
            mode="pack",
            caption=caption,
            columns=columns,
        )

    def verify(self) -> None:
        """Read all arrays and compare checksums; raises `ValueError` that names the bad block.

        The fingerprint is computed again, too, so that pack.json must agree with it.
        """
        info, content = self.info, hashlib.sha256()
        for name in sorted(info.arrays, key=lambda name: name != IMAGES):  # images first
            of = info.arrays[name]
            with open_regular(self.path / f"{name}.bin") as stream:
                for number, expected in enumerate(of.crc32):
                    block = stream.read(of.block * of.row)
                    content.update(block)
                    if zlib.crc32(block) != expected:
                        first = number * of.block
                        last = min(first + of.block, of.shape[0]) - 1
                        rows = "bytes" if name + ENDS in self.arrays else "images"
                        raise ValueError(
                            f"{self.path}/{name}.bin is damaged: block {number} "
                            f"({rows} {first} to {last}) does not have its recorded checksum"
                        )
        content.update(header(info.space, info.arrays, info.columns, info.classes, info.heldout))
        if content.hexdigest() != info.fingerprint:
            raise ValueError(f"{self.path} is damaged: it does not have its recorded fingerprint")

    def check_sizes(self) -> None:
        """Raise `Stop` if a file was cut short: what was read of its end since may be zeros.

        Call it after images are read, before anything is made of them that stays.
        """
        for mapped in self.mapped:
            mapped.check()
        for name, of in self.info.arrays.items():
            file = self.path / f"{name}.bin"
            with contextlib.suppress(OSError):  # of a file that is deleted nothing is lost
                if file.stat().st_size < of.bytes:
                    raise Stop(f"{file} was cut short; prepare the data again", code=DAMAGED)


def _mapped(file: Path, of: ArrayInfo, mapped: list[Mapped]) -> Tensor:
    """Memory-map an array, or read a small one; `ValueError` if its size is not as recorded.

    A mapped file is appended to `mapped`.
    """
    size = of.bytes
    actual = file.stat().st_size if file.is_file() else None
    if actual != size:
        problem = "is missing" if actual is None else f"has {actual} bytes"
        raise ValueError(f"{file} {problem}; {size} bytes are recorded in pack.json")
    dtype = np.dtype(of.dtype).newbyteorder("<")
    if size <= SMALL:
        return torch.from_numpy(np.fromfile(file, dtype).reshape(of.shape))
    array = np.memmap(file, dtype, "r", shape=of.shape)
    mapped.append(watch(array, file))
    with warnings.catch_warnings():
        # Read-only on purpose: a private writable mapping would count as memory in full.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _rises(ends: Tensor, length: int) -> bool:
    """True if `ends` divide `length` bytes into consecutive entries."""
    starts = torch.cat([torch.zeros(1, dtype=ends.dtype), ends[:-1]])
    return bool((starts <= ends).all()) and int(ends[-1]) == length
