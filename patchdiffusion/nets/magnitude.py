"""Operations that keep the magnitude (RMS) of their inputs, after EDM2 (arXiv 2312.02696).

Inputs are assumed to be uncorrelated and of magnitude 1. Written from the formulas of the paper.
Shapes: B batch, C channels, H and W height and width, N = H W pixels, n heads, d = C / n.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.nets.base import Key, Role
from patchdiffusion.nets.layers import normal
from patchdiffusion.system.dist import local

EPS = 1e-4
BRANCH = 0.3
"""Share of a branch in a sum, `t` of `mp_sum`."""


def normalize(x: Tensor, *dims: int) -> Tensor:
    """x / (eps + its RMS over some axes); the RMS is float32 or better."""
    precise = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=precise)
    count = math.prod([x.shape[dim] for dim in dims])
    return x / (EPS + norm / math.sqrt(count)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU, divided by its RMS for normal values."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """(1 - t) a + t b, scaled to magnitude 1."""
    return a.lerp(b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Channels of a [B, Ca, H, W] and b [B, Cb, H, W], with shares 1 - t and t of what follows."""
    count_a, count_b = a.shape[1], b.shape[1]
    scale = math.sqrt((count_a + count_b) / ((1 - t) ** 2 + t**2))
    parts = (a * (scale * (1 - t) / math.sqrt(count_a)), b * (scale * t / math.sqrt(count_b)))
    return torch.cat(parts, dim=1)


class MPFourier(nn.Module):
    """Cosines of magnitude 1, of frequencies ~ N(0, 1) and phases that are fixed: [B] -> [B, N]."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, count: int):
        super().__init__()
        self.register_buffer("freqs", torch.zeros(count))
        self.register_buffer("phases", torch.zeros(count))

    def draw(self, key: Key) -> None:
        if not self.freqs.is_meta:
            self.freqs.copy_(normal(self.freqs.shape, key("freqs")))
            drawn = torch.rand(self.phases.shape, generator=key("phases"), device="cpu")
            self.phases.copy_(drawn)

    def forward(self, noise: Tensor) -> Tensor:
        turns = noise[:, None] * self.freqs + self.phases
        return math.sqrt(2) * (2 * math.pi * turns).cos()


class MPWeight(nn.Module):
    """A convolution (kernel 1, 3, ...) or linear layer (kernel 0) without bias.

    Only the direction of each filter counts: its weights are normalized whenever they are used
    and, by `normalize_weight`, after each update, so that the learning rate stays relative to them.
    With `gain` the output has a learned factor that is zero at the start.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: int = 0,
        *,
        gain: bool = False,
        role: Role | None = None,
    ):
        super().__init__()
        self.kernel = kernel
        self.role = role
        self.weight = nn.Parameter(torch.empty(cout, cin, *(kernel, kernel)[: 2 * bool(kernel)]))
        self.gain = nn.Parameter(torch.empty(1)) if gain else None

    def draw(self, key: Key) -> None:
        if self.weight.is_meta:
            return
        with torch.no_grad():
            self.weight.copy_(self._unit(normal(self.weight.shape, key("weight"))))
            if self.gain is not None:
                self.gain.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, cin, H, W] -> [B, cout, H, W], or [B, cin] -> [B, cout]."""
        weight = self._unit(self.weight) / math.sqrt(self.weight[0].numel())
        if self.gain is not None:
            weight = weight * self.gain
        return F.conv2d(x, weight, padding=self.kernel // 2) if self.kernel else F.linear(x, weight)

    @torch.no_grad()
    def normalize_weight(self, applied: Tensor) -> None:
        """Give every filter the RMS 1; nothing changes where `applied` is 0."""
        weight = local(self.weight)  # of whole filters: shards are cut along the first axis
        weight.copy_(torch.where(applied > 0, self._unit(weight), weight))

    def _unit(self, weight: Tensor) -> Tensor:
        return normalize(weight, *range(1, weight.ndim))


class MPAttention(nn.Module):
    """Attention whose queries, keys and values have magnitude 1: [B, C, H, W] -> [B, C, H, W].

    The channels of `qkv` are all queries, then all keys, then all values.
    """

    role: ClassVar[Role] = "attention"
    branches: ClassVar[tuple[str, ...]] = ("proj",)

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = MPWeight(channels, 3 * channels, 1)
        self.proj = MPWeight(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(x).reshape(b, 3, self.num_heads, -1, height * width)
        # Fused kernels, which keep the softmax in float32, need the features of a pixel adjacent.
        q, k, v = normalize(qkv.transpose(-1, -2).contiguous(), -1).unbind(1)  # each [B, n, N, d]
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(h.transpose(-1, -2).reshape(b, c, height, width))


class MPReader(nn.Module):
    """Attention of pixels to the tokens of a condition, which adds nothing at the start.

    A gain g of its output a is learned: (x + g a) / sqrt(1 + g^2) keeps the magnitude.
    """

    role: ClassVar[Role] = "attention"
    is_neutral: ClassVar[bool] = True
    branches: ClassVar[tuple[str, ...]] = ("proj",)

    def __init__(self, channels: int, num_heads: int, context: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = MPWeight(channels, channels, 1)
        self.kv = MPWeight(context, 2 * channels)
        self.proj = MPWeight(channels, channels, 1, gain=True)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, C, H, W], context [B, T, D], mask bool [B, T] -> [B, C, H, W]."""
        q = self.q(x).flatten(2).unflatten(1, (self.num_heads, -1)).mT  # [B, n, N, d]
        kv = self.kv(normalize(context, -1)).unflatten(-1, (2, self.num_heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind()  # each [B, n, T, d]
        where = None if mask is None else mask[:, None, None]
        q, k, v = (normalize(part.contiguous(), -1) for part in (q, k, v))
        h = F.scaled_dot_product_attention(q, k, v, where)
        h = self.proj(h.mT.flatten(1, 2).unflatten(2, x.shape[2:]))
        assert self.proj.gain is not None
        return (x + h) / (1 + self.proj.gain.square()).sqrt().to(x.dtype)


class MPTokenBlock(nn.Module):
    """Attention among the tokens that count, and an MLP, as branches of `mp_sum`."""

    role: ClassVar[Role] = "attention"
    branches: ClassVar[tuple[str, ...]] = ("proj", "layer1")

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = MPWeight(width, 3 * width)
        self.proj = MPWeight(width, width)
        self.layer0 = MPWeight(width, 4 * width, role="mlp")
        self.layer1 = MPWeight(4 * width, width, role="mlp")

    def forward(self, h: Tensor, where: Tensor) -> Tensor:
        """h [B, T, D], where bool [B, T] -> [B, T, D]."""
        h = normalize(h, -1)
        qkv = self.qkv(h).unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, n, d]
        q, k, v = normalize(qkv.permute(2, 0, 3, 1, 4).contiguous(), -1).unbind()
        out = F.scaled_dot_product_attention(q, k, v, where[:, None, None])
        h = mp_sum(h, self.proj(out.transpose(1, 2).flatten(2)), BRANCH)
        return mp_sum(h, self.layer1(mp_silu(self.layer0(h))), BRANCH)


@torch.no_grad()
def limit_weight(weight: Tensor, applied: Tensor) -> None:
    """Keep the RMS of every filter at most 1; nothing changes where `applied` is 0.

    For weights that start at zero, which cannot be normalized.
    """
    weight = local(weight)
    dims = tuple(range(1, weight.ndim))
    limited = weight / weight.square().mean(dims, keepdim=True).sqrt().clamp(min=1)
    weight.copy_(torch.where(applied > 0, limited, weight))
