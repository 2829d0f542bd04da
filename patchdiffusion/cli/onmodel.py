"""Commands that train a model further on other images: `patchdiffusion COMMAND RUN IMAGES`."""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

from patchdiffusion.cli.flags import read
from patchdiffusion.cli.parse import parse, parse_some
from patchdiffusion.cli.places import check_run
from patchdiffusion.cli.subject import Early, Subject
from patchdiffusion.cli.train import with_whole_paths
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.data.store import packs_aside
from patchdiffusion.model import ModelConfig, load_model
from patchdiffusion.system.serialize import decode, encode
from patchdiffusion.train.config import RunConfig, TrainConfig
from patchdiffusion.train.loop import train


class Arguments(Protocol):
    """The arguments of such a command."""

    @property
    def training(self) -> TrainConfig: ...
    @property
    def run(self) -> RunConfig: ...
    @property
    def print_config(self) -> bool: ...


Configure = Callable[[TrainConfig, ModelConfig, Pack, Path], TrainConfig]
"""The configuration of a recipe, a model, its new images and its folder -> that of the run."""


def train_on(arguments: Sequence[str], command: str, record: Any, configure: Configure) -> None:
    """Build the configuration from that of the model, the images and flags, and train.

    `record` is the class of the arguments, with an `example`.
    """
    words, flag_words = read(arguments)
    if not words or "help" in flag_words:  # or what is missing
        parse(record(), arguments, command)
    if len(words) != 2:
        typed = " ".join(words) or "nothing"
        raise ValueError(f"{command} needs a run and images: {record.example}; not {typed}")
    path, rest = Path(words[0]), list(arguments[2:])
    check_run(path)
    model = load_model(path).config
    early = parse_some(Early(), rest)
    if early.name is None:
        rest += ["--name", f"{name_of_run(path)}-{name_of_run(Path(words[1]))}"]

    def resumed_or_new(typed: list[str]) -> TrainConfig:
        if model.space.word == "pixels":
            sizes = {"data.resolution": model.canvas, "data.channels": (model.network.channels,)}
            for flag, values in sizes.items():
                if flag not in flag_words:
                    typed = [*typed, f"--{flag}", *map(str, dict.fromkeys(values))]
        subject = Subject.of(typed, command)
        config = subject.config(typed)
        if subject.resumes:
            return config
        return configure(config, model, prepare_data(config.data), path)

    with packs_aside() if "dry-run" in flag_words else nullcontext():
        config = resumed_or_new([words[1], *rest])
        run = RunConfig(start_from=path)
        options: Arguments = parse(record(training=config, run=run), [*words, *rest], command)
        if options.print_config:
            stored = decode(TrainConfig, encode(options.training))
            print(json.dumps(encode(stored), indent=2))
            return
        train(with_whole_paths(options.training), options.run)


def name_of_run(path: Path) -> str:
    """Name of a folder without endings."""
    return path.resolve().name.split(".")[0] or "run"
