"""Everything that changes while a run goes on, and the sums behind its status lines."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patchdiffusion.patches import Size
from patchdiffusion.plans import Group, equivalents
from patchdiffusion.train.config import Clock


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

    def to_json(self) -> list[Any]:
        """The sums; floats as hexadecimal text, which is exact."""
        return [
            [list(names), [value.hex() for value in pair.flatten().tolist()]]
            for names, pair in self.sums.items()
        ]

    @classmethod
    def from_json(cls, data: list[Any], device: torch.device) -> "Meter":
        """The inverse of `to_json`."""
        meter = cls()
        for names, values in data:
            numbers = [float.fromhex(v) for v in values]
            pair = torch.tensor(numbers, dtype=torch.float64, device=device).view(2, -1)
            meter.sums[tuple(names)] = pair
        return meter


@dataclass
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
    meter: Meter = field(default_factory=Meter)

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

    def to_json(self) -> dict[str, Any]:
        """The counters; floats as hexadecimal text, which is exact."""
        return {
            "step": self.step,
            "crops": self.crops,
            "equivalents": self.equivalents.hex(),
            "flops": self.flops,
            "passed": [self.passed_steps, self.passed_crops],
            "skipped": self.skipped,
            "shown": self.shown.hex(),
            "seconds": self.seconds.hex(),
            "meter": self.meter.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], device: torch.device) -> "TrainState":
        """The inverse of `to_json`."""
        return cls(
            step=data["step"],
            crops=data["crops"],
            equivalents=float.fromhex(data["equivalents"]),
            flops=data["flops"],
            passed_steps=data["passed"][0],
            passed_crops=data["passed"][1],
            skipped=data["skipped"],
            shown=float.fromhex(data["shown"]),
            seconds=float.fromhex(data["seconds"]),
            meter=Meter.from_json(data["meter"], device),
        )
