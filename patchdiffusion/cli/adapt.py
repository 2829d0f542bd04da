"""patchdiffusion adapt RUN DATA --adapter WORD [options]"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from patchdiffusion.cli.flags import flat, positional
from patchdiffusion.cli.onmodel import train_on
from patchdiffusion.data.pack import Pack
from patchdiffusion.model import ModelConfig
from patchdiffusion.nets.adapters import LoRA
from patchdiffusion.recipes.adapting import adapting
from patchdiffusion.train.config import RunConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class AdaptArguments:
    """Adapt a trained model to other images, by few parameters that change a frozen network.

    The same as `train DATA --start-from RUN` with network, parameterisation and noise law of RUN.
    The adapter is kept in model/adapter of the new run, a small folder for `sample RUN --adapter`.
    The same command again resumes the run.
    """

    example: ClassVar[str] = "patchdiffusion adapt runs/photos ./drawings"
    common: ClassVar[str] = (
        "adapter images batch optim.lr patches data.flip seed name out device threads max-hours "
        "fresh print-config dry-run"
    )

    subject: tuple[str, ...] = field(default=(), metadata=positional("RUN DATA"))
    """Folder of the run or model, and a folder, zip, array or pack of images."""
    training: TrainConfig = field(
        default_factory=lambda: TrainConfig(adapter=LoRA()), metadata=flat("training")
    )
    run: RunConfig = field(default_factory=RunConfig, metadata=flat("run"))
    print_config: bool = False
    """Print all settings as JSON, for train --config, and stop."""


def main(arguments: Sequence[str]) -> None:
    """Build the configuration from that of the model, the images and flags, and train."""
    train_on(arguments, "adapt", AdaptArguments, _adapting)


def _adapting(config: TrainConfig, model: ModelConfig, pack: Pack, path: Path) -> TrainConfig:
    return adapting(config, model, pack, model.adapter if model.adapter.maps else LoRA())
