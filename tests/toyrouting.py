"""Toys of what routes inside a network; `toys.py` makes them members of their families."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchdiffusion.nets import experts, gates, taskrouting


@dataclass(frozen=True, kw_only=True)
class ToyGates(gates.TaskRule):
    """Blocks see their features more weakly at more noise."""

    least: float = 0.5

    def build(self, blocks: Sequence[int]) -> "Dimmer":
        return Dimmer(self.least)


class Dimmer(gates.Gates):
    """One factor for all blocks and features."""

    def __init__(self, least: float):
        super().__init__()
        self.least = least

    def begin(self, percentile: Tensor) -> Tensor:
        return 1 - (1 - self.least) * percentile

    def forward(self, block: int, h: Tensor, state: Tensor) -> Tensor:
        return state.reshape(-1, *[1] * (h.ndim - 1))


@dataclass(frozen=True, kw_only=True)
class ToyExperts(experts.Mixture):
    """The first expert has the tokens of the left half, the second those of the right."""

    count: int = 2
    top: float = 1
    shared: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count != 2:
            raise ValueError(f"count must be 2 for toy-experts, not {self.count}")

    def mixture(self, shape: experts.MlpShape) -> "Halves":
        return Halves(self, shape)


class Halves(experts.Experts):
    """Two experts, by the first coordinate."""

    def scores(self, h: Tensor, places: Tensor | None) -> Tensor:
        assert places is not None
        left = places[..., :1] < 0
        return torch.cat([left, ~left], dim=-1).float()

    def mixed(self, h: Tensor, scores: Tensor) -> tuple[Tensor, experts.Routed]:
        each = torch.stack([mlp(h) for mlp in self.mlps], dim=-1)
        return (each * scores[..., None, :]).sum(-1), experts.Routed(scores, scores > 0)


TOYS = ((taskrouting.TaskRouting, ToyGates), (experts.MlpExperts, ToyExperts))
