"""Building blocks of convolutional networks: seeded layers, resampling, the residual block.

Shapes: B batch, C channels, H and W height and width (any size), E size of the embedding.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.nets.base import Key, Role
from patchdiffusion.nets.fused import group_norm, residual
from patchdiffusion.system.device import full_precision

# ---- Layers initialized from a seed, not from the global generator ----


Init = Literal["xavier", "kaiming", "normal"]
"""Initial weights and biases, times a scale: Xavier-uniform and zero; both uniform up to
1 / sqrt(inputs), PyTorch's default; normal of variance 1 and zero."""


def _draw(layer: "Conv | Linear", key: Key) -> None:
    weight, bias, scale = layer.weight, layer.bias, layer.scale
    if weight.is_meta:
        return
    fan_in, pixels = weight[0].numel(), weight[0, 0].numel()
    with torch.no_grad():
        if bias is not None:
            bias.zero_()
        if layer.init == "xavier":
            fan = (weight.shape[0] + weight.shape[1]) * pixels
            _uniform(weight, scale * (6 / fan) ** 0.5, key("weight"))
        elif layer.init == "kaiming":
            for name, parameter in layer.named_parameters():
                _uniform(parameter, scale / fan_in**0.5, key(name))
        else:
            weight.copy_(scale * normal(weight.shape, key("weight")))


def _uniform(parameter: Tensor, bound: float, generator: torch.Generator) -> None:
    drawn = torch.rand(parameter.shape, generator=generator, device="cpu")
    parameter.copy_((2 * drawn - 1) * bound)


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal values, drawn on the CPU whatever the device: a seed gives equal weights everywhere.

    float32, of the shape.
    """
    return torch.randn(shape, generator=generator, device="cpu")


class Conv(nn.Conv2d):
    """A convolution of stride 1; its initial weights are `init` times `scale`.

    DDPM++ in EDM (arXiv 2206.00364) has scale 1e-5 at the end of branches, sqrt(.2) in attention.
    `role` and `neutral` are explained in `nets.base.Network`; neutral weights have scale 0.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: int = 3,
        *,
        init: Init = "xavier",
        scale: float = 1.0,
        bias: bool = True,
        padding: int | None = None,
        role: Role | None = None,
        neutral: bool = False,
    ):
        self.init: Init = init
        self.scale = 0.0 if neutral else scale
        super().__init__(
            cin, cout, kernel, padding=kernel // 2 if padding is None else padding, bias=bias
        )
        self.role, self.is_neutral = role, neutral

    def reset_parameters(self) -> None:
        """Nothing: the default would consume the global generator."""

    def draw(self, key: Key) -> None:
        _draw(self, key)


class Linear(nn.Linear):
    """A linear layer; the arguments are those of `Conv`."""

    def __init__(
        self,
        cin: int,
        cout: int,
        *,
        init: Init = "xavier",
        scale: float = 1.0,
        bias: bool = True,
        role: Role | None = None,
        neutral: bool = False,
    ):
        self.init: Init = init
        self.scale = 0.0 if neutral else scale
        super().__init__(cin, cout, bias=bias)
        self.role, self.is_neutral = role, neutral

    def reset_parameters(self) -> None:
        """Nothing: the default would consume the global generator."""

    def draw(self, key: Key) -> None:
        _draw(self, key)


