"""Cost of training steps: time, memory, and counts that do not depend on the load of a machine."""

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from patchdiffusion.plans import Group, equivalents
from patchdiffusion.system.device import (
    compiled_graphs,
    peak_memory,
    reset_peak_memory,
    synchronize,
)
from patchdiffusion.train.loop import one_step
from patchdiffusion.train.setup import Training
from patchdiffusion.train.timing import COMPUTE

SYNCS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal")
COPIES = ("aten._to_copy", "aten.copy_", "aten.clone")


class Operators(TorchDispatchMode):
    """Counts called operators, those for whose result the host waits, and bytes copied."""

    only_counts = True  # so that nets/fused.py keeps its kernels under this mode

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.copied = 0
        """Bytes written by operators that only copy or convert."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket)
        if not func.is_view:
            self.calls[name] += 1
        if name in COPIES:
            self.copied += out.numel() * out.element_size()
        return out

    @property
    def total(self) -> int:
        """Number of operators, without views."""
        return sum(self.calls.values())

    @property
    def syncs(self) -> int:
        """Number of operators for whose result the host waits."""
        return sum(self.calls[name] for name in SYNCS)


@dataclass(frozen=True)
class Cost:
    """Cost of one kind of step."""

    groups: tuple[Group, ...]
    seconds: float
    """Median time of a step."""
    equivalents: float
    flops: float
    operators: int
    syncs: int
    copied: int
    """Bytes copied or converted."""
    memory: int
    """Peak memory in bytes."""
    graphs: int
    """Number of graphs compiled for it."""
    compile_seconds: float
    """Time of the first step beyond the median."""
    outside: float
    """Share of the time outside forward, backward, update and average."""

    @property
    def crops(self) -> int:
        """Number of crops of a step."""
        return sum(group.count for group in self.groups)


def measure(training: Training, kinds: Sequence[tuple[Group, ...]], repeats: int) -> list[Cost]:
    """Measure the cost of steps of some kinds, after two warm-up steps of each.

    The kinds take turns, so that a temporary slowdown of the machine affects all of them.
    """
    device, ready = training.device, [_prepare(training, groups) for groups in kinds]
    times: list[list[float]] = [[] for _ in kinds]
    shares: list[Counter[str]] = [Counter() for _ in kinds]
    for _ in range(repeats):
        for groups, seconds, share in zip(kinds, times, shares, strict=True):
            training.phases.read()
            seconds.append(_timed(training, groups))
            share.update(training.phases.read()[0])
    costs = []
    for groups, (first, graphs), seconds, share in zip(kinds, ready, times, shares, strict=True):
        reset_peak_memory(device)
        _step(training, groups)
        memory = peak_memory(device)
        with Operators() as counted:
            _step(training, groups)
        usual = statistics.median(seconds)
        costs.append(
            Cost(
                groups=groups,
                seconds=usual,
                equivalents=equivalents(groups, training.canvas),
                flops=float(sum(training.flops[g.size] * g.count for g in groups)),
                operators=counted.total,
                syncs=counted.syncs,
                copied=counted.copied,
                memory=memory,
                graphs=graphs,
                compile_seconds=max(first - usual, 0.0) if graphs else 0.0,
                outside=1 - sum(share[name] for name in COMPUTE) / sum(share.values()),
            )
        )
    return costs


def _prepare(training: Training, groups: tuple[Group, ...]) -> tuple[float, int]:
    """Seconds of the first step, and number of graphs compiled for it, after two steps."""
    graphs = compiled_graphs()
    first = _timed(training, groups)
    _step(training, groups)
    return first, compiled_graphs() - graphs


def _timed(training: Training, groups: tuple[Group, ...]) -> float:
    synchronize(training.device)
    start = time.perf_counter()
    _step(training, groups)
    synchronize(training.device)
    return time.perf_counter() - start


def _step(training: Training, groups: tuple[Group, ...]) -> None:
    one_step(training, groups)
    training.stepper.guard.observe()
