"""The contract of tasks: the kind of model that a run trains.

A task is a frozen record in the configuration that defines model, objective and preview; loop,
optimizer, averages, checkpoints, guard and ranks are the same for all. A new task is a record that
inherits `TaskConfig`, and a member of the union in `config.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from patchdiffusion.data.augment import LABELS
from patchdiffusion.data.columns import Filled
from patchdiffusion.data.controls import read_columns
from patchdiffusion.data.pack import Pack
from patchdiffusion.losses import Loss
from patchdiffusion.model import ModelConfig
from patchdiffusion.nets.base import Makes
from patchdiffusion.nets.heads import Head
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.objectives import DenoisingConfig
from patchdiffusion.objectives.base import Materials
from patchdiffusion.rng import Draws
from patchdiffusion.system import families
from patchdiffusion.train.preview import Preview, Scene, reads_captions
from patchdiffusion.train.settings import Settings


@dataclass(frozen=True, kw_only=True)
class TaskConfig(ABC):
    """Base of tasks. The network with its head is optimized, by roles, and averaged."""

    own_loss: ClassVar[bool] = False
    """True if the loss is its own, and the objective of the configuration is not used."""

    def check(self, config: Settings, pack: Pack) -> None:
        """Raise `ValueError` unless configuration and data fit together."""
        check_images(config, pack)

    @abstractmethod
    def head(self, pack: Pack) -> Head:
        """Head of the network, which is built and saved with it."""

    @abstractmethod
    def model(self, network: nn.Module, config: Settings) -> nn.Module:
        """Model around the network, for objective and preview; see `parallel.Recorded`."""

    @abstractmethod
    def objective(self, config: Settings, materials: Materials) -> Loss:
        """Loss to minimize: (model, batch, draws) -> `LossOut`."""

    @abstractmethod
    def preview(self, scene: Scene) -> Preview:
        """Preview of a run."""

    def columns(self, config: Settings, pack: Pack) -> tuple[Filled, ...]:
        """Columns of a batch, by default those that network and adapter read."""
        return read_columns(pack.columns, config, pack)

    def classes(self, config: Settings, pack: Pack) -> tuple[str, ...]:
        """Class names of the model."""
        return pack.classes

    def counts(self, config: Settings, pack: Pack) -> tuple[int, ...]:
        """Training images of each class of the model; empty if that is not known."""
        return pack.trained_counts if config.network.num_classes else ()

    def files(self, model: ModelConfig, objective: Loss) -> Mapping[str, bytes]:
        """Files that are saved in the folder of the model, by their names there; mostly none."""
        return {}

    def levels(self, config: Settings, draws: Draws, law: NoiseLaw) -> Tensor | None:
        """Noise levels that a step draws, to report bad steps: [B], or None."""
        return None

    def dropout(self, config: Settings) -> float:
        """Probability that a sample is trained without its conditions."""
        return 0.0

    def unconditional(self, config: Settings, pack: Pack) -> bool:
        """True if the network also learns to denoise without a class and without a text."""
        if self.dropout(config) > 0:
            return True
        none = torch.ones(len(pack.train), dtype=torch.bool)
        if config.network.num_classes:
            none &= _unlabeled(pack)
        if reads_captions(config):
            none &= torch.tensor([not pack.captions[i] for i in pack.train.tolist()])
        return bool(none.any())

    def not_counting(self, config: Settings) -> tuple[str, ...]:
        """The parts of the loss that do not read `Batch.counted`, as flags."""
        return (f"--task {families.word(type(self))}",)

    def passes(self, config: Settings) -> float:
        """Number of forward passes of a training step beside the usual one."""
        return 0.0

    def evaluations(self, config: Settings, pack: Pack) -> float:
        """Approximate number of evaluations of the network on whole images in one preview."""
        return float(min(config.preview.held_out, len(pack.heldout)) + config.preview.grid)

    def teachers(self, config: Settings) -> tuple[Path, ...]:
        """Runs or models of the teachers."""
        return ()

    def digests(self) -> tuple[str, ...]:
        """Digests of files beside the teachers that the loss depends on."""
        return ()

    def located(self) -> Self:
        """A copy with absolute paths, so that a run may resume in any folder."""
        return self

    def told(self) -> str:
        """Loss of a task with its own one, for the first lines of a run."""
        return ""

    def shards(self, config: Settings) -> bool:
        """True if `--shard` is supported."""
        return True


def _unlabeled(pack: Pack) -> Tensor:
    """Training images without a label, bool [len(pack.train)]; none if no image has one."""
    if pack.labels is None:
        return torch.zeros(len(pack.train), dtype=torch.bool)
    return pack.labels[pack.train] < 0


def check_own_objective(config: Settings, name: str) -> None:
    """Raise `ValueError` for an objective or additions, which belong to denoisers."""
    plain = replace(config, objective=DenoisingConfig())
    if config.objective not in (plain.objective, config.network.prefers(plain).objective):
        raise ValueError(
            f"objective is {config.objective}, and {name} has its own; leave out --objective and "
            "its fields"
        )
    if config.additions:
        words = " ".join(families.word(type(addition)) for addition in config.additions)
        raise ValueError(
            f"{name} has its own objective, which takes no additions, not {words}: "
            "leave --additions out"
        )


_FIXES: Mapping[Makes, str] = {
    "denoiser": "choose another, such as --network unet, or train it by train autoencoder IMAGES",
    "autoencoder": "leave --network out, or use --network kl",
}


def check_images(config: Settings, pack: Pack, makes: Makes = "denoiser") -> None:
    """Raise `ValueError` unless the network fits the images: axes, channels and augmentation.

    `makes` is the kind of network that the task trains.
    """
    if config.network.makes != makes:
        raise ValueError(
            f"the network is {families.word(type(config.network))}, of the kind "
            f"{config.network.makes}, and this task trains one of the kind {makes}; {_FIXES[makes]}"
        )
    if makes == "autoencoder" and pack.space.random:
        raise ValueError(
            f"an autoencoder is trained on images, and {pack.name} holds {pack.space.word}; give "
            "the images themselves, without --autoencoder"
        )
    pack.space.check()
    channels, axes = pack.channels, pack.images.ndim - 2
    if axes != config.network.axes:
        raise ValueError(
            f"the network has {config.network.axes} axes, and the images have {axes} axes; "
            f"use one such as --network dit --network.patch{' 2' * axes}"
        )
    if channels != config.network.channels:
        raise ValueError(
            f"network.channels is {config.network.channels}, and the images have {channels}; "
            f"set --network.channels {channels}"
        )
    augment = config.data.augment
    if config.data.flip and augment.p and "xflip" in augment.operations:
        raise ValueError(
            "data.flip and the operation xflip of data.augment do the same; leave out one, for "
            "example by --data.no-flip"
        )
    if augment.p and config.network.augment_dim != LABELS:
        raise ValueError(
            f"network.augment_dim is {config.network.augment_dim}, and augmentation has {LABELS} "
            f"parameters; set --network.augment-dim {LABELS}"
        )
