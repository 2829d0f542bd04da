"""The command line as functions: `train`, `auto`, and a run that can be sampled."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from patchdiffusion.cli.keywords import arguments_of, as_keywords, changed_fields
from patchdiffusion.cli.subject import Subject
from patchdiffusion.cli.train import TrainArguments, chosen, parsed
from patchdiffusion.data.pack import Pack
from patchdiffusion.model import Weights
from patchdiffusion.nets import own
from patchdiffusion.sampling.pipeline import Pipeline, load
from patchdiffusion.train import loop
from patchdiffusion.train.callbacks import Callback
from patchdiffusion.train.config import RunConfig, TrainConfig
from patchdiffusion.train.report import read_log


@dataclass(frozen=True)
class Run:
    """A run on disk, which goes wherever its folder goes: `load(run)`, `Path(run)`."""

    folder: Path

    def __fspath__(self) -> str:
        return str(self.folder)

    def __str__(self) -> str:
        return str(self.folder)

    def load(self, weights: Weights = "averaged", **options: Any) -> Pipeline:
        """The model of the run, ready to sample; see `patchdiffusion.load`."""
        return load(self.folder, weights=weights, **options)

    def sample(self, count: int = 16, **settings: Any) -> np.ndarray:
        """Images of the averaged weights; see `Pipeline.sample`."""
        return self.load().sample(count, **settings)

    @property
    def log(self) -> list[dict[str, Any]]:
        """The records of `log.jsonl`."""
        return read_log(self.folder)


def train(
    what: TrainConfig | Pack | str | os.PathLike[str],
    run: RunConfig | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    **fields: Any,
) -> Run:
    """Train on images at a path, by a recipe, or with a full configuration; returns the run.

    `fields` are those of `TrainConfig` and `RunConfig`, as on the command line: `images=5000`,
    `batch=16`, `out="runs/a"`, `network="dit"`, `optim={"lr": 1e-3}`, `network=UNetConfig(
    base=16)`. A network of your own may be any module `F(x, noise, cond)`. `callbacks` are called
    with every `Event`; one that returns True, or raises, ends the run, which is saved before. The
    same call again goes on with the run. Raises `ValueError` for what cannot work,
    before anything is written, and `Stop` when a run cannot go on.
    """
    with ExitStack() as held:
        with as_keywords():
            flags = arguments_of(TrainArguments(), _named(fields))
            if isinstance(what, TrainConfig):
                arguments = parsed(flags, what, run=run)
            else:
                flag_words = arguments_of(TrainArguments(), changed_fields(run or RunConfig()))
                arguments = held.enter_context(chosen([_path(what), *flag_words, *flags]))
        return Run(loop.train(arguments.training, arguments.run, callbacks))


def auto(
    what: Pack | str | os.PathLike[str], *, device: str = "auto", **fields: Any
) -> TrainConfig:
    """Prepare images and choose a configuration for them: `train(auto("photos", batch=8))`.

    `fields` are those of `TrainConfig`, see `train`.
    """
    with as_keywords():
        flags = arguments_of(TrainArguments(), _named(fields))
        config = Subject.of([_path(what), "--device", device, *flags], "train").fresh(flags)
        return parsed(flags, config).training


def edit(config: TrainConfig, **fields: Any) -> TrainConfig:
    """A configuration with other values, by the names of the command line; see `train`."""
    with as_keywords():
        flags = arguments_of(TrainArguments(), _named(fields))
        return parsed(flags, config).training


def _named(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with the record of a network that is none of ours, which is made known."""
    network = fields.get("network")
    if own.is_network(network):
        own.allow(network)
        return {**fields, "network": own.OwnNetworkConfig.of(network).changes()}
    return dict(fields)


def _path(what: Pack | str | os.PathLike[str]) -> str:
    return str(what.path) if isinstance(what, Pack) else os.fspath(what)
