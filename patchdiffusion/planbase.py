"""The contract of patch plans, a plan on a canvas, and plans that are the same in all of a run."""

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, Protocol, Self, runtime_checkable

import torch

from patchdiffusion import rng
from patchdiffusion.noise import LogNormal, NoiseLaw, Truncated
from patchdiffusion.patches import Size, size_name
from patchdiffusion.sizes import PatchLaw, PatchSize

Clock = Literal["equivalents", "crops", "steps"]


@dataclass(frozen=True)
class Group:
    """Crops of one size within one optimizer step, over all processes."""

    size: Size
    """Length of each axis of the crops in the network's input: height and width of images."""
    count: int
    """Number of crops."""
    weight: float
    """The group adds weight * mean(loss per pixel) to the loss of the step."""
    pitch: int = 1
    """Image pixels per input pixel along a side; q > 1 is a view down-sampled by averaging."""
    noise: NoiseLaw = field(default_factory=LogNormal)
    """Noise law of this group."""
    lr: float = 1.0
    """Factor of the learning rate of a step of this group."""

    @property
    def name(self) -> str:
        """Name in logs: its size, then its pitch and percentiles if they are not the default."""
        name = size_name(self.size)
        if self.pitch > 1:
            name += f"@{self.pitch}"
        if isinstance(self.noise, Truncated) and (self.noise.low, self.noise.high) != (0.0, 1.0):
            name += f"[{self.noise.low:g}-{self.noise.high:g}]"
        return name


Kinds = tuple[tuple[float, tuple[Group, ...]], ...]
"""The kinds of step of a plan: for each its share of all steps, and its groups."""


class Moment(NamedTuple):
    """Arguments of a plan's draw: seed, step and progress of the run."""

    seed: int
    step: int
    progress: float | None
    """Share of the run that is done; None if it is unknown."""


class Plan(Protocol):
    """A rule that composes steps of groups; `on` holds canvas, batch, divisor and noise law."""

    def draw(self, on: "PatchPlan", now: Moment) -> tuple[Group, ...]:
        """The groups of one step, a pure function."""
        ...

    def kinds(self, on: "PatchPlan", clock: Clock) -> Kinds:
        """All results of `draw`, with their share of the steps; `clock` is that of the run."""
        ...


@runtime_checkable
class Cyclic(Protocol):
    """A plan whose groups depend on the number of the step, too, and repeat."""

    @property
    def cycle(self) -> int:
        """Number of steps after which the groups of a part of the run repeat."""
        ...


# ---- Plans of a few crop sizes ----


def group_of(k: PatchSize, count: float, weight: float) -> Group:
    """A group of about `count` crops of a size."""
    return Group(k.size, max(1, round(count)), weight, k.pitch, k.noise)


def alone(on: "PatchPlan", k: PatchSize) -> tuple[Group, ...]:
    """The groups of a step of one size."""
    return (group_of(k, on.batch * k.multiplier, k.share / k.prob),)


def pick(sizes: Sequence[PatchSize], u: float) -> PatchSize:
    """The size at a percentile of their probabilities."""
    edges = list(itertools.accumulate(k.prob for k in sizes))
    return sizes[min(bisect.bisect_right(edges, u), len(sizes) - 1)]


@dataclass(frozen=True, kw_only=True)
class Stratified(PatchLaw):
    """All sizes in every step, in proportion to their probabilities."""

    def draw(self, on: "PatchPlan", now: Moment) -> tuple[Group, ...]:
        """One group for each size, equal in every step."""
        sizes = self.sizes(on.canvas, on.divisor, on.noise)
        return tuple(group_of(k, on.batch * k.multiplier * k.prob, k.share) for k in sizes)

    def kinds(self, on: "PatchPlan", clock: Clock) -> Kinds:
        """One kind."""
        return ((1.0, self.draw(on, Moment(0, 0, None))),)


@dataclass(frozen=True, kw_only=True)
class RandomSize(PatchLaw):
    """One size per step, drawn by the probabilities."""

    def draw(self, on: "PatchPlan", now: Moment) -> tuple[Group, ...]:
        """One group."""
        key = rng.keys(now.seed, "patch size", now.step, torch.zeros(1, dtype=torch.int64))
        sizes = self.sizes(on.canvas, on.divisor, on.noise)
        return alone(on, pick(sizes, float(rng.uniform(key, 1))))

    def kinds(self, on: "PatchPlan", clock: Clock) -> Kinds:
        """A kind for each size."""
        return tuple((k.prob, alone(on, k)) for k in self.sizes(on.canvas, on.divisor, on.noise))


@dataclass(frozen=True, kw_only=True)
class Stochastic(RandomSize):
    """One random size per step, as published (arXiv 2304.12526)."""

    @classmethod
    def paper(cls, p: float = 0.5, *, latent: bool = False) -> Self:
        """The published plan with a share p of whole images; its batches are x 1, 2, 4.

        Pixels: (p, .6 (1-p), .4 (1-p)) for sides (1, 1/2, 1/4); latents: (p, 1-p) for (1, 1/2).
        """
        if not 0 <= p <= 1:
            raise ValueError(f"the share p of whole images must lie in [0, 1], not {p}")
        if latent:
            return cls(fractions=(1.0, 0.5), probs=(p, 1 - p))
        return cls(fractions=(1.0, 0.5, 0.25), probs=(p, 0.6 * (1 - p), 0.4 * (1 - p)))


