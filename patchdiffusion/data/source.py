"""Open a `Source` from a path, or a built-in data set from its name."""

from collections.abc import Callable
from pathlib import Path

from patchdiffusion.data.arrays import array_source
from patchdiffusion.data.example import BadImage, Example, Source
from patchdiffusion.data.files import folder_source, zip_source
from patchdiffusion.data.glyphs import Glyphs
from patchdiffusion.data.moving import MovingGlyphs
from patchdiffusion.data.pack import Pack
from patchdiffusion.system.files import expanded, read_json

__all__ = ["BadImage", "Example", "Source", "is_run", "open_source"]

SAMPLES = "samples.npy"
"""Array that `patchdiffusion sample` writes beside pictures that cannot hold its exact values."""

BUILT_IN: dict[str, Callable[[], Source]] = {c.name: c for c in (Glyphs, MovingGlyphs)}
"""Data sets that need no files, by name."""

_ALLOWED = f"allowed are a folder, a pack, a .zip, .npy or .npz file, or {' or '.join(BUILT_IN)}"


def is_run(folder: Path) -> bool:
    """Whether a folder belongs to a run; others may hold a `config.json`, too."""
    if (folder / "config.json").exists() and (folder / "log.jsonl").exists():
        return True  # even if it is damaged: its samples are not a data set
    try:
        return read_json(folder / "config.json").get("type") == "TrainConfig"
    except (OSError, ValueError, AttributeError):
        return False


def open_source(spec: str | Path) -> Source:
    """Open the data set at a path, or else the built-in one of that name.

    Raises `ValueError`, in one line, for anything else and for data that cannot be read.
    """
    path = expanded(spec)
    run = is_run(path)
    if run and str(spec) not in BUILT_IN:
        raise ValueError(f"{spec} is the folder of a run, not of images; {_ALLOWED}")
    if path.is_dir() and not run:
        if (path / "pack.json").is_file() and (path / "images.bin").is_file():
            return Pack.open(path)
        samples = path / SAMPLES
        is_made = samples.is_file() and samples.with_suffix(".json").is_file()
        return array_source(samples) if is_made else folder_source(path)
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix == ".zip":
            return zip_source(path)
        if suffix in (".npy", ".npz"):
            return array_source(path)
        raise ValueError(f"{path} is a file of another kind; {_ALLOWED}")
    if str(spec) in BUILT_IN:
        return BUILT_IN[str(spec)]()
    raise ValueError(f"{str(spec)!r} does not exist; {_ALLOWED}")
