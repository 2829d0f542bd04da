"""Attention of the feature maps of a U-Net to the tokens of a condition (arXiv 2112.10752).

Shapes: B batch, C channels, H and W height and width, N = H W pixels, T tokens of the condition.
"""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.nets.base import Role
from patchdiffusion.nets.layers import Conv, Linear, Norm
from patchdiffusion.nets.tokenblock import ContextAttention, TokenAttention, normalized

HEAD = 32
"""Features of an attention head, wherever that divides the channels."""


class Reader(nn.Module):
    """A transformer block over pixels: self-attention, attention to the condition, a gated MLP.

    Between two convolutions of 1 x 1 pixel, of which the last one is zero at the start.
    """

    role: ClassVar[Role] = "mlp"
    is_neutral: ClassVar[bool] = True

    def __init__(self, channels: int, context: int):
        super().__init__()
        heads = channels // HEAD if channels % HEAD == 0 else 1
        self.norm = Norm(channels)
        self.proj_in = Conv(channels, channels, 1, role="conv")
        self.attention = TokenAttention(channels, heads)
        self.context = ContextAttention(channels, heads, context, scale=1.0)
        self.layer0 = Linear(channels, 8 * channels)
        self.layer1 = Linear(4 * channels, channels)
        self.proj_out = Conv(channels, channels, 1, scale=0.0, role="conv")

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, C, H, W], context [B, T, D], mask bool [B, T] -> [B, C, H, W]."""
        h = self.proj_in(self.norm(x)).flatten(2).mT  # [B, N, C]
        h = h + self.attention(normalized(h, "layer"))[0]
        h = h + self.context(normalized(h, "layer"), context, mask)
        inner, gate = self.layer0(normalized(h, "layer")).chunk(2, dim=-1)
        h = h + self.layer1(inner * F.gelu(gate))
        return x + self.proj_out(h.mT.unflatten(2, x.shape[2:]))
