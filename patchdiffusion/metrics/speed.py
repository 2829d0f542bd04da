"""Samplers compared: the error of their images, the operations, and the seconds that they take.

The error of a sampler is the distance of its images from those of the same noise on the exact path
of the probability-flow equation, so it needs neither real images nor features, and a few images are
enough. Samplers that draw fresh noise follow no such path and are not compared.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch

from patchdiffusion.accel import Accelerator, NoAccelerator
from patchdiffusion.nets.count import MacCounter
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.sampling.pipeline import Pipeline
from patchdiffusion.solvers import Heun, Jumps, Method, Solver, run
from patchdiffusion.system import families

SOLVERS = ("heun", "euler", "dpmpp_2m", "dpmpp_3m", "unipc")
STEPS = (4, 6, 8, 12, 18, 27)


@runtime_checkable
class Tried(Protocol):
    """An accelerator that says with which settings it is tried; others are tried as they are."""

    @classmethod
    def trials(cls) -> Sequence[Self]:
        """Settings from the most careful to the fastest."""
        ...


@dataclass(frozen=True)
class Point:
    """A sampler, what an image costs with it, and how far its images are from exact ones."""

    config: SamplerConfig
    """As resolved for the model."""
    macs: float
    """Multiply-accumulates for an image."""
    seconds: float
    """For an image, measured."""
    error: float = math.nan
    """Root mean square distance from the exact images, relative to the deviation of their values;
    NaN for jumps, which follow no path."""
    frechet: float | None = None
    """Frechet distance of samples from real images, if that was measured."""
    kernel: float | None = None
    """Kernel distance (KID) of the same samples."""
    model: str = ""
    """Folder of another model that is compared, or ""."""

    @property
    def accelerated(self) -> bool:
        """True if it has an accelerator."""
        return not isinstance(self.config.accelerator, NoAccelerator)


def operations(point: Point) -> float:
    """Multiply-accumulates for an image."""
    return point.macs


def seconds(point: Point) -> float:
    """Seconds for an image."""
    return point.seconds


def error(point: Point) -> float:
    """Distance from the exact images."""
    return point.error


def frechet(point: Point) -> float:
    """Frechet distance; NaN if it was not measured."""
    return math.nan if point.frechet is None else point.frechet


Quantity = Callable[[Point], float]


def frontier(points: Sequence[Point], cost: Quantity, worth: Quantity = error) -> list[Point]:
    """The points that no other equals or betters in both cost and worth, from the cheapest on.

    `worth` is what should be small; points without it, NaN, are left out.
    """
    best, out = math.inf, []
    known = [point for point in points if not math.isnan(worth(point))]
    for point in sorted(known, key=lambda p: (cost(p), worth(p))):
        if worth(point) < best:
            best = worth(point)
            out.append(point)
    return out


def advised(points: Sequence[Point], within: float) -> Point | None:
    """The fastest point of the frontier with an error up to `within`; None if there is none."""
    good = [p for p in frontier(points, seconds) if p.error <= within]
    return good[0] if good else None


def draws_noise(solver: Solver) -> bool:
    """True for a solver that draws fresh noise between its steps."""

    def refuse(index: int) -> torch.Tensor:
        raise LookupError

    still = torch.zeros(1, 1)
    sigmas = torch.tensor([2.0, 1, 0.5, 0], dtype=torch.float64)
    try:
        if isinstance(solver, Method):
            run(solver(lambda x, sigma, cond=None: x, still, sigmas, noise=refuse))
    except LookupError:
        return True
    return False


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The comparison for a model. `base` has the guidance, schedule and canvas of all samplers."""

    pipeline: Pipeline
    base: SamplerConfig = field(default_factory=SamplerConfig)
    classes: Sequence[str | int] | None = None
    count: int = 16
    """Images, in one batch."""
    seed: int = 0
    solvers: Sequence[str] = SOLVERS
    steps: Sequence[int] = STEPS
    accelerators: Sequence[str] = ()
    """Words; none is all."""
    reference_steps: int = 64
    """Steps of the exact path, by heun."""
    repeats: int = 3
    """Times that the samplers of the frontier are timed, in turns."""
    progress: Callable[[int], object] = bool
    """Called with the evaluations of each sampler that is done."""

    def __post_init__(self) -> None:
        for name in ("count", "reference_steps", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if wrong := [steps for steps in self.steps if steps < 2]:
            raise ValueError(f"steps must be at least 2, not {wrong[0]}")
        for solver in self._solvers():
            if isinstance(solver, Jumps) or draws_noise(solver):
                raise ValueError(
                    f"{families.word(type(solver))} follows no path of which the end is known; "
                    f"compared are solvers such as {', '.join(SOLVERS)}"
                )
        if self.solvers and not self.pipeline.model.config.objective.denoises:
            raise ValueError(
                "a consistency model jumps and follows no path; compare it with a denoiser: "
                "speed RUN --beside MODEL"
            )
        for word in self.accelerators:
            families.create(Accelerator, word, "accelerators")

    # ---- Which samplers ----

    def _solvers(self) -> list[Solver]:
        return [families.create(Solver, word, "solvers") for word in self.solvers]

    def plain(self) -> list[SamplerConfig]:
        """Every solver with every number of steps, without an accelerator."""
        return [
            replace(self.base, solver=solver, steps=steps, accelerator=NoAccelerator())
            for solver in self._solvers()
            for steps in self.steps
        ]

    def choices(self) -> tuple[list[Accelerator], dict[str, str]]:
        """Accelerators to try, and the words of those that this model cannot use, with why."""
        allowed = [m for m in families.members(Accelerator) if m is not NoAccelerator]
        out, refused = [], {}
        for member in allowed:
            word = families.word(member)
            if self.accelerators and word not in self.accelerators:
                continue
            trials = member.trials() if issubclass(member, Tried) else (member(),)
            for accelerator in trials:
                try:
                    self._check(replace(self.base, solver=Heun(), accelerator=accelerator))
                    out.append(accelerator)
                except ValueError as error:
                    refused[word] = str(error)
        return out, refused

    def _check(self, config: SamplerConfig) -> None:
        self.pipeline.check(self.count, seed=self.seed, batch=self.count, config=config)

    # ---- One sampler ----

    def draw(self, config: SamplerConfig, count: int | None = None) -> tuple[np.ndarray, float]:
        """Images by a sampler, as numbers, and seconds for each."""
        number = count or self.count
        start = time.perf_counter()
        images = self.pipeline.sample(
            number, seed=self.seed, classes=self.classes, config=config, batch=number
        )
        seconds = (time.perf_counter() - start) / number
        return images.astype(np.float64), seconds

    def macs(self, config: SamplerConfig) -> float:
        """Multiply-accumulates that a sampler computes for an image, counted while it does."""
        with MacCounter() as counter:
            self.draw(config, 1)
        return counter.macs

    def measure(self, config: SamplerConfig, exact: np.ndarray) -> Point:
        """Error, operations and seconds of a sampler."""
        images, seconds = self.draw(config)
        macs = self.macs(config)
        self.progress(self.evaluations((config,)))
        return Point(self.pipeline.sampler(config), macs, seconds, distance(images, exact))

    # ---- The comparison ----

    def exact(self) -> tuple[np.ndarray, float]:
        """The end of the path, and how far that of half as many steps is from it."""
        fine, coarse = self.references
        images, _ = self.draw(fine)
        halved, _ = self.draw(coarse)
        self.progress(self.evaluations((fine, coarse)))
        return images, distance(halved, images)

    def plain_points(self, exact: np.ndarray) -> list[Point]:
        """All samplers without an accelerator, measured."""
        self.draw(replace(self.base, solver=Heun(), steps=2))  # first-time work
        return [self.measure(config, exact) for config in self.plain()]

    def trials(
        self, plain: Sequence[Point], accelerators: Sequence[Accelerator]
    ) -> list[SamplerConfig]:
        """Accelerators with the solvers that are on the frontier without them."""
        best = {type(p.config.solver) for p in frontier(plain, operations)}
        return [
            replace(config, accelerator=accelerator)
            for config in self.plain()
            if type(config.solver) in best
            for accelerator in accelerators
        ]

    def jumps(self, model: str, counts: Sequence[int] = ()) -> list[Point]:
        """A few-step model with these numbers of jumps; its folder is named in the points.

        None are those of its objective.
        """
        counts = counts or self.pipeline.model.config.objective.jump_counts
        configs = [self.pipeline.sampler(SamplerConfig(solver=Jumps(), steps=n)) for n in counts]
        self.draw(configs[0])  # first-time work
        out = []
        for config in configs:
            times = [self.draw(config)[1] for _ in range(self.repeats)]
            out.append(Point(config, self.macs(config), statistics.median(times), model=model))
        return out

    def timed(self, points: Sequence[Point]) -> list[Point]:
        """The points, those of the frontiers with the median of several times, in turns."""
        chosen = {id(p) for cost in (operations, seconds) for p in frontier(points, cost)}
        times = {i: [p.seconds] for i, p in enumerate(points) if id(p) in chosen}
        for _ in range(self.repeats - 1):
            for i in times:
                times[i].append(self.draw(points[i].config)[1])
        return [
            replace(p, seconds=statistics.median(times[i])) if i in times else p
            for i, p in enumerate(points)
        ]

    def evaluations(self, configs: Sequence[SamplerConfig]) -> int:
        """Evaluations of the network for an image of each of these samplers."""
        return sum(self.pipeline.sampler(config).evaluations for config in configs)

    @property
    def references(self) -> tuple[SamplerConfig, SamplerConfig]:
        """The sampler of the exact path, and that of half as many steps."""
        heun = replace(self.base, solver=Heun(), accelerator=NoAccelerator())
        half = max(self.reference_steps // 2, 1)
        return replace(heun, steps=self.reference_steps), replace(heun, steps=half)


def distance(images: np.ndarray, exact: np.ndarray) -> float:
    """Root mean square difference, relative to the deviation of the values of `exact`."""
    return float(np.sqrt(np.mean((images - exact) ** 2)) / max(exact.std(), 1e-12))


def facts(point: Point) -> dict[str, Any]:
    """A point for JSON."""
    config = point.config
    return {
        "solver": families.word(type(config.solver)),
        "steps": config.count,
        "evaluations": config.evaluations,
        "accelerator": families.word(type(config.accelerator)),
        "macs": point.macs,
        "seconds": point.seconds,
        "error": None if math.isnan(point.error) else point.error,
        "frechet": point.frechet,
        "kernel": point.kernel,
        "model": point.model,
    }


def sparing(tried: Sequence[Point], plain: Sequence[Point]) -> list[Point]:
    """Accelerated points that take fewer operations than the same sampler without accelerator."""
    macs = {(type(p.config.solver), p.config.count): p.macs for p in plain}
    return [p for p in tried if p.macs < macs[type(p.config.solver), p.config.count]]


def beaten(points: Sequence[Point], cost: Quantity) -> Iterator[str]:
    """Words of accelerators without a point on the frontier."""
    on = {type(p.config.accelerator) for p in frontier(points, cost)}
    for kind in dict.fromkeys(type(p.config.accelerator) for p in points if p.accelerated):
        if kind not in on:
            yield families.word(kind)
