"""patchdiffusion evaluate RUN [options]"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from patchdiffusion.cli.autoencoders import autoencoder_at, evaluate
from patchdiffusion.cli.compared import compared
from patchdiffusion.cli.evaluation_table import FULL, table
from patchdiffusion.cli.featuring import FeatureArguments, check_measures, extractor_for
from patchdiffusion.cli.flags import flat, positional
from patchdiffusion.cli.measuring import BitsArguments, Measuring
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_file, check_run, home, new_file
from patchdiffusion.data.source import is_run
from patchdiffusion.metrics.evaluate import Evaluation
from patchdiffusion.metrics.options import EvaluationConfig
from patchdiffusion.nets.base import Weights
from patchdiffusion.sampling.pipeline import Pipeline, load
from patchdiffusion.system.device import pick_device, use_threads
from patchdiffusion.system.dist import join
from patchdiffusion.system.files import write_json

_ALL = 10**9


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Measure a run or a model, or compare images with images.

    For an autoencoder: PSNR, SSIM, distances (rFID) of reconstructions, statistics of latents.
    For another model: loss on held-out images, bits per dimension (--bits.images), and a comparison
    of samples with real images (Frechet, kernel and sliced distance, precision, recall, density,
    coverage, copies); of larger images than those of training (--size 128) the seams of windows.
    Measures that are not possible are listed, with the reason. The quick default shows a trend;
    --full is the protocol of publications. The same command resumes one that was interrupted, to
    the same numbers. Also under torchrun.
    """

    example: ClassVar[str] = "patchdiffusion evaluate runs/photos --full"
    common: ClassVar[str] = (
        "full samples held-out data resolution features.extractor features.weights bits.images "
        "steps solver guidance canvas weights seed batch save device threads"
    )

    path: Path = field(default=Path(), metadata=positional("RUN"))
    """Folder of a run or model, or images in a folder or zip."""
    data: str | None = None
    """Images to compare with; None is the training data of the run."""
    full: bool = False
    """Use 50,000 samples, all real and all held-out images."""
    resolution: int | tuple[int, int] | None = None
    """Side, or height and width, at which images are compared; None is their own. Not for models,
    which have theirs."""
    weights: Weights = "averaged"
    """averaged: moving average of the weights; raw: weights as trained."""
    features: FeatureArguments = field(default_factory=FeatureArguments)
    bits: BitsArguments = field(default_factory=BitsArguments)
    save: Path | None = None
    """JSON file to write; None is evaluations/0001.json, 0002.json, ... beside the model, or for
    images in the current folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to evaluate on; auto is CUDA if available."""
    threads: int | None = None
    """CPU threads of each process; None leaves it to PyTorch (one per core)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the network."""
    config: EvaluationConfig = field(default_factory=EvaluationConfig, metadata=flat("measures"))


def main(arguments: Sequence[str]) -> None:
    """Evaluate, print a table, and write a file."""
    options = parse(EvaluateArguments(), arguments, "evaluate")
    path, device = options.path, pick_device(options.device)
    use_threads(options.threads)
    if not path.exists():
        check_run(path)
    config = options.config
    if options.full:
        if config.samples != EvaluationConfig.samples:
            raise ValueError(f"--full takes {FULL:,} samples; leave out --samples {config.samples}")
        config = replace(config, samples=FULL, held_out=_ALL, reference=_ALL)
    if (model := autoencoder_at(path, options.weights, device)) is not None:
        evaluate(
            path,
            model,
            data=options.data,
            count=_ALL if options.full else options.config.held_out,
            features=options.features,
            batch=options.config.batch,
            save=options.save,
        )
        return
    with join() as team:  # which gives each process a device of its own
        if team.size > 1 and config.sampler.splits:
            raise ValueError(
                "guidance.split and canvas.split are for sample: evaluate gives every process "
                "images of its own"
            )
        pipeline = _model(path, options, device)
        if pipeline is None and options.data is None:
            raise ValueError(
                f"{path} holds no model, only images; give --data PATH to compare them with"
            )
        if pipeline is None and options.bits.images:
            images = options.bits.images
            raise ValueError(f"{path} holds no model, which --bits.images {images} is about")
        if pipeline is not None and config.samples:
            minimized = pipeline.model.config.objective.minimized
            check_measures(options.features.extractor, minimized, path)
        folder = Path("evaluations") if pipeline is None else home(path) / "evaluations"
        check_file(options.save or folder / "0001.json")
        sides = compared(path, pipeline, team, data=options.data, resolution=options.resolution)
        extract, missing = None, ""
        if config.samples:
            extract, missing = extractor_for(options.features, sides.richest, device, team)
        evaluation = Evaluation(
            pack=sides.pack,
            config=config,
            extract=extract,
            team=team,
            missing=missing,
            compared=sides.colors,
        )
        bits = options.bits if pipeline is not None else BitsArguments()
        measuring = Measuring(evaluation, pipeline, sides.images, str(path), bits)

        def write(result: dict[str, Any]) -> None:
            print("\n".join(table(result)))
            file = options.save or new_file(folder, ".json")
            write_json(file, result)
            print(f"written to {file}")

        save = options.save
        parts = save.with_name(f"{save.name}.unfinished") if save else folder / "unfinished"
        try:
            measuring.run(parts, write)
        finally:
            with contextlib.suppress(OSError):  # unless it holds a result
                folder.rmdir()


def _model(path: Path, options: EvaluateArguments, device: torch.device) -> Pipeline | None:
    """Load the model at a path; None if there are images."""
    files = ("model.safetensors", "raw.safetensors", "model/config.json")
    holds = is_run(path) or any((path / name).exists() for name in files)
    if path.is_file() or (path.is_dir() and not holds):
        return None
    if options.resolution is not None:
        raise ValueError(f"--resolution is for images, and {path} is a model; leave it out")
    return load(path, weights=options.weights, device=device, precision=options.precision)
