"""Denoising task routing: every noise level has its own, overlapping share of the channels.

Park et al., "Denoising Task Routing for Diffusion Models" (DTR, ICLR 2024, arXiv 2310.07138):
a window of channels slides from the first ones at the lowest noise level to the last ones at the
highest. Masks have no parameters and are computed from their formula in every pass, so weights of
networks with and without them are the same. Written from the paper.

Shapes: B batch, C channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from patchdiffusion.nets.gates import Gates, TaskRule
from patchdiffusion.rng import bits, seed_of


def window_starts(tasks: Tensor, count: int, alpha: float, room: int) -> Tensor:
    """First channel of the windows of tasks 0 (least noise) ... count - 1: int64 [B] -> int64 [B].

    round((t / (count - 1))^alpha room): alpha above 1 shares channels at low noise.
    """
    return ((tasks.double() / (count - 1)) ** alpha * room).round().long()


def windows(tasks: Tensor, count: int, alpha: float, channels: int, seen: int) -> Tensor:
    """Windows of `seen` of the channels for tasks int64 [B]: bool [B, C]."""
    start = window_starts(tasks, count, alpha, channels - seen)[:, None]
    channel = torch.arange(channels, device=tasks.device)
    return (channel >= start) & (channel < start + seen)


def random_masks(tasks: Tensor, channels: int, seen: int, seed: int) -> Tensor:
    """Independent random subsets of `seen` of the channels for tasks int64 [B]: bool [B, C]."""
    keys = bits(torch.full_like(tasks, seed_of(seed, "channel masks")), 1)[:, 0] ^ tasks
    order = bits(bits(keys, 1)[:, 0], channels).argsort(dim=1)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(channels, device=order.device).expand_as(order)
    )
    return rank < seen


@dataclass(frozen=True, kw_only=True)
class ChannelMasks(TaskRule):
    """Blocks see a share of the channels that slides with the noise level (DTR, 2310.07138)."""

    word: ClassVar[str] = "dtr"
    in_unets: ClassVar[bool] = True

    kind: Literal["window", "random"] = "window"
    """window: neighboring noise levels share most of their channels; random: each has an
    independent subset, the paper's weaker baseline."""
    alpha: float = 4.0
    """Exponent of the place of the window: above 1 it hardly moves at low noise."""
    beta: float = 0.8
    """Share of the channels that a noise level sees; 1 is all of them."""
    tasks: int = 1000
    """Number of intervals of noise levels, of equal probability in training, with own masks."""
    soft: bool = False
    """True to interpolate the masks of neighboring intervals, so that the denoiser is continuous in
    the noise level; not in the paper."""
    seed: int = 0
    """Seed of random masks."""

    def __post_init__(self) -> None:
        if self.kind not in ("window", "random"):
            raise ValueError(f"kind must be window or random, not {self.kind!r}")
        if not 0 < self.alpha <= 100:
            raise ValueError(f"alpha must lie in (0, 100], not {self.alpha:g}")
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta must lie in (0, 1], not {self.beta:g}")
        if not 2 <= self.tasks <= 10**6:
            raise ValueError(f"tasks must lie in [2, 1000000], not {self.tasks}")

    def masks(self, tasks: Tensor, channels: int) -> Tensor:
        """Channels that tasks int64 [B] see, 0 is the least noise: bool [B, C]."""
        seen = max(1, math.floor(self.beta * channels))
        if self.kind == "random":
            return random_masks(tasks, channels, seen, self.seed)
        return windows(tasks, self.tasks, self.alpha, channels, seen)

    def factors(self, percentile: Tensor, channels: int) -> Tensor:
        """Factors of the channels at percentiles [B] of the noise law: float32 [B, C]."""
        place = (percentile.double() * (self.tasks - 1)).clamp(0, self.tasks - 1)
        if not self.soft:
            return self.masks(place.round().long(), channels).float()
        low = place.long().clamp(max=self.tasks - 2)
        part = (place - low)[:, None]
        near, far = self.masks(low, channels), self.masks(low + 1, channels)
        return torch.lerp(near.double(), far.double(), part).float()

    def build(self, blocks: Sequence[int]) -> "MaskGates":
        return MaskGates(self)


class MaskGates(Gates):
    """The masks of all blocks, equal in blocks of equal width."""

    def __init__(self, rule: ChannelMasks):
        super().__init__()
        self.rule = rule

    def begin(self, percentile: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        return percentile, {}

    def forward(self, block: int, h: Tensor, state: tuple[Tensor, dict[int, Tensor]]) -> Tensor:
        percentile, made = state
        tokens = h.ndim == 3
        channels = h.shape[-1] if tokens else h.shape[1]
        if channels not in made:
            made[channels] = self.rule.factors(percentile, channels).to(h.dtype)
        mask = made[channels]
        return mask[:, None] if tokens else mask[:, :, None, None]
