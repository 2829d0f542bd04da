"""State of a run apart from tensors, in memory and in checkpoints.

`system/serialize.py` converts the records to JSON and back. JSON stores floats exactly, as their
shortest text that gives the same bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchdiffusion.patches import Size
from patchdiffusion.plans import Clock, Group, equivalents
from patchdiffusion.train.config import TrainConfig
from patchdiffusion.train.guard import GuardState

Sums = tuple[tuple[tuple[str, ...], tuple[float, ...]], ...]
"""For each set of names that are added together: totals, then counts."""


class Meter:
    """Means of scalars on the device, read once per status line, so that no step waits for them."""

    def __init__(self) -> None:
        # Float64 [2, n], totals and counts, by the names that were added together.
        self.sums: dict[tuple[str, ...], Tensor] = {}

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add scalars; those that are not finite are left out, as their step is skipped."""
        now = torch.stack([value.to(torch.float64) for value in values.values()])
        finite = torch.isfinite(now)
        pair = torch.stack([torch.where(finite, now, 0.0), finite.to(torch.float64)])
        names = tuple(values)
        self.sums[names] = self.sums[names] + pair if names in self.sums else pair

    def read(self) -> dict[str, float]:
        """Means since the last call, by name; synchronizes with the device.

        "skipped sum" is the number of skipped steps.
        """
        totals: dict[str, float] = {}
        counts: dict[str, float] = {}
        for names, pair in self.sums.items():
            for name, total, count in zip(names, *pair.tolist(), strict=True):
                totals[name] = totals.get(name, 0.0) + total
                counts[name] = counts.get(name, 0.0) + count
        means = {name: totals[name] / count for name, count in counts.items() if count}
        if "skipped" in totals:
            means["skipped sum"] = totals["skipped"]
        self.sums.clear()
        return means

    def state(self) -> Sums:
        """Sums, for a checkpoint."""
        rows = self.sums.items()
        return tuple((names, tuple(pair.flatten().tolist())) for names, pair in rows)

    @classmethod
    def of(cls, state: Sums, device: torch.device) -> "Meter":
        """Inverse of `state`."""
        meter = cls()
        for names, values in state:
            pair = torch.tensor(values, dtype=torch.float64, device=device)
            meter.sums[names] = pair.view(2, len(names))
        return meter


@dataclass(kw_only=True)
class TrainState:
    """Counters of a run; random draws are functions of these, so there is no other random state."""

    step: int = 0
    """Optimizer steps, skipped ones included."""
    crops: int = 0
    """Crops seen."""
    equivalents: float = 0.0
    """Area of these crops in full images."""
    flops: int = 0
    """Floating-point operations of the network, forward and backward."""
    passed_steps: int = 0
    """Steps whose draws were skipped by rollbacks."""
    passed_crops: int = 0
    """Crops of these steps."""
    skipped: int = 0
    """Steps whose loss or gradient was not finite, up to the last status line."""
    shown: float = 0.0
    """Value of the clock at the last preview."""
    seconds: float = 0.0
    """Time spent training, over all restarts."""

    @property
    def cursor(self) -> tuple[int, int]:
        """Step and position that key the draws of the next step."""
        return self.step + self.passed_steps, self.crops + self.passed_crops

    def move_cursor(self, cursor: tuple[int, int]) -> None:
        """Skip all draws up to a cursor."""
        self.passed_steps, self.passed_crops = cursor[0] - self.step, cursor[1] - self.crops

    def clock(self, name: Clock) -> float:
        """Counter that a clock is based on."""
        shown = {"equivalents": self.equivalents, "crops": self.crops, "steps": self.step}
        return float(shown[name])

    def advance(self, groups: tuple[Group, ...], canvas: Size, flops: int) -> None:
        """Count one step."""
        self.step += 1
        self.crops += sum(group.count for group in groups)
        self.equivalents += equivalents(groups, canvas)
        self.flops += flops


# ---- Checkpoints ----


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """Fingerprint and size of the training data."""

    fingerprint: str
    images: int


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """State of a run apart from tensors: the file `state.json` of a checkpoint."""

    format: int
    """Version of the format of checkpoints."""
    step: int
    images: float
    """Value of the clock of the run."""
    state: TrainState
    meter: Sums = ()
    guard: GuardState
    loss_scale: tuple[float, float]
    """Loss scale of fp16, and number of good steps since it changed."""
    data: DataFacts
    config: TrainConfig
    engine: dict[str, Any]
    """Software and hardware settings, see `engine.engine_facts`."""
    groups: dict[str, tuple[str, ...]]
    """Names of all tensors, by group."""
    teacher: str | None = None
    """Digest of the teacher."""
