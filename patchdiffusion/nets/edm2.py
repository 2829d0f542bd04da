"""EDM2: a U-Net whose activations, weights and updates keep their magnitude (arXiv 2312.02696).

Written from the formulas of the paper. Shapes: B batch, C image channels, H and W height and width
(any size), E size of the embedding.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from patchdiffusion.cond import Cond
from patchdiffusion.nets.base import NetworkConfig, Role
from patchdiffusion.nets.embed import augmentation, exact_convolution, jump_features, one_hot
from patchdiffusion.nets.fused import dropout
from patchdiffusion.nets.layers import Conv, Linear, Resample, resampled
from patchdiffusion.nets.levels import decoder, encoder, middle
from patchdiffusion.nets.magnitude import (
    BRANCH,
    MPAttention,
    MPFourier,
    MPReader,
    MPWeight,
    limit_weight,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
)
from patchdiffusion.nets.shapes import BlockPosition, HeadedShape
from patchdiffusion.nets.text import ContextShape, Text
from patchdiffusion.nets.topology import UNet
from patchdiffusion.noise import LogNormal
from patchdiffusion.system.device import full_precision

LARGEST = 256.0
"""Activations are clipped to plus or minus this."""
LOG_VARIANCE = 128
"""Size of the learned log-variance of the loss."""

_LEARNING_RATES = {
    64: 0.017, 128: 0.012, 192: 0.010, 256: 0.009, 320: 0.008, 384: 0.007, 448: 0.0065,
}  # fmt: skip


def _published(base: int, dropout: float = 0.0) -> dict[str, Any]:
    return {
        "base": base,
        "mult": (1, 2, 3, 4),
        "blocks": 3,
        "attention": (2, 3),
        "dropout": dropout,
    }


@dataclass(frozen=True, kw_only=True)
class EDM2Config(HeadedShape, ContextShape):
    """The magnitude-preserving U-Net of EDM2; the defaults suit a CPU: 1.2M parameters."""

    word: ClassVar[str] = "edm2"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "edm2-xxs": _published(64),
        "edm2-xs": _published(128),
        "edm2-s": _published(192),
        "edm2-m": _published(256, 0.1),
        "edm2-l": _published(320, 0.1),
        "edm2-xl": _published(384, 0.1),
        "edm2-xxl": _published(448, 0.1),
    }

    base: int = 32
    mult: tuple[int, ...] = (1, 2, 2)
    blocks: int = 1
    attention: tuple[int, ...] = (2,)

    def inherit(self, old: NetworkConfig, config: object) -> Self:
        """A copy with channels and classes of the network that it replaces; dropout is its own."""
        return replace(super().inherit(old, config), dropout=self.dropout)

    def suits(self, config: Any) -> Mapping[str, Any]:
        """Learning rate and its decay, and for plain denoising noise law and log-variance."""
        values = {
            "optim.lr": _LEARNING_RATES.get(self.base, round(0.136 / math.sqrt(self.base), 4)),
            "optim.betas": (0.9, 0.99),
            "optim.schedule": "inverse-sqrt",
        }
        if not hasattr(config.objective, "log_variance"):
            return values
        values["objective.log_variance"] = LOG_VARIANCE
        if isinstance(config.precond.default_noise(), LogNormal):
            values["noise"] = LogNormal(mean=-0.8, std=1.6)  # of pixels, at 64 x 64
        return values

    def build(self, *, seed: int = 0) -> "MPUNet":
        return MPUNet(self, seed=seed)


class MPUNet(UNet[EDM2Config, None]):
    """EDM2's U-Net: no norms with parameters and no biases; the output is zero at the start.

    A channel of ones takes the place of biases. Coordinates, augmentation and jump have weights
    that are zero at the start and never larger than those of other inputs.
    """

    def __init__(self, config: EDM2Config, *, seed: int = 0):
        super().__init__(config)
        widths = config.widths
        self.embed = MPEmbedding(config)
        self.stem = MPStem(config.channels, widths[0], config.position_channels)
        self.enc, skips = encoder(widths[0], widths, config.blocks, self._block)
        self.dec = decoder(widths, skips, config.blocks, self._block)
        self.mid = middle(widths[-1], config.levels - 1, self._block)
        self.add_conditions(widths[0], max(widths))
        self.out_conv = MPWeight(widths[0], config.channels, 3, gain=True, role="head")
        self.init(seed)

    def _block(self, position: BlockPosition, cin: int, cout: int) -> "MPBlock":
        heads = self.config.heads(position, cout)
        return MPBlock(
            cin,
            cout,
            max(self.config.widths),
            decodes=position.half != "enc",
            resample=position.resample,
            drop=self.config.dropout,
            attention=MPAttention(cout, heads) if heads else None,
        )

    def embedding(self, noise: Tensor, cond: Cond) -> Tensor:
        return self.embed(noise, cond)

    def begin(self, x: Tensor, cond: Cond) -> tuple[Tensor, None]:
        return self.stem(x, self.positions(x, cond)), None

    def text_encoder(self, text: Text) -> nn.Module | None:
        return text.build(keeps_magnitude=True)

    def reader(self, attention: nn.Module | None, context: int) -> nn.Module | None:
        if not isinstance(attention, MPAttention):
            return None
        return MPReader(attention.proj.weight.shape[0], attention.num_heads, context)

    def pictured(self, picture: Tensor) -> Tensor:
        return super().pictured(picture) / math.sqrt(9 * self.config.image_channels)

    def join(self, h: Tensor, skip: Tensor) -> Tensor:
        return mp_cat(h, skip)

    def remove_head(self) -> None:
        super().remove_head()
        del self.out_conv

    def finish(self, h: Tensor) -> Tensor:
        return self.out_conv(h)

    def after_step(self, applied: Tensor) -> None:
        """Normalize all weights that are trained (forced weight normalization)."""
        for module in self.modules():
            if isinstance(module, MPWeight | Conv | Linear) and not module.weight.requires_grad:
                continue
            if isinstance(module, MPWeight):
                module.normalize_weight(applied)
            elif isinstance(module, Conv | Linear):
                limit_weight(module.weight, applied)


class MPStem(nn.Module):
    """The first convolution: of the image and ones, and in float32 of the coordinates."""

    role: ClassVar[Role] = "stem"
    uncalled: ClassVar[tuple[str, ...]] = ("coordinates",)

    def __init__(self, channels: int, width: int, coordinates: int):
        super().__init__()
        self.image = MPWeight(channels + 1, width, 3)
        self.coordinates = (
            Conv(coordinates, width, bias=False, neutral=True) if coordinates else None
        )

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], pos float32 [B or 1, P, H, W] or None -> [B, width, H, W]."""
        h = self.image(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        if self.coordinates is None or pos is None:
            return h
        inputs = self.coordinates.weight[0].numel()
        return (h + exact_convolution(self.coordinates, pos) / math.sqrt(inputs)).to(h.dtype)


class MPEmbedding(nn.Module):
    """Noise level, class, augmentation and jump as one vector, always in full precision.

    Classes outside [0, K), such as -1, are the zero vector.
    """

    role: ClassVar[Role] = "embedding"

    def __init__(self, config: EDM2Config):
        super().__init__()
        base, width = config.widths[0], max(config.widths)
        classes, augment = config.num_classes, config.augment_dim
        self.base = base
        self.perturb = config.perturb
        self.fourier = MPFourier(base)
        self.noise = MPWeight(base, width)
        self.label = MPWeight(classes, width) if classes else None
        self.augment = Linear(augment, width, bias=False, neutral=True) if augment else None
        self.jump = Linear(base, width, bias=False, neutral=True) if config.jump else None

    def forward(self, noise: Tensor, cond: Cond) -> Tensor:
        """noise [B] -> [B, E]."""
        dtype = self.noise.weight.dtype
        with full_precision(noise):
            h = self.noise(self.fourier(noise).to(dtype))
            if self.label is not None:
                classes = self.label.weight.shape[1]
                e = self.label(one_hot(cond.labels, classes, h) * math.sqrt(classes))
                h = mp_sum(h, self.perturb.of_label(e, cond, classes))
            if self.augment is not None:
                inputs = self.augment.in_features
                h = h + self.augment(augmentation(cond, inputs, h)) / math.sqrt(inputs)
            if self.jump is not None:
                jump = jump_features(cond, noise, self.base).to(dtype)
                h = h + self.jump(jump) / math.sqrt(self.base)
            return mp_silu(h)


class MPBlock(nn.Module):
    """A residual block: two convolutions, the embedding as a gain between, then attention.

    In the encoder the input is normalized over its channels, which bounds the sums of all blocks.
    """

    role: ClassVar[Role] = "conv"
    branches: ClassVar[tuple[str, ...]] = ("conv1",)

    def __init__(
        self,
        cin: int,
        cout: int,
        emb: int,
        *,
        decodes: bool,
        resample: Resample = "none",
        drop: float = 0.0,
        attention: nn.Module | None = None,
    ):
        super().__init__()
        self.decodes = decodes
        self.resample: Resample = resample
        self.drop = drop
        self.conv0 = MPWeight(cin if decodes else cout, cout, 3)
        self.affine = MPWeight(emb, cout, gain=True, role="modulation")
        self.conv1 = MPWeight(cout, cout, 3)
        self.skip = MPWeight(cin, cout, 1) if cin != cout else None
        self.attention = attention

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        key: Tensor | None = None,
        size: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """x [B, C, H, W], emb [B, E] -> [B, cout, H', W']; the arguments are those of `Block`."""
        x = resampled(x, self.resample, size)
        if not self.decodes:
            x = normalize(x if self.skip is None else self.skip(x), 1)
        h = self.conv0(mp_silu(x))
        with full_precision(emb):
            gain = 1 + self.affine(emb)[:, :, None, None]
        h = mp_silu(h * gain.to(h.dtype))
        if key is not None and self.drop > 0:
            h = dropout(h, key, self.drop)
        if self.decodes and self.skip is not None:
            x = self.skip(x)
        x = mp_sum(x, self.conv1(h), BRANCH)
        if self.attention is not None:
            x = mp_sum(x, self.attention(x), BRANCH)
        return x.clamp(-LARGEST, LARGEST)
