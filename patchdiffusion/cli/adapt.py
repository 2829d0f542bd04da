"""patchdiffusion adapt RUN DATA --adapter WORD [options]"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from patchdiffusion.cli.flags import flat, positional, read
from patchdiffusion.cli.parse import parse, parse_some
from patchdiffusion.cli.places import check_run
from patchdiffusion.cli.subject import Early, Subject
from patchdiffusion.cli.train import with_whole_paths
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.data.store import packs_aside
from patchdiffusion.model import ModelConfig, load_model
from patchdiffusion.nets.adapters import LoRA
from patchdiffusion.recipes.adapting import adapting
from patchdiffusion.system.serialize import decode, encode
from patchdiffusion.train.config import RunConfig, TrainConfig
from patchdiffusion.train.loop import train


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
    words, flag_words = read(arguments)
    if not words or "help" in flag_words:  # or what is missing
        parse(AdaptArguments(), arguments, "adapt")
    if len(words) != 2:
        typed = " ".join(words) or "nothing"
        raise ValueError(f"adapt needs a run and images: {AdaptArguments.example}; not {typed}")
    path, rest = Path(words[0]), list(arguments[2:])
    check_run(path)
    model = load_model(path).config
    early = parse_some(Early(), rest)
    if early.name is None:
        rest += ["--name", f"{_name(path)}-{_name(Path(words[1]))}"]
    with packs_aside() if "dry-run" in flag_words else nullcontext():
        config = _config([words[1], *rest], flag_words, model)
        run = RunConfig(start_from=path)
        options = parse(AdaptArguments(training=config, run=run), [*words, *rest], "adapt")
        if options.print_config:
            stored = decode(TrainConfig, encode(options.training))
            print(json.dumps(encode(stored), indent=2))
            return
        train(with_whole_paths(options.training), options.run)


def _name(path: Path) -> str:
    return path.resolve().name.split(".")[0] or "run"


def _config(
    arguments: list[str], flag_words: dict[str, list[str]], model: ModelConfig
) -> TrainConfig:
    """The configuration before flags: that of the run to resume, or for the new images."""
    if model.space.word == "pixels":
        sizes = {"data.resolution": model.canvas, "data.channels": (model.network.channels,)}
        for flag, values in sizes.items():
            if flag not in flag_words:
                arguments = [*arguments, f"--{flag}", *map(str, dict.fromkeys(values))]
    subject = Subject.of(arguments, "adapt")
    config = subject.config(arguments)
    if subject.resumes:
        return config
    adapter = model.adapter if model.adapter.maps else LoRA()
    return adapting(config, model, prepare_data(config.data), adapter)
