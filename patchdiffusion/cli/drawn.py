"""The folder of samples: written batch by batch, locked, and marked until it is complete."""

import contextlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from patchdiffusion.data.source import SAMPLES, UNFINISHED
from patchdiffusion.data.space import Pixels, Space, shown
from patchdiffusion.system.files import check_place, lock, read_json, write_atomic, write_json
from patchdiffusion.system.files import write_bytes as write
from patchdiffusion.system.png import grid, image_file, npy, save_png

_PARTS = ".parts"
_LOCK = "lock"
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
        exact = self.space.word == Pixels.word and len(self.shape) == 3 and not self.preview
        return not exact or not (self.singles or self.shown == self.count)

    def missing(self) -> list[int]:
        """Numbers of the images that are not written yet."""
        written: set[int] = set()
        for first, stop, _ in self._parts():
            written.update(range(first, stop))
        if not self.array:
            names = {file.name for file in self.folder.glob("seed-*.png")}
            rest = range(self.shown, self.count)
            written.update(i for i in rest if f"{self._name(i)}.png" in names)
        return [i for i in range(self.count) if i not in written]

    def add(self, first: int, images: np.ndarray, classes: Sequence[str]) -> None:
        """Write a batch of images [N, *S, C] with the names of their classes, if there are any."""
        singles = self.space.to_picture(images) if self.preview else images
        for i, image in enumerate(singles if self.singles else ()):
            facts = {**self.texts, "seed": str(self.seed + first + i)}
            if self.preview:
                facts["channels"] = self.preview
            if classes:
                facts["class"] = classes[i]
            if (file := image_file(image, facts)) is not None:
                write(self.folder / f"{self._name(first + i)}{file.suffix}", file.content)
        if self.array or first < self.shown:
            write(self.folder / _PARTS / f"{first}-{first + len(images)}.npy", npy(images))

    def finish(self) -> None:
        """Write the grid and the array of all images, and delete the mark."""
        seeds = {"seeds": f"{self.seed}-{self.seed + self.count - 1}"}
        parts = list(self._parts())
        first = [np.load(file) for begin, _, file in parts if begin < self.shown]
        images = np.concatenate(first)[: self.shown]
        save_png(
            self.folder / "grid.png", grid(self.space.to_picture(images)), {**self.texts, **seeds}
        )
        if self.array:
            write_atomic(self.folder / SAMPLES, lambda path: self._collect(path, parts))
            write_json(self.folder / "samples.json", {**self.texts, **seeds})
        (self.folder / UNFINISHED).unlink()
        shutil.rmtree(self.folder / _PARTS, ignore_errors=True)

    def _name(self, number: int) -> str:
        return f"seed-{self.seed + number:08d}"

    def _parts(self) -> list[tuple[int, int, Path]]:
        """First image, end and file of each part, in order."""
        parts = []
        for file in (self.folder / _PARTS).glob("*.npy"):
            if match := re.fullmatch(r"(\d+)-(\d+)\.npy", file.name):
                parts.append((int(match[1]), int(match[2]), file))
        return sorted(parts)

    def _collect(self, path: Path, parts: Sequence[tuple[int, int, Path]]) -> None:
        """Write an .npy file of all parts, one after the other."""
        dtype = np.load(parts[0][2], mmap_mode="r").dtype
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
        with path.open("wb") as stream:
            shape = (self.count, *self.shape)
            np.lib.format.write_array_header_1_0(stream, {**header, "shape": shape})
            for _, _, file in parts:
                stream.write(np.ascontiguousarray(np.load(file)).tobytes())


def batches(numbers: Sequence[int], size: int) -> list[range]:
    """Ranges of consecutive numbers, of at most `size` each."""
    runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ranges = []
    for _, run in runs:
        run = [number for _, number in run]
        ranges += [range(a, min(a + size, run[-1] + 1)) for a in range(run[0], run[-1] + 1, size)]
    return ranges


