"""Measured speed of the steps of each kind, from which the time left of a run is estimated."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from patchdiffusion.patches import Size
from patchdiffusion.plans import Group

MEMORY = 60.0
"""Seconds of measurement after which an older one counts e times less: other programs come and go.
"""


def kind_of(groups: Sequence[Group]) -> str:
    """Name of a kind of step: its crop sizes."""
    return "+".join(group.name for group in groups)


@dataclass(frozen=True)
class Measured:
    """Operations and seconds of some steps of a kind, of which older ones count less."""

    area: float
    """Mean area of the crops."""
    flops: float = 0.0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Operations per second."""
        return self.flops / self.seconds


class Pace:
    """Speed of each kind of step, without the first one, which warms up.

    A kind that has not run yet is as fast as in a rehearsal, times the factor by which the others
    differ from theirs: other programs may slow a run down. One without a rehearsal is as fast as
    the known one with crops of the nearest area.
    """

    def __init__(self, flops: Mapping[Size, int]):
        self.flops = flops
        self.measured: dict[str, Measured] = {}
        self.rehearsed: dict[str, Measured] = {}
        self._warm: set[str] = set()
        """Kinds that this process has trained on."""
        self._steps: dict[str, list[Sequence[Group]]] = {}
        """Steps of each kind since the last measurement, but for those that warm up."""
        self._aside = 0.0
        """Seconds of the latter."""

    @property
    def rates(self) -> dict[str, float]:
        """Operations per second of each measured kind."""
        return {kind: measured.rate for kind, measured in self.measured.items()}

    def operations(self, groups: Sequence[Group]) -> float:
        """Floating-point operations of a step."""
        return float(sum(self.flops[group.size] * group.count for group in groups))

    def seconds(self, groups: Sequence[Group]) -> float:
        """Seconds of a step; infinity before anything is measured."""
        kind, flops = kind_of(groups), self.operations(groups)
        if kind in self.measured:
            return flops / self.measured[kind].rate
        if kind in self.rehearsed:
            return flops / self.rehearsed[kind].rate * self._slowdown()
        return self._at(_area(groups), flops)

    def seconds_of(self, flops: float, size: Size) -> float:
        """Seconds of operations on inputs of a size; infinity before anything is measured."""
        return self._at(math.prod(size), flops)

    def _at(self, area: float, flops: float) -> float:
        """Seconds of operations at the speed of the kind of the nearest area."""
        known = {**self.rehearsed, **self.measured}
        if not known:
            return math.inf
        kind = min(known, key=lambda kind: abs(math.log(known[kind].area / area)))
        return flops / known[kind].rate * (1.0 if kind in self.measured else self._slowdown())

    def _slowdown(self) -> float:
        """Seconds of the kinds that have run relative to those by their rehearsal."""
        both = [(self.measured[k], self.rehearsed[k]) for k in self.measured if k in self.rehearsed]
        if not both:
            return 1.0
        return sum(m.seconds for m, _ in both) / sum(m.flops / r.rate for m, r in both)

    def add(self, steps: Sequence[Sequence[Group]], seconds: float) -> None:
        """Add a measurement: steps of one kind, and the seconds of all of them."""
        kind, flops = kind_of(steps[0]), sum(map(self.operations, steps))
        old, keep = self.measured.get(kind, Measured(_area(steps[0]))), math.exp(-seconds / MEMORY)
        seconds = max(seconds, 1e-9)
        self.measured[kind] = Measured(
            old.area, keep * old.flops + flops, keep * old.seconds + seconds
        )

    def count(self, groups: Sequence[Group], seconds: float) -> None:
        """Note a step that took so many seconds of the host, which may be ahead of the device."""
        kind = kind_of(groups)
        if kind in self._warm:
            self._steps.setdefault(kind, []).append(groups)
        else:
            self._warm.add(kind)
            self._aside += seconds

    def measure(self, seconds: float) -> None:
        """Divide the seconds since the last call among the kinds of its steps, as was expected."""
        spent, steps = seconds - self._aside, self._steps
        self.forget()
        known = self.measured or self.rehearsed
        expected = self.seconds if known else self.operations
        weights = {kind: sum(map(expected, same)) for kind, same in steps.items()}
        if spent > 0:
            for kind, same in steps.items():
                self.add(same, spent * weights[kind] / sum(weights.values()))

    def forget(self) -> None:
        """Leave the steps since the last measurement out."""
        self._steps, self._aside = {}, 0.0


def _area(groups: Sequence[Group]) -> float:
    """Mean area of the crops of a step."""
    return sum(math.prod(g.size) * g.count for g in groups) / sum(g.count for g in groups)
