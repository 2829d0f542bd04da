"""The images of `sample` as files: written batch by batch, a grid and an array at the end."""

import itertools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patchdiffusion.cli.claimed import PARTS
from patchdiffusion.data.source import SAMPLES, UNFINISHED
from patchdiffusion.data.space import Pixels, Space, shown
from patchdiffusion.system.files import write_atomic, write_json
from patchdiffusion.system.files import write_bytes as write
from patchdiffusion.system.parts import Parts
from patchdiffusion.system.png import grid, image_file, save_png

_GRID = 1024
"""Largest number of images in a grid."""
_GRID_PIXELS = 2**26


@dataclass(frozen=True)
class Drawn:
    """Samples 0 ... count - 1 of a command as files of a folder.

    Each batch is written when it is drawn: a file per image and then, where grid or array need it,
    a part in a hidden folder. The file `UNFINISHED` is in the folder until everything is written.
    """

    folder: Path
    count: int
    seed: int
    texts: Mapping[str, str]
    """Text entries of all files: model and sampler."""
    singles: bool
    """True if there is a file for each image."""
    shape: tuple[int, ...]
    """Shape of an image: [*S, C]."""
    space: Space
    """Meaning of the values of the images."""
    prompts: Sequence[str] = ()
    """Texts, which images have in turn."""

    @property
    def channels(self) -> int:
        """Number of channels that pictures show."""
        return shown(self.shape[-1], alpha=self.space.alpha)

    @property
    def preview(self) -> str:
        """Text about the channels that pictures show, "" if these are all."""
        count, channels = self.channels, self.shape[-1]
        return "" if count == channels else f"the first {count} of {channels}; all in {SAMPLES}"

    @property
    def shown(self) -> int:
        """Number of images in the grid."""
        height, width = self.shape[0], math.prod(self.shape[1:-1])
        return min(self.count, _GRID, max(1, _GRID_PIXELS // (height * width)))

    @property
    def array(self) -> bool:
        """True if all images are stored as one array, as single files cannot hold them exactly."""
        exact = (
            self.space.pictured.word == Pixels.word and len(self.shape) == 3 and not self.preview
        )
        return not exact or not (self.singles or self.shown == self.count)

    def missing(self) -> list[int]:
        """Numbers of the images that are not written yet; damaged parts are deleted."""
        written: set[int] = set()
        for numbers, file in self._parts.written():
            if self._parts.read(numbers) is None:
                file.unlink()
            else:
                written.update(numbers)
        if not self.array:
            names = {file.name for file in self.folder.glob("seed-*.png")}
            rest = range(self.shown, self.count)
            written.update(i for i in rest if f"{self._name(i)}.png" in names)
        return [i for i in range(self.count) if i not in written]

    def prompts_of(self, numbers: range) -> list[str] | None:
        """Texts of the images with these numbers; None if there are none."""
        count = len(self.prompts)
        return [self.prompts[i % count] for i in numbers] if count else None

    def add(self, first: int, images: np.ndarray, classes: Sequence[str]) -> None:
        """Write a batch of images [N, *S, C] with the names of their classes, if there are any."""
        singles = self.space.to_picture(images) if self.preview else images
        prompts = self.prompts_of(range(first, first + len(images)))
        for i, image in enumerate(singles if self.singles else ()):
            facts = {**self.texts, "seed": str(self.seed + first + i)}
            if self.preview:
                facts["channels"] = self.preview
            if classes:
                facts["class"] = classes[i]
            if prompts:
                facts["prompt"] = prompts[i]
            if (file := image_file(image, facts)) is not None:
                write(self.folder / f"{self._name(first + i)}{file.suffix}", file.content)
        if self.array or first < self.shown:
            self._parts.write(range(first, first + len(images)), images)

    def finish(self) -> None:
        """Write the grid and the array of all images, and delete the mark."""
        seeds = {"seeds": f"{self.seed}-{self.seed + self.count - 1}"}
        if self.prompts:
            seeds["prompts"] = json.dumps(list(self.prompts), ensure_ascii=False)
        parts = self._parts.written()
        files = [file for _, file in parts]
        first = [np.load(file) for numbers, file in parts if numbers.start < self.shown]
        images = np.concatenate(first)[: self.shown]
        save_png(
            self.folder / "grid.png", grid(self.space.to_picture(images)), {**self.texts, **seeds}
        )
        if self.array:
            write_atomic(self.folder / SAMPLES, lambda path: self._collect(path, files))
            write_json(self.folder / "samples.json", {**self.texts, **seeds})
        (self.folder / UNFINISHED).unlink()
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)

    def _name(self, number: int) -> str:
        return f"seed-{self.seed + number:08d}"

    @property
    def _parts(self) -> Parts:
        return Parts(self.folder / PARTS)

    def _collect(self, path: Path, files: Sequence[Path]) -> None:
        """Write an .npy file of all parts, one after the other."""
        dtype = np.load(files[0], mmap_mode="r").dtype
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
        with path.open("wb") as stream:
            shape = (self.count, *self.shape)
            np.lib.format.write_array_header_1_0(stream, {**header, "shape": shape})
            for file in files:
                stream.write(np.ascontiguousarray(np.load(file)).tobytes())


def batches(numbers: Sequence[int], size: int) -> list[range]:
    """Ranges of consecutive numbers, of at most `size` each."""
    runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ranges = []
    for _, run in runs:
        run = [number for _, number in run]
        ranges += [range(a, min(a + size, run[-1] + 1)) for a in range(run[0], run[-1] + 1, size)]
    return ranges


def check_space(folder: Path, needed: int) -> None:
    """Raise `ValueError` unless a disk has `needed` bytes free; the folder need not exist."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if needed > (free := shutil.disk_usage(existing).free):
        raise ValueError(
            f"the images need about {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free in "
            f"{existing}; use a smaller --count, or another --out"
        )
