"""What a run shows of itself on the way, whatever it trains: a picture, measures and warnings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from patchdiffusion.data.pack import Pack
from patchdiffusion.patches import Size
from patchdiffusion.system.dist import Team
from patchdiffusion.train.settings import Settings

T = TypeVar("T")
Ending = Callable[[], bool]


class Abandoned(Exception):
    """The run is to end, and what was being computed is not needed to go on later."""


@dataclass(frozen=True)
class Shown:
    """One preview."""

    picture: np.ndarray
    """uint8 [H, W, C]."""
    facts: Mapping[str, Any]
    """What is recorded, as JSON values; "held_out" has loss, bands and sizes."""
    text: str = ""
    """What is said beside the name of the picture."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """For trackers, by their names."""
    warnings: tuple[str, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    """Text entries of the picture."""


class Preview(Protocol):
    """Measures and shows the averaged weights; the same seeds, images and noise each time.

    Each process computes its share. `ending` says whether to give up, which any process may do: all
    then raise `Abandoned`.
    """

    def show(self, model: Any, ending: Ending = bool) -> Shown:
        """The preview of a model, as `TaskConfig.model` makes it; all processes must call it."""
        ...


@dataclass(frozen=True)
class Scene:
    """What a preview may depend on."""

    config: Settings
    pack: Pack
    sizes: tuple[Size, ...]
    """The whole canvas, then the sizes of the plan's crops."""
    device: torch.device
    precision: str
    team: Team

    @property
    def batch(self) -> int:
        """Images at a time."""
        return min(64, self.config.micro_batch or self.config.batch)

    def everywhere(self, work: Callable[[], T]) -> list[T]:
        """What all processes have made, unless one of them gave up."""
        try:
            made = [work()]
        except Abandoned:
            made = []
        found = self.team.gather(made)
        if not all(found):
            raise Abandoned
        return [value for (value,) in found]


def held_out_text(facts: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """The held-out loss, if it was measured, for people and for trackers."""
    held = facts.get("held_out")
    if held is None:
        return "", {}
    bands = " ".join(f"{band} {value:.3f}" for band, value in held["bands"].items())
    text = f"  held-out loss {held['loss']:.4f}  (by noise: {bands})"
    return text, {"held-out loss": held["loss"]}
