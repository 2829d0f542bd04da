"""A variational autoencoder of whole images, whose latent is one vector (arXiv 1312.6114).

Convolutions with bottlenecks and GELU lead to a few pixels, a linear layer to the vector, as in
DiffuseVAE (Pandey et al., TMLR 2022, arXiv 2201.00308). Written from the paper. Shapes: B batch,
C image channels, H and W height and width, z dimensions of the latent.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.nets.autoencoder import LOG_VARIANCES, AutoencoderNetwork
from patchdiffusion.nets.base import Makes, NetworkConfig, Role
from patchdiffusion.nets.layers import Conv, Linear, pad_to_multiple
from patchdiffusion.patches import Size

LEAST = 3
"""Least side of the features before the vector."""


@dataclass(frozen=True, kw_only=True)
class VAEConfig(NetworkConfig):
    """Variational autoencoder with one vector for an image; the defaults suit a CPU."""

    word: ClassVar[str] = "vae"
    makes: ClassVar[Makes] = "autoencoder"

    latent_channels: int = 32
    """Dimensions of the latent vector."""
    side: int = 0
    """Side of the images; smaller and oblong ones are padded. 0 is that of the training images."""
    base: int = 32
    """Features at a multiplier of 1; a multiple of 4."""
    mult: tuple[int, ...] = (1, 2, 4, 4)
    """Features of each level in units of base, from full resolution down; each level after the
    first halves the sides."""
    blocks: int = 1
    """Residual blocks per level."""
    output: Literal["sigmoid", "linear"] = "sigmoid"
    """sigmoid keeps images in [-1, 1]; linear is for values without limits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.limit("latent_channels", 1, 4096)
        self.limit("blocks", 1, 64)
        self.limit("side", 0, 4096)
        for name in ("num_classes", "augment_dim", "dropout", "jump"):
            if getattr(self, name):
                raise ValueError(f"{name} must be 0 for an autoencoder, not {getattr(self, name)}")
        if not 4 <= self.base <= 4096 or self.base % 4:
            raise ValueError(f"base must be a multiple of 4 in [4, 4096], not {self.base}")
        if not 1 <= len(self.mult) <= 12 or not all(1 <= m <= 64 for m in self.mult):
            raise ValueError(f"mult must be 1 to 12 integers in [1, 64], not {self.mult}")
        if self.side % self.halvings:
            raise ValueError(
                f"side must be a multiple of {self.halvings}, half as often as levels follow the "
                f"first one, not {self.side}"
            )
        if self.output not in ("sigmoid", "linear"):
            raise ValueError(f"output must be sigmoid or linear, not {self.output!r}")

    @property
    def halvings(self) -> int:
        """Pixels of an image per pixel before the vector, along each side."""
        return 2 ** (len(self.mult) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Features of each level, from full resolution down."""
        return tuple(self.base * m for m in self.mult)

    @property
    def divisor(self) -> int:
        return self.side or 1  # of crops, which must be whole images

    @property
    def reads(self) -> frozenset[str]:
        return frozenset()

    def inherit(self, old: NetworkConfig, config: object) -> Self:
        """A copy with the channels of the network it replaces; it reads no conditions."""
        return replace(self, channels=old.channels)

    def suits(self, config: Any) -> Mapping[str, Any]:
        """The loss of DiffuseVAE: squared error of images in [0, 1] and the divergence.

        Images are in [-1, 1], so that the error is 4 times as large, and so is the weight `kl`.
        """
        return {
            "task.error": "l2",
            "task.kl": 4.0,
            "task.perceptual": "none",
            "task.adversary": "none",
        }

    def for_canvas(self, canvas: Size) -> Self:
        """A copy with the side of a canvas, unless it is set; fewer levels for small images."""
        if self.side:
            return self
        longest, mult = max(canvas), self.mult
        while len(mult) > 1 and longest < LEAST * 2 ** (len(mult) - 1):
            mult = mult[:-1]
        halvings = 2 ** (len(mult) - 1)
        return replace(self, mult=mult, side=-(-longest // halvings) * halvings)

    def build(self, *, seed: int = 0) -> "VAE":
        return VAE(self.for_canvas((32, 32))).init(seed)


class VAE(AutoencoderNetwork[VAEConfig]):
    """Images [B, C, H, W] to the moments of a vector [B, z, 1, 1], and vectors to images."""

    def __init__(self, config: VAEConfig):
        super().__init__(config)
        self.least = config.side // config.halvings
        widths, pixels = config.widths, self.least**2
        features = widths[-1] * pixels
        self.stem = Conv(config.channels, widths[0], role="stem")
        self.enc = nn.ModuleList(
            _level(cin, width, config.blocks)
            for cin, width in zip((widths[0], *widths), widths, strict=False)
        )
        self.to_moments = Linear(features, 2 * config.latent_channels, role="mlp")
        self.from_latent = Linear(config.latent_channels, features, role="mlp")
        down = tuple(reversed(widths))
        self.dec = nn.ModuleList(
            _level(cin, width, config.blocks)
            for cin, width in zip((down[0], *down), down, strict=False)
        )
        self.head = Conv(widths[0], config.channels, role="head")

    @property
    def factor(self) -> int:
        return self.config.side

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    def units(self) -> list[nn.Module]:
        return [*self.enc, *self.dec]

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation float32 [B, z, 1, 1] of images of at most the side.

        Raises `ValueError` for larger ones.
        """
        side = self.config.side
        if max(x.shape[2:]) > side:
            raise ValueError(
                f"this autoencoder has one vector for an image of at most {side} x {side}, and "
                f"the images are {tuple(x.shape[2:])}"
            )
        h = self.stem(pad_to_multiple(x, (side, side)))
        for i, level in enumerate(self.enc):
            h = level(F.avg_pool2d(h, 2) if i else h)
        moments = self.to_moments(F.gelu(h).flatten(1)).float()[..., None, None]
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCES))

    def decode(self, z: Tensor) -> Tensor:
        h = self.from_latent(z.flatten(1).to(self.from_latent.weight.dtype))
        h = h.unflatten(1, (-1, self.least, self.least))
        for i, level in enumerate(self.dec):
            h = level(F.interpolate(h, scale_factor=2.0, mode="nearest") if i else h)
        x = self.head(F.gelu(h))
        return 2 * torch.sigmoid(x) - 1 if self.config.output == "sigmoid" else x


def _level(cin: int, width: int, blocks: int) -> nn.Sequential:
    """Residual blocks of a resolution, after a change of width."""
    first = [] if cin == width else [Conv(cin, width, 1, role="conv")]
    return nn.Sequential(*first, *(Bottleneck(width) for _ in range(blocks)))


class Bottleneck(nn.Module):
    """Residual block with a quarter of the features inside: 1 x 1, 3 x 3, 3 x 3, 1 x 1, GELU."""

    role: ClassVar[Role] = "conv"

    def __init__(self, width: int):
        super().__init__()
        inner = width // 4
        shapes = ((width, inner, 1), (inner, inner, 3), (inner, inner, 3), (inner, width, 1))
        self.convs = nn.ModuleList(Conv(cin, cout, kernel) for cin, cout, kernel in shapes)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W]."""
        h = x
        for conv in self.convs:
            h = conv(F.gelu(h))
        return x + h
