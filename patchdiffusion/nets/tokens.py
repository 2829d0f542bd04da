"""Tokens: patches of an image as a sequence, the places of these, and some of them alone.

Shapes: B batch, C image channels, n spatial axes, *S their lengths, T tokens, R registers,
D features of a token, E size of the embedding.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.nets.cuts import repeated
from patchdiffusion.system.device import full_precision

FINEST = 64
"""Half periods of the fastest position feature across the canvas; the slowest has one."""
FASTEST = 32
"""Quarter turns of the fastest rotation across the canvas; the slowest makes one."""


class Hint(NamedTuple):
    """Start of a branch that controls a network: its embedded map, and the weights of its parts."""

    h: Tensor
    """[B, T, D], or [B, F, H, W] of a U-Net."""
    gate: Tensor | None = None
    """[B, n], see `divcontrol.DivertedBranch`."""


class Tokens(NamedTuple):
    """State between blocks: tokens with their places, the condition, and the layout.

    All fields of a token go along in `select` and `scatter`, so that a part of the tokens can pass
    through some of the blocks:

        some = network.run(tokens.select(index), cond, 2, 8)
        tokens = network.run(tokens.scatter(index, some), cond, 8)
    """

    h: Tensor
    """[B, T, D]."""
    emb: Tensor
    """[B, E], noise level and conditions; [B, T, E] for a noise level of each token."""
    grid: tuple[int, ...]
    """Tokens along each axis of the image; their product is T unless some were selected."""
    size: tuple[int, ...]
    """Lengths of the image along each axis."""
    pos: Tensor
    """float32 [B, T, n], canvas coordinates of the centers, x first."""
    registers: Tensor | None = None
    """[B, R, D], tokens without a place, seen by all others."""
    values: Tensor | None = None
    """[B, R + T, D], values of the first attention, which later ones are mixed with."""
    context: Tensor | None = None
    """[B, T', D'], tokens of a condition."""
    context_mask: Tensor | None = None
    """bool [B, T'], the tokens of the condition that count."""
    outer: "Tokens | None" = None
    """Tokens before the current stage: of half resolution, or of some of the tokens."""
    summary: Tensor | None = None
    """[B, E], summary of the features of an earlier block, see `selfcondition.PooledFeatures`."""
    memory: "AttentionMemory | None" = None
    """Keys and values of tokens that are not among these."""
    kept: Tensor | None = None
    """int64 [B, T], places in `outer` of the tokens that pass through the current stage alone."""
    hints: tuple[Hint, ...] = ()
    """Start of each branch that controls the network, before its first block."""
    added: tuple[Tensor, ...] = ()
    """[B, T, D] each, what branches add to the tokens before the blocks 1, 2 ..."""

    @property
    def is_whole(self) -> bool:
        """True if there is a token for every patch of the image."""
        return self.h.shape[1] == math.prod(self.grid)

    def select(self, index: Tensor) -> "Tokens":
        """The tokens at an index int64 [B, K], in its order, with their places."""
        outer = self.outer
        if outer is not None and self.kept is None and outer.grid == self.grid:
            outer = outer.select(index)
        return self._replace(
            h=_gather(self.h, index),
            emb=_gather(self.emb, index) if self.emb.ndim == 3 else self.emb,
            pos=_gather(self.pos, index),
            values=None
            if self.values is None
            else _gather(self.values, self.with_registers(index)),
            outer=outer,
            kept=None if self.kept is None else self.kept.gather(1, index),
            hints=tuple(hint._replace(h=_gather(hint.h, index)) for hint in self.hints),
            added=tuple(_gather(part, index) for part in self.added),
        )

    def scatter(self, index: Tensor, some: "Tokens") -> "Tokens":
        """All tokens, with those at an index [B, K] replaced by `some`, which were selected."""
        values = self.values
        if values is not None and some.values is not None:
            values = scatter(values, self.with_registers(index), some.values)
        return self._replace(
            h=scatter(self.h, index, some.h),
            registers=some.registers,
            values=values,
            summary=some.summary,
        )

    def repeated(self, count: int) -> "Tokens":
        """These tokens again and again, for `count` samples; the embedding as it is."""
        fields = ("h", "pos", "registers", "values", "context", "context_mask")
        fields += ("summary", "kept")
        given = {name: getattr(self, name) for name in fields}
        several = {name: repeated(x, count) for name, x in given.items() if x is not None}
        outer = None if self.outer is None else self.outer.repeated(count)
        added = tuple(repeated(part, count) for part in self.added)
        return self._replace(**several, outer=outer, added=added)

    def with_registers(self, index: Tensor) -> Tensor:
        """Places of the registers, which are first, and of the tokens at an index [B, K]."""
        count = 0 if self.registers is None else self.registers.shape[1]
        first = torch.arange(count, device=index.device).expand(len(index), -1)
        return torch.cat([first, index + count], dim=1)


class AttentionMemory:
    """Keys and values of all tokens in every block, some of which are computed anew.

    Without an index all are kept as they are computed. With the places of some tokens (registers
    included) int64 [B, K], theirs replace those that were kept, and attention is to all.
    """

    def __init__(self) -> None:
        self.index: Tensor | None = None
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values to attend to in a block, for those of the present tokens [B, n, K, d]."""
        if self.index is not None:
            where = self.index[:, None, :, None].expand(-1, *k.shape[1:2], -1, k.shape[-1])
            k, v = (
                old.scatter(2, where, new)
                for old, new in zip(self._kept[block], (k, v), strict=True)
            )
        self._kept[block] = (k.detach(), v.detach())
        return k, v


def with_context(tokens: Tokens, cond: Cond, features: int) -> Tokens:
    """Tokens with those of the condition, see `context_of`."""
    context, mask = context_of(cond, features, tokens.emb)
    return tokens._replace(context=context, context_mask=mask)


def context_of(cond: Cond, features: int, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Tokens of the condition, after one of zeros that means that there are none, and their mask.

    [B, T' + 1, D'] in the type of `like` [B, ...] and bool [B, T' + 1], or None for all. Raises
    `ValueError` unless the tokens of the condition have so many features; 0 is no condition.
    """
    context, mask = cond.context, cond.context_mask
    if context is not None and (context.ndim != 3 or context.shape[-1] != features):
        expected = f"[B, tokens, {features}]" if features else "None"
        raise ValueError(
            f"cond.context must be {expected} for this network, not {tuple(context.shape)}; "
            f"network.context is the number of its features"
        )
    if context is not None and mask is not None and mask.shape != context.shape[:2]:
        raise ValueError(
            f"cond.context_mask must be {tuple(context.shape[:2])}, not {tuple(mask.shape)}"
        )
    if not features:
        return None, None
    none = like.new_zeros(like.shape[0], 1, features)
    if context is None:
        return none, None
    if mask is not None:
        mask = torch.cat([mask.new_ones(mask.shape[0], 1), mask], dim=1)
    return torch.cat([none, context.to(none.dtype)], dim=1), mask


def registered(tokens: Tokens, emb: Tensor) -> tuple[Tensor, Tensor, int]:
    """Registers and tokens [B, R + T, D], the embedding of each if it is that of tokens, and R."""
    h, registers = tokens.h, tokens.registers
    if registers is None:
        return h, emb, 0
    count = registers.shape[1]
    if emb.ndim == 3:  # registers have no noise level, and take the mean of the tokens
        emb = torch.cat([emb.mean(1, keepdim=True).expand(-1, count, -1), emb], dim=1)
    return torch.cat([registers, h], dim=1), emb, count


def of_tokens(cond: Cond, count: int) -> Cond:
    """The fields that are embedded with a noise level, for `count` tokens of each sample: [B T]."""
    names = ("labels", "augment", "extra", "jump", "seed")
    some = Cond(**{name: getattr(cond, name) for name in names})
    return some.map(lambda field: field.repeat_interleave(count, dim=0))


def _gather(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def scatter(x: Tensor, index: Tensor, part: Tensor) -> Tensor:
    """x [B, T, D] with the rows at an index [B, K] replaced by those of a part [B, K, D]."""
    return x.scatter(1, index[..., None].expand(-1, -1, x.shape[-1]), part.to(x.dtype))


# ---- Patches ----


def unfold(x: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Cut into patches: [B, C, *S], sides multiples of the patch -> [B, T, C * pixels of a patch].

    Tokens are in the order of their axes, the last one fastest.
    """
    n = len(patch)
    for axis in reversed(range(n)):
        x = x.unflatten(2 + axis, (-1, patch[axis]))  # [B, C, g1, p1, g2, p2, ...]
    grid, inner = range(2, 2 + 2 * n, 2), range(3, 3 + 2 * n, 2)
    return x.permute(0, *grid, 1, *inner).flatten(1 + n).flatten(1, n)


def fold(h: Tensor, grid: tuple[int, ...], patch: tuple[int, ...]) -> Tensor:
    """The inverse of `unfold`: [B, T, C * pixels of a patch] -> [B, C, *S]."""
    n = len(patch)
    x = h.unflatten(-1, (-1, *patch)).unflatten(1, grid)  # [B, g1, g2, ..., C, p1, p2, ...]
    pairs = (axis for i in range(n) for axis in (1 + i, 2 + n + i))
    x = x.permute(0, 1 + n, *pairs)  # [B, C, g1, p1, g2, p2, ...]
    for axis in range(n):
        x = x.flatten(2 + axis, 3 + axis)
    return x


def pixels_of(kept: Tensor, patch: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """Pixels of the tokens int64 [B, K] of an image of a size: bool [B, 1, *S]."""
    grid = tuple(-(-side // p) for side, p in zip(size, patch, strict=True))
    mask = torch.zeros(len(kept), math.prod(grid), dtype=torch.bool, device=kept.device)
    mask = mask.scatter(1, kept, True)[..., None].expand(-1, -1, math.prod(patch))
    return fold(mask, grid, patch)[(..., *(slice(side) for side in size))]


def centers(pos: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Centers of patches of coordinates [B, n, *S], sides multiples of the patch: [B, T, n]."""
    return unfold(pos, patch).unflatten(-1, (len(patch), -1)).mean(-1)


# ---- Positions ----


def position_features(pos: Tensor, width: int) -> Tensor:
    """Sines and cosines of canvas coordinates: [B, T, n] in [-1, 1] -> float32 [B, T, width].

    Every axis has width // (2 n) frequencies, evenly spaced in the logarithm from half a period
    across the canvas to `FINEST`; the remaining features are zero.
    """
    count = width // (2 * pos.shape[-1])
    steps = torch.arange(count, device=pos.device, dtype=torch.float32) / max(count - 1, 1)
    angles = pos.float()[..., None] * (math.pi / 2 * FINEST**steps)  # [B, T, n, count]
    features = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(2)
    return F.pad(features, (0, width - features.shape[-1]))


def grid_positions(pos: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Positions on the canvas in tokens, from the coordinates of all pixels [B, n, *S].

    Returns float32 [B, n, *S], x first: the first token of the canvas has its center at 0, the next
    one at 1. The unit is the distance of adjacent pixels, so a crop of one pixel along an axis has
    position 0 there.
    """
    n, out = len(patch), []
    for channel in range(n):
        axis = n - 1 - channel
        x = pos[:, channel].float()  # [B, *S]
        length, p = x.shape[1 + axis], patch[axis]
        ends = x.narrow(1 + axis, 0, 1), x.narrow(1 + axis, length - 1, 1)
        pixels = torch.zeros_like(x)
        if length > 1:
            pixels = (x + 1) * (length - 1) / (ends[1] - ends[0])
        out.append((pixels - (p - 1) / 2) / p)
    return torch.stack(out, dim=1)


def table_features(positions: Tensor, width: int) -> Tensor:
    """The table of DiT at positions in tokens: [B, T, n] -> float32 [B, T, width].

    Every axis has width // (2 n) frequencies from 1 to almost 1e-4, sines before cosines; columns
    come first, the remaining features are zero.
    """
    count = width // (2 * positions.shape[-1])
    steps = torch.arange(count, device=positions.device, dtype=torch.float32) / count
    angles = positions[..., None] * 10000.0**-steps  # [B, T, n, count]
    features = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(2)
    return F.pad(features, (0, width - features.shape[-1]))


def rotation(pos: Tensor, features: int, registers: int = 0) -> Tensor:
    """Cosines and sines of the rotation of queries and keys at canvas coordinates (RoPE).

    pos [B, T, n] -> float32 [2, B, 1, R + T, features / 2] (RoFormer, arXiv 2104.09864, for n
    axes): each axis has features // (2 n) angles, evenly spaced in the logarithm, that are
    proportional to its coordinate; remaining features, and registers, are not rotated.
    """
    with full_precision(pos):
        count = features // (2 * pos.shape[-1])
        steps = torch.arange(count, device=pos.device, dtype=torch.float32) / max(count - 1, 1)
        angles = pos.float()[..., None] * (math.pi / 4 * FASTEST**steps)  # [B, T, n, count]
        angles = angles.flatten(2)[:, None]
        angles = F.pad(angles, (0, features // 2 - angles.shape[-1], registers, 0))
        return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate pairs of features, one from each half: x [B, heads, T, features] by `rotation`."""
    a, b = x.float().chunk(2, dim=-1) if x.dtype != torch.float64 else x.chunk(2, dim=-1)
    cos, sin = turn.unbind()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)
