"""DeepCache: the deep part of a U-Net is computed in every n-th step (arXiv 2312.00858).

Of a transformer it is the sum of what the middle blocks add, of LEGO bricks that of the costliest.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from patchdiffusion.accel.base import check_steps
from patchdiffusion.accel.cache import Cached, FixedSteps, Refresh, cuttable
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.guidance.base import Surroundings


def uniform(steps: int, every: int) -> frozenset[int]:
    """The steps 0, every, 2 every, ... of so many."""
    return frozenset(range(0, steps, every))


def centered(
    steps: int, every: int, center: float, power: float, *, published: bool = False
) -> frozenset[int]:
    """About steps / every steps, dense near a center: {0} and floor(spow(l, power) + center).

    spow(a, q) = sign(a) |a|^q, with l evenly spaced from spow(-center, 1 / power) to
    spow(steps - center, 1 / power), the end excluded. `published` computes with complex powers, as
    the code of the authors does by accident, which is nearly uniform.
    """
    count = math.ceil(steps / every)
    if published:
        low, high = complex(-center) ** (1 / power), complex(steps - center) ** (1 / power)
        line = (low + (high - low) * i / count for i in range(count))
        chosen = {math.floor(math.trunc((point**power).real) + center) for point in line}
    else:
        low, high = _signed(-center, 1 / power), _signed(steps - center, 1 / power)
        points = (low + (high - low) * i / count for i in range(count))
        chosen = {math.floor(_signed(point, power) + center) for point in points}
    return frozenset({0} | {step for step in chosen if 0 <= step < steps})


def _signed(a: float, power: float) -> float:
    return math.copysign(abs(a) ** power, a)


@dataclass(frozen=True, kw_only=True)
class DeepCache:
    """The deep part of the network in every n-th step only, the rest in all (2312.00858)."""

    word: ClassVar[str] = "deepcache"

    every: int = 3
    """Steps from one full evaluation to the next; 1 is no cache."""
    first: int | None = None
    """Blocks at the start that are computed in every step: of the encoder of a U-Net after its
    stem (the paper's branch), of a transformer, or bricks. None: those of full resolution, at most
    3; a quarter; all before the costliest brick."""
    last: int | None = None
    """Blocks at the end of a transformer, or bricks, that are computed in every step; None as for
    `first`. Not for U-Nets."""
    center: float | None = None
    """Step near which full evaluations are dense; None spaces them evenly. Useful from 5 steps
    on."""
    power: float = 1.4
    """Power, above 1, of the distance from the center."""
    published: bool = False
    """The spacing around a center that the authors' code computes, which is nearly even."""
    steps: tuple[int, ...] = ()
    """Steps with full evaluations, from 0, instead of `every`."""
    refresh: Refresh = "all"
    """all: every evaluation of a full step is full; predictor: not the corrections of heun and
    others."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}")
        if self.steps and (self.every, self.center) != (3, None):
            raise ValueError("steps and every or center exclude each other: give one of them")
        if any(step < 0 for step in self.steps):
            raise ValueError(f"steps count from 0, not {min(self.steps)}")
        if self.center is not None and not 0 <= self.center < math.inf:
            raise ValueError(f"center must be a step, at least 0, not {self.center}")
        if not 1 < self.power <= 10:
            raise ValueError(f"power must lie in (1, 10], not {self.power}")
        if self.published and self.center is None:
            raise ValueError("published is about the spacing around a center: give one")

    @classmethod
    def trials(cls) -> "tuple[DeepCache, ...]":
        """Settings that `speed` tries."""
        return tuple(cls(every=every) for every in (2, 3, 5))

    def full_steps(self, count: int) -> frozenset[int]:
        """Steps of so many with full evaluations; the first one is always among them."""
        if self.steps:
            return frozenset({0, *(step for step in self.steps if step < count)})
        if self.center is None:
            return uniform(count, self.every)
        return centered(count, self.every, self.center, self.power, published=self.published)

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        """Raises `ValueError` for a network that does not run in parts, and for such blocks."""
        _, parts = cuttable(denoiser)
        count = len(around.schedule) - 1
        check_steps(self.steps, count)
        if self.center is not None and self.center >= count:
            raise ValueError(
                f"accelerator.center must be below {count} for {count} steps, not {self.center:g}"
            )
        cut = parts.cut(self.first, self.last)
        return Cached(denoiser, FixedSteps(self.full_steps(count), self.refresh), cut)
