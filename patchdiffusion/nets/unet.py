"""DDPM++ and NCSN++: the U-Nets of Song et al. (arXiv 2011.13456) as trained in EDM (2206.00364).

Shapes: B batch, C image channels, H and W height and width (any size), E size of the embedding.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor, nn

from patchdiffusion.cond import Cond
from patchdiffusion.nets.attention import Attention
from patchdiffusion.nets.embed import (
    Embedding,
    EmbeddingKind,
    Pyramid,
    Stem,
    switches_of,
)
from patchdiffusion.nets.fused import residual
from patchdiffusion.nets.layers import Block, Conv, Norm
from patchdiffusion.nets.levels import decoder, encoder, middle
from patchdiffusion.nets.shapes import BlockPosition, UNetShape
from patchdiffusion.nets.text import ContextShape
from patchdiffusion.nets.topology import UNet


@dataclass(frozen=True, kw_only=True)
class UNetConfig(UNetShape, ContextShape):
    """A U-Net (DDPM++, NCSN++); the defaults are DDPM++ for 64 x 64 images, without dropout."""

    gated: ClassVar[bool] = True
    learns_concepts: ClassVar[bool] = True

    embedding: EmbeddingKind = "positional"
    """Noise features: positional (DDPM++) or random Fourier frequencies (NCSN++)."""
    encoder: Literal["standard", "residual"] = "standard"
    """residual adds a pyramid of the down-sampled input to each level (NCSN++)."""
    filter: tuple[int, ...] = (1, 1)
    """Resampling filter: 1 1 (DDPM++) or 1 3 3 1 (NCSN++)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedding not in ("positional", "fourier"):
            raise ValueError(f"embedding must be positional or fourier, not {self.embedding!r}")
        if self.encoder not in ("standard", "residual"):
            raise ValueError(f"encoder must be standard or residual, not {self.encoder!r}")
        if self.filter not in ((1, 1), (1, 3, 3, 1)):
            raise ValueError(f"filter must be (1, 1) or (1, 3, 3, 1), not {self.filter}")

    @property
    def smooth_in_noise(self) -> bool:
        return self.embedding == "positional" and not self.task_routing.reads

    def build(self, *, seed: int = 0) -> "SongUNet":
        return SongUNet(self, seed=seed)


_SideInput = tuple[Tensor, Tensor | None]  # input pyramid of the level above, and coordinates


class SongUNet(UNet[UNetConfig, _SideInput]):
    """DDPM++ or NCSN++, according to the configuration.

    At the start the last convolution has 1e-5 of its usual scale, as published, so the output is
    nearly zero while every parameter has a gradient.
    """

    def __init__(self, config: UNetConfig, *, seed: int = 0):
        super().__init__(config)
        widths = config.widths
        self.embed = Embedding(
            config.base,
            config.embedding,
            config.num_classes,
            config.augment_dim,
            **switches_of(config),
        )
        self.stem = Stem(config.channels, config.base, coordinates=config.position_channels)
        self.enc, skips = encoder(config.base, widths, config.blocks, self._block)
        self.pyramid = self._pyramid([config.base, *widths])
        self.dec = decoder(widths, skips, config.blocks, self._block)
        self.mid = middle(widths[-1], config.levels - 1, self._block)
        self.add_conditions(config.base, 4 * config.base)
        self.out_norm = Norm(widths[0])
        self.out_conv = Conv(widths[0], config.channels, scale=1e-5, role="head")
        self.init(seed)

    def _pyramid(self, widths: list[int]) -> nn.ModuleDict:
        """NCSN++'s pyramid of the input; `widths[l]` is the width of the input of level l."""
        config, steps = self.config, nn.ModuleDict()
        for level in range(1, config.levels if config.encoder == "residual" else 1):
            steps[str(level)] = Pyramid(
                config.channels if level == 1 else widths[level - 1],
                widths[level],
                coordinates=config.position_channels if level == 1 else 0,
                smooth=len(config.filter) > 2,
            )
        return steps

    def _block(self, position: BlockPosition, cin: int, cout: int) -> Block:
        attends = {
            "enc": position.part != "down" and position.level in self.config.attention,
            "mid": not position.last,
            "dec": position.last and position.level in self.config.attention,
        }[position.half]
        return Block(
            cin,
            cout,
            4 * self.config.base,
            resample=position.resample,
            smooth=len(self.config.filter) > 2,
            drop=self.config.dropout,
            attention=Attention(cout) if attends else None,
        )

    def embedding(self, noise: Tensor, cond: Cond) -> Tensor:
        return self.embed(noise, cond)

    def begin(self, x: Tensor, cond: Cond) -> tuple[Tensor, _SideInput]:
        pos = self.positions(x, cond)
        return self.stem(x, pos), (x, pos)

    def descend(self, level: int, h: Tensor, side: _SideInput) -> tuple[Tensor, _SideInput]:
        if not self.pyramid:
            return h, side
        # The pyramid of the next level starts from these features.
        h = residual(h, self.pyramid[str(level)](*side))
        return h, (h, side[1])

    def remove_head(self) -> None:
        super().remove_head()
        del self.out_norm, self.out_conv

    def finish(self, h: Tensor) -> Tensor:
        return self.out_conv(self.out_norm(h, silu=True))


# ---- Published and smaller sizes; `changes` are fields of `UNetConfig` ----


def _nominal(resolution: int) -> tuple[int, tuple[int, ...]]:
    # Attention at the level of 16 x 16 pixels, one more level below, as published for 32 and 64.
    if resolution < 8:
        raise ValueError(f"resolution must be at least 8, not {resolution}")
    level = max(0, round(math.log2(resolution / 16)))
    return level, (1,) + (2,) * (level + 1)


def ddpmpp(resolution: int = 64, **changes: object) -> UNetConfig:
    """DDPM++ as in EDM (arXiv 2206.00364, table 7): 55.7M parameters at 32, 61.8M at 64.

    Below 64 every level has 256 features and the dropout is .13 (CIFAR-10), else .05 (FFHQ).
    """
    level, mult = _nominal(resolution)
    low = resolution < 64
    mult = (2, *mult[1:]) if low else mult
    config = UNetConfig(mult=mult, attention=(level,), dropout=0.13 if low else 0.05)
    return replace(config, **changes)


def ncsnpp(resolution: int = 64, **changes: object) -> UNetConfig:
    """NCSN++ as in EDM: `ddpmpp` with Fourier features, smooth resampling and an input pyramid."""
    config = replace(ddpmpp(resolution), embedding="fourier", encoder="residual")
    return replace(replace(config, filter=(1, 3, 3, 1)), **changes)


def tiny(resolution: int = 32, **changes: object) -> UNetConfig:
    """Configuration for a CPU: 1.3M parameters, 0.3 GMAC at 32; 1.8M, 1.3 GMAC at 64."""
    level, mult = _nominal(resolution)
    return replace(UNetConfig(base=32, blocks=1, mult=mult, attention=(level,)), **changes)


def small(resolution: int = 32, **changes: object) -> UNetConfig:
    """Configuration for few images: 7.0M parameters, 1.8 GMAC at 32; 9.9M, 6.8 GMAC at 64."""
    return replace(tiny(resolution), **{"base": 64, "blocks": 2, "dropout": 0.05} | changes)


def base(resolution: int = 32, **changes: object) -> UNetConfig:
    """Between `small` and `ddpmpp`: 27.9M parameters, 6.9 GMAC at 32; 39.4M, 27.1 GMAC at 64."""
    return replace(small(resolution), **{"base": 128} | changes)
