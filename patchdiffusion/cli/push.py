"""patchdiffusion push RUN user/name [options]"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from patchdiffusion.cli.flags import positional
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_run
from patchdiffusion.model import load_model
from patchdiffusion.sampling.publish import push


@dataclass(frozen=True, kw_only=True)
class PushArguments:
    """Push a model to the hub of Hugging Face, with a card that is written from its run.

    `patchdiffusion sample user/name` uses it everywhere. Images, checkpoints, paths and the log
    stay here. Log in before, by `hf auth login`, or set HF_TOKEN.
    """

    example: ClassVar[str] = "patchdiffusion push runs/photos me/photos --private"

    run: Path = field(default=Path(), metadata=positional("RUN"))
    """Folder of a run or model."""
    name: str = field(default="", metadata=positional("NAME"))
    """Name on the hub: user/name, or user/name@branch."""
    private: bool = False
    """Create a private repository, if it does not exist."""
    raw: bool = False
    """Push the raw weights, too, which other averages and trainings may start from."""


def main(arguments: Sequence[str]) -> None:
    """Push, and print the address."""
    options = parse(PushArguments(), arguments, "push")
    check_run(options.run)
    model = load_model(options.run)
    address = push(model, options.name, private=options.private, raw=options.raw)
    print(f"pushed    {address}")
    print("licence   fill in the fields of README.md there")
    print(f"sample    patchdiffusion sample {options.name}")
