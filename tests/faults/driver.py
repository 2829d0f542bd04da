"""A training process of its own, in which what a test asks for goes wrong.

python driver.py '{"images": ..., "out": ..., "config": {...}, "run": {...}, "faults": [...]}'
"""

import faulthandler
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import inject
import tiny
import torch

from patchdiffusion import cli, recipes
from patchdiffusion.nets import Network
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.objectives import AdditionUnion
from patchdiffusion.recipes.captions import with_captions
from patchdiffusion.system import families
from patchdiffusion.system.place import leave, place
from patchdiffusion.system.serialize import decode
from patchdiffusion.train import status
from patchdiffusion.train.config import Task


def carry_out(spec: Mapping[str, Any]) -> int:
    """Train with faults; the exit codes and the one line of an error are the command line's."""
    for fault in spec.get("faults", []):
        fault = dict(fault)
        if fault.pop("rank", place().rank) == place().rank:
            inject.FAULTS[fault.pop("kind")](**fault)
    config = tiny.config(Path(spec["images"]))
    word = spec.get("network")
    if isinstance(word, str):
        config = (
            families.create(Network, word, "network")
            .inherit(config.network, config)
            .prefers(config)
        )
    elif word:
        config = replace(config, network=decode(DiTConfig, word))
    if word := spec.get("captions"):
        config = with_captions(config, word)
    config = recipes.with_objective(config, spec.get("objective", "denoising"))
    additions = (
        decode(families.choose(AdditionUnion, word, "additions"), fields)
        for word, fields in spec.get("additions", {}).items()
    )
    config = replace(config, additions=tuple(additions))
    task = families.choose(Task, spec.get("task", "denoiser"), "task")()
    config = tiny.change(replace(config, task=task), spec.get("config", {}))

    def train(arguments: object) -> None:
        tiny.run(config, Path(spec["out"]), **spec.get("run", {}))

    cli.COMMANDS["train"] = cli.Command(train, object)
    return cli.main(["train"])


def main() -> int:
    faulthandler.enable()  # SIGABRT of the harness
    torch.set_num_threads(1)
    # The yardstick of the status lines and the report take longer than these runs.
    status.measured_peak = lambda device, precision: 1e9
    status.write_report = lambda folder: folder
    return carry_out(json.loads(sys.argv[1]))


if __name__ == "__main__":
    leave(main())
