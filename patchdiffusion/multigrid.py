"""Multigrid: small crops in large batches first, large ones in small batches last, at equal cost.

Wu et al., "A Multigrid Method for Efficiently Training Video Models" (arXiv 1912.00998). A long
cycle changes the shape a few times in a run, a short cycle in every step. Written for diffusion:
crops know their coordinates, and a view at half the resolution has half the noise.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self, get_args

from patchdiffusion.noise import Truncated
from patchdiffusion.patches import Size
from patchdiffusion.planbase import Clock, Group, Kinds, Moment, PatchPlan, advance
from patchdiffusion.sizes import rounded

Views = Literal["crop", "coarse", "both"]
Counts = Literal["area", "whole"]
Rates = Literal["linear", "sqrt", "none"]
Weights = Literal["mean", "area"]

HALF_AREA = math.sqrt(0.5)
"""Side of half the area."""


class Shape(NamedTuple):
    """Shape of crops as fractions of the canvas."""

    time: float
    side: float

    def area(self, axes: int) -> float:
        """Relative area on a canvas of n axes, of which the first of three is time."""
        return self.side ** min(axes, 2) * (self.time if axes > 2 else 1.0)


@dataclass(frozen=True, kw_only=True)
class Multigrid:
    """Long and short cycles of crop sizes in batches of equal cost (arXiv 1912.00998)."""

    sides: tuple[float, ...] = (HALF_AREA, HALF_AREA, 1.0, 1.0)
    """Sides of the shapes of the long cycle relative to the canvas, each for equally many steps."""
    times: tuple[float, ...] = (0.25, 0.5, 0.5, 1.0)
    """Lengths in time of the same shapes, which only clips have."""
    short: tuple[float, ...] = (0.5, HALF_AREA)
    """Sides of the steps between those of the shape itself, never larger than it; none if empty."""
    passes: tuple[float, ...] = (1.0,)
    """Relative numbers of steps of the passes through the long cycle, one after another."""
    final: float = 0.15
    """Share of the steps at the end that are whole images only."""
    final_short: bool = False
    """True to go on with the short cycle in them, as published."""
    view: Views = "crop"
    """Content of sides of 1/2, 1/3 ... in the short cycle: a crop; coarse: the whole image at that
    resolution, with as much less noise; both: one after the other."""
    counts: Counts = "area"
    """Crops in a step: batch / area; or times a whole number, as published."""
    rate: Rates = "sqrt"
    """Factor of the learning rate of a shape of the long cycle, of the growth of its batch: linear
    as published for SGD, its root for Adam, or none. Short cycles do not change it."""
    weight: Weights = "mean"
    """Weight of the steps: mean: all alike; area: that of their crops relative to the canvas."""

    def __post_init__(self) -> None:
        if not self.sides or len(self.sides) != len(self.times):
            raise ValueError(
                "sides and times need the same length, at least 1, "
                f"not {len(self.sides)} and {len(self.times)}"
            )
        for name in ("sides", "times", "short"):
            if not all(0 < f <= 1 for f in getattr(self, name)):
                raise ValueError(f"{name} must lie in (0, 1], not {getattr(self, name)}")
        if not all(0 < p < math.inf for p in self.passes) or not (self.passes or self.final == 1):
            raise ValueError(f"passes must be positive numbers, at least 1, not {self.passes}")
        if not 0 <= self.final <= 1:
            raise ValueError(f"final must lie in [0, 1], not {self.final}")
        kinds = {"view": Views, "counts": Counts, "rate": Rates, "weight": Weights}
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")

    @classmethod
    def published(cls, edges: tuple[float, ...] = (0, 94, 154, 196), end: float = 239) -> Self:
        """The published schedule for a baseline whose learning rate changes at these epochs.

        By default that of Kinetics. The last stage is the final one; run it with `--clock crops`.
        """
        passes = tuple(b - a for a, b in itertools.pairwise(edges))
        final = (end - edges[-1]) / end
        return cls(passes=passes, final=final, final_short=True, counts="whole", rate="linear")

    @property
    def cycle(self) -> int:
        """Number of steps after which the sizes of a part of the run repeat."""
        return (len(self.short) + 1) * (2 if self.view == "both" else 1)

    def draw(self, on: PatchPlan, now: Moment) -> tuple[Group, ...]:
        """One group; raises `ValueError` without `progress`."""
        if now.progress is None:
            raise ValueError("a multigrid plan draws by the progress of the run, in [0, 1]")
        parts = self._parts(on)
        lengths = [share * _mean(steps, on, on.clock) for share, steps in parts]
        ends = list(itertools.accumulate(length / sum(lengths) for length in lengths))
        part = sum(now.progress >= end for end in ends[:-1])
        steps = parts[part][1]
        return (steps[now.step % len(steps)],)

    def kinds(self, on: PatchPlan, clock: Clock) -> Kinds:
        """A kind for each size of each part of the run."""
        shares: dict[Group, float] = {}
        for share, steps in self._parts(on):
            for group in steps:
                shares[group] = shares.get(group, 0.0) + share / len(steps)
        return tuple((share, (group,)) for group, share in shares.items())

    def _parts(self, on: PatchPlan) -> list[tuple[float, list[Group]]]:
        """Parts of the run: the share of the steps of each, and its cycle of steps."""
        shapes = [Shape(*pair) for pair in zip(self.times, self.sides, strict=True)]
        pass_ = [self._steps(on, shape, short=True) for shape in shapes]
        parts = []
        for length in self.passes if self.final < 1 else ():
            share = (1 - self.final) * length / sum(self.passes) / len(shapes)
            parts += [(share, steps) for steps in pass_]
        if self.final:
            whole = self._steps(on, Shape(1.0, 1.0), short=self.final_short)
            parts.append((self.final, whole))
        return parts

    def _steps(self, on: PatchPlan, long: Shape, *, short: bool) -> list[Group]:
        """One cycle of steps of a shape of the long cycle."""
        sides = [min(side, long.side) for side in self.short] if short else []
        views = {"crop": (False,), "coarse": (True,), "both": (False, True)}[self.view]
        return [
            self._group(on, long, side, coarse and number < len(sides))
            for coarse in views
            for number, side in enumerate([*sides, long.side])
        ]

    def _group(self, on: PatchPlan, long: Shape, side: float, coarse: bool) -> Group:
        axes, pitch = len(on.canvas), 1
        if coarse and (whole := round(1 / side)) > 1 and abs(whole * side - 1) < 1e-9:
            if axes > 2:
                raise ValueError(f"view {self.view} is for images, not for {axes} axes: use crop")
            side, pitch = 1.0, whole
        fractions = (side,) * axes if axes < 3 else (long.time, *(side,) * (axes - 1))
        size: Size = tuple(
            rounded((length,), on.divisor, fraction, pitch)[0]
            for length, fraction in zip(on.canvas, fractions, strict=True)
        )
        area = math.prod(size) / math.prod(on.canvas)
        growth = round(1 / long.area(axes))
        if self.counts == "whole":
            count = growth * round((long.side * pitch / side) ** min(axes, 2))
        else:
            count = 1 / area
        noise = on.noise if pitch == 1 else Truncated(law=on.noise, scale=1 / pitch)
        power = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}[self.rate]
        weight = area if self.weight == "area" else 1.0
        return Group(
            size, max(1, round(on.batch * count)), weight, pitch, noise, float(growth) ** power
        )


def _mean(steps: list[Group], on: PatchPlan, clock: Clock) -> float:
    """Mean advance of the clock in a step."""
    return sum(advance((group,), on.canvas, clock) for group in steps) / len(steps)
