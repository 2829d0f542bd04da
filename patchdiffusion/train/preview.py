"""Previews of a run in progress: a picture, measurements and warnings, for any task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from patchdiffusion.conditioners.base import Change, unchanged
from patchdiffusion.data.pack import Pack
from patchdiffusion.patches import Size
from patchdiffusion.system.dist import Team
from patchdiffusion.train.settings import Settings

T = TypeVar("T")
Ending = Callable[[], bool]


class Abandoned(Exception):
    """Raised in a preview that is given up because the run is to end."""


@dataclass(frozen=True)
class Shown:
    """Result of a preview."""

    picture: np.ndarray
    """uint8 [H, W, C]."""
    facts: Mapping[str, Any]
    """Values for `log.jsonl`, as JSON; "held_out" has loss, bands and sizes."""
    text: str = ""
    """Text to print after the name of the picture."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Values for trackers, by name."""
    warnings: tuple[str, ...] = ()
    reference: np.ndarray | None = None
    """Training images for comparison with the picture, uint8 [H, W, C]."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Text entries of the picture."""
    charts: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Further pictures, uint8 [H, W, 3], by the end of their names, such as experts."""


class Preview(Protocol):
    """Measures and shows the averaged weights, with the same seeds, images and noise each time.

    Each process computes its share. `ending` returns True to give up; if any process does, all
    raise `Abandoned`.
    """

    def show(self, model: Any, ending: Ending = bool) -> Shown:
        """Preview of a model made by `TaskConfig.model`; all processes must call it."""
        ...


@dataclass(frozen=True)
class Scene:
    """Data, configuration and devices of a preview."""

    config: Settings
    pack: Pack
    sizes: tuple[Size, ...]
    """The whole canvas, then the crop sizes of the plan."""
    device: torch.device
    precision: str
    team: Team
    change: Change = unchanged
    """Change of batches by the conditioners."""
    kept: Mapping[str, bytes] = field(default_factory=dict)
    """Files that the conditioners have made."""

    @property
    def batch(self) -> int:
        """Number of images per forward pass."""
        return min(64, self.config.micro_batch or self.config.batch)

    def everywhere(self, work: Callable[[], T]) -> list[T]:
        """Results of `work` on all processes; raises `Abandoned` if it was raised on any."""
        try:
            result = [work()]
        except Abandoned:
            result = []
        results = self.team.gather(result)
        if not all(results):
            raise Abandoned
        return [value for (value,) in results]


def reads_captions(config: Settings) -> bool:
    """True if the network is conditioned on captions of the images."""
    return any(conditioner.reads_prompts for conditioner in config.conditioners)


def held_out_text(facts: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """Held-out loss, if it was measured, as text and as numbers for trackers."""
    held = facts.get("held_out")
    if held is None:
        return "", {}
    bands = " ".join(f"{band} {value:.3f}" for band, value in held["bands"].items())
    text = f"  held-out loss {held['loss']:.4f}  (by noise: {bands})"
    return text, {"held-out loss": held["loss"]}
