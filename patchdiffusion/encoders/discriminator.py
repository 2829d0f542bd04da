"""Discriminators of patches, against which other networks are trained (PatchGAN, arXiv 1611.07004).

Shapes: B batch, C channels, H and W sides of images, h and w those of the logits.
"""

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.encoders.embed import WIDTHS, random_weight
from patchdiffusion.nets.base import initialize
from patchdiffusion.nets.layers import Conv
from patchdiffusion.patches import Size, size_name
from patchdiffusion.rng import seed_of
from patchdiffusion.system.checks import positive

Form = Literal["hinge", "nonsaturating"]
Norm = Literal["none", "group", "batch"]

FLAG = "--task.adversary"
_SLOPE = 0.2  # of leaky ReLUs
_HE = (6 / (1 + _SLOPE**2)) ** 0.5


@dataclass(frozen=True, kw_only=True)
class NoAdversary:
    """No discriminator."""

    word: ClassVar[str] = "none"

    def check(self, size: Size, flag: str = FLAG) -> None:
        """Fits all crops."""


@dataclass(frozen=True, kw_only=True)
class AdversaryConfig(ABC):
    """Base of discriminators, whose gradient is balanced with that of the other losses."""

    weight: float = 0.5
    """Norm of its gradient on the last layer, relative to that of the other losses; the factor of
    its loss if it is not balanced."""
    balanced: bool = True
    """Balance its gradient with that of the other losses."""
    start: float = 0.25
    """Share of the run after which it counts."""
    warmup: float = 0.1
    """Share of the run before that in which the discriminator alone is trained."""
    rate: float = 0.2
    """Learning rate of the discriminator relative to that of the network."""
    form: Form = "hinge"
    """hinge: the loss of Lim & Ye (arXiv 1705.02894); nonsaturating: that of the first GANs."""
    limit: float = 1.0
    """Largest adaptive weight, of a loss that is a mean over the values of an image; the published
    limit is 1e4 for sums, 0.05 at 256 x 256."""
    r1: float = 0.0
    """Weight of the squared gradient on real images (R1, arXiv 1801.04406)."""

    def __post_init__(self) -> None:
        positive(self, "weight", "rate", "limit")
        if self.form not in get_args(Form):
            raise ValueError(f"form must be one of {get_args(Form)}, not {self.form!r}")
        if not (0 <= self.start < 1 and 0 <= self.warmup <= 1 and 0 <= self.r1 < 1e9):
            raise ValueError(
                "start must lie in [0, 1), warmup in [0, 1] and r1 be >= 0, "
                f"not {self.start}, {self.warmup} and {self.r1}"
            )

    def check(self, size: Size, flag: str = FLAG) -> None:
        """Raise `ValueError` for crops that it cannot judge; `flag` is that of the record."""
        return None

    @abstractmethod
    def network(self, channels: int) -> nn.Module:
        """Discriminator of images: [B, C, H, W] -> logits [B, 1, h, w], positive for real ones."""

    def build(self, channels: int, seed: int) -> nn.Module:
        """Discriminator with weights that are a function of the seed."""
        network = self.network(channels)
        initialize(network, seed_of(seed, "discriminator"))
        return network


@dataclass(frozen=True, kw_only=True)
class PatchGAN(AdversaryConfig):
    """Discriminator of patches (arXiv 1611.07004)."""

    word: ClassVar[str] = "patchgan"

    width: int = 64
    """Features of the first layer, which double up to eightfold."""
    layers: int = 3
    """Layers that halve the sides; the last logits see about 2^(layers + 3) pixels."""
    norm: Norm = "none"
    """none; group: group norm; batch: batch norm, as published, whose statistics are those of a
    pass, so that processes and micro-batches change the result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "width", "layers")
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {get_args(Norm)}, not {self.norm!r}")
        if self.norm == "group" and self.width % 8:
            raise ValueError(f"width must be a multiple of 8 for group norms, not {self.width}")

    def check(self, size: Size, flag: str = FLAG) -> None:
        """Raise `ValueError` for crops that are too small for its layers."""
        least = 3 * 2**self.layers
        if min(size) < least:
            fits = max(0, (min(size) // 3).bit_length() - 1)
            raise ValueError(
                f"a discriminator of {self.layers} layers needs crops of at least {least} pixels, "
                f"not {size_name(size)}; use "
                + (f"{flag}.layers {fits}" if fits else f"{flag} none")
            )

    def network(self, channels: int) -> "PatchDiscriminator":
        return PatchDiscriminator(channels, self.width, self.layers, self.norm)


@dataclass(frozen=True, kw_only=True)
class FeatureHeads(AdversaryConfig):
    """Small heads on the features of a fixed network at three resolutions, for few images."""

    word: ClassVar[str] = "feature-heads"

    width: int = 32
    """Hidden features of a head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "width")

    def network(self, channels: int) -> "FeatureDiscriminator":
        return FeatureDiscriminator(channels, self.width)


