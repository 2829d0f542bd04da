"""patchdiffusion evaluate RUN [options]"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from patchdiffusion.apps.likelihood import LikelihoodConfig, estimated_seconds, held_out_bits
from patchdiffusion.cli.evaluation_table import FULL, table
from patchdiffusion.cli.flags import flat, positional
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_file, check_run, home, new_file, run_of
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.plan import common_size
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.data.source import is_run, is_there, open_source
from patchdiffusion.data.space import Pixels
from patchdiffusion.encoders.features import CHANNELS, Extractor, extractor_or_reason
from patchdiffusion.metrics.estimate import estimate
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

_ALL = 10**9
_ANY = 1e6


@dataclass(frozen=True, kw_only=True)
class FeatureArguments:
    """Feature extractor for the comparison of images."""

    extractor: str = "inception"
    """inception, inception-legacy, dinov2 or module:callable; none measures the loss only."""
    weights: Path | None = None
    """File or folder of the weights; None downloads published ones once."""


@dataclass(frozen=True, kw_only=True)
class BitsArguments:
    """Likelihood of held-out images."""

    images: int = 0
    """Largest number of held-out images for bits per dimension; 0 measures none."""
    equation: LikelihoodConfig = field(default_factory=LikelihoodConfig, metadata=flat("bits"))

    def __post_init__(self) -> None:
        if self.images < 0:
            raise ValueError(f"bits.images must be at least 0, not {self.images}")


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Measure a run or a model, or compare images with images.

    For a model: loss on held-out images, bits per dimension (--bits.images), and a comparison of
    samples with real images (Frechet, kernel and sliced distance, precision, recall, density,
    coverage, copies). Measures that are not possible are listed, with the reason. The quick
    default shows a trend; --full is the protocol of publications. Also under torchrun.
    """

    example: ClassVar[str] = "patchdiffusion evaluate runs/photos --full"
    common: ClassVar[str] = (
        "full samples held-out data resolution features.extractor features.weights bits.images "
        "steps solver guidance weights seed batch save device threads"
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
    with join() as team:  # which gives each process a device of its own
        pipeline = _model(path, options, device)
        if pipeline is None and options.data is None:
            raise ValueError(
                f"{path} holds no model, only images; give --data PATH to compare them with"
            )
        if pipeline is None and options.bits.images:
            images = options.bits.images
            raise ValueError(f"{path} holds no model, which --bits.images {images} is about")
        folder = Path("evaluations") if pipeline is None else home(path) / "evaluations"
        check_file(options.save or folder / "0001.json")
        compared = _compared(path, options, pipeline, team)
        extract, missing = _extractor(options, team, device, compared.richest)
        evaluation = Evaluation(
            pack=compared.pack,
            config=config,
            extract=extract,
            team=team,
            missing=missing,
            compared=compared.colors,
        )
        bits = options.bits if pipeline is not None else BitsArguments()
        if team.is_main:
            print(_outlook(evaluation, pipeline, compared.images, bits))
        measured_bits = None if pipeline is None else _bits(evaluation, pipeline, bits)
        result = _measured(evaluation, pipeline, compared.images, str(path))
        if measured_bits is not None:
            result["bits"], result["card"]["bits"] = measured_bits
        if not result.keys() - {"card", "left_out"}:
            why = [f"{name}: {reason}" for name, reason in result["left_out"].items()]
            raise ValueError("; ".join(why) or "nothing is measured; choose --features.extractor")
        if team.is_main:
            print("\n".join(table(result)))
            file = options.save or new_file(folder, ".json")
            write_json(file, result)
            print(f"written to {file}")


def _model(path: Path, options: EvaluateArguments, device: torch.device) -> Pipeline | None:
    """Load the model at a path; None if there are images."""
    files = ("model.safetensors", "raw.safetensors", "model/config.json")
    holds = is_run(path) or any((path / name).exists() for name in files)
    if path.is_file() or (path.is_dir() and not holds):
        return None
    if options.resolution is not None:
        raise ValueError(f"--resolution is for images, and {path} is a model; leave it out")
    return load(path, weights=options.weights, device=device, precision=options.precision)


def _extractor(
    options: EvaluateArguments, team: Team, device: torch.device, pack: Pack
) -> tuple[Extractor | None, str]:
    """Extractor, or None and the reason why there is none, "" if none was asked for."""
    name, weights = options.features.extractor, options.features.weights
    axes, channels = pack.images.ndim - 2, pack.images.shape[-1]
    if name == "none" or not options.config.samples:
        return None, ""
    if axes != 2:
        return None, f"features are of images of two axes, and these have {axes}"
    if channels not in CHANNELS or (channels == 4 and not pack.space.alpha):
        return None, f"features are of gray, color and alpha, and these have {channels} channels"
    made = extractor_or_reason(name, weights=weights, device=device, team=team)
    return (None, made) if isinstance(made, str) else (made, "")


# ---- The two sides ----


@dataclass(frozen=True)
class Compared:
    """Data of an evaluation."""

    pack: Pack
    """Real images, in the size, channels and space of the model."""
    colors: Pack | None = None
    """Real images in color, if those of the model are gray."""
    images: Pack | None = None
    """Images that are measured instead of samples of a model."""

    @property
    def richest(self) -> Pack:
        """Real images with all of their colors."""
        return self.colors or self.pack


def _compared(
    path: Path, options: EvaluateArguments, pipeline: Pipeline | None, team: Team
) -> Compared:
    """Prepare real images and images to measure, with the channels that both need."""

    def prepared(data: DataConfig) -> Pack:
        return Pack.open(team.on_main(lambda: str(prepare_data(data).path)))

    data = _trained_on(path) if options.data is None else _like(path, options.data)
    if pipeline is not None:
        return _of_model(pipeline, data, prepared, keep_colors=options.data is not None)
    resolution = options.resolution or _own_size(path, data.path)
    pack = prepared(replace(data, resolution=resolution))
    size = (pack.info.shape[1], pack.info.shape[2])
    plain = DataConfig(path=str(path), resolution=size, max_enlarge=_ANY)
    images = prepared(replace(plain, space=pack.space.word))
    channels = max(pack.info.shape[3], images.info.shape[3])
    if pack.space.word == Pixels.word and channels in CHANNELS:
        if pack.info.shape[3] != channels:
            pack = prepared(replace(data, resolution=size, channels=channels))
        if images.info.shape[3] != channels:
            images = prepared(replace(plain, channels=channels, space="pixels"))
    return Compared(pack, images=images)


def _of_model(
    pipeline: Pipeline,
    wanted: DataConfig,
    prepared: Callable[[DataConfig], Pack],
    *,
    keep_colors: bool,
) -> Compared:
    """Real images for a model, and in color if its images are gray."""
    model, pack = pipeline.model.config, prepared(wanted)
    shape, channels = (*model.canvas, model.network.channels), model.network.channels
    if pack.space.word == model.space.word and (*pack.info.shape[1:],) == shape:
        return Compared(pack)
    fitting = replace(wanted, resolution=model.canvas, space=model.space.word)
    richer = keep_colors and pack.space.word == model.space.word == Pixels.word
    colors = pack.info.shape[-1]
    return Compared(
        prepared(replace(fitting, channels=channels)),
        prepared(replace(fitting, channels=colors)) if richer and colors > channels == 1 else None,
    )


def _like(path: Path, data: str) -> DataConfig:
    """Other images, with the range and fit of the training data of a run."""
    plain = DataConfig(path=data, max_enlarge=_ANY)
    try:
        trained = _trained_on(path)
    except ValueError:
        return plain
    return replace(plain, range=trained.range, fit=trained.fit)


def _own_size(images: Path, data: str) -> tuple[int, int] | None:
    """Common size of images, at which they are compared; None if the data is a pack."""
    if isinstance(open_source(data), Pack):
        return None
    size = common_size(open_source(str(images)))
    if size is None:
        raise ValueError(f"the images of {images} differ in size; choose one by --resolution")
    if len(size) != 2:
        raise ValueError(f"{images} holds data of {len(size)} axes; allowed are images of 2")
    return size[-2], size[-1]


def _trained_on(path: Path) -> DataConfig:
    """Training data of a run, from its configuration."""
    try:
        data = decode(TrainConfig, read_json(run_of(path) / "config.json")).data
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} does not say what it was trained on; give --data PATH") from error
    if not is_there(data.path):
        raise ValueError(
            f"the images that {path} was trained on are not at {data.path}; if they have been "
            f"moved, type patchdiffusion evaluate {path} --data FOLDER"
        )
    return data


