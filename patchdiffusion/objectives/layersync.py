"""LayerSync: an early block of the network learns the features of a later one.

Haghighi et al., "LayerSync: Self-aligning Intermediate Layers" (arXiv 2510.12581): the loss has the
term - weight mean cos(h_early, h_late) over places, and no gradient passes through h_late. It needs
neither an encoder nor parameters, and no further pass.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from patchdiffusion.denoiser import Denoiser
from patchdiffusion.losses import Batch, LossOut, Objective
from patchdiffusion.nets.tapmaps import TapMap, at_depth, chosen, coarsens, tap_maps
from patchdiffusion.objectives.base import Addition, Materials, Settings
from patchdiffusion.objectives.taps import check_taps, full_size, recorded, with_term
from patchdiffusion.patches import Size, size_name
from patchdiffusion.rng import Draws

EARLY, LATE = 0.3, 0.6
"""Default depths: blocks 8 and 16 of 28 in the paper's XL."""


@dataclass(frozen=True, kw_only=True)
class LayerSyncConfig(Addition):
    """LayerSync: features of an early block are drawn to those of a later one."""

    word: ClassVar[str] = "layersync"

    weight: float = 0.2
    """Weight of the term; 0 is none."""
    early: str = ""
    """Activation that learns, of those that patchdiffusion info lists; empty chooses: .3 of the
    depth, or the end of the lowest level of the encoder of a network with down-sampling."""
    late: str = ""
    """Activation that is learned from; empty chooses: .6 of the depth, or the end of the lowest
    level of the decoder."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1000:
            raise ValueError(f"weight must lie in [0, 1000], not {self.weight}")

    def check(self, config: Settings) -> None:
        check_taps("layersync", config)

    def add(self, objective: Objective, materials: Materials) -> Objective:
        """The objective with the term; at weight 0 the objective itself.

        Raises `ValueError` for a network without such taps, and for two that do not match.
        """
        if not self.weight:
            return objective
        network = materials.network
        maps = tap_maps(network.config.build, full_size(materials))
        early, late = self._pair(network.taps, maps)
        if (early.features, early.grid) != (late.features, late.grid):
            raise ValueError(
                f"layersync compares taps of one size, not {_said(early)} and {_said(late)}"
            )
        order = list(maps)
        if order.index(early.name) >= order.index(late.name):
            raise ValueError(
                f"layersync needs an early tap before the late one, not {early.name} and "
                f"{late.name}; the order is {', '.join(order)}"
            )
        return LayerSyncLoss(objective, self.weight, early, late, network.config.token_size)

    def _pair(self, names: tuple[str, ...], maps: dict[str, TapMap]) -> tuple[TapMap, TapMap]:
        """The taps that are compared."""
        early = chosen(names, maps, self.early, lambda: _early(names, maps))
        return early, chosen(names, maps, self.late, lambda: _late(names, maps, early))


def _early(names: tuple[str, ...], maps: dict[str, TapMap]) -> str:
    """The tap at `EARLY`, or the last of lowest resolution in the encoder of a U-Net."""
    if not coarsens(maps):
        return at_depth(names, maps, EARLY)
    coarsest = max(tap.cell for tap in maps.values())
    lowest = [name for name, tap in maps.items() if tap.cell == coarsest]
    return ([name for name in lowest if name.startswith("enc.")] or lowest)[-1]


def _late(names: tuple[str, ...], maps: dict[str, TapMap], early: TapMap) -> str:
    """The tap at `LATE`, or the last of the same size in a U-Net; after the early one."""
    order = list(maps)
    after = order[order.index(early.name) + 1 :]
    alike = [n for n in after if (maps[n].features, maps[n].grid) == (early.features, early.grid)]
    late = at_depth(names, maps, LATE)
    if late in alike and not coarsens(maps):
        return late
    return alike[-1 if coarsens(maps) else 0] if alike else late


def _said(tap: TapMap) -> str:
    return f"{tap.name} ({tap.features} features on {size_name(tap.grid)})"


@dataclass(frozen=True, eq=False)
class LayerSyncLoss:
    """An objective minus weight mean cos(h_early, h_late), where h_late is a constant."""

    objective: Objective
    weight: float
    early: TapMap
    late: TapMap
    tokens: Size

    @property
    def told(self) -> str:
        """The taps that are compared."""
        return f"features of {self.early.name} are drawn to those of {self.late.name}"

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        names = (self.early.name, self.late.name)
        out, (early, late) = recorded(self.objective, denoiser, batch, draws, names, self.tokens)
        return with_term(out, "layersync", self.weight, negative_cosine(early, late.detach()))


def negative_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Minus the mean cosine of maps of features over their places: [B, D, *G] -> float32 [B]."""
    with torch.autocast(a.device.type, enabled=False):
        cosine = F.cosine_similarity(a.float().flatten(2), b.float().flatten(2), dim=1)
        return -cosine.mean(1)
