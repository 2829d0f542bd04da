"""Commands that make pictures of pictures: their common flags, and a folder that is resumed."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from patchdiffusion.cli.claimed import check_out, claimed, resumable
from patchdiffusion.cli.flags import flat
from patchdiffusion.data.listing import EXTENSIONS, suffix
from patchdiffusion.data.source import UNFINISHED
from patchdiffusion.nets.base import Weights
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.sampling.pipeline import Pipeline, load
from patchdiffusion.system.device import use_threads
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


@dataclass(frozen=True, kw_only=True)
class RemakingArguments:
    """Flags of a command that samples images for each of some pictures."""

    count: int = 1
    """Number of results for each image."""
    seed: int = 0
    """Seed of the first result."""
    classes: tuple[str, ...] = ()
    """Names or numbers of classes, used in turn; none for no class."""
    weights: Weights = "averaged"
    """averaged: moving average of the weights; raw: weights as trained."""
    out: Path | None = None
    """Folder for the files; the default is a new one, 0001, 0002, ... in the folder of the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to sample on; auto is CUDA if available."""
    threads: int | None = None
    """CPU threads; None leaves it to PyTorch (one per core)."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig, metadata=flat("sampler"))

    def pipeline(self, run: Path) -> Pipeline:
        """The model of a run, on the device that is asked for."""
        if self.count < 1:
            raise ValueError(f"count must be at least 1, not {self.count}")
        use_threads(self.threads)
        return load(run, weights=self.weights, device=self.device)

    def named(self, name: str, number: int) -> str:
        """Name of a result of the picture `name`; numbers are left out if there is one."""
        return f"{name}-{number + 1}" if self.count > 1 else name

    def settings(self) -> dict[str, str]:
        """Flags on which results depend, as text entries."""
        return {name: str(getattr(self, name)) for name in ("count", "seed", "classes")}


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

    def file(self, name: str) -> Path | None:
        """File of a result, or None if it is not written."""
        files = (self.folder / f"{name}{end}" for end in (".png", ".tiff", ".npy"))
        return next((file for file in files if file.exists()), None)


@contextlib.contextmanager
def remaking(
    root: Path,
    out: Path | None,
    texts: Mapping[str, str],
    files: Sequence[Path],
    mask: str | None = None,
) -> Iterator[Remade]:
    """Context of the folder of results, `out` or a new one in `root`; the same request resumes.

    A request is the same if texts are, and the content of the files and of the mask.
    """
    check_out(out)
    read = [*files, *(() if mask is None else (expanded(mask),))]
    if missing := [str(file) for file in read if not file.is_file()]:
        raise ValueError(f"there is no file {missing[0]}")
    request: dict[str, Any] = {**texts, "files": {str(file): sha256(file) for file in read}}
    with claimed(root, out, request) as folder:
        made = Remade(folder, texts)
        with resumable(lambda: f"what is made is in {folder}"):
            yield made
        (folder / UNFINISHED).unlink()


def for_each(
    files: Sequence[Path],
    made: Remade,
    make: Callable[[Path], object],
    last: Callable[[str], str],
) -> None:
    """Make something of each picture, with a progress bar; what is there is not made again.

    `last` is the name of the result that is written last, for the name of a picture.
    """
    done = [file for file in files if made.file(last(file.stem))]
    if done:
        print(f"resume    {counted(len(done), 'image')} of {len(files)} are in {made.folder}")
    with progress_bar(len(files), "image", disable=len(files) == 1) as bar:
        bar.update(len(done))
        for file in files:
            if file not in done:
                make(file)
                bar.update()
    print(f"{counted(len(files), 'image')} in {made.folder}")
