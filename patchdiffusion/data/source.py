"""Open a `Source` from a path, or a built-in data set from its name."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from patchdiffusion.data.arrays import array_source
from patchdiffusion.data.example import BadImage, Example, Source, examples_of
from patchdiffusion.data.files import FileSource, folder_source, zip_source
from patchdiffusion.data.glyphs import Glyphs
from patchdiffusion.data.junk import is_run
from patchdiffusion.data.labels import LabelSource
from patchdiffusion.data.moving import MovingGlyphs
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.tables import JSON_LINES
from patchdiffusion.system.files import expanded

__all__ = ["BadImage", "Example", "Source", "is_run", "is_there", "open_source", "whole"]

SAMPLES = "samples.npy"
"""Array that `patchdiffusion sample` writes beside pictures that cannot hold its exact values."""

UNFINISHED = "unfinished.json"
"""File in a folder that `patchdiffusion sample` has not completed."""

BUILT_IN: dict[str, Callable[[], Source]] = {c.name: c for c in (Glyphs, MovingGlyphs)}
"""Data sets that need no files, by name."""

_ALLOWED = f"allowed are a folder, a pack, a .zip, .npy or .npz file, or {' or '.join(BUILT_IN)}"


@dataclass(frozen=True)
class Unlabeled:
    """A data set without its labels."""

    source: Source

    @property
    def classes(self) -> tuple[str, ...]:
        """No classes."""
        return ()

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self.source.name

    @property
    def stamp(self) -> str:
        """Text that changes when the data change."""
        stamp = getattr(self.source, "stamp", "")
        return f"{stamp} without labels" if stamp else ""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Example:
        return replace(self.source[index], label=None)

    def examples(self, index: int) -> Iterator[Example | BadImage]:
        """All images of an entry."""
        for found in examples_of(self.source, index):
            yield found if isinstance(found, BadImage) else replace(found, label=None)


def is_there(spec: str) -> bool:
    """True if a path exists, or names a built-in data set."""
    return spec in BUILT_IN or expanded(spec).exists()


def whole(spec: str) -> str:
    """Absolute path of data, which can be opened from any folder; other names unchanged."""
    path = expanded(spec)
    built_in = spec in BUILT_IN and (not path.exists() or is_run(path))
    return str(path.resolve()) if spec and path.exists() and not built_in else spec


def open_source(spec: str | Path, labels: LabelSource = "auto") -> Source:
    """Open the data set at a path, or else the built-in one of that name.

    `labels` are those of `DataConfig`. Raises `ValueError`, in one line, for anything else and for
    data that cannot be read.
    """
    source = _opened(spec, labels)
    is_done = isinstance(source, FileSource) or not source.classes
    return Unlabeled(source) if labels == "off" and not is_done else source


def _opened(spec: str | Path, labels: LabelSource) -> Source:
    path = expanded(spec)
    run = is_run(path)
    if run and str(spec) not in BUILT_IN:
        raise ValueError(f"{spec} is the folder of a run, not of images; {_ALLOWED}")
    if (path / UNFINISHED).is_file():
        raise ValueError(
            f"{spec} holds unfinished samples; repeat their command with --out {spec} to finish "
            f"them, or delete {UNFINISHED} to use those that exist"
        )
    if path.is_dir() and not run:
        if (path / "pack.json").is_file() and (path / "images.bin").is_file():
            return Pack.open(path)
        samples = path / SAMPLES
        is_made = samples.is_file() and samples.with_suffix(".json").is_file()
        return array_source(samples) if is_made else folder_source(path, labels)
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix == ".zip":
            return zip_source(path, labels)
        if suffix in (".npy", ".npz"):
            return array_source(path)
        if suffix in (".json", ".csv", ".tsv", *JSON_LINES):
            raise ValueError(
                f"{path} is a table, not images; give the folder of the images, where it is read"
            )
        raise ValueError(f"{path} is a file of another kind; {_ALLOWED}")
    if str(spec) in BUILT_IN:
        return BUILT_IN[str(spec)]()
    raise ValueError(f"{str(spec)!r} does not exist; {_ALLOWED}")
