"""Stages of half resolution in a transformer: tokens are merged, and later split again.

Shapes: B batch, T tokens, D features of a token, n spatial axes.
"""

from typing import ClassVar

from torch import Tensor, nn

from patchdiffusion.nets.base import Role
from patchdiffusion.nets.layers import Linear, pad_to_multiple
from patchdiffusion.nets.tokens import Tokens, centers, fold, unfold


class Merge(nn.Module):
    """2 x 2 tokens (2 along every axis) become one; an odd side is padded with its last tokens."""

    role: ClassVar[Role] = "mlp"

    def __init__(self, width: int, axes: int):
        super().__init__()
        self.factors = (2,) * axes
        self.layer = Linear(2**axes * width, width)

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens of the whole image -> those of half resolution, which hold them as `outer`."""
        if not tokens.is_whole:
            raise ValueError(
                f"the stage of half resolution needs all {tokens.grid} tokens, not "
                f"{tokens.h.shape[1]}; select tokens before or after it, or use half_blocks 0"
            )
        image = pad_to_multiple(_as_image(tokens.h, tokens.grid), self.factors)
        pos = pad_to_multiple(_as_image(tokens.pos, tokens.grid), self.factors)
        emb = tokens.emb
        if emb.ndim == 3:  # the tokens have noise levels of their own, one that is merged the mean
            merged = unfold(
                pad_to_multiple(_as_image(emb, tokens.grid), self.factors), self.factors
            )
            emb = merged.unflatten(-1, (emb.shape[-1], -1)).mean(-1)
        return tokens._replace(
            emb=emb,
            h=self.layer(unfold(image, self.factors)),
            grid=tuple(side // 2 for side in image.shape[2:]),
            pos=centers(pos, self.factors),
            values=None,
            outer=tokens,
        )


class Split(nn.Module):
    """The inverse of `Merge`: each token becomes 2 x 2, which are added to those before it."""

    role: ClassVar[Role] = "mlp"

    def __init__(self, width: int, axes: int):
        super().__init__()
        self.factors = (2,) * axes
        self.layer = Linear(width, 2**axes * width)

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens of half resolution -> those of full resolution."""
        outer = tokens.outer
        if outer is None:
            raise ValueError("there are no tokens of full resolution; run the blocks in order")
        if not tokens.is_whole:
            raise ValueError(
                f"the stage of half resolution ends with all {tokens.grid} tokens, not "
                f"{tokens.h.shape[1]}; put selected ones back by Tokens.scatter"
            )
        image = fold(self.layer(tokens.h), tokens.grid, self.factors)
        image = image[(..., *(slice(side) for side in outer.grid))]
        return outer._replace(h=outer.h + image.flatten(2).mT, registers=tokens.registers)


def _as_image(h: Tensor, grid: tuple[int, ...]) -> Tensor:
    """[B, T, D] -> [B, D, *grid]."""
    return h.mT.unflatten(-1, grid)
