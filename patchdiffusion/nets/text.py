"""Texts as a condition of a network: a small transformer over bytes that is trained with it.

Shapes: B batch, L bytes, T = L + 1 tokens, D features of a token.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.cond import Cond
from patchdiffusion.nets.base import Key, NetworkConfig, Role
from patchdiffusion.nets.embed import positional
from patchdiffusion.nets.layers import Linear, normal
from patchdiffusion.nets.magnitude import MPTokenBlock, MPWeight, mp_sum, normalize
from patchdiffusion.nets.perturb import NONE, Perturb


class TextConfig(ABC):
    """Base of text encoders inside a network: frozen records that build a module."""

    @property
    @abstractmethod
    def features(self) -> int:
        """Features of the tokens that it makes; 0 for none."""

    @abstractmethod
    def build(self, *, keeps_magnitude: bool = False) -> nn.Module | None:
        """The module, without initial weights: `Cond.tokens` [B, L] -> context [B, T, D], mask.

        The mask bool [B, T] says which tokens count, in any number that depends on L alone. One
        that keeps magnitudes has the layers of EDM2, which its learning rate is made for.
        """


@dataclass(frozen=True, kw_only=True)
class NoText(TextConfig):
    """No text: tokens of a condition come as they are, or not at all."""

    word: ClassVar[str] = "none"

    @property
    def features(self) -> int:
        """0."""
        return 0

    def build(self, *, keeps_magnitude: bool = False) -> None:
        """None."""
        return None


@dataclass(frozen=True, kw_only=True)
class ByteText(TextConfig):
    """Transformer over the bytes of a text in UTF-8, trained with the network; no vocabulary."""

    word: ClassVar[str] = "bytes"

    width: int = 128
    """Features of a token; a multiple of 2 and of heads."""
    depth: int = 2
    """Number of blocks."""
    heads: int = 4
    """Attention heads."""

    def __post_init__(self) -> None:
        for name, most in (("width", 8192), ("depth", 64), ("heads", 256)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie in [1, {most}], not {getattr(self, name)}")
        if self.width < 4 or self.width % 2 or self.width % self.heads:
            raise ValueError(
                f"width must be even, at least 4 and a multiple of heads ({self.heads}), not "
                f"{self.width}"
            )

    @property
    def features(self) -> int:
        """Features of the tokens that it makes."""
        return self.width

    def build(self, *, keeps_magnitude: bool = False) -> "TextTower | MPTextTower":
        """The transformer, without initial weights."""
        return MPTextTower(self) if keeps_magnitude else TextTower(self)


Text = NoText | ByteText
"""Texts of `--network.text`."""


@dataclass(frozen=True, kw_only=True)
class ContextShape(NetworkConfig):
    """Base of the configurations of networks with attention to the tokens of a condition."""

    context: int = 0
    """Features of the tokens of a condition that the network attends to, such as those of a text
    encoder; 0 is none."""
    text: Text = field(default_factory=NoText)
    """Text encoder inside the network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.limit("context", 0, 65536)
        if self.context and self.text.features:
            raise ValueError(
                f"context is {self.context}, and text makes tokens of its own, of "
                f"{self.text.features} features; use one of --network.context and --network.text"
            )

    def inherit(self, old: NetworkConfig, config: object) -> Self:
        """A copy with the contract's fields, and with context and text unless it has its own."""
        new = super().inherit(old, config)
        if not isinstance(old, ContextShape) or new.attends:
            return new
        return replace(new, context=old.context, text=old.text)

    @property
    def attends(self) -> int:
        """Features of the tokens that the network attends to, its own or given ones; 0 is none."""
        return self.text.features or self.context

    @property
    def read_features(self) -> int:
        return self.context

    @property
    def reads(self) -> frozenset[str]:
        names = {"tokens"} if self.text.features else set()
        names |= {"context", "context_mask"} if self.context else set()
        return super().reads | names


# ---- The transformer ----


