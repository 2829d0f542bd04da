"""Everything that changes while a run goes on, and the sums behind its status lines."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patchdiffusion.patches import Group, Size, equivalents
from patchdiffusion.train.config import Clock


class Meter:
    """Sums of scalars on the device, read once per status line, so that no step waits for one."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add a scalar; values that are not finite count as absent, as their step is skipped."""
        value = value.detach().to(torch.float64)
        finite = torch.isfinite(value)
        pair = torch.stack([torch.where(finite, value, 0.0), finite.to(torch.float64)])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def read(self) -> dict[str, float]:
        """Means since the last call, by name; synchronises with the device.

        "skipped sum" is the number of steps that were skipped.
        """
        means = {}
        for name, pair in self.sums.items():
            total, count = pair.tolist()
            if count:
                means[name] = total / count
            if name == "skipped":
                means["skipped sum"] = total
        self.sums.clear()
        return means


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
    skipped: int = 0
    """Steps whose loss or gradient was not finite, up to the last status line."""
    seconds: float = 0.0
    """Time spent training, over all restarts."""
    meter: Meter = field(default_factory=Meter)

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
            "skipped": self.skipped,
            "seconds": self.seconds.hex(),
            "meter": {k: [v.hex() for v in pair.tolist()] for k, pair in self.meter.sums.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], device: torch.device) -> "TrainState":
        """The inverse of `to_json`."""
        meter = Meter()
        for name, pair in data["meter"].items():
            values = [float.fromhex(v) for v in pair]
            meter.sums[name] = torch.tensor(values, dtype=torch.float64, device=device)
        return cls(
            step=data["step"],
            crops=data["crops"],
            equivalents=float.fromhex(data["equivalents"]),
            flops=data["flops"],
            skipped=data["skipped"],
            seconds=float.fromhex(data["seconds"]),
            meter=meter,
        )
