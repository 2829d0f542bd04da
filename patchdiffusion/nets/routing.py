"""Cheap tokens: in training, only some of the tokens pass through some blocks of a transformer.

Each rule is a record with a `Stage`, which selects the tokens before its first block and puts them
back after its last one. The loss is that of all tokens, or with a rule that `masks` that of those
which went on. Which tokens go on is a function of `cond.seed`; without it, as in
sampling and for held-out losses, all do. Written from the papers.

Shapes: B batch, T tokens, K of them that go on, D features of a token.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from patchdiffusion.nets.layers import Linear
from patchdiffusion.nets.tokenblock import Registers
from patchdiffusion.nets.tokens import Tokens, scatter
from patchdiffusion.rng import bernoulli, bits, subkeys


def kept_tokens(key: Tensor, count: int, rate: float) -> Tensor:
    """Random tokens of each sample, in their order, without a share `rate` of all `count`.

    int64 [B] keys -> int64 [B, K].
    """
    keep = max(1, round((1 - rate) * count))
    return bits(key, count).argsort(dim=1)[:, :keep].sort(dim=1).values


class Stage(nn.Module):
    """Blocks that only some of the tokens pass through; the others skip them."""

    def __init__(self, blocks: range, rate: float):
        super().__init__()
        self.blocks, self.rate = blocks, rate

    def choose(self, seed: Tensor, count: int) -> Tensor:
        """Indices of those of `count` tokens that go on, for seeds int64 [B]: int64 [B, K]."""
        return kept_tokens(subkeys(seed, "tokens"), count, self.rate)

    def enter(self, tokens: Tokens, seed: Tensor | None) -> Tokens:
        """The tokens that go on, before the first block; all without seeds int64 [B]."""
        if seed is None:
            return tokens
        index = self.choose(seed, tokens.h.shape[1])
        return tokens.select(index)._replace(outer=tokens, kept=index)

    def leave(self, tokens: Tokens, seed: Tensor | None) -> Tokens:
        """All tokens, after the last block."""
        if tokens.kept is None or tokens.outer is None:
            return tokens
        return tokens.outer.scatter(tokens.kept, tokens)


class MaskToken(Registers):
    """A learned token in the place of those that are missing: [1, D]."""

    is_neutral: ClassVar[bool] = True


class FusedStage(Stage):
    """Tokens before and after the blocks are fused by a linear layer; skipped ones are masked.

    The layer is stored as its difference from the tokens after the blocks, which starts at zero.
    """

    def __init__(self, blocks: range, rate: float, drop: float, width: int):
        super().__init__(blocks, rate)
        self.drop = drop
        self.mask = MaskToken(1, width)
        self.fuse = Linear(2 * width, width, role="mlp", neutral=True)

    def enter(self, tokens: Tokens, seed: Tensor | None) -> Tokens:
        return super().enter(tokens, seed)._replace(outer=tokens)

    def leave(self, tokens: Tokens, seed: Tensor | None) -> Tokens:
        outer, deep, registers = tokens.outer, tokens.h, tokens.registers
        if outer is None:
            raise ValueError("there are no tokens before the stage; run the blocks in order")
        if tokens.kept is not None:
            mask = self.mask.weight.to(deep.dtype).expand_as(outer.h)
            deep = scatter(mask, tokens.kept, deep)
            if seed is not None and self.drop:
                dropped = bernoulli(subkeys(seed, "path"), self.drop)[:, None, None]
                deep = torch.where(dropped, mask, deep)
                if registers is not None and outer.registers is not None:
                    registers = torch.where(dropped, outer.registers, registers)
        h = deep + self.fuse(torch.cat([outer.h, deep], dim=-1))
        return outer._replace(h=h, registers=registers)


# ---- Rules ----


@dataclass(frozen=True, kw_only=True)
class TokenRule(ABC):
    """Base of the rules of `--network.tokens`."""

    @abstractmethod
    def blocks(self, depth: int) -> range:
        """Numbers of the blocks that only some tokens pass through.

        Raises `ValueError` if the network has too few.
        """

    @abstractmethod
    def build(self, width: int, depth: int) -> Stage | None:
        """The stage of a network; None if all tokens pass through all blocks."""

    @property
    def is_random(self) -> bool:
        """True if the output depends on `cond.seed`."""
        return True

    @property
    def masks(self) -> bool:
        """True if the loss is that of the tokens that go on alone, see `Network.counted`."""
        return False

    def check(self, depth: int, half_blocks: int) -> None:
        """Raise `ValueError` for a network that this rule does not fit."""
        if self.blocks(depth) and half_blocks:
            raise ValueError(
                f"half_blocks must be 0 with a rule for tokens, not {half_blocks}: the stage of "
                "half resolution needs all of them; or set tokens none"
            )


def _in_range(name: str, value: float, *, below_one: bool = False) -> None:
    if not 0 <= value <= 1 or (below_one and value == 1):
        raise ValueError(f"{name} must lie in [0, 1{')' if below_one else ']'}, not {value:g}")


@dataclass(frozen=True, kw_only=True)
class AllTokens(TokenRule):
    """All tokens pass through all blocks."""

    word: ClassVar[str] = "none"

    def blocks(self, depth: int) -> range:
        return range(0)

    @property
    def is_random(self) -> bool:
        return False

    def build(self, width: int, depth: int) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Route(TokenRule):
    """Some tokens skip the middle blocks and keep the features they had (TREAD, 2501.04765)."""

    rate: float = 0.5
    """Share of the tokens that skip."""
    start: float = 0.167
    """First block that is skipped, as a fraction of the depth: 2 of 12; never the very first."""
    end: float = 0.667
    """Last block that is skipped, as a fraction of the depth: 8 of 12."""

    def __post_init__(self) -> None:
        _in_range("rate", self.rate, below_one=True)
        _in_range("start", self.start)
        _in_range("end", self.end)
        if self.start > self.end:
            raise ValueError(f"start must be at most end, {self.end:g}, not {self.start:g}")

    @property
    def is_random(self) -> bool:
        return self.rate > 0

    def blocks(self, depth: int) -> range:
        if depth < 2:
            raise ValueError(f"depth must be at least 2 for tokens route, not {depth}")
        start = min(max(1, round(self.start * depth)), depth - 1)
        return range(start, min(max(start, round(self.end * depth)), depth - 1) + 1)

    def build(self, width: int, depth: int) -> Stage:
        return Stage(self.blocks(depth), self.rate)


@dataclass(frozen=True, kw_only=True)
class Sprint(TokenRule):
    """Few tokens in the middle blocks, fused with all tokens before them (SPRINT, 2510.21986)."""

    rate: float = 0.75
    """Share of the tokens that skip the middle blocks; a learned token takes their places."""
    dense: int = 2
    """Blocks at the start, and as many at the end, that all tokens pass through."""
    drop: float = 0.05
    """Probability that the learned token takes all places of a sample."""

    def __post_init__(self) -> None:
        _in_range("rate", self.rate, below_one=True)
        _in_range("drop", self.drop, below_one=True)
        if not 1 <= self.dense <= 256:
            raise ValueError(f"dense must lie in [1, 256], not {self.dense}")

    @property
    def is_random(self) -> bool:
        return self.rate > 0 or self.drop > 0

    def blocks(self, depth: int) -> range:
        if depth <= 2 * self.dense:
            raise ValueError(
                f"depth must be at least {2 * self.dense + 1} for tokens sprint with {self.dense} "
                f"dense blocks at either end, not {depth}"
            )
        return range(self.dense, depth - self.dense)

    def build(self, width: int, depth: int) -> Stage:
        return FusedStage(self.blocks(depth), self.rate, self.drop, width)


@dataclass(frozen=True, kw_only=True)
class Mask(TokenRule):
    """Some tokens are dropped after the first blocks, and out of the loss (MicroDiT, 2407.15811).

    With a `mixer` this is deferred masking, without one the masking of MaskDiT (2306.09305), though
    without its decoder. Other than in MicroDiT, the first blocks are as wide as the others.
    """

    rate: float = 0.75
    """Share of the tokens that are dropped."""
    mixer: int = 2
    """Blocks at the start that all tokens pass through, so that those that go on know of the
    others; 0 is naive masking."""

    def __post_init__(self) -> None:
        _in_range("rate", self.rate, below_one=True)
        if not 0 <= self.mixer <= 255:
            raise ValueError(f"mixer must lie in [0, 255], not {self.mixer}")

    @property
    def is_random(self) -> bool:
        return self.rate > 0

    @property
    def masks(self) -> bool:
        return self.rate > 0

    def blocks(self, depth: int) -> range:
        if depth <= self.mixer:
            raise ValueError(
                f"depth must be at least {self.mixer + 1} for tokens mask with a mixer of "
                f"{self.mixer} blocks, not {depth}"
            )
        return range(self.mixer, depth)

    def build(self, width: int, depth: int) -> Stage:
        return Stage(self.blocks(depth), self.rate)


Routing = AllTokens | Route | Sprint | Mask
"""The rules of `--network.tokens`."""
