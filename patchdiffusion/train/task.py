"""The contract of tasks: what a run trains, and everything about the run that follows from it.

A task is a frozen record in the configuration that says what is built, what is minimised, what is
shown on the way and what is saved; loop, optimizer, averages, checkpoints, guards and ranks are the
same for all. A new task is a record that inherits `TaskConfig` and joins the union in `config.py`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from patchdiffusion.data.augment import LABELS
from patchdiffusion.data.columns import Filled, used
from patchdiffusion.data.pack import Pack
from patchdiffusion.losses import Loss
from patchdiffusion.nets.heads import Head
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.objectives import DenoisingConfig
from patchdiffusion.objectives.base import Materials
from patchdiffusion.rng import Draws
from patchdiffusion.system import families
from patchdiffusion.train.preview import Preview, Scene
from patchdiffusion.train.settings import Settings


@dataclass(frozen=True, kw_only=True)
class TaskConfig(ABC):
    """Base of tasks. What is optimised and averaged is the network with its head, by its roles."""

    def check(self, config: Settings, pack: Pack) -> None:
        """Raise `ValueError` unless configuration and data fit together."""
        check_images(config, pack)

    @abstractmethod
    def head(self, pack: Pack) -> Head:
        """What stands on the network: the head is built, and saved, with it."""

    @abstractmethod
    def model(self, network: nn.Module, config: Settings) -> nn.Module:
        """A network in use: what objective and preview are given, see `parallel.Recorded`."""

    @abstractmethod
    def objective(self, config: Settings, materials: Materials) -> Loss:
        """What is minimised: (model, batch, draws) -> `LossOut`."""

    @abstractmethod
    def preview(self, scene: Scene) -> Preview:
        """What a run shows of itself."""

    def columns(self, config: Settings, pack: Pack) -> tuple[Filled, ...]:
        """What crops bring beside their pixels: what the network reads."""
        return used(pack.columns, config.network.reads)

    def classes(self, config: Settings, pack: Pack) -> tuple[str, ...]:
        """Names of the classes that a model knows."""
        return pack.classes

    def levels(self, config: Settings, draws: Draws, law: NoiseLaw) -> Tensor | None:
        """The noise levels that a step draws, for reports of what went wrong: [B], or None."""
        return None

    def dropout(self, config: Settings) -> float:
        """Share of the samples that are trained without their conditions."""
        return 0.0

    def passes(self, config: Settings) -> float:
        """Forward passes of a training step beside the usual one."""
        return 0.0

    def teachers(self, config: Settings) -> tuple[Path, ...]:
        """Runs or models of denoisers that it needs."""
        return ()

    def shards(self, config: Settings) -> bool:
        """Whether it can be trained with `--shard`."""
        return True


def check_own_objective(config: Settings, name: str) -> None:
    """Raise `ValueError` for an objective or additions, which belong to denoisers."""
    if config.objective != DenoisingConfig():
        raise ValueError(
            f"{name} has its own objective, not {config.objective}: leave --objective and its "
            "fields alone"
        )
    if config.additions:
        words = " ".join(families.word(type(addition)) for addition in config.additions)
        raise ValueError(
            f"{name} has its own objective, which takes no additions, not {words}: "
            "leave --additions out"
        )


def check_images(config: Settings, pack: Pack) -> None:
    """Raise `ValueError` unless the network takes axes, channels and augmentation of the images."""
    channels, axes = pack.images.shape[-1], pack.images.ndim - 2
    if axes != config.network.axes:
        raise ValueError(
            f"the data has {axes} axes and the network {config.network.axes}: use a network for "
            f"{axes} axes, such as --network transformer --network.patch{' 2' * axes}"
        )
    if channels != config.network.channels:
        raise ValueError(
            f"the images have {channels} channels and the network {config.network.channels}: "
            f"set --network.channels {channels}"
        )
    augment = config.data.augment
    if config.data.flip and augment.p and "xflip" in augment.operations:
        raise ValueError(
            "data.flip and the operation xflip of data.augment do the same: leave one out, for "
            "example by --data.no-flip"
        )
    if augment.p and config.network.augment_dim != LABELS:
        raise ValueError(
            f"the augmentation has {LABELS} numbers and the network takes "
            f"{config.network.augment_dim}: set --network.augment-dim {LABELS}"
        )
