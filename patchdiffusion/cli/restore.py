"""patchdiffusion restore RUN IMAGE --operator downsample"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.cli.flags import flat, positional
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_run, home
from patchdiffusion.cli.remade import Remade, for_each, pictures_of, remaking
from patchdiffusion.guidance.inverse import psnr
from patchdiffusion.nets.base import Weights
from patchdiffusion.sampling.canvas import AutoCanvas
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.sampling.pictures import read_picture, to_network
from patchdiffusion.sampling.pipeline import Pipeline, load
from patchdiffusion.sampling.restoring import Measured, image_size, usual
from patchdiffusion.system.device import use_threads
from patchdiffusion.system.serialize import encode


@dataclass(frozen=True, kw_only=True)
class RestoreArguments:
    """Restore images that are reduced, blurred, masked or measured along lines.

    Samples images that fit the measurement, under the model as a prior: a sample of what the image
    may have been, not what it was. Larger images than those of training are denoised in windows.
    Interrupted, the same command goes on.
    """

    example: ClassVar[str] = "patchdiffusion restore runs/photos small.png"
    common: ClassVar[str] = "operator way noise iterations simulate count seed steps out device"

    path: Path = field(default=Path(), metadata=positional("RUN"))
    """Folder of a run or model."""
    images: tuple[str, ...] = field(default=(), metadata=positional("IMAGE..."))
    """Pictures of measurements, or folders of them; intact images with --simulate."""
    measured: Measured = field(default_factory=Measured, metadata=flat("measured"))
    simulate: bool = False
    """Take intact images: measure them first, with noise, and print how well they are restored."""
    count: int = 1
    """Number of samples of each image."""
    mean: bool = False
    """Also write the mean of the samples, which has the smallest squared error."""
    seed: int = 0
    """Seed of the first sample."""
    weights: Weights = "averaged"
    """averaged: moving average of the weights; raw: weights as trained."""
    out: Path | None = None
    """Folder for the files; the default is restored/0001, 0002, ... in the folder of the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to sample on; auto is CUDA if available."""
    threads: int | None = None
    """CPU threads; None leaves it to PyTorch (one per core)."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig, metadata=flat("sampler"))


def main(arguments: Sequence[str]) -> None:
    """Restore images one after another."""
    options = parse(RestoreArguments(), arguments, "restore")
    check_run(options.path)
    files = pictures_of(options.images)
    use_threads(options.threads)
    pipeline = load(options.path, weights=options.weights, device=options.device)
    ratios: dict[str, tuple[float, float]] = {}

    def make(file: Path, made: Remade) -> None:
        ratio = _restore(file, made, options, pipeline)
        if ratio is not None:
            ratios[file.stem] = ratio

    texts = {
        **pipeline.texts(usual(options.sampler)),
        "measured": json.dumps(encode(options.measured)),
        "count": str(options.count),
        "seed": str(options.seed),
    }
    with remaking(home(options.path) / "restored", options.out, texts, files) as made:
        for_each(files, made, make, _last(options))
    if ratios:
        restored, simple = (sum(r[i] for r in ratios.values()) / len(ratios) for i in (0, 1))
        print(f"PSNR {restored:.2f} dB, without a model {simple:.2f} dB ({len(ratios)} images)")


def _last(options: RestoreArguments) -> str:
    return "-mean" if options.mean else _suffix(options.count - 1, options.count)


def _suffix(number: int, count: int) -> str:
    return f"-{number + 1}" if count > 1 else ""


def _restore(
    file: Path, made: Remade, options: RestoreArguments, pipeline: Pipeline
) -> tuple[float, float] | None:
    """Restore one picture; PSNR of the result and of a simple guess, if the image is known."""
    model, operator = pipeline.model.config, options.measured.operator
    channels = model.network.channels
    values = read_picture(str(file), model.space, channels)
    picture = to_network(values, model.space)[None]
    clean = None
    if options.simulate:
        clean = picture
        generator = torch.Generator().manual_seed(options.seed)
        y = operator(clean)
        y = y + options.measured.noise * torch.randn(y.shape, generator=generator)
        file = made.write(f"{file.stem}-measured", _stored(operator.to_picture(y), pipeline))
        values = read_picture(str(file), model.space, channels)
        picture = to_network(values, model.space)[None]
    name = file.stem.removesuffix("-measured") if options.simulate else file.stem
    size = image_size(operator, tuple(picture.shape[2:]), str(file))
    measured = replace(options.measured, picture=str(file))
    config = replace(usual(options.sampler), canvas=AutoCanvas(size=size), restore=measured)
    images = pipeline.sample(options.count, seed=options.seed, config=config, batch=options.count)
    for number, image in enumerate(images):
        facts = {"source": file.name, "seed": str(options.seed + number)}
        made.write(name + _suffix(number, options.count), image, facts)
    restored = torch.stack([to_network(image, model.space) for image in images])
    mean = restored.mean(0, keepdim=True)
    if options.mean:
        made.write(f"{name}-mean", _stored(mean, pipeline), {"source": file.name})
    if clean is None:
        return None
    guess = operator.guess(operator.from_picture(picture)).clamp(-1, 1)
    best = mean if options.mean else restored
    return psnr(best, clean.expand_as(best)).mean().item(), psnr(guess, clean).item()


def _stored(x: Tensor, pipeline: Pipeline) -> np.ndarray:
    """One image in the units of the network as stored values: [1, C, H, W] -> [H, W, C]."""
    return pipeline.model.config.space.to_values(x)[0]
