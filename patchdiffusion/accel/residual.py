"""A cache that looks: blocks are left out for images whose first blocks have hardly changed.

The first blocks are evaluated in every step. If what they add differs little from what they added
when the others were last computed, the output of those is kept (first-block caches, as in
ParaAttention and cache-dit); else they are computed. Each image decides for itself.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchdiffusion.accel.cache import Cached, CacheSchedule, Memory, Moment, cuttable
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.guidance.base import Surroundings


@dataclass(frozen=True)
class ByChange(CacheSchedule):
    """Full evaluations of samples whose signal has changed by at least a threshold.

    The change is mean |s - s_full| / mean |s_full|, for each sample. With `accumulate` changes
    since the step before are summed until the next full evaluation instead.
    """

    threshold: float
    warmup: int = 0
    """Steps at the start that are full."""
    most: int = -1
    """Most evaluations of a trajectory without the inner part; -1 is any."""
    most_in_row: int = -1
    """Most of them one after the other; -1 is any."""
    accumulate: bool = False
    order: int = 0

    def full(self, memory: Memory, now: Moment, signal: Tensor) -> Tensor | bool:
        facts, count = memory.facts, len(signal)
        if not facts:
            facts |= {name: torch.zeros(count, dtype=torch.float64) for name in _FACTS}
        if now.index < self.warmup or memory.signal is None:
            return True
        facts["drift"] = self._drift(memory, signal)
        decided = facts["drift"] >= self.threshold
        if self.most >= 0:
            decided |= facts["all"] >= self.most
        if self.most_in_row >= 0:
            decided |= facts["row"] >= self.most_in_row
        return decided

    def _drift(self, memory: Memory, signal: Tensor) -> Tensor:
        reference = memory.before if self.accumulate else memory.signal
        assert reference is not None
        change = (signal - reference).abs().flatten(1).mean(1, dtype=torch.float32)
        size = reference.abs().flatten(1).mean(1, dtype=torch.float32)
        relative = (change / size).double().cpu().nan_to_num(posinf=math.inf)
        return memory.facts["drift"] + relative if self.accumulate else relative

    def done(self, memory: Memory, now: Moment, full: Tensor) -> None:
        """Count what was left out, and begin the sum of changes anew."""
        for name, value in memory.facts.items():
            if name == "drift":
                memory.facts[name] = value.masked_fill(full, 0)
            else:
                counted = value + (~full).double()
                memory.facts[name] = counted.masked_fill(full, 0) if name == "row" else counted


_FACTS = ("drift", "all", "row")


# ---- As a part of a sampler ----


@dataclass(frozen=True, kw_only=True)
class Residual:
    """Blocks are kept for images whose first blocks have hardly changed; each decides by itself."""

    word: ClassVar[str] = "residual"

    threshold: float = 0.1
    """Relative change of what the first blocks add, from which on the others are computed; 0 is no
    cache."""
    accumulate: bool = False
    """Sum the changes of all steps since the last full one, instead of the change since it."""
    warmup: int = 2
    """Full steps at the start."""
    most: int = -1
    """Most evaluations in which blocks are left out; -1 is any number."""
    most_in_row: int = 4
    """Most of them one after the other; -1 is any number."""
    taylor: int = 0
    """Degree of the polynomial that continues what was kept: 0 as it was, 1 along a line, 2."""
    first: int | None = None
    """Blocks at the start that are always computed: see `deepcache`."""
    last: int | None = None
    """Blocks at the end that are always computed: see `deepcache`."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold must be at least 0 and finite, not {self.threshold}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0, not {self.warmup}")
        for name in ("most", "most_in_row"):
            if getattr(self, name) < -1:
                raise ValueError(f"{name} must be at least -1, not {getattr(self, name)}")
        if not 0 <= self.taylor <= 2:
            raise ValueError(f"taylor must be 0, 1 or 2, not {self.taylor}")

    @classmethod
    def trials(cls) -> "tuple[Residual, ...]":
        """Settings that `speed` tries."""
        return tuple(cls(threshold=threshold) for threshold in (0.05, 0.1, 0.2))

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        """Raises `ValueError` for a network that does not run in parts, and for such blocks."""
        _, parts = cuttable(denoiser)
        cut = parts.cut(self.first, self.last)
        if cut.first == 0 and self.first is None:
            cut = parts.cut(1, self.last)
        if cut.first == 0:
            raise ValueError("first must be at least 1: the first blocks say what has changed")
        schedule = ByChange(
            self.threshold,
            self.warmup,
            self.most,
            self.most_in_row,
            self.accumulate,
            self.taylor,
        )
        return Cached(denoiser, schedule, cut)
