"""patchdiffusion evaluate RUN [options]"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from patchdiffusion.apps.likelihood import LikelihoodConfig, held_out_bits
from patchdiffusion.cli.flags import flat, positional
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_run
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.plan import common_size
from patchdiffusion.data.prepare import prepare, prepare_data
from patchdiffusion.data.source import is_run, open_source
from patchdiffusion.encoders.features import Extractor, extractor
from patchdiffusion.metrics.evaluate import Evaluation, EvaluationConfig
from patchdiffusion.nets.base import Weights
from patchdiffusion.sampling.pipeline import Pipeline, load
from patchdiffusion.system.device import pick_device, use_threads
from patchdiffusion.system.dist import Team, join
from patchdiffusion.system.files import read_json, write_json
from patchdiffusion.system.progress import progress_bar
from patchdiffusion.system.serialize import decode
from patchdiffusion.train.config import TrainConfig
from patchdiffusion.train.log import duration

FULL = 50_000
_ALL = 10**9


@dataclass(frozen=True, kw_only=True)
class FeatureArguments:
    """What images are compared by."""

    extractor: str = "inception"
    """inception, inception-legacy, dinov2, module:callable, or none to measure the loss only."""
    weights: Path | None = None
    """File or folder with the weights; None fetches published ones once."""


@dataclass(frozen=True, kw_only=True)
class BitsArguments:
    """The likelihood of held-out images."""

    images: int = 0
    """Held-out images whose bits per dimension are measured, at most; 0 measures none."""
    equation: LikelihoodConfig = field(default_factory=LikelihoodConfig, metadata=flat("bits"))

    def __post_init__(self) -> None:
        if self.images < 0:
            raise ValueError(f"bits.images must be at least 0, not {self.images}")


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Measure a run or a model, or compare images with images.

    Of a model: its loss on held-out images, how many bits it needs for them (--bits.images), and
    its samples beside the real images (Frechet and kernel distance, precision, recall, density,
    coverage, copies). The quick default shows a trend; --full is the protocol of publications.
    Also under torchrun.
    """

    example: ClassVar[str] = "patchdiffusion evaluate runs/photos --full"
    common: ClassVar[str] = (
        "full samples held-out data resolution features.extractor features.weights bits.images "
        "steps solver guidance weights seed batch save device threads"
    )

    path: Path = field(default=Path(), metadata=positional("RUN"))
    """Folder of a run or model, or images in a folder or zip."""
    data: str | None = None
    """Images to compare with; None takes those that the run was trained on."""
    full: bool = False
    """50,000 samples, all real and all held-out images."""
    resolution: int | tuple[int, int] | None = None
    """Side, or height and width, at which images are compared with --data; None is their own. A
    model has its own."""
    weights: Weights = "averaged"
    """averaged: what one wants; raw: the weights as trained."""
    features: FeatureArguments = field(default_factory=FeatureArguments)
    bits: BitsArguments = field(default_factory=BitsArguments)
    save: Path | None = None
    """JSON file to write; None is evaluations/0001.json, 0002.json, ... beside the model, or for
    images in the current folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    threads: int | None = None
    """CPU threads of each process; None leaves it to PyTorch (one per core)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the network that is measured."""
    config: EvaluationConfig = field(default_factory=EvaluationConfig, metadata=flat("measures"))


def main(arguments: Sequence[str]) -> None:
    """Measure, print a table, and write a file."""
    given = parse(EvaluateArguments(), arguments, "evaluate")
    path, device = given.path, pick_device(given.device)
    use_threads(given.threads)
    if not path.exists():
        check_run(path)
    config = given.config
    if given.full:
        if config.samples != EvaluationConfig.samples:
            raise ValueError(f"--full takes {FULL:,} samples; leave out --samples {config.samples}")
        config = replace(config, samples=FULL, held_out=_ALL, reference=_ALL)
    with join() as team:  # which gives each process a device of its own
        pipeline = _model(path, given, device)
        if pipeline is None and given.data is None:
            raise ValueError(f"{path} holds no model; images are compared with --data PATH")
        if pipeline is None and given.bits.images:
            images = given.bits.images
            raise ValueError(f"{path} holds no model, which --bits.images {images} is about")
        pack = _reference(path, given, pipeline, team)
        evaluation = Evaluation(
            pack=pack,
            config=config,
            extract=_extractor(given, team, device, axes=pack.images.ndim - 2),
            team=team,
        )
        bits = _bits(evaluation, pipeline, given.bits) if pipeline and given.bits.images else None
        result = _measured(evaluation, pipeline, path)
        if bits is not None:
            result["bits"], result["card"]["bits"] = bits
        if not result.keys() - {"card", "left_out"}:
            why = [f"{name}: {reason}" for name, reason in result["left_out"].items()]
            raise ValueError("; ".join(why) or "nothing is to be measured; name an extractor")
        if team.is_main:
            print("\n".join(table(result)))
            file = given.save or _new_file(path, pipeline is not None)
            write_json(file, result)
            print(f"written to {file}")


def _model(path: Path, given: EvaluateArguments, device: torch.device) -> Pipeline | None:
    """The model at a path, or None if there are images."""
    files = ("model.safetensors", "raw.safetensors", "model/config.json")
    holds = is_run(path) or any((path / name).exists() for name in files)
    if path.is_file() or (path.is_dir() and not holds):
        return None
    if given.resolution is not None:
        raise ValueError(f"--resolution is for images, and {path} is a model, which has its own")
    return load(path, weights=given.weights, device=device, precision=given.precision)


def _extractor(
    given: EvaluateArguments, team: Team, device: torch.device, *, axes: int
) -> Extractor | None:
    name, weights = given.features.extractor, given.features.weights
    if name == "none" or not given.config.samples:
        return None
    if axes != 2:
        raise ValueError(
            f"features are of images of two axes, and these have {axes}; --features.extractor none "
            "measures loss and copies"
        )
    return extractor(name, weights=weights, device=device, team=team)


def _reference(path: Path, given: EvaluateArguments, pipeline: Pipeline | None, team: Team) -> Pack:
    """The real images, decoded as those that the model was trained on or those of `path`."""
    wanted = _trained_on(path) if given.data is None else DataConfig(path=given.data)
    if pipeline is None:
        wanted = replace(wanted, resolution=given.resolution or _own_size(path, wanted.path))
    else:
        model = pipeline.model.config
        pack = Pack.open(team.on_main(lambda: str(prepare_data(wanted).path)))
        alike = pack.space.word == model.space.word
        if alike and (*pack.info.shape[1:],) == (*model.canvas, model.network.channels):
            return pack
        wanted = replace(
            wanted,
            resolution=model.canvas,
            channels=model.network.channels,
            space=model.space.word,
        )
    return Pack.open(team.on_main(lambda: str(prepare_data(wanted).path)))


def _own_size(images: Path, data: str) -> tuple[int, int] | None:
    """The size of images, at which they are compared; a pack keeps its own, which is None."""
    if isinstance(open_source(data), Pack):
        return None
    size = common_size(open_source(str(images)))
    if size is None:
        raise ValueError(f"the images of {images} differ in size; give one with --resolution")
    if len(size) != 2:
        raise ValueError(f"{images} holds data of {len(size)} axes; images of two are compared")
    return size[-2], size[-1]


def _trained_on(path: Path) -> DataConfig:
    """What a run was trained on, by its configuration."""
    file = (path if (path / "model").is_dir() else path.parent) / "config.json"
    try:
        return decode(TrainConfig, read_json(file)).data
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} does not say what it was trained on; give --data PATH") from error


def _measured(evaluation: Evaluation, pipeline: Pipeline | None, path: Path) -> dict[str, Any]:
    images = None
    if pipeline is None:
        shape = evaluation.pack.info.shape
        images = prepare(
            open_source(str(path)),
            resolution=(shape[1], shape[2]),
            channels=shape[3],
            space=evaluation.pack.space.word,
            holdout=0,
        ).images
    count = evaluation.config.samples if images is None else len(images)
    team = evaluation.team
    if team.is_main:
        print(f"this will take about {duration(evaluation.estimate(pipeline, count))}: ", end="")
        parts = [] if pipeline is None else [(len(evaluation.loss_images(pipeline)), "losses")]
        if evaluation.extract is not None:
            reference = min(evaluation.config.reference, len(evaluation.pack))
            parts += [(count, "samples"), (reference, "real images")]
        print(", ".join(f"{number:,} {name}" for number, name in parts if number))
    total = 0 if evaluation.extract is None else (count + evaluation.uncached) // team.size
    with progress_bar(total, "image", disable=not team.is_main) as bar:
        watched = replace(evaluation, progress=bar.update)
        if pipeline is not None:
            return watched.of_model(pipeline)
        assert images is not None
        return watched.of_images(images, str(path))


def _bits(
    evaluation: Evaluation, pipeline: Pipeline, bits: BitsArguments
) -> tuple[dict[str, Any], dict[str, Any]]:
    pack, team = evaluation.pack, evaluation.team
    count = len(pack.some_held_out(bits.images)) // team.size
    with progress_bar(count, "likelihood", disable=not team.is_main) as bar:
        return held_out_bits(
            pipeline,
            pack,
            bits.equation,
            images=bits.images,
            batch=evaluation.config.batch,
            team=team,
            progress=bar.update,
        )


def _new_file(path: Path, model: bool) -> Path:
    root = Path("evaluations")
    if model:
        root = (path if (path / "model").is_dir() else path.parent) / root
    number = 1
    while (file := root / f"{number:04d}.json").exists():
        number += 1
    return file


ROWS = {
    "frechet_distance": "Frechet distance",
    "kernel_distance": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "copy_rate": "copies",
}


def table(result: dict[str, Any]) -> list[str]:
    """The numbers for people, each with what it depends on."""
    lines, card = [], result["card"]
    for name, label in (("held_out", "held-out loss"), ("loss", "loss on these images")):
        if held := result.get(name):
            bands = "  ".join(f"{band} {loss:.3f}" for band, loss in held["bands"].items())
            lines.append(
                f"{label:<28}{held['loss']:.4f}{_error(held)} on "
                f"{held['images']:,} images (by noise: {bands})"
            )
    if bits := result.get("bits"):
        how = card["bits"]
        lines.append(
            f"{'bits per dimension':<28}{bits['bits_per_dim']:.4f}{_error(bits)} on "
            f"{bits['images']:,} images (upper bound but for {how['steps']} steps, {how['method']})"
        )
    for name, label in ROWS.items():
        if name in result:
            spread = result.get(f"{name}_std")
            told = "" if not spread else f" +- {spread:.3g}"
            lines.append(f"{label:<28}{result[name]:.4g}{told}")
    if "extractor" in card:
        facts = ", ".join(str(v) for v in card["extractor"].values())
        height, width, _ = card["data"]["size"]
        crops = f" in crops of {card['crop']} pixels" if card["crop"] else ""
        lines.append(
            f"by {facts}; {card['samples']:,} samples against {card['reference']:,} images "
            f"of {card['data']['name']}, at {height}x{width}{crops}"
        )
        if card["samples"] < FULL:
            lines.append(
                "a Frechet distance of fewer than 50,000 samples is larger; compare like with like"
            )
    if not card["data"].get("of_the_model", True):
        lines.append(
            f"{card['data']['name']} is not what the model was trained on, or is divided in "
            "another way: some of these images may have been trained on"
        )
    lines += [f"not measured: {name} ({why})" for name, why in result["left_out"].items()]
    return lines


def _error(found: dict[str, Any]) -> str:
    error = found["standard_error"]
    return "" if error is None else f" +- {error:.4f}"
