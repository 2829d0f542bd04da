"""Estimated duration and memory of a run, from a few steps of each kind in memory."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from patchdiffusion.plans import Group
from patchdiffusion.system.device import synchronize
from patchdiffusion.system.text import counted
from patchdiffusion.train.log import duration
from patchdiffusion.train.pace import kind_of
from patchdiffusion.train.report import read_log
from patchdiffusion.train.setup import Training, assemble

TRIAL = 4e10
"""Limit of the floating-point operations of a timed step on a CPU, unless one crop has more."""
TIMED = 3
"""Steps of each kind, after one that warms up; the fastest counts."""
SLOW = 5.0
"""Seconds of a step that is timed once: so long a one varies little."""
LONG = 100
"""Steps of a run for which the speed of crop sizes to come is worth being measured first."""

Step = Callable[[Training, tuple[Group, ...]], None]
"""Trains on some groups."""


@dataclass
class Activations:
    """Counts the peak memory of tensors saved for backward passes, except some, such as weights."""

    most: int = 0
    excepted: Iterable[Tensor] = ()
    _now: int = 0
    _backward: bool = False
    _kept: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._excepted = {_identity(tensor) for tensor in self.excepted}

    def pack(self, kept: Tensor) -> Tensor:
        """Count a saved tensor."""
        if self._backward:
            self._now, self._backward = 0, False
            self._kept.clear()
        identity = _identity(kept)
        if identity not in self._kept | self._excepted:
            self._kept.add(identity)
            self._now += kept.untyped_storage().nbytes()
            self.most = max(self.most, self._now)
        return kept

    def unpack(self, kept: Tensor) -> Tensor:
        """Record the start of a backward pass."""
        self._backward = True
        return kept


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # not data_ptr, which is 0 on the meta device


def outlook(training: Training, step: Step) -> str:
    """Estimated duration of the rest of a run, with previews, and memory on each device, as text.

    It trains, in memory.
    """
    config, team, pace = training.config, training.team, training.pace
    kept = rehearse_kinds(training, step)
    left = max(0.0, 1 - training.now / config.images)
    steps = training.forecast.left(training.now, pace.seconds)
    count = training.num_previews
    preview = pace.seconds_of(training.forecast.preview, training.canvas)
    previews = preview * math.ceil(count * left)
    weights = training.held_parameters * 4 * (4 + 1 + len(config.ema.profiles))
    whole = config.batch / team.size
    memory = weights + kept * min(whole, config.micro_batch or whole)
    return (
        f"time      about {duration(steps + previews)}: {duration(steps)} of steps, "
        f"{duration(previews)} of {counted(count, 'preview')}; "
        f"about {memory / 1e9:.2g} GB of memory"
    )


def learn_pace(training: Training, step: Step) -> None:
    """Take over the speed of each kind of step from the log of a resumed run, or measure it.

    Measured on a copy of the run, and only if crop sizes are still to come and it takes seconds: a
    small network on a CPU, one process, no teacher, nothing to compile. Otherwise the run itself
    shows it.
    """
    config, pace = training.config, training.pace
    kinds = {kind_of(groups): groups for _, groups in training.plan.kinds(config.clock)}
    records = []
    with contextlib.suppress(OSError):  # a log that cannot be read stops nothing
        records = read_log(training.folder)
    logged = (record.get("rates") for record in reversed(records))
    rates = next((rates for rates in logged if rates and isinstance(rates, dict)), {})
    for kind, rate in rates.items():
        if kind in kinds and isinstance(rate, int | float) and rate > 0:
            pace.add([kinds[kind]], pace.operations(kinds[kind]) / rate)
    if (
        pace.measured.keys() >= kinds.keys()
        or training.forecast.next_stage(training.now) is None
        or training.device.type != "cpu"
        or training.team.size > 1
        or config.task.teachers(config)
        or training.engine["compiled"]
        or training.total_steps < LONG
        or max(training.flops.values()) > TRIAL
    ):
        return
    copy = assemble(config, replace(training.run, dry_run=True), training.pack)
    rehearse_kinds(copy, step)
    pace.rehearsed = copy.pace.measured


def rehearse_kinds(training: Training, step: Step) -> float:
    """Measure the pace of each kind of step; returns the bytes that are kept for backward passes.

    The latter for one crop with the area of a whole image. On a CPU each step has few crops.
    """
    most, phases = 0.0, training.phases
    for groups in _affordable(training):
        trial, kept = _trial(training, groups), Activations()
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
            step(training, trial)  # which also prepares kernels and buffers
        largest = max(math.prod(g.size) * g.count for g in trial) / math.prod(training.canvas)
        most = max(most, kept.most * training.team.size / largest)
        share = training.pace.operations(groups) / training.pace.operations(trial)
        times: list[float] = []
        for _ in range(TIMED):
            phases.read()
            seconds = _timed(lambda trial=trial: step(training, trial), training.device)
            spent, _ = phases.read()
            update = spent["update"] + spent["average"]  # whatever the number of crops
            times.append((seconds - update) * share + update)
            if seconds > SLOW:
                break
        training.pace.add([groups], min(times))
    return most


def _affordable(training: Training) -> list[tuple[Group, ...]]:
    """The kinds of step of which every group can be tried, and at least a smallest group."""
    flops, most = training.flops, 10 * TRIAL / training.team.size
    kinds = [groups for _, groups in training.plan.kinds(training.config.clock)]
    if training.device.type != "cpu":
        return kinds
    few = [groups for groups in kinds if sum(flops[group.size] for group in groups) <= most]
    small = min(training.plan.groups, key=lambda group: flops[group.size])
    return few or [(small,)]


def _trial(training: Training, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """A step of some groups, on a CPU with few crops each."""
    if training.device.type != "cpu":
        return groups
    size, share = training.team.size, TRIAL / training.pace.operations(groups)
    return tuple(
        replace(group, count=max(size, min(group.count, int(group.count * share))))
        for group in groups
    )


def _timed(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start