Adversary = PatchGAN | FeatureHeads | NoAdversary
"""Discriminators of `--task.adversary` and `--objective.adversary`."""


class PatchDiscriminator(nn.Module):
    """Convolutions of 4 x 4: images [B, C, H, W] -> logits [B, 1, h, w], positive for real ones."""

    def __init__(self, channels: int, width: int, layers: int, norm: Norm):
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [_conv(channels, widths[0], 2, norm), nn.LeakyReLU(_SLOPE)]
        for i, (cin, cout) in enumerate(itertools.pairwise(widths), start=1):
            parts += [_conv(cin, cout, 2 if i < layers else 1, norm), *_norm(norm, cout)]
            parts += [nn.LeakyReLU(_SLOPE)]
        self.layers = nn.Sequential(*parts, _conv(widths[-1], 1, 1, norm))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class FeatureDiscriminator(nn.Module):
    """Two layers of each place on the features of three fixed random convolutions.

    Images [B, C, H, W] -> logits [B, 1, 3 h, w], h and w a quarter of H and W, rounded up. As the
    features are not trained, heads of few weights do not learn a handful of images by heart.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        heads: list[nn.Module] = []
        for number, (below, features) in enumerate(itertools.pairwise((channels, *WIDTHS))):
            weight = random_weight(number, features, below, 2)
            self.register_buffer(f"weight{number}", weight, persistent=False)
            hidden = Conv(features, width, 1, init="kaiming", scale=_HE, role="conv")
            out = Conv(width, 1, 1, init="kaiming", scale=_HE, role="conv")
            heads.append(nn.Sequential(hidden, nn.LeakyReLU(_SLOPE), out))
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        maps: list[Tensor] = []
        for number in range(len(self.heads)):
            weight = self.get_buffer(f"weight{number}").to(x.dtype)
            x = F.conv2d(x, weight, padding=1, stride=1 if number == 0 else 2)
            x = F.leaky_relu(x, _SLOPE)
            maps.append(x)
        size = (x.shape[2], x.shape[3])
        pooled = [F.adaptive_avg_pool2d(h, size) for h in maps]
        return torch.cat([head(h) for head, h in zip(self.heads, pooled, strict=True)], dim=2)


def _conv(cin: int, cout: int, stride: int, norm: Norm) -> Conv:
    # As published with norms; without, values keep their size (arXiv 1502.01852).
    if norm == "none":
        layer = Conv(cin, cout, 4, init="kaiming", scale=_HE, padding=1, role="conv")
    else:
        layer = Conv(cin, cout, 4, init="normal", scale=0.02, padding=1, role="conv")
    layer.stride = (stride, stride)
    return layer


def _norm(kind: Norm, channels: int) -> list[nn.Module]:
    kinds: dict[Norm, Any] = {
        "none": lambda: [],
        "group": lambda: [nn.GroupNorm(8, channels)],
        "batch": lambda: [nn.BatchNorm2d(channels, track_running_stats=False)],
    }
    return kinds[kind]()


def generator_loss(logits: Tensor, form: Form) -> Tensor:
    """Loss of images that should be taken for real ones: logits [B, 1, h, w] -> float32 [B]."""
    logits = logits.float()
    each = -logits if form == "hinge" else F.softplus(-logits)
    return each.flatten(1).mean(1)


def discriminator_loss(real: Tensor, fake: Tensor, form: Form) -> Tensor:
    """Loss of a discriminator: logits [B, 1, h, w] of real and fake images -> float32 [B]."""
    real, fake = real.float(), fake.float()
    if form == "hinge":
        each = F.relu(1 - real) + F.relu(1 + fake)
    else:
        each = F.softplus(-real) + F.softplus(fake)
    return 0.5 * each.flatten(1).mean(1)