def check_out(out: Path | None) -> None:
    """Raise `ValueError` or `OSError` for a folder that cannot be created, or holds other files.

    Nothing is written.
    """
    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise ValueError(
            f"{out} exists and is no folder; nothing is overwritten, use another --out"
        )
    if out.exists() and not (out / UNFINISHED).is_file() and _others(out):
        raise ValueError(
            f"{out} exists and is not empty; nothing is overwritten, use another --out"
        )
    check_place(out)


def check_space(folder: Path, needed: int) -> None:
    """Raise `ValueError` unless a disk has `needed` bytes free; the folder need not exist."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if needed > (free := shutil.disk_usage(existing).free):
        raise ValueError(
            f"the images need about {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free in "
            f"{existing}; use a smaller --count, or another --out"
        )


@contextlib.contextmanager
def claimed(root: Path, out: Path | None, request: Mapping[str, Any]) -> Iterator[Path]:
    """Context of a locked folder for the images of a request: `out`, or a new one in `root`.

    An unfinished folder of the same request is used again. Raises `ValueError` if `out` holds
    anything else, or if another process writes there.
    """
    with contextlib.ExitStack() as held:
        is_new, folder = False, _unfinished(root, request, held) if out is None else None
        if folder is None:
            folder = _new(root) if out is None else out
            is_new = out is None or not out.exists()
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock(folder / _LOCK, folder))
        _check_request(folder, request)
        if not (folder / UNFINISHED).exists():
            write_json(folder / UNFINISHED, dict(request))
        try:
            yield folder
        finally:
            if (folder / UNFINISHED).exists() and _is_bare(folder):
                (folder / UNFINISHED).unlink()
                shutil.rmtree(folder / _PARTS, ignore_errors=True)
                if is_new:
                    shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):  # unless it holds others
                    root.rmdir()


def _others(folder: Path) -> list[str]:
    """Names in a folder other than those that a killed process may leave."""
    leftovers = (_LOCK, f".{UNFINISHED}.")
    return [file.name for file in folder.iterdir() if not file.name.startswith(leftovers)]


def _is_bare(folder: Path) -> bool:
    """Whether no image has been written."""
    return set(_others(folder)) <= {UNFINISHED, _PARTS} and not any(folder.glob(f"{_PARTS}/*.npy"))


def _unfinished(root: Path, request: Mapping[str, Any], held: contextlib.ExitStack) -> Path | None:
    """Unfinished folder of the same request in `root` that no other process holds, or None."""
    for mark in sorted(root.glob(f"*/{UNFINISHED}")):
        folder = mark.parent
        with contextlib.suppress(OSError, ValueError):
            if not _differences(folder, request):
                held.enter_context(lock(folder / _LOCK, folder))
                if mark.exists():
                    return folder
    return None


def _new(root: Path) -> Path:
    """Create the first of root/0001, 0002, ... that does not exist."""
    root.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            (root / f"{number:04d}").mkdir()
            return root / f"{number:04d}"
    raise AssertionError("unreachable")


def _check_request(folder: Path, request: Mapping[str, Any]) -> None:
    if (folder / UNFINISHED).exists():
        if changed := _differences(folder, request):
            raise ValueError(
                f"{folder} holds unfinished samples of another command ({'; '.join(changed)}); "
                "repeat that command to resume it, or use another --out"
            )
    elif _others(folder):
        raise ValueError(
            f"{folder} exists and is not empty; nothing is overwritten, use another --out"
        )


def _differences(folder: Path, request: Mapping[str, Any]) -> list[str]:
    stored, current = read_json(folder / UNFINISHED), json.loads(json.dumps(dict(request)))
    stored = stored if isinstance(stored, dict) else {}
    names = [name for name in current | stored if stored.get(name) != current.get(name)]
    return [f"{name}: {stored.get(name)} -> {current.get(name)}" for name in names]