# ---- A plan on a canvas ----


@dataclass(frozen=True)
class PatchPlan:
    """The groups of crops of each step: a pure function of (seed, step, progress).

    Every process calls `draw` with the same arguments and gets the same answer, so no process
    waits for another one that drew a larger size. `divisor` is the total down-sampling of the
    network; crop sides are rounded to multiples of it. The whole canvas is never rounded.
    """

    canvas: Size
    batch: int
    law: Plan = Stratified()
    divisor: int = 1
    noise: NoiseLaw = field(default_factory=LogNormal)
    """Noise law of the run, which groups with percentiles or pitches divide."""
    clock: Clock = "equivalents"
    """Clock of the run, of whose length progress is a share."""

    def __post_init__(self) -> None:
        if isinstance(self.canvas, int) or not self.canvas or min(self.canvas) < 1:
            raise ValueError(
                f"canvas must be the positive length of each axis, not {self.canvas}; "
                "(height, width) of images"
            )
        if self.batch < 1 or self.divisor < 1:
            raise ValueError(
                f"batch and divisor must be at least 1, not {self.batch} and {self.divisor}"
            )
        self.kinds()  # raises for sizes that do not fit this canvas

    @classmethod
    def paper(
        cls,
        canvas: Size,
        batch: int,
        *,
        p: float = 0.5,
        latent: bool = False,
        divisor: int = 1,
    ) -> "PatchPlan":
        """The plan of the paper: see `Stochastic.paper`."""
        return cls(canvas, batch, Stochastic.paper(p, latent=latent), divisor)

    def draw(self, *, seed: int, step: int, progress: float | None = None) -> tuple[Group, ...]:
        """The groups of one step.

        `progress` in [0, 1] is the share of the run that is done, which progressive sizes need.
        """
        return self.law.draw(self, Moment(seed, step, progress))

    def kinds(self, clock: Clock = "equivalents") -> Kinds:
        """The kinds of step, with their share of all steps; `clock` is that of the run."""
        return self.law.kinds(self, clock)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """One group of each name, largest crops first."""
        groups = {group.name: group for _, groups in self.kinds() for group in groups}
        return tuple(sorted(groups.values(), key=lambda g: math.prod(g.size), reverse=True))

    @property
    def rounding(self) -> str:
        """Clause about sizes that differ from what was asked for, empty if none does."""
        law = self.law
        return law.rounding(self.canvas, self.divisor) if isinstance(law, PatchLaw) else ""

    @cached_property
    def stages(self) -> tuple[tuple[float, Kinds], ...]:
        """Progress at which the groups of steps change, and the kinds of step from there on.

        One stage, from 0, unless steps depend on the progress of the run. Changes are found to
        1e-6; those that are undone within 1/64 of a run are not.
        """
        cycle = self.law.cycle if isinstance(self.law, Cyclic) else 1

        def kinds(progress: float) -> Kinds:
            steps = (self.draw(seed=0, step=i, progress=progress) for i in range(cycle))
            return tuple((1 / cycle, groups) for groups in steps)

        def changes(low: float, high: float) -> Iterator[float]:
            if kinds(low) != kinds(high):
                middle = (low + high) / 2
                if high - low < 1e-6:
                    yield round(high, 6)
                else:
                    yield from (*changes(low, middle), *changes(middle, high))

        edges = itertools.pairwise(i / 64 for i in range(65))
        starts = [0.0, *(start for low, high in edges for start in changes(low, high))]
        return tuple((start, kinds(start)) for start in starts)

    def cost(
        self,
        *,
        clock: Clock = "equivalents",
        world: int = 1,
        synced: bool = True,
        attention: float = 0.0,
    ) -> "Cost":
        """Expected cost of a step, in full images; `attention` is its quadratic share of one.

        `clock` is that of the run. `synced=False` is the time of `world` processes that draw sizes
        independently and wait for the slowest, as in the published code.
        """
        whole, steps, crops = math.prod(self.canvas), [], 0.0
        for prob, groups in self.kinds(clock):
            spent = 0.0
            for group in groups:
                area = math.prod(group.size) / whole
                spent += group.count * (area * (1 - attention) + area**2 * attention)
                crops += prob * group.count / self.batch
            steps.append((spent / self.batch, prob))
        mean = sum(prob * cost for cost, prob in steps)
        if not synced:
            mean, below = 0.0, 0.0
            for cost, prob in sorted(steps):
                mean += cost * ((below + prob) ** world - below**world)
                below += prob
        return Cost(crops=crops, step=mean, crop=mean / crops)


@dataclass(frozen=True)
class Cost:
    """Expected cost of a plan relative to whole-image training at the same batch."""

    crops: float
    """Crops per step and per image of the batch (M in the paper's bookkeeping)."""
    step: float
    """Cost of a step."""
    crop: float
    """Cost of a crop, if crops are counted as images the way the paper does."""


def equivalents(groups: tuple[Group, ...], canvas: Size) -> float:
    """Area of the crops of a step in whole images, the unit of the clock."""
    pixels = sum(g.count * math.prod(g.size) for g in groups)
    return pixels / math.prod(canvas)


def advance(groups: tuple[Group, ...], canvas: Size, clock: Clock) -> float:
    """Advance of the clock in a step, in its unit."""
    if clock == "steps":
        return 1.0
    return sum(g.count for g in groups) if clock == "crops" else equivalents(groups, canvas)
