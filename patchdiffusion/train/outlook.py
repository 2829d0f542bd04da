"""Estimated duration and memory of a run, from two steps in memory."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from patchdiffusion.plans import Group
from patchdiffusion.system.text import counted
from patchdiffusion.train.log import duration
from patchdiffusion.train.setup import Training

TRIAL = 2e10
"""Limit of the floating-point operations of a timed step on a CPU, unless one crop has more."""


@dataclass
class Activations:
    """Counts the peak memory of tensors saved for backward passes."""

    most: int = 0
    _now: int = 0
    _backward: bool = False
    _kept: set[int] = field(default_factory=set)

    def pack(self, kept: Tensor) -> Tensor:
        """Count a saved tensor."""
        if self._backward:
            self._now, self._backward = 0, False
            self._kept.clear()
        storage = kept.untyped_storage()
        if storage.data_ptr() not in self._kept:
            self._kept.add(storage.data_ptr())
            self._now += storage.nbytes()
            self.most = max(self.most, self._now)
        return kept

    def unpack(self, kept: Tensor) -> Tensor:
        """Record the start of a backward pass."""
        self._backward = True
        return kept


def outlook(training: Training, step: Callable[[Training, tuple[Group, ...]], None]) -> str:
    """Estimated duration of the rest of a run, with previews, and memory on each device, as text.

    `step` trains on some groups, twice, in memory.
    """
    config, team = training.config, training.team
    groups = _trial(training)
    kept = Activations()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        step(training, groups)  # which also prepares kernels and buffers
    seconds = _timed(lambda: step(training, groups), training.device)
    rate = sum(training.flops[group.size] * group.count for group in groups) / seconds
    left = max(0.0, 1 - training.now / config.images)
    steps = training.forecast.left(training.now) / rate
    count = training.num_previews
    previews = training.forecast.preview / rate * math.ceil(count * left)
    weights = training.parameters * 4 * (4 + 1 + len(config.ema.profiles))
    whole = config.batch / team.size
    micro = min(whole, config.micro_batch or whole)
    largest = max(math.prod(g.size) * g.count for g in groups) / math.prod(training.canvas)
    memory = weights + kept.most * micro / (largest / team.size)
    return (
        f"time      about {duration(steps + previews)} at this rate: {duration(steps)} of steps, "
        f"{duration(previews)} of {counted(count, 'preview')}; "
        f"about {memory / 1e9:.2g} GB of memory"
    )


def _trial(training: Training) -> tuple[Group, ...]:
    """The groups of a step at the end of the run, on a CPU with few crops each."""
    config, team = training.config, training.team
    groups = training.plan.draw(seed=config.seed, step=0, progress=1.0)
    if training.device.type != "cpu":
        return groups
    flops = training.flops
    small = min(groups, key=lambda group: flops[group.size])
    if sum(flops[group.size] for group in groups) * team.size > 10 * TRIAL:
        groups = (small,)
    share = TRIAL / sum(flops[group.size] * group.count for group in groups)
    return tuple(
        replace(group, count=max(team.size, min(group.count, int(group.count * share))))
        for group in groups
    )


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
