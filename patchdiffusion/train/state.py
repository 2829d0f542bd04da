"""Everything that changes while a run goes on, declared once: in memory and in checkpoints.

`system/serialize.py` turns the records into JSON and back. JSON holds floats exactly, by their
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
"""Of each set of names that are added together: totals, then counts."""


class Meter:
    """Sums of scalars on the device, read once per status line, so that no step waits for one."""

    def __init__(self) -> None:
        # Float64 [2, n], totals and counts, by the names that were added together.
        self.sums: dict[tuple[str, ...], Tensor] = {}

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add scalars; those that are not finite count as absent, as their step is skipped."""
        now = torch.stack([value.to(torch.float64) for value in values.values()])
        finite = torch.isfinite(now)
        pair = torch.stack([torch.where(finite, now, 0.0), finite.to(torch.float64)])
        names = tuple(values)
        self.sums[names] = self.sums[names] + pair if names in self.sums else pair

    def read(self) -> dict[str, float]:
        """Means since the last call, by name; synchronises with the device.

        "skipped sum" is the number of steps that were skipped.
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
        """The sums."""
        rows = self.sums.items()
        return tuple((names, tuple(pair.flatten().tolist())) for names, pair in rows)

    @classmethod
    def of(cls, state: Sums, device: torch.device) -> "Meter":
        """The inverse of `state`."""
        meter = cls()
        for names, values in state:
            pair = torch.tensor(values, dtype=torch.float64, device=device)
            meter.sums[names] = pair.view(2, len(names))
        return meter


@dataclass(kw_only=True)
class TrainState:
    """Counters of a run. There is no random state, since every draw is a function."""

    step: int = 0
    """Optimizer steps, skipped ones included."""
    crops: int = 0
    """Crops seen."""
    equivalents: float = 0.0
    """Their area in full images."""
    flops: int = 0
    """Floating-point operations of the network, forward and backward."""
    passed_steps: int = 0
    """Steps whose draws were left out after a rollback."""
    passed_crops: int = 0
    """Their crops."""
    skipped: int = 0
    """Steps whose loss or gradient was not finite, up to the last status line."""
    shown: float = 0.0
    """What the clock showed when samples were drawn last."""
    seconds: float = 0.0
    """Time spent training, over all restarts."""

    @property
    def cursor(self) -> tuple[int, int]:
        """Position and position that the draws of the next step are keyed by."""
        return self.step + self.passed_steps, self.crops + self.passed_crops

    def move_cursor(self, cursor: tuple[int, int]) -> None:
        """Leave out all draws up to a cursor."""
        self.passed_steps, self.passed_crops = cursor[0] - self.step, cursor[1] - self.crops

    def clock(self, name: Clock) -> float:
        """The counter that a clock shows."""
        return {"equivalents": self.equivalents, "crops": self.crops, "steps": self.step}[name]

    def advance(self, groups: tuple[Group, ...], canvas: Size, flops: int) -> None:
        """Count one step."""
        self.step += 1
        self.crops += sum(group.count for group in groups)
        self.equivalents += equivalents(groups, canvas)
        self.flops += flops


# ---- As checkpoints hold it ----


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What a run was trained on."""

    fingerprint: str
    images: int


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Everything about a run that is not a tensor: the file `state.json` of a checkpoint."""

    format: int
    """Version of the checkpoint's layout."""
    step: int
    images: float
    """What the clock of the run shows."""
    state: TrainState
    meter: Sums = ()
    guard: GuardState
    loss_scale: tuple[float, float]
    """For fp16: the factor, and the number of good steps since it changed."""
    data: DataFacts
    config: TrainConfig
    engine: dict[str, Any]
    """What the last bits depend on beside the configuration."""
    groups: dict[str, tuple[str, ...]]
    """Names of all tensors, by group."""
    teacher: str | None = None
    """Digest of the model that is distilled."""
