"""The levels of U-Nets: blocks of any kind, from full resolution down and up again.

Shapes: B batch, F features of a level, H' and W' height and width of the lowest one, E size of the
embedding.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from patchdiffusion.cond import Cond
from patchdiffusion.nets.cuts import repeated
from patchdiffusion.nets.shapes import BlockPosition

Factory = Callable[[BlockPosition, int, int], nn.Module]
"""(position, features in, features out) -> a block, called with (h, emb, key, size): `UNet.run`."""


def encoder(
    stem: int, widths: list[int], blocks: int, factory: Factory
) -> tuple[nn.ModuleList, list[int]]:
    """The levels of an encoder from full resolution down, and the width of every skip.

    `stem` is the width of the input, `widths` that of each level.
    """
    levels, width, skips = nn.ModuleList(), stem, [stem]
    for level, features in enumerate(widths):
        stage = nn.ModuleDict()
        if level > 0:
            stage["down"] = factory(BlockPosition("enc", level, "down"), width, width)
            skips.append(width)
        for i in range(blocks):
            position = BlockPosition("enc", level, str(i), last=i == blocks - 1)
            stage[str(i)] = factory(position, width, features)
            width = features
            skips.append(width)
        levels.append(stage)
    return levels, skips


def middle(width: int, level: int, factory: Factory) -> nn.ModuleDict:
    """The two blocks between encoder and decoder, at the lowest level."""
    positions = (BlockPosition("mid", level, "0"), BlockPosition("mid", level, "1", last=True))
    return nn.ModuleDict({position.part: factory(position, width, width) for position in positions})


def decoder(widths: list[int], skips: list[int], blocks: int, factory: Factory) -> nn.ModuleList:
    """The levels of a decoder, in the order of the encoder; `skips` are those of `encoder`."""
    levels, width, skips = nn.ModuleList(), widths[-1], list(skips)
    for level, features in reversed(list(enumerate(widths))):
        stage = nn.ModuleDict()
        if level < len(widths) - 1:
            stage["up"] = factory(BlockPosition("dec", level, "up"), width, width)
        for i in range(blocks + 1):
            position = BlockPosition("dec", level, str(i), last=i == blocks)
            stage[str(i)] = factory(position, width + skips.pop(), features)
            width = features
        levels.insert(0, stage)
    return levels


def skip_widths(stem: int, widths: list[int], blocks: int) -> list[int]:
    """Features of every skip of such an encoder, and of the middle."""
    out = [stem]
    for level, features in enumerate(widths):
        out += out[-1:] * (level > 0) + [features] * blocks
    return [*out, widths[-1]]


class Features(NamedTuple):
    """Output of the encoder, input of the decoder."""

    h: Tensor
    """[B, F, H', W'] after the middle."""
    skips: tuple[Tensor, ...]
    """Outputs of the stem and of every block of the encoder."""
    sizes: tuple[tuple[int, int], ...]
    """Height and width of each level."""
    emb: Tensor
    """[B, E]."""
    context: Tensor | None = None
    """[B, T, D], tokens of the condition."""
    context_mask: Tensor | None = None
    """bool [B, T], the tokens of the condition that count."""
    summary: Tensor | None = None
    """[B, E], summary of the features, see `selfcondition.PooledFeatures`."""
    branches: tuple[tuple["Features", Any], ...] = ()
    """Features and side input of each branch that controls the network."""

    def told(self, cond: Cond) -> Cond:
        """A condition with these tokens."""
        return replace(cond, context=self.context, context_mask=self.context_mask)

    def repeated(self, count: int) -> "Features":
        """These features again and again, for `count` samples; the embedding as it is."""
        context, mask, summary = self.context, self.context_mask, self.summary
        return self._replace(
            h=repeated(self.h, count),
            skips=tuple(repeated(skip, count) for skip in self.skips),
            context=None if context is None else repeated(context, count),
            context_mask=None if mask is None else repeated(mask, count),
            summary=None if summary is None else repeated(summary, count),
            branches=tuple((f.repeated(count), side) for f, side in self.branches),
        )
