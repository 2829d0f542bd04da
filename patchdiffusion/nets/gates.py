"""Gates at the inputs of blocks: features that a block sees depend on the noise level.

Each rule of `--network.task-routing` is a record that builds a module of gates m. A residual block
z + F(z) then becomes z + F(m z): the gate changes the input of its branches only, and features pass
beside them as they are. In the blocks of U-Nets the convolutions see gated features, and the skip,
also one that changes the width, and attention see all of them. A noise level is told by its
percentile in the noise law, `percentile` of `Cond`, so that equal steps are equal shares of the
training, and samplers may take any levels.

Shapes: B batch, T tokens, D features, C channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from patchdiffusion.cond import Cond, Tape


class Gates(nn.Module, ABC):
    """The gates of all blocks of a network."""

    @abstractmethod
    def begin(self, percentile: Tensor) -> Any:
        """State of a pass for percentiles [B], which is given to the gate of every block."""

    @abstractmethod
    def forward(self, block: int, h: Tensor, state: Any) -> Tensor:
        """Factors of the features that a block sees, which broadcast against h.

        h [B, T, D] or [B, C, H, W]; blocks are counted in their order in the network.
        """

    def put_losses(self, tape: Tape, percentile: Tensor) -> None:
        """Put auxiliary losses of percentiles [B] on the tape; by default none."""

    def units(self) -> list[nn.Module]:
        """Parts that are compiled and sharded one by one."""
        return []


class TaskRule(ABC):
    """Base of the rules of `--network.task-routing`: frozen records that build a module."""

    in_unets: ClassVar[bool] = False
    """True if blocks of U-Nets can be gated as well."""

    @abstractmethod
    def build(self, blocks: Sequence[int]) -> Gates | None:
        """Gates of blocks with so many features at their inputs; None for none."""

    @property
    def reads(self) -> frozenset[str]:
        """Fields of `Cond` that the network reads for it."""
        return frozenset({"percentile"})


@dataclass(frozen=True, kw_only=True)
class NoTaskRouting(TaskRule):
    """All blocks see all features at every noise level."""

    word: ClassVar[str] = "none"
    in_unets: ClassVar[bool] = True

    def build(self, blocks: Sequence[int]) -> None:
        return None

    @property
    def reads(self) -> frozenset[str]:
        return frozenset()


def percentiles(cond: Cond, like: Tensor) -> Tensor:
    """Percentiles of the noise levels, float32 [B]; `ValueError` if they are missing.

    On the meta device, where nothing is computed, they may be missing.
    """
    if cond.percentile is not None:
        return cond.percentile
    if like.is_meta:
        return torch.empty(len(like), device="meta")
    raise ValueError(
        "this network routes by the percentile of the noise level, and Cond.percentile is missing; "
        "give NetDenoiser the noise law of the model, or take Model.denoiser"
    )
