"""A training process of its own, in which what a test asks for goes wrong.

python driver.py '{"images": ..., "out": ..., "config": {...}, "run": {...}, "faults": [...]}'
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import inject
import tiny
import torch

from patchdiffusion import cli
from patchdiffusion.dist import place
from patchdiffusion.train import loop, status


def main() -> int:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    # The yardstick of the status lines and the report take longer than these runs.
    status.measured_peak = lambda device, precision: 1e9
    loop.write_report = lambda folder: folder
    for fault in spec.get("faults", []):
        fault = dict(fault)
        if fault.pop("rank", place().rank) == place().rank:
            inject.FAULTS[fault.pop("kind")](**fault)
    config = tiny.change(tiny.config(Path(spec["images"])), spec.get("config", {}))

    def train(arguments: object) -> None:
        tiny.run(config, Path(spec["out"]), **spec.get("run", {}))

    # The exit codes and the one line of an error are those of the command line.
    cli.COMMANDS["train"] = (train, "")
    return cli.main(["train"])


if __name__ == "__main__":
    sys.exit(main())