class ByteTable(nn.Module):
    """Features of each byte, of which 0, in no text, is the start of all: [B, T] -> [B, T, D]."""

    role: ClassVar[Role] = "embedding"

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(256, width))

    def draw(self, key: Key) -> None:
        if not self.weight.is_meta:
            with torch.no_grad():
                self.weight.copy_(normal(self.weight.shape, key("weight")))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens.long(), self.weight)


class TextBlock(nn.Module):
    """Attention among the tokens that count, and an MLP, each after a layer norm."""

    role: ClassVar[Role] = "attention"

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.layer0 = Linear(width, 4 * width, role="mlp")
        self.layer1 = Linear(4 * width, width, role="mlp")

    def forward(self, h: Tensor, where: Tensor) -> Tensor:
        """h [B, T, D], where bool [B, T] -> [B, T, D]."""
        qkv = self.qkv(_normalized(h)).unflatten(-1, (3, self.heads, -1))  # [B, T, 3, n, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each [B, n, T, d]
        out = F.scaled_dot_product_attention(q, k, v, where[:, None, None])
        h = h + self.proj(out.transpose(1, 2).flatten(2))
        return h + self.layer1(F.gelu(self.layer0(_normalized(h)), approximate="tanh"))


class TextTower(nn.Module):
    """Bytes of texts -> tokens of a condition, the first of which stands before every text.

    A network with it starts as one without: attention to a context adds nothing at the start.
    """

    role: ClassVar[Role] = "embedding"
    is_neutral: ClassVar[bool] = True

    def __init__(self, config: ByteText):
        super().__init__()
        self.width = config.width
        self.table = ByteTable(config.width)
        self.blocks = nn.ModuleList(
            TextBlock(config.width, config.heads) for _ in range(config.depth)
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, L], filled up with 0 -> context [B, T, D] and mask bool [B, T]."""
        tokens, where = _after_start(tokens)
        h = self.table(tokens) + _places(tokens, self.width)
        for block in self.blocks:
            h = block(h, where)
        return _normalized(h), where


class MPTextTower(nn.Module):
    """Bytes of texts -> tokens, by layers that keep the magnitude as in EDM2 (arXiv 2312.02696)."""

    role: ClassVar[Role] = "embedding"
    is_neutral: ClassVar[bool] = True

    def __init__(self, config: ByteText):
        super().__init__()
        self.width = config.width
        self.table = MPWeight(256, config.width)
        self.blocks = nn.ModuleList(
            MPTokenBlock(config.width, config.heads) for _ in range(config.depth)
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, L], filled up with 0 -> context [B, T, D] and mask bool [B, T]."""
        tokens, where = _after_start(tokens)
        one_hot = F.one_hot(tokens.long(), 256).to(self.table.weight.dtype)
        h = mp_sum(self.table(16 * one_hot), math.sqrt(2) * _places(tokens, self.width))
        for block in self.blocks:
            h = block(h, where)
        return normalize(h, -1), where


def _after_start(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes after the start of all texts, and which of them are in the text: [B, L + 1] both."""
    where = torch.cat([torch.ones_like(tokens[:, :1], dtype=torch.bool), tokens != 0], dim=1)
    return F.pad(tokens, (1, 0)), where


def _places(tokens: Tensor, width: int) -> Tensor:
    places = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
    return positional(places, width)


def _normalized(h: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], eps=1e-6)


def described(
    text: nn.Module | None, cond: Cond, batch: int, device: torch.device, perturb: Perturb = NONE
) -> Cond:
    """The condition with the context that a text encoder makes of its tokens, perturbed.

    Without an encoder the context is the given one. No tokens are empty texts: every parameter has
    a gradient, for which other processes wait.
    """
    if text is None:
        if cond.context is None or not perturb.active:
            return cond
        return replace(cond, context=perturb.of_context(cond.context, cond))
    tokens = cond.tokens
    if tokens is None:
        tokens = torch.zeros(batch, 1, dtype=torch.uint8, device=device)
    if tokens.ndim != 2 or tokens.shape[0] != batch:
        raise ValueError(f"cond.tokens must be [{batch}, bytes], not {tuple(tokens.shape)}")
    context, mask = text(tokens)
    context = perturb.of_context(context, cond, (tokens != 0).any(1))
    return replace(cond, context=context, context_mask=mask)
