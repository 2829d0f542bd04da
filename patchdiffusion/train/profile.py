"""What steps cost: time by phase, and counts that do not depend on the machine's mood."""

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
    """Counts the operators that are called inside, those that make the host wait, and copies."""

    only_counts = True  # nets/fused.py need not show it what its kernels do

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
        """Operators that do some work."""
        return sum(self.calls.values())

    @property
    def syncs(self) -> int:
        """Operators whose result the host waits for."""
        return sum(self.calls[name] for name in SYNCS)


@dataclass(frozen=True)
class Cost:
    """One kind of step."""

    groups: tuple[Group, ...]
    seconds: float
    """Median of a whole step."""
    equivalents: float
    flops: float
    operators: int
    syncs: int
    copied: int
    """Bytes."""
    memory: int
    """Most bytes held."""
    graphs: int
    """Compiled graphs that were made for it."""
    compile_seconds: float
    """What the first step took beyond a usual one."""
    outside: float
    """Share of the time outside forward, backward, update and average."""

    @property
    def crops(self) -> int:
        """Crops of a step."""
        return sum(group.count for group in self.groups)


def measure(training: Training, kinds: Sequence[tuple[Group, ...]], repeats: int) -> list[Cost]:
    """Time and count steps of some kinds, of which each comes twice before it is timed.

    The kinds take turns, so that a machine that slows down for a while slows all of them.
    """
    device, ready = training.device, [_prepare(training, groups) for groups in kinds]
    times: list[list[float]] = [[] for _ in kinds]
    shares: list[Counter[str]] = [Counter() for _ in kinds]
    for _ in range(repeats):
        for groups, taken, share in zip(kinds, times, shares, strict=True):
            training.phases.read()
            taken.append(_timed(training, groups))
            share.update(training.phases.read()[0])
    costs = []
    for groups, (first, made), taken, share in zip(kinds, ready, times, shares, strict=True):
        reset_peak_memory(device)
        _step(training, groups)
        held = peak_memory(device)
        with Operators() as counted:
            _step(training, groups)
        usual = statistics.median(taken)
        costs.append(
            Cost(
                groups=groups,
                seconds=usual,
                equivalents=equivalents(groups, training.canvas),
                flops=float(sum(training.flops[g.size] * g.count for g in groups)),
                operators=counted.total,
                syncs=counted.syncs,
                copied=counted.copied,
                memory=held,
                graphs=made,
                compile_seconds=max(first - usual, 0.0) if made else 0.0,
                outside=1 - sum(share[name] for name in COMPUTE) / sum(share.values()),
            )
        )
    return costs


def _prepare(training: Training, groups: tuple[Group, ...]) -> tuple[float, int]:
    """Seconds of the first step, and the graphs that were compiled for it."""
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
