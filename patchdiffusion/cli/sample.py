"""patchdiffusion sample RUN [options]"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from patchdiffusion import __version__
from patchdiffusion.cli.flags import flat, positional, read
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_run
from patchdiffusion.data.source import SAMPLES
from patchdiffusion.nets.base import Weights
from patchdiffusion.sampling.pipeline import Pipeline, SamplerConfig, load
from patchdiffusion.system.device import use_threads
from patchdiffusion.system.files import read_json, write_bytes, write_json
from patchdiffusion.system.png import grid, image_file, npy, save_png
from patchdiffusion.system.serialize import encode


@dataclass(frozen=True, kw_only=True)
class SampleArguments:
    """Sample images from a run, also while it trains, or from a model.

    Seeds are SEED, SEED + 1, ...; the same seed gives the same image whatever the batch. Files go
    to a new folder each time and hold their seed and the model's digest.
    """

    example: ClassVar[str] = "patchdiffusion sample runs/photos --count 25"
    common: ClassVar[str] = (
        "count seed classes steps solver guidance canvas weights out singles batch device threads"
    )

    path: Path = field(default=Path(), metadata=positional("RUN"))
    """Folder of a run or model."""
    count: int = 16
    """Number of images."""
    seed: int = 0
    """Seed of the first image."""
    classes: tuple[str, ...] = ()
    """Names or numbers of classes, taken in turn; none is all of them in turn, -1 no class."""
    weights: Weights = "averaged"
    """averaged: what one wants; raw: the weights as trained."""
    out: Path | None = None
    """Folder for the files; the default is generated/0001, 0002, ... in the folder of the run."""
    singles: bool = True
    """Write one file per image beside the grid: PNG, animated for clips, or TIFF for floats of one
    channel."""
    batch: int = 64
    """Images at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    threads: int | None = None
    """CPU threads of each process; None leaves it to PyTorch (one per core)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the network."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig, metadata=flat("sampler"))


def main(arguments: Sequence[str]) -> None:
    """Sample, and write a grid and single files."""
    given = parse(SampleArguments(), arguments, "sample", _classes_of(arguments))
    path = given.path
    check_run(path)
    use_threads(given.threads)
    pipeline = load(path, weights=given.weights, device=given.device, precision=given.precision)
    _check_out(given.out)
    images = pipeline.sample(
        given.count,
        seed=given.seed,
        classes=given.classes or None,
        config=given.sampler,
        batch=given.batch,
        progress=True,
    )
    folder = _new_folder(path, given.out)
    _write(folder, images, pipeline, given)
    print(f"{given.count} images in {folder}")


def _classes_of(arguments: Sequence[str]) -> str:
    """The classes of the run that is named, for the help."""
    words, _ = read(arguments)
    files = [Path(word) / name for word in words for name in ("model/config.json", "config.json")]
    for file in files:
        facts = read_json(file) if file.is_file() else {}
        if isinstance(facts, dict) and facts.get("classes"):
            return f"; classes of {words[0]} are {', '.join(map(str, facts['classes']))}"
    return ""


def _check_out(out: Path | None) -> None:
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; nothing is overwritten, use another")


def _new_folder(path: Path, out: Path | None) -> Path:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        return out
    root = (path if (path / "model").is_dir() else path.parent) / "generated"
    number = 1
    while (folder := root / f"{number:04d}").exists():
        number += 1
    folder.mkdir(parents=True)
    return folder


def _write(folder: Path, images: np.ndarray, pipeline: Pipeline, given: SampleArguments) -> None:
    labels = pipeline.labels(given.count, given.classes or None)
    names = pipeline.model.config.classes
    common = {
        "software": f"patchdiffusion {__version__}",
        "model": pipeline.model.digest,
        "weights": given.weights,
        "sampler": json.dumps(encode(pipeline.sampler(given.sampler))),
    }
    if pipeline.companions.digests:
        common["guides"] = json.dumps(pipeline.companions.digests)
    seeds = {"seeds": f"{given.seed}-{given.seed + given.count - 1}"}
    pictures = pipeline.model.config.space.to_picture(images)
    save_png(folder / "grid.png", grid(pictures), {**common, **seeds})
    if images is not pictures or images.ndim != 4:  # not what can be looked at
        write_bytes(folder / SAMPLES, npy(images))
        write_json(folder / "samples.json", {**common, **seeds})
    for i, image in enumerate(images if given.singles else ()):
        facts = {**common, "seed": str(given.seed + i)}
        if labels is not None:
            label = int(labels[i])
            facts["class"] = names[label] if 0 <= label < len(names) else str(label)
        if (file := image_file(image, facts)) is not None:
            write_bytes(folder / f"seed-{given.seed + i:08d}{file.suffix}", file.content)
