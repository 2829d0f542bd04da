"""Embeddings of the conditions of a network: noise level, class, augmentation, coordinates.

Shapes: B batch, C channels, H and W height and width, D size of the noise features, E size of the
embedding, K classes.
"""

import math
from typing import ClassVar, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.cond import Cond
from patchdiffusion.nets.base import Key, NetworkConfig, Role
from patchdiffusion.nets.concepts import concepts_of
from patchdiffusion.nets.layers import (
    Conv,
    Init,
    Linear,
    downsample,
    full_precision,
    normal,
    pad_even,
)
from patchdiffusion.nets.perturb import NONE, Perturb
from patchdiffusion.patches import Region

EmbeddingKind = Literal["positional", "fourier"]


def positional(noise: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of width/2 frequencies from 1 to 1e-4: [B] -> [B, width] (DDPM++)."""
    angle = angles(noise, width // 2, last=width // 2 - 1)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def angles(noise: Tensor, count: int, *, last: int) -> Tensor:
    """Noise times frequencies that fall from 1, by 1e-4 in `last` of them: [B] -> [B, count]."""
    steps = torch.arange(count, device=noise.device, dtype=torch.float32) / last
    return noise[:, None] * torch.exp(steps * -math.log(10000))


class Fourier(nn.Module):
    """Sines, then cosines, of fixed frequencies drawn from N(0, scale^2): [B] -> [B, width]."""

    freqs: Tensor

    def __init__(self, width: int, scale: float = 16.0):
        super().__init__()
        self.scale = scale
        self.register_buffer("freqs", torch.zeros(width // 2))

    def draw(self, key: Key) -> None:
        if not self.freqs.is_meta:
            self.freqs.copy_(normal(self.freqs.shape, key("freqs")) * self.scale)

    def forward(self, noise: Tensor) -> Tensor:
        angle = noise[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class Switches(TypedDict):
    """Keywords of the embeddings of a configuration; `concepts` of the classes are tokens."""

    jump: bool
    perturb: Perturb
    concepts: int


def switches_of(config: NetworkConfig) -> Switches:
    """The keywords of a configuration."""
    return {"jump": config.jump, "perturb": config.perturb, "concepts": config.concepts}


class Embedding(nn.Module):
    """Noise level, class, augmentation and jump as one vector, always in full precision.

    All others are added to the noise features before two layers with SiLU (EDM, arXiv 2206.00364,
    appendix F). Classes outside [0, K), such as -1, are the zero vector. The jump of a flow map has
    positional features, whose low frequencies have moderate derivatives, through weights that are
    zero at the start.
    """

    role: ClassVar[Role] = "embedding"

    def __init__(
        self,
        base: int,
        kind: EmbeddingKind,
        num_classes: int,
        augment_dim: int,
        *,
        jump: bool = False,
        perturb: Perturb = NONE,
        concepts: int = 0,
    ):
        super().__init__()
        width = 2 * base if kind == "fourier" else base
        self.base = base
        self.num_classes = table = num_classes - concepts
        self.perturb = perturb
        self.fourier = Fourier(width) if kind == "fourier" else None
        self.label = Linear(table, width) if table else None
        self.concepts = concepts_of(num_classes, concepts, width)
        self.augment = Linear(augment_dim, width, bias=False) if augment_dim else None
        self.jump = Linear(base, width, bias=False, neutral=True) if jump else None
        self.layer0 = Linear(width, 4 * base)
        self.layer1 = Linear(4 * base, 4 * base)

    def forward(self, noise: Tensor, cond: Cond) -> Tensor:
        """noise [B] -> [B, E], E = 4 base."""
        dtype = self.layer0.weight.dtype
        with full_precision(noise):
            h = self.fourier(noise) if self.fourier else positional(noise, self.base)
            h = h.to(dtype)  # [B, D]
            if self.label is not None:
                classes = one_hot(cond.labels, self.num_classes, h)
                e = self.label(classes * math.sqrt(self.num_classes))
                h = h + self.perturb.of_label(e, cond, self.num_classes)
            if self.concepts is not None:
                h = self.concepts(h, cond.labels)
            if self.augment is not None:
                h = h + self.augment(augmentation(cond, self.augment.in_features, h))
            if self.jump is not None:
                h = h + self.jump(jump_features(cond, noise, self.base).to(dtype))
            return F.silu(self.layer1(F.silu(self.layer0(h))))


def one_hot(labels: Tensor | None, num_classes: int, like: Tensor) -> Tensor:
    """1 for the class of each sample, none for labels outside [0, K): [B] -> like [B, K]."""
    if labels is None:
        return like.new_zeros(like.shape[0], num_classes)
    classes = torch.arange(num_classes, device=labels.device)
    return (labels[:, None] == classes).to(like.dtype)


def augmentation(cond: Cond, size: int, like: Tensor) -> Tensor:
    """Augmentation parameters, zero if there are none: like [B, size]."""
    # None is zero: every parameter has a gradient, for which other processes wait.
    if cond.augment is None:
        return like.new_zeros(like.shape[0], size)
    return cond.augment.to(like.dtype)


def jump_features(cond: Cond, noise: Tensor, width: int) -> Tensor:
    """Positional features of the jump, which is 0 if there is none: [B, width]."""
    return positional(torch.zeros_like(noise) if cond.jump is None else cond.jump, width)


class Labels(nn.Module):
    """A vector for each of K classes, and one for all others, such as -1: [B] -> [B, E]."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes + 1, width))

    def draw(self, key: Key) -> None:
        if not self.weight.is_meta:
            with torch.no_grad():
                self.weight.copy_(0.02 * normal(self.weight.shape, key("weight")))

    def forward(self, labels: Tensor) -> Tensor:
        return F.embedding(self.rows(labels), self.weight)

    def rows(self, labels: Tensor) -> Tensor:
        """The row of each label, the last for none: [B] -> [B]."""
        none = len(self.weight) - 1
        return torch.where((labels >= 0) & (labels < none), labels, none)


class LateEmbedding(nn.Module):
    """Noise level, class, augmentation and jump as in DiT (arXiv 2212.09748), in full precision.

    256 features of the noise level pass two layers; the others are added behind them. `Embedding`
    says what none and jump are.
    """

    role: ClassVar[Role] = "embedding"
    features: ClassVar[int] = 256

    def __init__(
        self,
        width: int,
        num_classes: int,
        augment_dim: int,
        *,
        jump: bool = False,
        perturb: Perturb = NONE,
        concepts: int = 0,
        last: int = 128,
    ):
        """Frequencies fall from 1, by 1e-4 in `last` of them: 128 in DiT, 127 in diffusers."""
        super().__init__()
        self.num_classes = table = num_classes - concepts
        self.perturb = perturb
        self.last = last
        self.layer0 = Linear(self.features, width, init="normal", scale=0.02)
        self.layer1 = Linear(width, width, init="normal", scale=0.02)
        self.label = Labels(table, width) if table else None
        self.concepts = concepts_of(num_classes, concepts, width)
        self.augment = Linear(augment_dim, width, bias=False) if augment_dim else None
        self.jump = Linear(self.features, width, bias=False, neutral=True) if jump else None

    def forward(self, noise: Tensor, cond: Cond) -> Tensor:
        """noise [B] -> [B, E]."""
        dtype = self.layer0.weight.dtype
        with full_precision(noise):
            h = self.layer1(F.silu(self.layer0(self._waves(noise).to(dtype))))
            if self.label is not None:
                none = torch.full(noise.shape[:1], -1, device=noise.device)
                e = self.label(none if cond.labels is None else cond.labels)
                h = h + self.perturb.of_label(e, cond, self.num_classes)
            if self.concepts is not None:
                h = self.concepts(h, cond.labels)
            if self.augment is not None:
                h = h + self.augment(augmentation(cond, self.augment.in_features, h))
            if self.jump is not None:
                h = h + self.jump(jump_features(cond, noise, self.features).to(dtype))
            return F.silu(h)

    def _waves(self, noise: Tensor) -> Tensor:
        """Cosines, then sines, of frequencies from 1 to about 1e-4: [B] -> [B, features]."""
        angle = angles(noise, self.features // 2, last=self.last)
        return torch.cat([angle.cos(), angle.sin()], dim=1)


def whole_canvas(x: Tensor) -> Tensor:
    """Coordinates if x [B, C, *S] is the whole canvas of n axes: float32 [1, n, *S]."""
    return Region.whole(tuple(x.shape[2:])).pos(x[:1])


def fourier_features(pos: Tensor, count: int) -> Tensor:
    """Sines and cosines of coordinates at doubling frequencies (arXiv 2006.10739).

    pos [B, A, ...] in [-1, 1] -> float32 [B, 2 A count, ...]; the lowest frequency is half a period
    across the canvas, so that all positions differ.
    """
    octaves = 2.0 ** torch.arange(count, device=pos.device)
    angles = math.pi / 2 * torch.einsum("k,b...->bk...", octaves, pos.float())
    return torch.cat([angles.sin(), angles.cos()], dim=1).flatten(1, 2)


def exact_convolution(conv: nn.Conv2d, pos: Tensor) -> Tensor:
    """A convolution of coordinates without a bias, in float32 also under autocast.

    Fast "float32" convolutions of GPUs (TF32) keep 11 bits of their inputs, so the coordinates are
    split into a coarse part, which fits, and a small remainder.
    """
    with full_precision(pos):
        dtype = torch.promote_types(conv.weight.dtype, torch.float32)
        pos, weight = pos.to(dtype), conv.weight.to(dtype)
        coarse = torch.round(pos * 128) / 128
        split = torch.cat([coarse, pos - coarse], dim=1)
        return F.conv2d(split, weight.repeat(1, 2, 1, 1), None, conv.stride, conv.padding)


class Stem(nn.Module):
    """The first convolution: of the image and, separately and in float32, of the coordinates.

    Equal to one convolution of the concatenated channels (Patch Diffusion, arXiv 2304.12526), but
    coordinates are never rounded to low precision, and with zero weights, as at the start, they
    add exactly nothing.
    """

    role: ClassVar[Role] = "stem"
    uncalled: ClassVar[tuple[str, ...]] = ("coordinates",)

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        coordinates: int,
        padding: int = 1,
        init: Init = "xavier",
    ):
        super().__init__()
        self.image = Conv(channels, width, padding=padding, init=init)
        self.coordinates = (
            Conv(coordinates, width, bias=False, padding=padding, neutral=True)
            if coordinates
            else None
        )

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], pos float32 [B or 1, P, H, W] or None -> [B, width, H', W']."""
        h = self.image(x)
        if self.coordinates is None or pos is None:
            return h
        return (h + exact_convolution(self.coordinates, pos)).to(h.dtype)


class Pyramid(nn.Module):
    """One step of NCSN++'s input pyramid: a convolution, then half the sides, rounded up.

    The convolution is padded by the reach of the filter, as published.
    """

    def __init__(self, channels: int, width: int, *, coordinates: int, smooth: bool):
        super().__init__()
        self.smooth = smooth
        self.stem = Stem(channels, width, coordinates=coordinates, padding=2 if smooth else 1)

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], pos float32 [B or 1, P, H, W] or None -> [B, width, H/2, W/2]."""
        h = self.stem(pad_even(x), None if pos is None else pad_even(pos))
        return downsample(h, smooth=self.smooth, padded=True)
