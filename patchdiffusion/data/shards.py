"""Data sets in many large files, archives or tables: a folder of them, a pattern, or one file."""

import glob
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from patchdiffusion.data.files import FileSource
from patchdiffusion.data.labels import LabelSource, natural
from patchdiffusion.data.listing import SHARDS, Listing, suffix
from patchdiffusion.data.splits import split_of
from patchdiffusion.data.tabular import TableSource, table_source
from patchdiffusion.data.tars import tar_source
from patchdiffusion.system.files import expanded

_MOST = 100_000
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


def is_pattern(spec: str) -> bool:
    """True if a text stands for several paths: train-{000..099}.tar, or data/*.parquet."""
    return any(c in spec for c in "{*?[") and not expanded(spec).exists()


def expanded_pattern(spec: str) -> list[Path]:
    """Files that a pattern stands for; raises `ValueError` if there are none, or one is missing."""
    paths: list[Path] = []
    for text in _alternatives(spec):
        there = [text] if expanded(text).exists() else glob.glob(str(expanded(text)))
        if not there:
            raise ValueError(f"{spec} stands for {text}, which does not exist")
        paths += (expanded(name) for name in sorted(there, key=natural))
        if len(paths) > _MOST:
            raise ValueError(f"{spec} stands for more files than {_MOST:,}, which are allowed")
    return list(dict.fromkeys(paths))


def _alternatives(spec: str) -> Iterator[str]:
    """Texts without braces: {00..12} counts, with as many digits, and {a,b} lists."""
    pieces: list[Sequence[str]] = []
    total, start = 1, 0
    for match in _BRACES.finditer(spec):
        first, last, listed = match.groups()
        count = len(listed.split(",")) if listed else abs(int(last) - int(first)) + 1
        if (total := total * count) > _MOST:
            raise ValueError(f"{spec} stands for {total:,} files; allowed are {_MOST:,}")
        if listed:
            choices = listed.split(",")
        else:
            low, high = sorted((int(first), int(last)))
            choices = [str(number).zfill(len(first)) for number in range(low, high + 1)]
        pieces += ([spec[start : match.start()]], choices)
        start = match.end()
    pieces.append([spec[start:]])
    return ("".join(parts) for parts in itertools.product(*pieces))


def is_shard(path: Path) -> bool:
    """True for a file that holds many images, by its name; `ValueError` for a compressed one."""
    if path.name.lower().endswith(_COMPRESSED):
        raise ValueError(
            f"{path} is a compressed archive, whose members cannot be read in place; unpack it to "
            "a folder, or decompress it to a .tar"
        )
    return suffix(path.name) in SHARDS


def of_files(
    paths: Sequence[Path], labels: LabelSource, fields: Mapping[str, str]
) -> FileSource | TableSource:
    """Source over archives or tables."""
    if wrong := [path for path in paths if not (path.is_file() and is_shard(path))]:
        allowed = " ".join(SHARDS)
        raise ValueError(f"{wrong[0]} is none of the files that a pattern may stand for: {allowed}")
    outer = paths[0].parent
    names = {_below(path, outer): path for path in paths}
    return _source(common_name(paths), names, labels, fields)


def of_folder(
    path: Path, listing: Listing, labels: LabelSource, fields: Mapping[str, str]
) -> FileSource | TableSource:
    """Source over the archives or tables in a folder."""
    keys = sorted((entry.key for entry in listing.shards), key=natural)
    return _source(path.resolve().name, {key: path / key for key in keys}, labels, fields)


def _source(
    name: str, shards: Mapping[str, Path], labels: LabelSource, fields: Mapping[str, str]
) -> FileSource | TableSource:
    is_tar = {suffix(key) == ".tar" for key in shards}
    if len(is_tar) > 1:
        first, other = (
            next(k for k in shards if (suffix(k) == ".tar") is t) for t in (True, False)
        )
        raise ValueError(f"there are archives and tables of images, {first} and {other}; name one")
    splits = [_split(key) for key in shards]
    if is_tar == {True}:
        if fields:
            raise ValueError("fields names columns of tables, and these are archives; leave it out")
        return tar_source(name, shards, labels, splits)
    return table_source(name, shards, labels, splits, fields)


def _split(key: str) -> str | None:
    """Split named by a part of the name of a file, or else by a folder."""
    path = PurePosixPath(key)
    parts = [*re.split(r"[-_.]", path.stem), *reversed(path.parent.parts)]
    return next((split for part in parts if (split := split_of(part))), None)


def _below(path: Path, outer: Path) -> str:
    return path.relative_to(outer).as_posix() if path.is_relative_to(outer) else path.as_posix()


def common_name(paths: Sequence[Path]) -> str:
    """Common start of the names of files, or else the name of their folder."""
    stem = re.split(r"[-_.]?\d+($|-of-)", paths[0].stem)[0] if len(paths) > 1 else paths[0].stem
    return stem or paths[0].resolve().parent.name or "images"
