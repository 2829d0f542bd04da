"""patchdiffusion concept RUN IMAGES [options]"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from patchdiffusion.cli.flags import flat, positional
from patchdiffusion.cli.onmodel import train_on
from patchdiffusion.data.pack import Pack
from patchdiffusion.model import ModelConfig
from patchdiffusion.nets.adapters import LoRA
from patchdiffusion.recipes.teaching import teaching
from patchdiffusion.train.concept import ConceptTask
from patchdiffusion.train.config import RunConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class ConceptArguments:
    """Teach a few-step model a new class from a few images, together with its teacher.

    RUN is the few-step model; --task.teacher is a run of a denoiser, by default RUN itself if it is
    one, too. The class is called as the folder of the images. The teacher learns it as well: its
    adapter is model/teacher of the new run. The same command again resumes the run.
    """

    example: ClassVar[str] = "patchdiffusion concept runs/meanflow ./mug"
    common: ClassVar[str] = (
        "task.teacher task.names images batch optim.lr adapter seed name out device threads "
        "max-hours fresh print-config dry-run"
    )

    subject: tuple[str, ...] = field(default=(), metadata=positional("RUN IMAGES"))
    """Folder of the few-step model, and a folder, zip, array or pack of images."""
    training: TrainConfig = field(
        default_factory=lambda: TrainConfig(task=ConceptTask(), adapter=LoRA(concept=True)),
        metadata=flat("training"),
    )
    run: RunConfig = field(default_factory=RunConfig, metadata=flat("run"))
    print_config: bool = False
    """Print all settings as JSON, for train --config, and stop."""


def main(arguments: Sequence[str]) -> None:
    """Build the configuration from that of the model, the images and flags, and train."""
    train_on(arguments, "concept", ConceptArguments, _teaching)


def _teaching(config: TrainConfig, model: ModelConfig, pack: Pack, path: Path) -> TrainConfig:
    return teaching(config, model, pack, path)
