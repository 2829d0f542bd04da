"""From what a person types to a `Source`."""

from pathlib import Path

from patchdiffusion.data.arrays import array_source
from patchdiffusion.data.example import BadImage, Example, Source
from patchdiffusion.data.files import folder_source, zip_source
from patchdiffusion.data.glyphs import Glyphs
from patchdiffusion.data.pack import Pack

__all__ = ["BadImage", "Example", "Source", "open_source"]

_ALLOWED = "allowed are a folder, a pack, a .zip, .npy or .npz file, or the name 'glyphs'"


def open_source(spec: str | Path) -> Source:
    """The data set at a path, or the built-in one named "glyphs" (unless a path has that name).

    Raises `ValueError`, in one line, for anything else and for data that cannot be read.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        is_pack = (path / "pack.json").is_file() and (path / "images.bin").is_file()
        return Pack.open(path) if is_pack else folder_source(path)
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix == ".zip":
            return zip_source(path)
        if suffix in (".npy", ".npz"):
            return array_source(path)
        raise ValueError(f"{path} is a file of another kind; {_ALLOWED}")
    if str(spec) == "glyphs":
        return Glyphs()
    raise ValueError(f"{str(spec)!r} does not exist; {_ALLOWED}")
