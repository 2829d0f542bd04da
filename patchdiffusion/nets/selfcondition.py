"""Self-conditioning on features: later blocks are conditioned on pooled features of an earlier one.

Xiang et al., "DDAE++" (arXiv 2505.10999). With the features H after a block, the mean g of their
norms over all positions, and the place of the crop, s = W2 SiLU(W1 [g, place]), later blocks see
emb + (1 + A emb) s instead of the embedding emb of noise level and conditions. The authors' code
is not public: the layers follow the paper's description, the place and the zeros at the start are
ours. This is no self-conditioning on an earlier estimate of the image.

Shapes: B batch, T positions, D features, E size of the embedding, n spatial axes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.nets.base import Role
from patchdiffusion.nets.layers import Linear
from patchdiffusion.system.device import full_precision

SMALLEST = 2.0**-6
"""Least half extent of a crop on the canvas that is told apart from smaller ones."""


class SelfConditioning(ABC):
    """Base of the rules of `--network.self-condition`: frozen records that build a module."""

    @abstractmethod
    def after(self, depth: int) -> int:
        """Number of blocks of `depth` before the features are pooled; 0 is never.

        Raises `ValueError` if there are too few.
        """

    @abstractmethod
    def build(self, features: int, emb: int, axes: int) -> "PooledFeatures | None":
        """The module for D features, an embedding of E numbers and n axes."""


@dataclass(frozen=True, kw_only=True)
class NoSelfConditioning(SelfConditioning):
    """Blocks are conditioned on noise level and conditions alone."""

    word: ClassVar[str] = "none"

    def after(self, depth: int) -> int:
        return 0

    def build(self, features: int, emb: int, axes: int) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class FeatureSelfConditioning(SelfConditioning):
    """Pooled features of a block condition the later ones, as in DDAE++ (2505.10999)."""

    word: ClassVar[str] = "features"

    block: int = 0
    """Number of blocks of a transformer before the features are pooled; 0 is half of them. A U-Net
    pools those of its middle."""
    hidden: int = 0
    """Hidden features of the layers behind them; 0 is as many as are pooled."""
    time_scale: bool = True
    """True if the embedding, and so the noise level, scales the result."""

    def __post_init__(self) -> None:
        for name, most in (("block", 255), ("hidden", 65536)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie in [0, {most}], not {getattr(self, name)}")

    def after(self, depth: int) -> int:
        block = self.block or depth // 2
        if not 1 <= block < depth:
            raise ValueError(
                f"self_condition.block must lie in [1, {depth - 1}] for {depth} blocks, so that "
                f"there are blocks behind it, not {block}"
            )
        return block

    def build(self, features: int, emb: int, axes: int) -> "PooledFeatures":
        return PooledFeatures(features, emb, axes, self.hidden or features, self.time_scale)


class PooledFeatures(nn.Module):
    """Summary of the features of an image, and the embedding with it; nothing at the start."""

    role: ClassVar[Role] = "modulation"
    is_neutral: ClassVar[bool] = True

    def __init__(self, features: int, emb: int, axes: int, hidden: int, time_scale: bool):
        super().__init__()
        self.layer0 = Linear(features + 2 * axes, hidden)
        self.layer1 = Linear(hidden, emb, scale=0.0)
        self.scale = Linear(emb, emb, bias=False, scale=0.0) if time_scale else None

    def forward(self, h: Tensor, pos: Tensor) -> Tensor:
        """Features [B, T, D] at canvas coordinates [B or 1, *, n] -> summary [B, E]."""
        with full_precision(h):
            dtype = torch.promote_types(self.layer0.weight.dtype, torch.float32)
            pooled = F.layer_norm(h.to(dtype), h.shape[-1:], eps=1e-6).mean(1)
            where = place(pos).to(dtype).expand(len(h), -1)
            return self.layer1(F.silu(self.layer0(torch.cat([pooled, where], dim=1))))

    def conditioned(self, emb: Tensor, summary: Tensor | None) -> Tensor:
        """Embedding [B, E] or [B, T, E] with a summary [B, E]; unchanged without one."""
        if summary is None:
            return emb
        with full_precision(emb):
            s = summary[:, None] if emb.ndim == 3 else summary
            return emb + (s if self.scale is None else s + self.scale(emb) * s).to(emb.dtype)


def place(pos: Tensor) -> Tensor:
    """Center of a crop and logarithm of its extent, by its coordinates [B, T, n]: [B, 2 n].

    The whole canvas has the center 0 and about the logarithm 0 along each axis.
    """
    low, high = pos.amin(1), pos.amax(1)
    return torch.cat([(low + high) / 2, ((high - low) / 2).clamp(min=SMALLEST).log2()], dim=1)


NONE = NoSelfConditioning()

SelfCondition = NoSelfConditioning | FeatureSelfConditioning
"""The rules of `--network.self-condition`."""
