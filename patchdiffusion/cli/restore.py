"""patchdiffusion restore RUN IMAGE --operator downsample"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from patchdiffusion.cli.flags import flat, positional
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_run, home
from patchdiffusion.cli.remade import Remade, RemakingArguments, for_each, pictures_of, remaking
from patchdiffusion.guidance.inverse import psnr
from patchdiffusion.sampling.canvas import of_size
from patchdiffusion.sampling.pictures import read_picture, to_network
from patchdiffusion.sampling.pipeline import Pipeline
from patchdiffusion.sampling.restoring import Inpaint, Measured, Restoring, image_size, usual
from patchdiffusion.system.serialize import encode


@dataclass(frozen=True, kw_only=True)
class RestoreArguments(RemakingArguments):
    """Restore images that are reduced, blurred, masked or measured along lines.

    Samples images that fit the measurement, under the model as a prior: a sample of what the image
    may have been, not what it was. Larger images than those of training are denoised in windows.
    Interrupted, the same command goes on.
    """

    example: ClassVar[str] = "patchdiffusion restore runs/photos small.png"
    common: ClassVar[str] = "operator way noise simulate mean count seed classes steps out device"

    path: Path = field(default=Path(), metadata=positional("RUN"))
    """Folder of a run or model."""
    images: tuple[str, ...] = field(default=(), metadata=positional("IMAGE..."))
    """Pictures of measurements, or folders of them; intact images with --simulate."""
    restoring: Restoring = field(default_factory=Restoring, metadata=flat("restoring"))
    simulate: bool = False
    """Take intact images: measure them first, with noise, and print how well they are restored."""
    mean: bool = False
    """Also write the mean of the samples, which has the smallest squared error."""

    def last(self, name: str) -> str:
        """Name of the result that is written last."""
        return f"{name}-mean" if self.mean else self.named(name, self.count - 1)


def main(arguments: Sequence[str]) -> None:
    """Restore images one after another."""
    options = parse(RestoreArguments(), arguments, "restore")
    check_run(options.path)
    files = pictures_of(options.images)
    pipeline = options.pipeline(options.path)
    texts = {
        **pipeline.texts(usual(options.sampler)),
        **options.settings(),
        "restoring": json.dumps(encode(options.restoring)),
        "simulate": str(options.simulate),
        "mean": str(options.mean),
    }
    operator = options.restoring.operator
    mask = operator.mask if isinstance(operator, Inpaint) else None
    with remaking(home(options.path) / "restored", options.out, texts, files, mask) as made:
        for_each(files, made, lambda file: _restore(file, made, options, pipeline), options.last)
        if options.simulate:
            ratios = torch.tensor([_ratios(file, made, options, pipeline) for file in files])
            restored, simple = ratios.mean(0).tolist()
            print(f"PSNR {restored:.2f} dB, without a model {simple:.2f} dB ({len(files)} images)")


def _restore(file: Path, made: Remade, options: RestoreArguments, pipeline: Pipeline) -> None:
    """Restore one picture."""
    space, settings = pipeline.model.config.space, options.restoring
    name, source = file.stem, file.name
    if options.simulate:
        clean = _read(file, pipeline)
        y = settings.operator.ready(tuple(clean.shape[2:]))(clean)
        generator = torch.Generator().manual_seed(options.seed)
        y = y + settings.noise * torch.randn(y.shape, generator=generator)
        picture = space.to_values(settings.operator.to_picture(y))[0]
        file = made.write(f"{name}-measured", picture, {"source": source})
    picture = _read(file, pipeline)
    size = image_size(settings.operator, tuple(picture.shape[2:]), str(file))
    y = settings.operator.from_picture(picture)
    config = usual(options.sampler)
    images = pipeline.sample(
        options.count,
        seed=options.seed,
        classes=pipeline.unlabeled(options.classes),
        config=replace(config, canvas=of_size(config.canvas, size)),
        known=Measured(settings.operator.ready(size), y, settings),
        batch=options.count,
    )
    for number, image in enumerate(images):
        facts = {"source": source, "seed": str(options.seed + number)}
        made.write(options.named(name, number), image, facts)
    if options.mean:
        mean = torch.stack([to_network(image, space) for image in images]).mean(0, keepdim=True)
        made.write(f"{name}-mean", space.to_values(mean)[0], {"source": source})


def _ratios(
    file: Path, made: Remade, options: RestoreArguments, pipeline: Pipeline
) -> tuple[float, float]:
    """PSNR of what is restored, of the mean if there is one, and of a guess without a model."""
    names = [options.named(file.stem, number) for number in range(options.count)]
    names = [options.last(file.stem)] if options.mean else names
    results = [_read(made.file(name), pipeline) for name in names]
    clean, measured = _read(file, pipeline), _read(made.file(f"{file.stem}-measured"), pipeline)
    operator = options.restoring.operator.ready(tuple(clean.shape[2:]))
    guess = operator.guess(operator.from_picture(measured)).clamp(-1, 1)
    ratio = torch.stack([psnr(result, clean) for result in results]).mean()
    return ratio.item(), psnr(guess, clean).item()


def _read(file: Path | None, pipeline: Pipeline) -> Tensor:
    """A picture in the units of the network: [1, C, H, W]."""
    assert file is not None, "results are written before they are compared"
    model = pipeline.model.config
    values = read_picture(str(file), model.space, model.network.channels)
    return to_network(values, model.space)[None]
