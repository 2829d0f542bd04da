"""DDPM++ and NCSN++: the U-Nets of Song et al. (arXiv 2011.13456) as trained in EDM (2206.00364).

Level l works on images of ceil(H / 2^l) x ceil(W / 2^l); level 0 is full resolution.
Shapes: B batch, C image channels, H and W height and width (any size), F features of a level,
E size of the embedding.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

from torch import Tensor, nn

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets.attention import Attention
from patchdiffusion.nets.embed import (
    Embedding,
    EmbeddingKind,
    Pyramid,
    Stem,
    fourier_features,
    whole_canvas,
)
from patchdiffusion.nets.fused import join, residual
from patchdiffusion.nets.layers import Block, Conv, Norm, initialise
from patchdiffusion.rng import subkeys


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """A U-Net; the defaults are DDPM++ for 64 x 64 images, without dropout."""

    channels: int = 3
    """Channels of the image, in and out."""
    base: int = 128
    """Features at a multiplier of 1; a multiple of 4."""
    mult: tuple[int, ...] = (1, 2, 2, 2)
    """Features of each level in units of base, from full resolution down."""
    blocks: int = 4
    """Residual blocks per level."""
    attention: tuple[int, ...] = (2,)
    """Levels with self-attention, whatever the size of the input; 0 is full resolution."""
    num_classes: int = 0
    """Number of classes; 0 is an unconditional network."""
    augment_dim: int = 0
    """Number of augmentation parameters the network is told."""
    coordinates: bool = True
    """Whether the network is told where each pixel lies on the canvas."""
    fourier_features: int = 0
    """Tell it by sines and cosines of so many frequencies instead of two linear channels."""
    embedding: EmbeddingKind = "positional"
    """Noise features: positional (DDPM++) or random Fourier frequencies (NCSN++)."""
    encoder: Literal["standard", "residual"] = "standard"
    """residual adds a pyramid of the down-sampled input to each level (NCSN++)."""
    filter: tuple[int, ...] = (1, 1)
    """Resampling filter: 1 1 (DDPM++) or 1 3 3 1 (NCSN++)."""
    dropout: float = 0.0
    """Share of features dropped in every block while training."""
    jump: bool = False
    """Whether the network is told how far it goes, as few-step models of two times are."""

    def __post_init__(self) -> None:
        # The upper limits only catch slips: far below them a network fits no machine.
        for name, least, most in (
            ("channels", 1, 4096),
            ("blocks", 1, 64),
            ("num_classes", 0, 10**6),
            ("augment_dim", 0, 4096),
            ("fourier_features", 0, 16),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} must lie in [{least}, {most}], not {value}")
        if not 4 <= self.base <= 4096 or self.base % 4:
            raise ValueError(f"base must be a multiple of 4 in [4, 4096], not {self.base}")
        if not 1 <= len(self.mult) <= 12 or not all(1 <= m <= 64 for m in self.mult):
            raise ValueError(f"mult must be 1 to 12 integers in [1, 64], not {self.mult}")
        if any(not 0 <= level < self.levels for level in self.attention):
            raise ValueError(
                f"attention must be levels in [0, {self.levels - 1}], not {self.attention}"
            )
        if self.embedding not in ("positional", "fourier"):
            raise ValueError(f"embedding must be positional or fourier, not {self.embedding!r}")
        if self.encoder not in ("standard", "residual"):
            raise ValueError(f"encoder must be standard or residual, not {self.encoder!r}")
        if self.filter not in ((1, 1), (1, 3, 3, 1)):
            raise ValueError(f"filter must be (1, 1) or (1, 3, 3, 1), not {self.filter}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.mult)

    @property
    def position_channels(self) -> int:
        """Channels that say where each pixel lies."""
        return (4 * self.fourier_features or 2) if self.coordinates else 0

    @property
    def divisor(self) -> int:
        """Total down-sampling; sides that are multiples of it need no padding."""
        return 2 ** (self.levels - 1)


class SongUNet(nn.Module):
    """DDPM++ or NCSN++, according to the configuration.

    At the start the last convolution has 1e-5 of its usual scale, as published, so the output is
    nearly zero while every parameter has a gradient. Activations on the tape: `stem`,
    `enc.<level>.down`, `enc.<level>.<block>`, `mid.<block>`, `dec.<level>.up`,
    `dec.<level>.<block>`. The same names key the dropout.
    """

    def __init__(self, config: UNetConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        widths = [config.base * m for m in config.mult]
        self.embed = Embedding(
            config.base,
            config.embedding,
            config.num_classes,
            config.augment_dim,
            jump=config.jump,
        )
        self.stem = Stem(config.channels, config.base, coordinates=config.position_channels)
        self.enc = nn.ModuleList()
        self.pyramid = nn.ModuleDict()
        self.dec = nn.ModuleList()
        skips = self._build_encoder(widths)
        self.mid = nn.ModuleDict(
            {
                "0": self._block(widths[-1], widths[-1], True),
                "1": self._block(widths[-1], widths[-1]),
            }
        )
        self._build_decoder(widths, skips)
        self.out_norm = Norm(widths[0])
        self.out_conv = Conv(widths[0], config.channels, scale=1e-5)
        self.init(seed)

    def _build_encoder(self, widths: list[int]) -> list[int]:
        config = self.config
        width, skips = config.base, [config.base]
        for level, features in enumerate(widths):
            stage = nn.ModuleDict()
            if level > 0:
                stage["down"] = self._block(width, width, resample="down")
                skips.append(width)
                if config.encoder == "residual":
                    self.pyramid[str(level)] = Pyramid(
                        config.channels if level == 1 else widths[level - 2],
                        width,
                        coordinates=config.position_channels if level == 1 else 0,
                        smooth=len(config.filter) > 2,
                    )
            for i in range(config.blocks):
                stage[str(i)] = self._block(width, features, level in config.attention)
                width = features
                skips.append(width)
            self.enc.append(stage)
        return skips

    def _build_decoder(self, widths: list[int], skips: list[int]) -> None:
        width = widths[-1]
        for level, features in reversed(list(enumerate(widths))):
            stage = nn.ModuleDict()
            if level < len(widths) - 1:
                stage["up"] = self._block(width, width, resample="up")
            for i in range(self.config.blocks + 1):
                attention = i == self.config.blocks and level in self.config.attention
                stage[str(i)] = self._block(width + skips.pop(), features, attention)
                width = features
            self.dec.insert(0, stage)

    def _block(
        self,
        cin: int,
        cout: int,
        attention: bool = False,
        resample: Literal["none", "down", "up"] = "none",
    ) -> Block:
        return Block(
            cin,
            cout,
            4 * self.config.base,
            resample=resample,
            smooth=len(self.config.filter) > 2,
            drop=self.config.dropout,
            attention=Attention(cout) if attention else None,
        )

    def init(self, seed: int) -> Self:
        """Fill all weights anew: a function of the seed alone, the same on every device."""
        initialise(self, seed)
        return self

    @property
    def divisor(self) -> int:
        """Total down-sampling; sides that are multiples of it need no padding."""
        return self.config.divisor

    def units(self) -> list[nn.Module]:
        """The repeated parts, which are compiled and sharded one by one."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        """x [B, C, H, W], noise [B] -> [B, C, H, W]; no dropout unless `cond.seed` is given.

        Uses labels, augment, pos, jump and seed of the condition. Raises `ValueError` if the
        channels of x or the shape of cond.pos [B, 2, H, W] do not fit.
        """
        emb = self.embed(noise, cond)  # [B, E]
        pos = self._positions(x, cond)

        def run(name: str, block: nn.Module, h: Tensor, size: tuple[int, int] = (0, 0)) -> Tensor:
            # Names are hashed out here, so that one compiled block serves all of them.
            key = None
            if cond.seed is not None and self.config.dropout > 0:
                key = subkeys(cond.seed, name)
            return block(h, emb, key, size)

        h = _put(tape, "stem", self.stem(x, pos))
        skips, sizes = [h], []
        for level, stage in enumerate(self.enc):
            for part, block in stage.named_children():
                h = run(f"enc.{level}.{part}", block, h)
                if part == "down" and self.pyramid:
                    # From here on x is the pyramid, which the features of each level join.
                    x = h = residual(h, self.pyramid[str(level)](x, pos))
                skips.append(_put(tape, f"enc.{level}.{part}", h))
            sizes.append((h.shape[-2], h.shape[-1]))
        for part, block in self.mid.named_children():
            h = _put(tape, f"mid.{part}", run(f"mid.{part}", block, h))
        for level in reversed(range(self.config.levels)):
            for part, block in self.dec[level].named_children():
                if part != "up":
                    h = join(h, skips.pop())
                h = run(f"dec.{level}.{part}", block, h, sizes[level])
                h = _put(tape, f"dec.{level}.{part}", h)
        return self.out_conv(self.out_norm(h, silu=True))

    def _positions(self, x: Tensor, cond: Cond) -> Tensor | None:
        if x.ndim != 4 or x.shape[1] != self.config.channels:
            raise ValueError(f"x must be [B, {self.config.channels}, H, W], not {tuple(x.shape)}")
        if not self.config.coordinates:
            return None
        if cond.pos is not None and cond.pos.shape != (x.shape[0], 2, *x.shape[2:]):
            raise ValueError(
                f"cond.pos must be {(x.shape[0], 2, *x.shape[2:])} for x {tuple(x.shape)}, "
                f"not {tuple(cond.pos.shape)}"
            )
        pos = whole_canvas(x) if cond.pos is None else cond.pos
        return (
            fourier_features(pos, self.config.fourier_features)
            if self.config.fourier_features
            else pos
        )


def _put(tape: Tape | None, name: str, activation: Tensor) -> Tensor:
    if tape is not None:
        tape.put(name, activation)
    return activation


# ---- Published and smaller settings; all take fields of `UNetConfig` as further arguments ----


def _nominal(resolution: int) -> tuple[int, tuple[int, ...]]:
    # Attention where a whole image is 16 x 16, and one level below, as published for 32 and 64.
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
    plain = UNetConfig(mult=mult, attention=(level,), dropout=0.13 if low else 0.05)
    return replace(plain, **changes)


def ncsnpp(resolution: int = 64, **changes: object) -> UNetConfig:
    """NCSN++ as in EDM: `ddpmpp` with Fourier features, smooth resampling and an input pyramid."""
    plain = replace(ddpmpp(resolution), embedding="fourier", encoder="residual")
    return replace(replace(plain, filter=(1, 3, 3, 1)), **changes)


def tiny(resolution: int = 32, **changes: object) -> UNetConfig:
    """For a CPU: 1.3M parameters, 0.3 GMAC at 32; 1.8M, 1.3 GMAC at 64."""
    level, mult = _nominal(resolution)
    return replace(UNetConfig(base=32, blocks=1, mult=mult, attention=(level,)), **changes)


def small(resolution: int = 32, **changes: object) -> UNetConfig:
    """For few images: 7.0M parameters, 1.8 GMAC at 32; 9.9M, 6.8 GMAC at 64."""
    return replace(tiny(resolution), **{"base": 64, "blocks": 2, "dropout": 0.05} | changes)


def base(resolution: int = 32, **changes: object) -> UNetConfig:
    """Between `small` and `ddpmpp`: 27.9M parameters, 6.9 GMAC at 32; 39.4M, 27.1 GMAC at 64."""
    return replace(small(resolution), **{"base": 128} | changes)
