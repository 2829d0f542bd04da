"""patchdiffusion walk RUN [options]"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from patchdiffusion.apps.walk import (
    along,
    class_direction,
    encode,
    interpolated,
    latent_of,
    principal_axes,
    walk,
    wish_of,
)
from patchdiffusion.cli.compared import compared
from patchdiffusion.cli.flags import flat, positional
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_file, check_run, home
from patchdiffusion.nets.base import Weights
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.sampling.pipeline import Pipeline, load
from patchdiffusion.system.checks import positive
from patchdiffusion.system.device import use_threads
from patchdiffusion.system.dist import Team
from patchdiffusion.system.png import enlarge, grid, save_png


@dataclass(frozen=True, kw_only=True)
class WalkArguments:
    """Show how samples change with the latent vector of a DiffuseVAE model, with the same noise.

    A picture with a row for each walk: from the latent of one seed to that of the next, or, with
    --axes or --between, of one seed along a direction. Each row keeps its class, if there are any.
    """

    example: ClassVar[str] = "patchdiffusion walk runs/refiner --axes"
    common: ClassVar[str] = "rows columns seed axes between reach steps solver out device threads"

    path: Path = field(default=Path(), metadata=positional("RUN"))
    """Folder of a run or model, trained with --conditioners reconstruction."""
    rows: int = 6
    """Number of walks."""
    columns: int = 9
    """Number of images of a walk."""
    seed: int = 0
    """Seed of the latent of the first row, and of the noise of all images."""
    axes: bool = False
    """Walk along the principal axes of the encoded training images, one for each row."""
    between: tuple[str, str] | None = None
    """Walk along the difference of the mean latents of two classes of the data, by their names."""
    reach: float = 2.0
    """Length of such a walk to either side, in deviations of the axis or differences of classes."""
    classes: tuple[str, ...] = ()
    """Classes of the rows, used in turn, of a model that has classes; none for all in turn."""
    data: str | None = None
    """Images to encode; None is those that the model was trained on."""
    weights: Weights = "averaged"
    """averaged: moving average of the weights; raw: weights as trained."""
    out: Path | None = None
    """Picture to write; the default is walk.png in the folder of the run."""
    batch: int = 64
    """Batch size: number of images per evaluation of the network."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to sample on; auto is CUDA if available."""
    threads: int | None = None
    """CPU threads; None leaves it to PyTorch (one per core)."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig, metadata=flat("sampler"))

    def __post_init__(self) -> None:
        positive(self, "rows", "batch", "reach")
        if self.columns < 2:
            raise ValueError(f"columns must be at least 2, not {self.columns}")
        if self.axes and self.between:
            raise ValueError("axes and between are two walks; give one of them")


def main(arguments: Sequence[str]) -> None:
    """Sample the images of all walks, and write them as a picture."""
    options = parse(WalkArguments(), arguments, "walk")
    check_run(options.path)
    out = options.out or home(options.path) / "walk.png"
    check_file(out)
    use_threads(options.threads)
    pipeline = load(options.path, weights=options.weights, device=options.device)
    latents = _latents(pipeline, options)
    images = walk(
        pipeline,
        latents,
        config=options.sampler,
        seed=options.seed,
        labels=pipeline.labels(len(latents), options.classes or None),
        batch=options.batch,
        progress=True,
    )
    flat_images = images.reshape(-1, *images.shape[2:])
    pictures = pipeline.model.config.space.to_picture(flat_images)
    texts = {"model": pipeline.model.digest, "seed": str(options.seed)}
    save_png(out, enlarge(grid(pictures, columns=options.columns)), texts)
    print(f"{len(images)} walks of {options.columns} images in {out}")


def _latents(pipeline: Pipeline, options: WalkArguments) -> Tensor:
    """Latents of all walks: [R, K, d]."""
    latent, rows, columns = latent_of(pipeline), options.rows, options.columns
    wish = wish_of(pipeline, torch.arange(options.seed, options.seed + rows + 1))
    z = latent.latents(wish).cpu()
    if not options.axes and options.between is None:
        return interpolated(z[:-1], z[1:], columns)
    pack = compared(options.path, pipeline, Team(), data=options.data, resolution=None).pack
    encoded, labels = encode(pipeline, pack)
    if options.axes:
        axes = principal_axes(encoded, rows)
        return along(z[:1].expand(rows, -1), axes, columns, options.reach)
    assert options.between is not None
    if labels is None:
        raise ValueError(f"{pack.name} has no classes to walk between; use --axes")
    unknown = [name for name in options.between if name not in pack.classes]
    if unknown:
        raise ValueError(
            f"between names {unknown[0]!r}, and the classes are {', '.join(pack.classes[:20])}"
        )
    start, end = (pack.classes.index(name) for name in options.between)
    return along(z[:-1], class_direction(encoded, labels, start, end), columns, options.reach)
