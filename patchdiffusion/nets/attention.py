"""Self-attention over the pixels of a feature map.

Shapes: B batch, C channels, H and W height and width, N = H W pixels, n heads, d = C / n.
"""

import contextlib
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from patchdiffusion.nets.base import Role
from patchdiffusion.nets.layers import Conv, Init, Norm


def twice_differentiable() -> contextlib.AbstractContextManager[object]:
    """A context without fused attention, which lacks forward and second derivatives."""
    return sdpa_kernel(SDPBackend.MATH)


class Attention(nn.Module):
    """The attention branch of a block, without the residual sum: [B, C, H, W] -> [B, C, H, W].

    The channels of `qkv` are all queries, then all keys, then all values.
    """

    role: ClassVar[Role] = "attention"
    branches: ClassVar[tuple[str, ...]] = ("proj",)

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        *,
        eps: float = 1e-6,
        init: Init = "xavier",
        scales: tuple[float, float] = (0.2**0.5, 1e-5),
    ):
        """`eps` is that of the norm, `init` and `scales` those of `qkv` and `proj`."""
        super().__init__()
        self.num_heads = num_heads
        self.norm = Norm(channels, eps)
        self.qkv = Conv(channels, 3 * channels, 1, init=init, scale=scales[0])
        self.proj = Conv(channels, channels, 1, init=init, scale=scales[1])

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.num_heads, -1, height * width)
        # Fused kernels, which keep the softmax in float32, need the features of a pixel adjacent.
        q, k, v = qkv.transpose(-1, -2).contiguous().unbind(1)  # each [B, n, N, d]
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(h.transpose(-1, -2).reshape(b, c, height, width))
