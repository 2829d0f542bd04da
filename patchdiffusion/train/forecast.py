"""Forecasts of a run: operations and previews until its end."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from patchdiffusion.patches import Size, size_name
from patchdiffusion.plans import Clock, Group, Kinds, PatchPlan, advance

PREVIEW_SHARE = 0.1
"""Largest share of the operations of a run that previews take if their number is not given."""
MAX_PREVIEWS = 10

StepCost = Callable[[Sequence[Group]], float]
"""Cost of a step of some groups: operations, seconds ..."""


@dataclass(frozen=True)
class Forecast:
    """Costs of a run in floating-point operations."""

    plan: PatchPlan
    clock: Clock
    length: float
    """Length of the run in units of its clock."""
    flops: dict[Size, int]
    """Operations to train on one crop of each size."""
    preview: float
    """Operations of one preview."""

    def left(self, now: float, cost: StepCost | None = None) -> float:
        """Cost of training from `now` to the end of the run; by default its operations."""
        starts = [start * self.length for start, _ in self.plan.stages]
        ends = [*starts[1:], self.length]
        return sum(
            (end - max(start, now)) * self._per_unit(index, cost or self._step)
            for index, (start, end) in enumerate(zip(starts, ends, strict=True))
            if end > max(start, now)
        )

    def _per_unit(self, stage: int, cost: StepCost) -> float:
        """Cost of the steps in which the clock advances by 1, in a stage of the plan."""
        stages = self.plan.stages
        steps = stages[stage][1] if len(stages) > 1 else self.plan.kinds(self.clock)
        total = sum(p * cost(groups) for p, groups in steps)
        return total / sum(p * advance(groups, self.plan.canvas, self.clock) for p, groups in steps)

    def _step(self, groups: Sequence[Group]) -> float:
        return sum(self.flops[group.size] * group.count for group in groups)

    @property
    def previews(self) -> int:
        """The number of previews that take at most `PREVIEW_SHARE` of the operations of the run."""
        if not self.preview:
            return MAX_PREVIEWS
        most = PREVIEW_SHARE * self.left(0.0) / self.preview
        return max(1, min(MAX_PREVIEWS, math.floor(most)))

    def share(self, previews: int) -> float:
        """Operations of some previews relative to those of training."""
        return previews * self.preview / self.left(0.0)

    def largest(self, now: float) -> Size:
        """The largest crops of the stages of the plan that have begun."""
        if len(self.plan.stages) == 1:
            return max((group.size for group in self.plan.groups), key=math.prod)
        begun = [kinds for start, kinds in self.plan.stages if start * self.length <= now]
        sizes = [group.size for kinds in begun for _, groups in kinds for group in groups]
        return max(sizes, key=math.prod)

    def next_stage(self, now: float) -> tuple[float, str] | None:
        """Clock time of the next change of crop sizes, and their names; None if never."""
        for start, kinds in self.plan.stages:
            if start * self.length > now:
                return start * self.length, self.names(kinds)
        return None

    def names(self, kinds: Kinds) -> str:
        """Sizes of crops of some kinds of step in words, each one once."""
        names = (self.name(group.size) for _, groups in kinds for group in groups)
        return " + ".join(dict.fromkeys(names))

    def name(self, size: Size) -> str:
        """Size of crops in words: `whole images` for those of the canvas."""
        return "whole images" if size == self.plan.canvas else size_name(size)
