"""Open a `Source` from a path, or a built-in data set from its name."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from patchdiffusion.data import shards
from patchdiffusion.data.arrays import array_source
from patchdiffusion.data.decode import EXTENSIONS
from patchdiffusion.data.example import BadImage, Example, Source, examples_of
from patchdiffusion.data.files import FileSource, folder_source, zip_source
from patchdiffusion.data.glyphs import Glyphs
from patchdiffusion.data.junk import is_run
from patchdiffusion.data.labels import LabelSource
from patchdiffusion.data.listing import SHARDS, list_folder
from patchdiffusion.data.moving import MovingGlyphs
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.shards import expanded_pattern, is_pattern
from patchdiffusion.data.tables import JSON_LINES
from patchdiffusion.data.tabular import TableSource
from patchdiffusion.system.files import expanded
from patchdiffusion.system.hub import hub_name, snapshot

__all__ = ["BadImage", "Example", "Source", "is_run", "is_there", "open_source", "whole"]

SAMPLES = "samples.npy"
"""Array that `patchdiffusion sample` writes beside pictures that cannot hold its exact values."""

UNFINISHED = "unfinished.json"
"""File in a folder that `patchdiffusion sample` has not completed."""

BUILT_IN: dict[str, Callable[[], Source]] = {c.name: c for c in (Glyphs, MovingGlyphs)}
"""Data sets that need no files, by name."""

_ALLOWED = (
    f"allowed are a folder, a pack, a {', '.join(('.zip', '.npy', '.npz', *SHARDS))} file, "
    f"user/name on the hub, or {' or '.join(BUILT_IN)}"
)


_ON_HUB = (*SHARDS, *sorted(EXTENSIONS), ".txt", ".csv", ".tsv", ".json", *JSON_LINES)
"""Extensions of the files of a data set on the hub that are fetched."""


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
    """True if a path exists, a pattern stands for files, or a data set may have that name.

    It is that of a built-in one, or of the form of those on the hub.
    """
    if is_pattern(spec):
        with contextlib.suppress(ValueError):
            return bool(expanded_pattern(spec))
    return spec in BUILT_IN or expanded(spec).exists() or hub_name(spec) is not None


def name_of(spec: str) -> str:
    """Short name of data that lie on the hub, or that a pattern stands for."""
    if name := hub_name(spec):
        return name.short
    return shards.common_name(expanded_pattern(spec)) if is_pattern(spec) else spec


def whole(spec: str) -> str:
    """Absolute path of data, which can be opened from any folder; other names unchanged."""
    path = expanded(spec)
    if is_pattern(spec):
        return os.path.abspath(path)
    built_in = spec in BUILT_IN and (not path.exists() or is_run(path))
    return str(path.resolve()) if spec and path.exists() and not built_in else spec


def open_source(
    spec: str | Path, labels: LabelSource = "auto", fields: Sequence[str] = ()
) -> Source:
    """Open the data set at a path, or else the built-in one of that name.

    `labels` and `fields` are those of `DataConfig`. Raises `ValueError`, in one line, for anything
    else and for data that cannot be read.
    """
    named = _pairs(fields)
    source = _opened(spec, labels, named)
    if named and not isinstance(source, TableSource):
        raise ValueError(f"fields names columns of tables, and {spec} is none; leave it out")
    is_done = isinstance(source, FileSource) or not source.classes
    return Unlabeled(source) if labels == "off" and not is_done else source


def _pairs(fields: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in fields]
    if wrong := [text for text, (_, _, name) in zip(fields, pairs, strict=True) if not name]:
        raise ValueError(f"fields has {wrong[0]!r}; allowed are image=NAME, label=, caption=")
    return {part: name for part, _, name in pairs}


def _of_folder(
    path: Path, labels: LabelSource, fields: Mapping[str, str]
) -> FileSource | TableSource:
    listing = list_folder(path)
    if listing.shards and not listing.images:
        return shards.of_folder(path, listing, labels, fields)
    return folder_source(path, labels, listing)


def _opened(spec: str | Path, labels: LabelSource, fields: Mapping[str, str]) -> Source:
    path = expanded(spec)
    if is_pattern(str(spec)):
        return shards.of_files(expanded_pattern(str(spec)), labels, fields)
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
        return array_source(samples) if is_made else _of_folder(path, labels, fields)
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix == ".zip":
            return zip_source(path, labels)
        if suffix in (".npy", ".npz"):
            return array_source(path)
        if shards.is_shard(path):
            return shards.of_files([path], labels, fields)
        if suffix in (".json", ".csv", ".tsv", *JSON_LINES):
            raise ValueError(
                f"{path} is a table, not images; give the folder of the images, where it is read"
            )
        raise ValueError(f"{path} is a file of another kind; {_ALLOWED}")
    if str(spec) in BUILT_IN:
        return BUILT_IN[str(spec)]()
    if name := hub_name(str(spec)):
        missing = f"{spec} does not exist, and no such data set could be had from the hub"
        outer = f"{name.folder}/" if name.folder else ""
        patterns = [f"{outer}*{extension}" for extension in _ON_HUB]
        folder = snapshot(name, "dataset", patterns, missing)
        return replace(_of_folder(folder, labels, fields), name=name.short)
    raise ValueError(f"{str(spec)!r} does not exist; {_ALLOWED}")