class Norm(nn.GroupNorm):
    """Group norm with at least 4 channels a group; statistics in float32, output like the input.

    The number of groups is the largest divisor of the channels up to min(32, channels / 4), which
    is the published number wherever that one divides, unless another is given.
    """

    role: ClassVar[Role] = "norm"

    def __init__(self, channels: int, eps: float = 1e-6, groups: int | None = None):
        most = max(1, min(32, channels // 4))
        groups = groups or next(g for g in range(most, 0, -1) if channels % g == 0)
        super().__init__(groups, channels, eps)
        self.change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        """Gain and bias of adapters, as a function of those of the norm."""

    def draw(self, key: Key) -> None:
        self.reset_parameters()  # ones and zeros

    def forward(
        self,
        input: Tensor,
        shift: Tensor | None = None,
        *,
        silu: bool = False,
        key: Tensor | None = None,
        drop: float = 0.0,
    ) -> Tensor:
        """Normalize [B, C, H, W] + shift [B, C], then SiLU if `silu`, then dropout if key [B]."""
        settings = {"groups": self.num_groups, "eps": self.eps, "silu": silu, "drop": drop}
        affine = self.weight, self.bias
        weight, bias = affine if self.change is None else self.change(*affine)
        return group_norm(input, weight, bias, shift, key, **settings)


# ---- Resampling ----

Resample = Literal["none", "down", "up"]


def pad_to_multiple(x: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Repeat the last pixels until every side is a multiple of its factor: [B, C, *S]."""
    for axis, factor in enumerate(factors, start=2):
        missing = -x.shape[axis] % factor
        if missing:
            last = x.narrow(axis, x.shape[axis] - 1, 1)
            x = torch.cat([x, *(last,) * missing], dim=axis)
    return x


def _smooth(x: Tensor, gain: int) -> Tensor:
    """The filter [1, 3, 3, 1] along both axes for every channel of x: [C, 1, 4, 4], sum `gain`."""
    # Created on the device at each use: no buffer to store, no copy from the host to wait for.
    taps = 1 + 2 * (torch.arange(4, device=x.device) % 3 != 0).to(x.dtype)
    return (taps[:, None] * taps * (gain / 64)).expand(x.shape[1], 1, 4, 4)


def pad_even(x: Tensor) -> Tensor:
    """Repeat the last row and column where a side is odd: [B, C, H, W]."""
    return pad_to_multiple(x, (2, 2))


def downsample(x: Tensor, *, smooth: bool, padded: bool = False) -> Tensor:
    """Half the sides, rounded up, with [1, 1] or, if smooth, [1, 3, 3, 1]: [B, C, H, W].

    Outside is zero; with `padded`, x brings the margin of 1 that the smooth filter needs.
    """
    x = pad_even(x)
    if not smooth:
        return F.avg_pool2d(x, 2)
    return F.conv2d(x, _smooth(x, 1), stride=2, padding=0 if padded else 1, groups=x.shape[1])


def upsample(x: Tensor, size: tuple[int, int], *, smooth: bool) -> Tensor:
    """Twice the sides, cut to `size`: [B, C, H, W] -> [B, C, *size]; filters of `downsample`."""
    if smooth:
        x = F.conv_transpose2d(x, _smooth(x, 4), stride=2, padding=1, groups=x.shape[1])
    else:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    return x[..., : size[0], : size[1]]


def resampled(x: Tensor, kind: Resample, size: tuple[int, int], *, smooth: bool = False) -> Tensor:
    """x [B, C, H, W] of half or twice the sides, or itself; `size` is that of an up-sampled one."""
    if kind == "down":
        return downsample(x, smooth=smooth)
    return upsample(x, size, smooth=smooth) if kind == "up" else x


# ---- The residual block ----


class Block(nn.Module):
    """A residual block (EDM, arXiv 2206.00364, appendix F): two convolutions, embedding between.

    It may resample, and an attention branch may follow.
    """

    role: ClassVar[Role] = "conv"
    branches: ClassVar[tuple[str, ...]] = ("conv1",)

    def __init__(
        self,
        cin: int,
        cout: int,
        emb: int,
        *,
        resample: Resample = "none",
        smooth: bool = False,
        drop: float = 0.0,
        attention: nn.Module | None = None,
    ):
        super().__init__()
        self.resample: Resample = resample
        self.smooth = smooth
        self.drop = drop
        self.norm0 = Norm(cin)
        self.conv0 = Conv(cin, cout)
        self.affine = Linear(emb, cout, role="modulation")
        self.norm1 = Norm(cout)
        self.conv1 = Conv(cout, cout, scale=1e-5)
        self.skip = Conv(cin, cout, 1) if cin != cout or resample != "none" else None
        self.attention = attention

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        key: Tensor | None = None,
        size: tuple[int, int] = (0, 0),
        whole: Tensor | None = None,
    ) -> Tensor:
        """x [B, C, H, W], emb [B, E] -> [B, cout, H', W'].

        `key` int64 [B] are the keys of the dropout, None is no dropout; `size` is H', W' of a block
        that up-samples. `whole` [B, C, H, W] takes the place of x beside the branch, if x is gated.
        """
        h = self.conv0(self._sampled(self.norm0(x, silu=True), size))
        with full_precision(emb):
            shift = self.affine(emb)
        h = self.conv1(self.norm1(h, shift, silu=True, key=key, drop=self.drop))
        x = self._sampled(x if whole is None else whole, size)
        x = residual(h, x if self.skip is None else self.skip(x))
        return x if self.attention is None else residual(x, self.attention(x))

    def _sampled(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return resampled(x, self.resample, size, smooth=self.smooth)
