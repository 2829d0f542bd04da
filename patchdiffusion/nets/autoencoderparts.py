"""Encoder and decoder of convolutional autoencoders; names of parameters are those of diffusers.

Shapes: B batch, C channels, H and W height and width.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.nets.base import Role
from patchdiffusion.nets.layers import Conv, Linear, Norm

EPS = 1e-6  # of all norms


def conv(cin: int, cout: int, kernel: int = 3, *, role: Role = "conv") -> Conv:
    """A convolution with the initial weights of PyTorch, drawn from the seed of the network."""
    return Conv(cin, cout, kernel, init="kaiming", role=role)


class ResidualBlock(nn.Module):
    """Two convolutions, each after a norm and SiLU, added to the input."""

    role: ClassVar[Role] = "conv"

    def __init__(self, cin: int, cout: int, groups: int):
        super().__init__()
        self.norm1 = Norm(cin, EPS, groups)
        self.conv1 = conv(cin, cout)
        self.norm2 = Norm(cout, EPS, groups)
        self.conv2 = conv(cout, cout)
        self.conv_shortcut = None if cin == cout else conv(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, cout, H, W]."""
        h = self.conv1(self.norm1(x, silu=True))
        h = self.conv2(self.norm2(h, silu=True))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class PixelAttention(nn.Module):
    """Self-attention of one head over the pixels, added to the input."""

    role: ClassVar[Role] = "attention"

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = Norm(channels, EPS, groups)
        self.to_q = Linear(channels, channels, init="kaiming")
        self.to_k = Linear(channels, channels, init="kaiming")
        self.to_v = Linear(channels, channels, init="kaiming")
        self.to_out = nn.ModuleList([Linear(channels, channels, init="kaiming")])

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W]."""
        h = self.group_norm(x).flatten(2).mT  # [B, H W, C]
        heads = [layer(h)[:, None] for layer in (self.to_q, self.to_k, self.to_v)]
        h = self.to_out[0](F.scaled_dot_product_attention(*heads)[:, 0])
        return x + h.mT.unflatten(2, x.shape[2:])


class Halving(nn.Module):
    """A convolution of stride 2; a row below and a column to the right are padded by zeros."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv(channels, channels)
        self.conv.stride, self.conv.padding = (2, 2), (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] of even sides -> [B, C, H / 2, W / 2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Doubling(nn.Module):
    """Every pixel four times, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, 2 H, 2 W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if the level attends."""

    def __init__(self, cin: int, cout: int, blocks: int, groups: int, *, attends: bool):
        super().__init__()
        widths = (cin, *(cout,) * (blocks - 1))
        self.resnets = nn.ModuleList(ResidualBlock(width, cout, groups) for width in widths)
        if attends:
            self.attentions = nn.ModuleList(PixelAttention(cout, groups) for _ in widths)
        self.attends = attends

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.resnets):
            x = block(x)
            x = self.attentions[i](x) if self.attends else x
        return x


class DownLevel(Level):
    """A level of the encoder; halves the sides at its end unless it is the last."""

    def __init__(self, cin: int, cout: int, blocks: int, groups: int, *, attends: bool, last: bool):
        super().__init__(cin, cout, blocks, groups, attends=attends)
        self.downsamplers = nn.ModuleList([] if last else [Halving(cout)])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for layer in self.downsamplers:
            x = layer(x)
        return x


class UpLevel(Level):
    """A level of the decoder; doubles the sides at its end unless it is the last."""

    def __init__(self, cin: int, cout: int, blocks: int, groups: int, *, attends: bool, last: bool):
        super().__init__(cin, cout, blocks, groups, attends=attends)
        self.upsamplers = nn.ModuleList([] if last else [Doubling(cout)])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for layer in self.upsamplers:
            x = layer(x)
        return x


class Middle(nn.Module):
    """The lowest resolution: two residual blocks, with attention in between if it attends."""

    def __init__(self, channels: int, groups: int, *, attends: bool):
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)] if attends else [])
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for layer in self.attentions:
            x = layer(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Images [B, C, H, W] -> [B, cout, H / f, W / f]."""

    def __init__(
        self,
        channels: int,
        cout: int,
        widths: Sequence[int],
        *,
        blocks: int,
        groups: int,
        attention: Sequence[int],
        middle: bool,
    ):
        """`attention` are the levels that attend; `middle` is that of the lowest resolution."""
        super().__init__()
        last = len(widths) - 1
        self.conv_in = conv(channels, widths[0], role="stem")
        self.down_blocks = nn.ModuleList(
            DownLevel(cin, width, blocks, groups, attends=i in attention, last=i == last)
            for i, (cin, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.mid_block = Middle(widths[-1], groups, attends=middle)
        self.conv_norm_out = Norm(widths[-1], EPS, groups)
        self.conv_out = conv(widths[-1], cout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down_blocks:
            h = level(h)
        return self.conv_out(self.conv_norm_out(self.mid_block(h), silu=True))


class Decoder(nn.Module):
    """Latents [B, cin, h, w] -> images [B, C, f h, f w]."""

    def __init__(
        self,
        cin: int,
        channels: int,
        widths: Sequence[int],
        *,
        blocks: int,
        groups: int,
        attention: Sequence[int],
        middle: bool,
    ):
        """The arguments are those of `Encoder`; each level has one block more."""
        super().__init__()
        last, down = len(widths) - 1, tuple(reversed(widths))
        self.conv_in = conv(cin, down[0])
        self.mid_block = Middle(down[0], groups, attends=middle)
        self.up_blocks = nn.ModuleList(
            UpLevel(a, b, blocks + 1, groups, attends=last - i in attention, last=i == last)
            for i, (a, b) in enumerate(zip((down[0], *down), down, strict=False))
        )
        self.conv_norm_out = Norm(widths[0], EPS, groups)
        self.conv_out = conv(widths[0], channels, role="head")

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            h = level(h)
        return self.conv_out(self.conv_norm_out(h, silu=True))
