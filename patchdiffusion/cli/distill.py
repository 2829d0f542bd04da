"""patchdiffusion distill RUN --objective WORD [options]"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from patchdiffusion.cli.flags import flat, positional, read
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_run
from patchdiffusion.cli.train import with_whole_paths
from patchdiffusion.data.source import is_run, is_there
from patchdiffusion.data.store import packs_aside
from patchdiffusion.recipes.distilled import distilled, distilling, starts_with
from patchdiffusion.system.files import expanded
from patchdiffusion.system.serialize import decode, encode
from patchdiffusion.train.config import RunConfig, TrainConfig
from patchdiffusion.train.folder import stored_config
from patchdiffusion.train.loop import train


@dataclass(frozen=True, kw_only=True)
class DistillArguments:
    """Train a few-step model of a trained one, with the settings that suit.

    The same as `train` with the images and the network of RUN, its weights as a start where they
    fit, and its model as the teacher where the objective has one. The new run lies beside RUN, and
    the same command resumes it.
    """

    example: ClassVar[str] = "patchdiffusion distill runs/photos --objective boot"
    common: ClassVar[str] = (
        "objective images batch optim.lr patches seed name out device threads max-hours fresh "
        "start-from print-config dry-run"
    )

    path: Path = field(default=Path(), metadata=positional("RUN"))
    """Folder of the run of the teacher."""
    training: TrainConfig = field(default_factory=TrainConfig, metadata=flat("training"))
    run: RunConfig = field(default_factory=RunConfig, metadata=flat("run"))
    print_config: bool = False
    """Print all settings as JSON, for train --config, and stop."""


def main(arguments: Sequence[str]) -> None:
    """Build the configuration from that of the teacher and flags, and train."""
    words, flag_words = read(arguments)
    if not words:  # the help, or what is missing
        parse(DistillArguments(), arguments, "distill")
    path = Path(words[0])
    check_run(path)
    config, run = _defaults(path, flag_words)
    options = parse(DistillArguments(training=config, run=run), arguments, "distill")
    if options.print_config:
        print(json.dumps(encode(decode(TrainConfig, encode(options.training))), indent=2))
        return
    with packs_aside() if options.run.dry_run else nullcontext():
        train(with_whole_paths(options.training), options.run)


def _defaults(path: Path, flag_words: dict[str, list[str]]) -> tuple[TrainConfig, RunConfig]:
    """The configuration before flags, that of the new run if it exists, and its folder."""
    teacher = stored_config(expanded(path)) if is_run(expanded(path)) else None
    if teacher is None:
        raise ValueError(
            f"{path} has no configuration of a run, which says how it was trained; use "
            f"patchdiffusion train DATA --start-from {path} --objective WORD"
        )
    chosen = flag_words.get("objective", [])
    if len(chosen) != 1:
        raise ValueError(
            f"--objective is missing; give one of {', '.join(distilling())}: patchdiffusion "
            f"distill {path} --objective boot"
        )
    folder = expanded(path).resolve()
    config = distilled(teacher, chosen[0], folder)
    if not is_there(config.data.path) and "data.path" not in flag_words:
        raise ValueError(
            f"the images that {path} was trained on are not at {config.data.path}; if they have "
            "been moved, add --data.path FOLDER"
        )
    name = flag_words.get("name", [config.name])
    out = folder.parent / (name[0] if len(name) == 1 else config.name)
    folders = flag_words.get("out", [])
    stored = stored_config(expanded(folders[0]) if folders else out)
    if stored is not None and "fresh" not in flag_words:
        config = stored
    start = folder if starts_with(config, teacher) else None
    return config, RunConfig(out=out, start_from=start)
