"""The parts of a run, assembled from its configuration."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from patchdiffusion.data.feed import Feed
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.losses import DenoisingLoss
from patchdiffusion.model import ModelConfig, build, pick_device
from patchdiffusion.nets.count import training_flops
from patchdiffusion.patches import PatchPlan, Size
from patchdiffusion.train.config import DataConfig, RunConfig, TrainConfig
from patchdiffusion.train.ema import EMA
from patchdiffusion.train.folder import check_disk
from patchdiffusion.train.log import RunLog, quantity
from patchdiffusion.train.state import TrainState
from patchdiffusion.train.step import Stepper, best_precision
from patchdiffusion.train.watch import Watch, training_labels


def prepare_data(data: DataConfig) -> Pack:
    """Prepare the images of a configuration, or open what was prepared before.

    A pack is used as it is, unless another resolution or number of channels is asked for.
    """
    source = open_source(data.path)
    if isinstance(source, Pack):
        _, height, width, channels = source.info.shape
        square = height if height == width else (height, width)
        if data.resolution in (None, square, (height, width)) and data.channels in (None, channels):
            return source
    return prepare(source, resolution=data.resolution, channels=data.channels)


def check_fits(config: TrainConfig, pack: Pack) -> None:
    """Raise `ValueError` unless the network takes the channels and classes of the images."""
    channels, classes = pack.images.shape[3], len(pack.classes)
    if channels != config.network.channels:
        raise ValueError(
            f"the images have {channels} channels and the network {config.network.channels}: "
            f"set --network.channels {channels}"
        )
    if config.watch.guidance != 1 and not config.network.num_classes:
        raise ValueError(
            f"watch.guidance {config.watch.guidance} needs a network with classes; leave it at 1"
        )
    if config.network.num_classes not in (0, classes):
        raise ValueError(
            f"the data has {classes} classes and the network {config.network.num_classes}: "
            f"set --network.num-classes {classes}, or 0 to ignore them"
        )


@dataclass
class Training:
    """A run in memory. Nothing has been written yet."""

    config: TrainConfig
    run: RunConfig
    pack: Pack
    folder: Path
    log: RunLog
    device: torch.device
    precision: str
    canvas: Size
    plan: PatchPlan
    network: nn.Module
    ema: EMA
    stepper: Stepper
    flops: dict[Size, int]
    watch: Watch
    state: TrainState

    @property
    def now(self) -> float:
        """What the clock of the run shows."""
        return self.state.clock(self.config.clock)

    @property
    def finished(self) -> bool:
        """Whether the run has its full length."""
        return self.now >= self.config.images

    @property
    def averaged(self) -> NetDenoiser:
        """The denoiser of the averaged weights."""
        return NetDenoiser(self.ema.network, self.config.precond, self.config.noise)

    @property
    def model_config(self) -> ModelConfig:
        """What is needed to use the model of this run."""
        return ModelConfig(
            network=self.config.network,
            precond=self.config.precond,
            noise=self.config.noise,
            canvas=self.canvas,
            classes=self.pack.classes if self.config.network.num_classes else (),
            data=self.pack.name,
            images=self.state.equivalents,
            step=self.state.step,
        )

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.network.parameters())

    @property
    def total_steps(self) -> int:
        """Expected number of steps of the whole run."""
        cost = self.plan.cost()
        per_step = {
            "equivalents": self.config.batch * cost.step,
            "crops": self.config.batch * cost.crops,
            "steps": 1.0,
        }[self.config.clock]
        return max(1, math.ceil(self.config.images / per_step))

    def describe(self) -> None:
        """Say what this run is and takes; raises `ValueError` if the disk is too full."""
        config, pack, say = self.config, self.pack, self.log.say
        needed = check_disk(self.folder, self.parameters, self.run.keep)
        sizes = " + ".join(f"{k.size[0]}x{k.size[1]}" for k in self.plan.sizes)
        classes = f", {len(pack.classes)} classes" if config.network.num_classes else ""
        say(
            f"data      {pack.name}: {len(pack.train):,} images of {self.canvas[0]}x"
            f"{self.canvas[1]}{classes}, {len(pack.heldout):,} held out; pack {pack.path}"
        )
        say(
            f"network   {self.parameters / 1e6:.2f}M parameters, "
            f"{self.flops[self.canvas] / 6e9:.3g} GMAC per image; {self.precision} on "
            f"{self.device}, {torch.get_num_threads()} threads"
        )
        say(
            f"patches   {config.patches.mode}, sizes {sizes}; a step of batch {config.batch} "
            f"costs {self.plan.cost().step:.2f} of one with whole images only"
        )
        say(
            f"length    {quantity(config.images)} {config.clock}, about {self.total_steps:,} "
            f"steps; up to {needed / 1e9:.2g} GB of disk in {self.folder}"
        )


def assemble(config: TrainConfig, run: RunConfig, pack: Pack) -> Training:
    """Build everything a run needs; raises `ValueError` for what does not fit together."""
    check_fits(config, pack)
    device = pick_device(run.device)
    precision = best_precision(device) if config.precision == "auto" else config.precision
    folder = run.folder(config.name)
    canvas = (pack.images.shape[1], pack.images.shape[2])
    plan = config.plan(canvas)
    trained = tuple(k.size for k in plan.sizes)
    sizes = trained if canvas in trained else (canvas, *trained)
    network = build(config.network, seed=config.seed)
    # Weights as crops come, channels last: 5 % faster on a CPU.
    network = network.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    feed = Feed(
        pack.images,
        training_labels(config, pack),
        pack.train,
        seed=config.seed,
        flip=config.data.flip,
        device=device,
    )
    stepper = Stepper(
        NetDenoiser(network, config.precond, config.noise),
        DenoisingLoss(config.noise, config.weighting, config.label_dropout),
        list(network.parameters()),
        feed,
        config=config.optim,
        canvas=canvas,
        micro_batch=config.micro_batch,
        precision=precision,
    )
    return Training(
        config=config,
        run=run,
        pack=pack,
        folder=folder,
        log=RunLog(folder),
        device=device,
        precision=precision,
        canvas=canvas,
        plan=plan,
        network=network,
        ema=EMA(network),
        stepper=stepper,
        flops={size: round(training_flops(network, size)) for size in sizes},
        watch=Watch(config, pack, sizes, device, precision),
        state=TrainState(),
    )