# ---- Measuring ----


def _outlook(
    evaluation: Evaluation, pipeline: Pipeline | None, images: Pack | None, bits: BitsArguments
) -> str:
    """Estimate of the time of an evaluation, with its parts."""
    count = evaluation.config.samples if images is None else len(images)
    seconds, parts = estimate(evaluation, pipeline, count), []
    if pipeline is not None:
        parts += [(len(evaluation.loss_images(pipeline)), "losses")]
        count = count if evaluation.draws(pipeline) else 0
        if bits.images:
            likelihoods = len(evaluation.pack.some_held_out(bits.images))
            parts += [(likelihoods, "likelihoods")]
            seconds += _seconds_of_bits(evaluation, pipeline, bits) / evaluation.team.size
    parts += [(count, "samples" if images is None else "images")]
    if evaluation.extract is not None:
        parts += [(len(evaluation.reference), "real images")]
    listed = ", ".join(f"{number:,} {name}" for number, name in parts if number)
    return f"this will take about {duration(seconds)}: {listed}"


def _seconds_of_bits(evaluation: Evaluation, pipeline: Pipeline, bits: BitsArguments) -> float:
    pack, batch = evaluation.pack, evaluation.config.batch
    return estimated_seconds(pipeline, pack, bits.equation, images=bits.images, batch=batch)


def _measured(
    evaluation: Evaluation, pipeline: Pipeline | None, images: Pack | None, name: str
) -> dict[str, Any]:
    total = 0 if evaluation.extract is None else evaluation.reference.uncached
    if pipeline is not None:
        total += len(evaluation.loss_images(pipeline))
        total += evaluation.config.samples if evaluation.draws(pipeline) else 0
    total += 0 if images is None else len(images)
    team = evaluation.team
    with progress_bar(total // team.size, "image", disable=not team.is_main) as bar:
        watched = replace(evaluation, progress=bar.update)
        if pipeline is not None:
            return watched.of_model(pipeline)
        assert images is not None
        return watched.of_images(images.images, name)


def _bits(
    evaluation: Evaluation, pipeline: Pipeline, bits: BitsArguments
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    pack, team = evaluation.pack, evaluation.team
    if not bits.images:
        return None
    count = len(pack.some_held_out(bits.images)) // team.size
    with progress_bar(count, "image", name="likelihood", disable=not team.is_main) as bar:
        return held_out_bits(
            pipeline,
            pack,
            bits.equation,
            images=bits.images,
            batch=evaluation.config.batch,
            team=team,
            progress=bar.update,
        )
