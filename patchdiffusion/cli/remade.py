"""Pictures that a command makes of pictures: a folder that fills up, and is resumed."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from patchdiffusion.cli.claimed import check_out, claimed, resumable
from patchdiffusion.data.listing import EXTENSIONS, suffix
from patchdiffusion.data.source import UNFINISHED
from patchdiffusion.system.files import expanded, sha256, write_bytes
from patchdiffusion.system.png import ImageFile, image_file, npy
from patchdiffusion.system.progress import progress_bar
from patchdiffusion.system.text import counted


def pictures_of(words: Sequence[str]) -> list[Path]:
    """The image files that are named, and those directly in the folders that are named.

    Raises `ValueError` for one that does not exist, for none, and for two of one name.
    """
    files: list[Path] = []
    for word in words:
        path = expanded(word)
        if not path.exists():
            raise ValueError(f"there is no file {word}")
        inside = [path]
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if suffix(file.name) in EXTENSIONS)
        if not inside:
            raise ValueError(f"{word} holds no images")
        files += inside
    if not files:
        raise ValueError("IMAGE is missing: give image files, or a folder of them")
    names = [file.stem for file in files]
    if same := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"several images are named {same[0]}, and so would be what is made of them"
        )
    return files


@dataclass(frozen=True)
class Remade:
    """A folder of results, each written when it is made."""

    folder: Path
    texts: Mapping[str, str]
    """Text entries of all files."""

    def write(self, name: str, image: np.ndarray, facts: Mapping[str, str] | None = None) -> Path:
        """Write an image [H, W, C]: PNG, TIFF for floats of one channel, else .npy."""
        made = image_file(image, {**self.texts, **(facts or {})})
        made = made or ImageFile(".npy", npy(image))
        path = self.folder / f"{name}{made.suffix}"
        write_bytes(path, made.content)
        return path

    def has(self, name: str) -> bool:
        """True if a result is written."""
        return any((self.folder / f"{name}{end}").exists() for end in (".png", ".tiff", ".npy"))


@contextlib.contextmanager
def remaking(
    root: Path, out: Path | None, texts: Mapping[str, str], files: Sequence[Path]
) -> Iterator[Remade]:
    """Context of the folder of results, `out` or a new one in `root`; the same request resumes."""
    check_out(out)
    request: dict[str, Any] = {**texts, "files": {str(file): sha256(file) for file in files}}
    with claimed(root, out, request) as folder:
        made = Remade(folder, texts)
        with resumable(lambda: f"what is made is in {folder}"):
            yield made
        (folder / UNFINISHED).unlink()


def for_each(
    files: Sequence[Path], made: Remade, make: Callable[[Path, Remade], object], last: str = ""
) -> None:
    """Make something of each picture, with a progress bar; what is there is not made again.

    `last` is appended to the name of the result that is written last.
    """
    done = [file for file in files if made.has(file.stem + last)]
    if done:
        print(f"resume    {counted(len(done), 'image')} of {len(files)} are in {made.folder}")
    with progress_bar(len(files), "image", disable=len(files) == 1) as bar:
        bar.update(len(done))
        for file in files:
            if file not in done:
                make(file, made)
                bar.update()
    print(f"{counted(len(files), 'image')} in {made.folder}")
