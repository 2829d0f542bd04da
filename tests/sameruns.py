"""What every run promises, whatever it trains: to be resumed to the bit, and cut into passes."""

from dataclasses import replace
from pathlib import Path

import tiny
import torch

from patchdiffusion import TrainConfig
from patchdiffusion.train import loop


def check_resumed(config: TrainConfig, folder: Path) -> Path:
    """A run that is stopped and resumed is one that was not, to the bit; returns the latter."""
    straight, broken = folder / "straight", folder / "broken"
    tiny.run(config, straight)
    tiny.run(config, broken, max_hours=1e-9)
    assert 0 < len(tiny.history(broken)) < len(tiny.history(straight))
    tiny.run(config, broken)
    assert tiny.history(broken) == tiny.history(straight)
    assert tiny.weights(broken) == tiny.weights(straight)
    return straight


def check_micro_batches(config: TrainConfig, folder: Path) -> None:
    """Two steps in passes of one crop are two steps, up to rounding."""
    whole, parts = (tiny.training(replace(config, micro_batch=size), folder) for size in (None, 1))
    for training in (whole, parts):
        for _ in range(2):
            loop.one_step(training)
    other = dict(parts.network.named_parameters())
    for name, weight in whole.network.named_parameters():
        torch.testing.assert_close(weight, other[name], rtol=1e-3, atol=2e-4)
