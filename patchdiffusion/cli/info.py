"""patchdiffusion info NETWORK|RUN [options]"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from patchdiffusion import recipes
from patchdiffusion.cli.flags import flat, positional, read
from patchdiffusion.cli.parse import parse, parse_some
from patchdiffusion.cli.places import check_run, run_of
from patchdiffusion.cli.words import did_you_mean
from patchdiffusion.cond import Cond
from patchdiffusion.conditioners.base import text_of
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.losses import squared_error
from patchdiffusion.model import ModelConfig, load_model
from patchdiffusion.nets import Network, base
from patchdiffusion.nets.count import Count, count, training_flops
from patchdiffusion.nets.heads import Head, OwnHead
from patchdiffusion.patches import Size, size_name
from patchdiffusion.plans import PatchPlan
from patchdiffusion.system import families
from patchdiffusion.system.device import autocast, best_precision, pick_device, synchronize
from patchdiffusion.system.memory import total_memory
from patchdiffusion.system.text import counted
from patchdiffusion.train.config import TrainConfig
from patchdiffusion.train.describe import in_words
from patchdiffusion.train.folder import stored_config
from patchdiffusion.train.log import duration
from patchdiffusion.train.outlook import Activations
from patchdiffusion.train.status import measured_peak

TRIAL = 2e11
"""Limit of the operations of a pass that is timed on a CPU: a second or a few."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images of a network, on which the defaults of all other flags depend."""

    resolution: tuple[int, ...] = ()
    """Side, or length of each axis; the default is that of the run, or 64."""
    channels: int | None = None
    """Number of channels; None is that of the run, or 3."""
    classes: int | None = None
    """Number of classes; None is that of the run, or 0."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of training; auto is CUDA if available."""

    def __post_init__(self) -> None:
        if self.resolution and min(self.resolution) < 1:
            raise ValueError(f"resolution must be positive, not {self.resolution}")
        for name, least in (("channels", 1), ("classes", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")

    def canvas(self, axes: int, default: Size) -> Size:
        """Length of each axis of the images."""
        sides = self.resolution or default
        return sides * axes if len(sides) == 1 else sides


@dataclass(frozen=True, kw_only=True)
class InfoArguments(Images):
    """Print size, cost, memory and parts of a network, or of that of a run.

    Nothing is trained or written. Flags of train change the network, the crops and the batch.
    """

    example: ClassVar[str] = "patchdiffusion info dit-b/2 --resolution 64"
    common: ClassVar[str] = "resolution channels classes batch patches precision device"

    subject: str = field(default="", metadata=positional("NETWORK|RUN"))
    """Word of a network or preset, such as unet or dit-b/2, or a folder of a run or model."""
    training: TrainConfig = field(default_factory=TrainConfig, metadata=flat("training"))


@dataclass(frozen=True)
class Subject:
    """A network within the settings of its training."""

    training: TrainConfig
    canvas: Size
    device: torch.device
    model: ModelConfig | None = None
    """Facts about a trained model."""

    @property
    def head(self) -> Head:
        """Head of the network."""
        return OwnHead() if self.model is None else self.model.head

    @cached_property
    def network(self) -> base.Network:
        """The network, without weights."""
        with torch.device("meta"):
            network = self.head.build(self.training.network)
            self.training.precond.attach(network, self.training.network.channels)
            return network

    @property
    def config(self) -> Network:
        """Configuration of the network."""
        return self.training.network

    @cached_property
    def plan(self) -> PatchPlan:
        """Patch plan of the training."""
        return self.training.plan(self.canvas)

    @cached_property
    def costs(self) -> dict[Size, Count]:
        """Cost of whole images, and of crops of each size."""
        sizes = dict.fromkeys([self.canvas, *(group.size for group in self.plan.groups)])
        return {size: count(self.network, size, self.text) for size in sizes}

    @property
    def text(self) -> Cond:
        """A text that the network reads, on meta."""
        return text_of(self.training.conditioners, self.canvas)

    @property
    def precision(self) -> str:
        """Precision of the training."""
        chosen = self.training.precision
        return best_precision(self.device) if chosen == "auto" else chosen

    @property
    def step(self) -> float:
        """Mean operations of a step of training."""
        share = 1 + self.training.task.passes(self.training) / 3
        kinds = self.plan.kinds(self.training.clock)
        costs = {size: share * training_flops(self.network, size, self.text) for size in self.costs}
        return sum(p * sum(costs[g.size] * g.count for g in groups) for p, groups in kinds)

    @property
    def averages(self) -> int:
        """Copies of the weights that are averaged."""
        return 1 + len(self.training.ema.profiles)


def main(arguments: Sequence[str]) -> None:
    """Print facts about a network."""
    words, flags = read(arguments)
    if not words or "help" in flags:
        config = recipes.folder(recipes.Facts(canvas=(64, 64), device="cpu"))
        parse(InfoArguments(training=config), arguments, "info")
        raise ValueError(f"NETWORK|RUN is missing; {_networks()}")
    lines = facts(subject_of(arguments, words[0]))
    print("\n".join(f"{name:<10}{text}" for name, text in lines))


def subject_of(arguments: Sequence[str], name: str) -> Subject:
    """Network by its word, or that of a run or model by its folder, changed by flags.

    A run or model in a folder of that name takes precedence.
    """
    images = parse_some(Images(), arguments)
    if families.find(Network, name) is not None and not (Path(name) / "config.json").is_file():
        return _of_word(arguments, name, images)
    return _of_run(arguments, name, images)


def _networks() -> str:
    """Words of networks, and where those of presets are listed, for an error."""
    words = ", ".join(sorted(families.words(Network)))
    return f"networks are {words}, and presets such as dit-b/2: patchdiffusion info --help network"


def _of_word(arguments: Sequence[str], word: str, images: Images) -> Subject:
    """A network by its word, in the training of a folder of images."""
    device = pick_device(images.device)
    preset = families.create(Network, word, "network")
    canvas = images.canvas(preset.axes, (64,))
    about = recipes.Facts(
        canvas=canvas,
        channels=images.channels or 3,
        classes=images.classes or 0,
        device=device.type,
    )
    typed = [*arguments, "--network", word]
    config = parse(InfoArguments(training=recipes.folder(about)), typed, "info").training
    return _fitted(config, canvas, about.channels, device)


def _of_run(arguments: Sequence[str], path: str, images: Images) -> Subject:
    """The network of a run or model, in its training."""
    folder = Path(path)
    if not folder.exists():
        near = did_you_mean(path, [*families.words(Network), *families.presets(Network)])
        raise ValueError(f"{path} is neither a network nor a run; {_networks()}{near}")
    check_run(folder)
    model = load_model(folder).config
    run = run_of(folder)
    stored = stored_config(run) if (run / "log.jsonl").exists() else None
    config = stored or TrainConfig(
        network=model.network,
        precond=model.precond,
        noise=model.noise,
        conditioners=model.conditioners,
    )
    config = parse(InfoArguments(training=config), arguments, "info").training
    changes = {"channels": images.channels, "num_classes": images.classes}
    given: dict[str, Any] = {name: v for name, v in changes.items() if v is not None}
    config = replace(config, network=replace(config.network, **given))
    canvas = images.canvas(len(model.canvas), model.canvas)
    device = pick_device(images.device)
    return _fitted(config, canvas, config.network.channels, device, model)


def _fitted(
    config: TrainConfig,
    canvas: Size,
    channels: int,
    device: torch.device,
    model: ModelConfig | None = None,
) -> Subject:
    config = config.for_canvas(canvas, channels)
    if len(canvas) != (axes := config.network.axes):
        raise ValueError(
            f"resolution is {size_name(canvas)}, and the network is for data of "
            f"{counted(axes, 'axis', 'axes')}; give one side for each axis, and a network for as "
            "many, such as --network.patch 4 4 for images"
        )
    return Subject(config, canvas, device, model)


# ---- Facts ----


def facts(subject: Subject) -> list[tuple[str, str]]:
    """Lines about a network, each with a name."""
    config, network, model = subject.config, subject.network, subject.model
    whole = subject.costs[subject.canvas]
    params = whole.params
    classes = counted(config.num_classes, "class", "classes")
    about = f"{counted(config.channels, 'channel')}, {classes}"
    word = families.word(type(config))
    lines = [("network", f"{word}, {whole.parameters_text}, {about}")]
    if model is not None:
        lines.append(
            (
                "model",
                f"{model.head.kind} of {model.data or '-'}, trained on {model.images:,.0f} images",
            )
        )
        if about := model.space.described:
            lines.append((model.space.word, about))
    lines += [("texts", in_words(c)) for c in subject.training.conditioners if c.reads_prompts]
    for number, (size, cost) in enumerate(subject.costs.items()):
        name = f"{'crops of' if number else 'whole images of'} {size_name(size)}"
        tokens = f", {counted(tokens, 'token')}" if (tokens := config.num_tokens(size)) else ""
        lines.append(("" if number else "cost", f"{name}: {cost.macs / 1e9:.3g} GMAC{tokens}"))
    timing, kept = _measured(subject, params)
    lines += [("memory", _memory(subject, params, kept)), ("time", timing)]
    units = {type(unit).__name__: 0 for unit in network.units()}
    for unit in network.units():
        units[type(unit).__name__] += 1
    lines.append(("units", ", ".join(f"{n} {name}" for name, n in units.items()) or "none"))
    lines.append(("taps", " ".join(network.taps) or "none"))
    alone = "image and noise level" if config.makes == "denoiser" else "image"
    return [*lines, ("reads", " ".join(sorted(config.reads)) or f"{alone} alone")]


def _memory(subject: Subject, params: int, kept: float) -> str:
    """Estimated memory of training, as in the dry run."""
    training, each = subject.training, 4 * params / 1e9
    batch = min(training.batch, training.micro_batch or training.batch)
    kept = kept * batch / 1e9
    total = each * (4 + subject.averages) + kept
    return (
        f"about {total:.2g} GB to train: {each:.2g} of weights, as much of gradients and "
        f"of {counted(subject.averages, 'average')}, {2 * each:.2g} of moments, {kept:.2g} kept "
        f"for the backward pass of {counted(batch, 'image')}"
    )


def _measured(subject: Subject, params: int) -> tuple[str, float]:
    """Estimated time of a step, and bytes that are kept for the backward pass of an image."""
    flops, precision = 6 * subject.costs[subject.canvas].macs, subject.precision
    on = f"{precision} on {subject.device}, {counted(torch.get_num_threads(), 'thread')}"
    work = f"a step of {counted(subject.training.batch, 'image')}, {subject.step:.2g} operations"
    fits = 16 * params < total_memory(subject.device) / 4
    slow = subject.device.type == "cpu" and flops > TRIAL
    if slow or not fits or not isinstance(subject.head, OwnHead):
        rate = measured_peak(subject.device, precision)
        _, kept = _trial(subject, torch.device("meta"), 1)
        said = f"at the {rate / 1e12:.2g} TFLOP/s of matrix products here, which no network reaches"
        time_text = f"at least {_short(subject.step / rate)}"
        return f"{time_text} for {work}: {said} ({on})", kept / (1 + (precision != "fp32"))
    number = max(1, min(8, int(TRIAL / 4 / flops)))
    seconds, kept = _trial(subject, subject.device, number)
    time_text = f"about {_short(subject.step * seconds / (flops * number))}"
    said = f"measured on {counted(number, 'whole image')}"
    return f"{time_text} for {work}: {said} ({on})", kept / number


def _short(seconds: float) -> str:
    return f"{seconds:.2g}s" if seconds < 10 else duration(seconds)


def _trial(subject: Subject, device: torch.device, number: int) -> tuple[float, float]:
    """Seconds, and bytes kept, of the second forward and backward pass of some images."""
    training, real = subject.training, device.type != "meta"
    network = subject.network
    if real:
        network = training.network.build()
        training.precond.attach(network, training.network.channels)
        network.to(device)
    precond = training.objective.precond(training.precond)
    denoiser = NetDenoiser(network, precond, training.noise if real else None)
    x = torch.zeros(number, training.network.channels, *subject.canvas, device=device)
    sigma = torch.ones(number, device=device)
    seconds, kept, weights = 0.0, Activations(), list(network.parameters())
    for _ in range(2 if real else 1):  # the first one also prepares kernels and buffers
        kept = Activations(excepted=weights)
        hooks = torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack)
        start = time.perf_counter()
        with autocast(device, subject.precision) if real else nullcontext(), hooks:
            loss = squared_error(denoiser(x, sigma, Cond()), x).sum()
        loss.backward()
        synchronize(device)
        seconds = time.perf_counter() - start
    return seconds, float(kept.most)
