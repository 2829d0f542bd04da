"""Small trained changes of the layers of a frozen network; `attached.py` puts them there.

A layer y = W x + b becomes y + sum_k w_k d_k(x, y), with one difference d_k for each adapter k and
its strength w_k. Differences are zero at first, bit for bit.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.nets.base import Key, Role
from patchdiffusion.nets.embed import Labels
from patchdiffusion.nets.layers import Norm, normal
from patchdiffusion.nets.magnitude import MPWeight

Layer = nn.Linear | nn.Conv2d | MPWeight
"""Layers with a matrix of weights, which adapters may change."""

# ---- Differences ----


class Trained(nn.Module):
    """Base of the trained parts of an adapter, one for a layer of the network."""

    is_neutral: ClassVar[bool] = True
    role: Role


class Change(Trained, ABC):
    """Base of changes of an output."""

    @abstractmethod
    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The difference d(x, y) of the output y of a layer with the input x."""

    def merged(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a layer with the difference; `ValueError` if no weights have it."""
        raise ValueError("no weights of the layer have the same output")


class Affine(Change):
    """(1 + g) (y + b) - y for each output: a scale, a product of several, and a bias."""

    def __init__(self, outputs: int, scales: int, *, shift: bool):
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.zeros(outputs)) for _ in range(scales))
        self.shift = nn.Parameter(torch.zeros(outputs)) if shift else None

    def draw(self, key: Key) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def _gain(self) -> Tensor:
        return torch.stack([1 + scale for scale in self.scales]).prod(0) - 1

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self.shift is None:
            return y * outputs(self._gain(), layer, y)
        shift = outputs(self.shift, layer, y)
        if not self.scales:
            return shift.expand_as(y)
        return (y + shift) * outputs(self._gain(), layer, y) + shift

    def merged(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        weight, bias = layer.weight, bias_of(layer)
        gain = 1 + self._gain() if self.scales else weight.new_ones(len(weight))
        if self.shift is not None:
            bias = self.shift if bias is None else bias + self.shift
        scaled = weight * gain.reshape(-1, *[1] * (weight.ndim - 1))
        return scaled, None if bias is None else bias * gain


class Branch(Change):
    """a (y - b) + b' + s U act(V x): a low-rank branch, with a scale and a bias if they are wanted.

    A layer without a bias gets none. V of a convolution has its kernel, U is 1 x 1. U, a and b' are
    zero at first and s is 1.
    """

    def __init__(
        self,
        layer: Layer,
        rank: int,
        *,
        factor: float = 1.0,
        affine: bool = False,
        relu: bool = False,
    ):
        """`factor` multiplies the branch, in the place of a learned s unless `affine`."""
        super().__init__()
        outs = len(layer.weight)
        self.factor, self.relu, self.rank = factor, relu, rank
        self.down = nn.Parameter(torch.empty(rank, *layer.weight.shape[1:]))
        self.up = nn.Parameter(torch.empty(outs, rank))
        self.scale = nn.Parameter(torch.zeros(outs)) if affine else None
        biased = affine and bias_of(layer) is not None
        self.shift = nn.Parameter(torch.zeros(outs)) if biased else None
        self.gain = nn.Parameter(torch.ones(())) if affine else None

    def draw(self, key: Key) -> None:
        with torch.no_grad():
            if not self.down.is_meta:
                fan = self.down[0].numel()
                self.down.copy_(normal(self.down.shape, key("down")) / math.sqrt(fan))
            self.up.zero_()
            for parameter in (self.scale, self.shift):
                if parameter is not None:
                    parameter.zero_()
            if self.gain is not None:
                self.gain.fill_(1)

    def low_rank(self, layer: nn.Module, x: Tensor) -> Tensor:
        """s U act(V x)."""
        h = applied(cast(Layer, layer), self.down, x)
        h = F.relu(h) if self.relu else h
        up = self.up * (self.factor if self.gain is None else self.gain)
        return (
            F.conv2d(h, up[:, :, None, None]) if h.ndim == 4 and is_conv(layer) else F.linear(h, up)
        )

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        d = self.low_rank(layer, x)
        bias = bias_of(layer)
        if self.scale is not None:
            plain = y if bias is None else y - outputs(bias, layer, y)
            d = d + plain * outputs(self.scale, layer, y)
        return d if self.shift is None else d + outputs(self.shift, layer, y)

    def product(self) -> Tensor:
        """s U V, in the shape of the weights of the layer."""
        factor = self.factor if self.gain is None else self.gain
        return factor * (self.up @ self.down.flatten(1)).unflatten(1, self.down.shape[1:])

    def merged(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        if self.relu:
            return super().merged(layer)
        weight, bias = layer.weight, bias_of(layer)
        if self.scale is not None:
            weight = weight * (1 + self.scale).reshape(-1, *[1] * (weight.ndim - 1))
        if bias is not None and self.shift is not None:
            bias = bias + self.shift
        return weight + self.product(), bias


class Direction(Branch):
    """DoRA (arXiv 2402.09353): a low-rank change of the direction of the weights, and magnitudes.

    W' = (1 + m) |W| (W + s U V) / |W + s U V|, with the norm of the weights of each output. The
    derivative of the norm is left out, as in the paper (section 4.3).
    """

    def __init__(self, layer: Layer, rank: int, *, factor: float = 1.0):
        super().__init__(layer, rank, factor=factor)
        self.magnitude = nn.Parameter(torch.zeros(len(layer.weight)))

    def draw(self, key: Key) -> None:
        super().draw(key)
        nn.init.zeros_(self.magnitude)

    def _ratio(self, weight: Tensor) -> Tensor:
        """Factor of the outputs: [out]."""
        with torch.no_grad():
            before = weight.flatten(1).norm(dim=1)
            after = (weight + self.product()).flatten(1).norm(dim=1)
            ratio = torch.where(after > 0, before / after, 1.0)
        return (1 + self.magnitude) * ratio

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        weight, bias = cast(Layer, layer).weight, bias_of(layer)
        ratio = outputs(self._ratio(weight), layer, y)
        plain = y if bias is None else y - outputs(bias, layer, y)
        return (ratio - 1) * plain + ratio * self.low_rank(layer, x)

    def merged(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().merged(layer)
        return weight * self._ratio(layer.weight).reshape(-1, *[1] * (weight.ndim - 1)), bias


class Matrix(Change):
    """A difference of all weights of a layer, and of its bias."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(layer.weight))
        bias = bias_of(layer)
        self.shift = None if bias is None else nn.Parameter(torch.zeros_like(bias))

    def draw(self, key: Key) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        d = applied(cast(Layer, layer), self.weight, x)
        return d if self.shift is None else d + outputs(self.shift, layer, y)

    def merged(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        bias = bias_of(layer)
        if bias is not None and self.shift is not None:
            bias = bias + self.shift
        return layer.weight + self.weight, bias


class Table(Change):
    """A difference for each class, and one for none."""

    def __init__(self, layer: Labels):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(layer.weight))

    def draw(self, key: Key) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.embedding(cast(Labels, layer).rows(x), self.weight)

    def merged(self, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
        return cast(Labels, layer).weight + self.weight, None


class Modulated(Change):
    """Gains and biases of norms without parameters, through the shifts and scales behind them.

    With h' = g h + c a modulated h' (1 + s) + t is one of h with 1 + s' = g (1 + s) and
    t' = c (1 + s) + t. `layout` are the parts of the output: shift, scale or gate. `first` is
    another change of the same layer, which comes before.
    """

    def __init__(self, features: int, layout: tuple[str, ...], first: Change | None = None):
        super().__init__()
        self.layout, self.first = layout, first
        norms = layout.count("scale")
        self.gain = nn.Parameter(torch.zeros(norms, features))
        self.bias = nn.Parameter(torch.zeros(norms, features))

    def draw(self, key: Key) -> None:
        nn.init.zeros_(self.gain)
        nn.init.zeros_(self.bias)

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self.first is None:
            return self._difference(y, 1)
        d = self.first(layer, x, y)
        return d + self._difference(y + d, 1)

    def _difference(self, y: Tensor, one: int) -> Tensor:
        parts = list(zip(self.layout, y.chunk(len(self.layout), dim=-1), strict=True))
        scales = [one + part for word, part in parts if word == "scale"]
        gains, biases, out = iter(self.gain), iter(self.bias), []
        count = {"shift": 0, "scale": 0, "gate": 0}
        for word, part in parts:
            scale = scales[min(count[word], len(scales) - 1)]
            count[word] += 1
            if word == "gate":
                out.append(torch.zeros_like(part))
            else:
                out.append(next(biases if word == "shift" else gains) * scale)
        return torch.cat(out, dim=-1)

    def merged(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        weight, bias = (
            (layer.weight, bias_of(layer)) if self.first is None else self.first.merged(layer)
        )
        if bias is None:
            return super().merged(layer)
        columns = weight.mT
        return (columns + self._difference(columns, 0)).mT, bias + self._difference(bias, 1)


class NormChange(Trained):
    """Differences of the gains and biases of a norm that has some."""

    def __init__(self, layer: Norm):
        super().__init__()
        self.role: Role = "norm"
        self.weight = nn.Parameter(torch.zeros_like(layer.weight))
        self.bias = nn.Parameter(torch.zeros_like(layer.bias))

    def draw(self, key: Key) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


# ---- Layers ----


def is_conv(layer: nn.Module) -> bool:
    """True for a convolution."""
    return cast(Layer, layer).weight.ndim == 4


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias of a layer, if it has one."""
    return cast("Tensor | None", getattr(layer, "bias", None))


def outputs(values: Tensor, layer: nn.Module, y: Tensor) -> Tensor:
    """A value for each output of a layer, in the form of its output y."""
    shaped = values[:, None, None] if y.ndim == 4 and is_conv(layer) else values
    return shaped.to(torch.promote_types(y.dtype, torch.bfloat16))


def applied(layer: Layer, weight: Tensor, x: Tensor) -> Tensor:
    """Other weights applied as those of a layer, without a bias."""
    if not is_conv(layer):
        return F.linear(x, weight)
    if isinstance(layer, MPWeight):
        return F.conv2d(x, weight, padding=layer.kernel // 2)
    conv = cast(nn.Conv2d, layer)
    return F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation)
