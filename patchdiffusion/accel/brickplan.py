"""Schedules of bricks by noise level, and tables of measurements that they are made of."""

import bisect
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Subset = tuple[int, ...]
"""Numbers of bricks that are evaluated, in order, from 1; the output is that of the last."""


def subsets(count: int, *, needs_first: bool = True) -> tuple[Subset, ...]:
    """All bricks, then the early exits from the latest, then all without one of the others.

    Without the first brick only if the others do not need it.
    """
    every = tuple(range(1, count + 1))
    exits = [every[:k] for k in range(count - 1, 0, -1)]
    inner = every[1:-1] if needs_first else every[:-1]
    return (every, *exits, *(without(every, (k,)) for k in inner))


def without(every: Subset, left_out: Iterable[int]) -> Subset:
    """The bricks but for some of them; `ValueError` if there is no such brick, or none is left."""
    dropped = set(left_out)
    wrong = sorted(dropped - set(every))
    if wrong or dropped == set(every):
        bad = f"brick {wrong[0]}" if wrong else f"all of {_listed(every)}"
        raise ValueError(f"{bad} cannot be left out; the bricks are {_listed(every)}")
    return tuple(k for k in every if k not in dropped)


def described(subset: Subset, count: int) -> str:
    """Text for a subset of so many bricks: all, only 1, without 3."""
    every = tuple(range(1, count + 1))
    if subset == every:
        return "all"
    if len(subset) < min(count - 1, 2):
        return f"only {_listed(subset)}"
    return f"without {_listed(k for k in every if k not in subset)}"


def _some(every: Subset, subset: Subset) -> Subset:
    return tuple(k for k in every if k in subset)


def _listed(bricks: Iterable[int]) -> str:
    return ", ".join(map(str, bricks))


@dataclass(frozen=True)
class BrickSchedule:
    """Bricks by noise level: bricks[i] where edges[i - 1] < sigma <= edges[i].

    Raises `ValueError` unless the edges increase and there is one subset more than edges.
    """

    edges: tuple[float, ...]
    bricks: tuple[Subset, ...]

    def __post_init__(self) -> None:
        pairs = itertools.pairwise((0.0, *self.edges, math.inf))
        if len(self.bricks) != len(self.edges) + 1 or not all(a < b for a, b in pairs):
            raise ValueError(
                f"{len(self.bricks)} subsets of bricks need {len(self.bricks) - 1} increasing "
                f"noise levels between them, not {self.edges}"
            )

    @classmethod
    def joined(cls, edges: Iterable[float], bricks: Iterable[Subset]) -> "BrickSchedule":
        """A schedule without the edges at which nothing changes."""
        bricks = list(bricks)
        changes = zip(edges, itertools.pairwise(bricks), strict=True)
        kept = [(edge, above) for edge, (below, above) in changes if below != above]
        return cls(tuple(edge for edge, _ in kept), (bricks[0], *(above for _, above in kept)))

    @classmethod
    def within(cls, low: float, high: float, inside: Subset, outside: Subset) -> "BrickSchedule":
        """One subset of bricks where low < sigma <= high, and another one elsewhere."""
        if low == high:
            return cls((), (outside,))
        below = [(low, outside)] if low > 0 else []
        pieces = [*below, (high, inside)]
        pieces += [(math.inf, outside)] if high < math.inf else []
        return cls.joined([edge for edge, _ in pieces[:-1]], [subset for _, subset in pieces])

    def at(self, sigma: float) -> Subset:
        """Bricks at a noise level."""
        return self.bricks[bisect.bisect_left(self.edges, sigma)]

    def pieces(self, sigma: Tensor) -> Tensor:
        """Index into `bricks` for each noise level: int64 of the same shape.

        Edges are rounded as the levels are, so that a level that is an edge stays one.
        """
        edges = torch.tensor(self.edges, dtype=sigma.dtype, device=sigma.device)
        return torch.bucketize(sigma.contiguous(), edges)


@dataclass(frozen=True, kw_only=True)
class BrickTable:
    """Held-out losses of subsets of bricks, by noise level, for one model.

    Raises `ValueError` unless all lists fit, the first subset has all bricks, and all numbers are
    finite.
    """

    FILE: ClassVar[str] = "bricks.json"

    subsets: tuple[Subset, ...]
    """Bricks of each row, of which the first has all."""
    sigmas: tuple[float, ...]
    """Increasing noise levels of the columns."""
    losses: tuple[tuple[float, ...], ...]
    """Mean weighted loss of each subset at each noise level."""
    errors: tuple[tuple[float, ...], ...]
    """Standard error of each penalty, over the images."""
    macs: tuple[float, ...]
    """Multiply-accumulates of each subset, for an image of the canvas."""
    images: int
    """Number of images."""
    data: str = ""
    """Name of the data that the images are from."""

    def __post_init__(self) -> None:
        rows, columns = len(self.subsets), len(self.sigmas)
        fits = rows == len(self.losses) == len(self.errors) == len(self.macs) > 0 < columns
        lengths = {len(row) for row in (*self.losses, *self.errors)}
        if not fits or lengths != {columns}:
            raise ValueError("the rows and columns of losses are not those of bricks and sigmas")
        numbers = (*self.sigmas, *self.macs, *itertools.chain(*self.losses, *self.errors))
        if not all(map(math.isfinite, numbers)):
            raise ValueError(
                "all numbers must be finite: the model denoises to values that are not"
            )
        increasing = all(a < b for a, b in itertools.pairwise((0.0, *self.sigmas)))
        if not increasing or any(loss <= 0 for row in self.losses for loss in row):
            raise ValueError("noise levels must be positive and increase, losses must be positive")
        every = tuple(range(1, len(self.subsets[0]) + 1))
        if self.subsets[0] != every or not every:
            raise ValueError(f"the first subset must have all bricks, not {self.subsets[0]}")
        if any(not subset or subset != _some(every, subset) for subset in self.subsets):
            raise ValueError(f"every subset must be some of the bricks {_listed(every)}, in order")

    def penalty(self, row: int, column: int) -> float:
        """Relative increase of the loss with a subset instead of all bricks."""
        return self.losses[row][column] / self.losses[0][column] - 1

    def schedule(self, bound: float) -> BrickSchedule:
        """The cheapest subset at each noise level whose penalty is at most `bound`.

        A choice holds half the way, in the logarithm, to the next noise level; beyond the first and
        the last it is theirs. Raises `ValueError` for a negative bound.
        """
        if not 0 <= bound < math.inf:
            raise ValueError(f"the bound of a penalty must be at least 0 and finite, not {bound}")
        chosen = []
        for column in range(len(self.sigmas)):
            rows = range(len(self.subsets))
            fair = [row for row in rows if row == 0 or self.penalty(row, column) <= bound]
            best = min(fair, key=lambda row: (self.macs[row], self.losses[row][column]))
            chosen.append(self.subsets[best])
        between = [math.sqrt(a * b) for a, b in itertools.pairwise(self.sigmas)]
        return BrickSchedule.joined(between, chosen)

    def cost(self, schedule: BrickSchedule, sigmas: Iterable[float]) -> float:
        """Share of the operations of all bricks that evaluations at these noise levels take."""
        macs = dict(zip(self.subsets, self.macs, strict=True))
        taken = [macs[schedule.at(sigma)] for sigma in sigmas]
        return sum(taken) / (len(taken) * self.macs[0])
