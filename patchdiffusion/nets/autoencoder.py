"""Autoencoders: images to latents of fewer pixels and back (Rombach et al., arXiv 2112.10752).

The architecture and the names of its parameters are those of `AutoencoderKL` in diffusers, so that
published weights load. Shapes: B batch, C image channels, H and W height and width, c latent
channels, h = H / f and w = W / f for the factor f.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets.autoencoderparts import Decoder, Encoder, conv
from patchdiffusion.nets.base import Makes, Network, NetworkConfig
from patchdiffusion.nets.layers import pad_to_multiple
from patchdiffusion.rng import Draws
from patchdiffusion.system.dist import Team

LOG_VARIANCES = (-30.0, 20.0)
"""Limits of the logarithm of the variance of a latent."""

Noise = Callable[[tuple[int, ...]], Tensor]
"""Standard normal noise of a shape [c, h, w] for each image of a batch: [B, c, h, w]."""

# ---- The contract of autoencoders ----


class Bottleneck(NamedTuple):
    """Latents in training, and the losses that belong to them."""

    z: Tensor
    """[B, c, h, w], to be decoded by `AutoencoderNetwork.decoded`."""
    kl: Tensor | None = None
    """float32 [B], divergence of the posterior from N(0, 1), a sum over its latents in nats."""
    penalty: Tensor | None = None
    """float32 [B], a loss that always has weight 1, such as that of a codebook."""
    encoded: Tensor | None = None
    """[B, c, h, w], latents before quantization, without gradient."""
    codes: Tensor | None = None
    """int64 [B, h, w], numbers of the codes of latents."""


class Upkeep(nn.Module, ABC):
    """State of an autoencoder in training that no gradient changes; saved in checkpoints."""

    @abstractmethod
    def observe(self, latents: Bottleneck, draws: Draws) -> None:
        """Note the latents of some crops of a step."""

    @abstractmethod
    def after_step(self, applied: Tensor, team: Team) -> None:
        """Change state and network after an update; nothing may change if `applied` is 0."""

    def numbers(self) -> Mapping[str, Tensor]:
        """Values for the log, by name."""
        return {}


Config = TypeVar("Config", bound=NetworkConfig)


class AutoencoderNetwork(Network[Config], Generic[Config]):
    """Base of autoencoders, which encode images to a posterior of latents and decode latents.

    Called as a network it reconstructs: x -> decode(mean of x), of any size.
    """

    @property
    @abstractmethod
    def factor(self) -> int:
        """Pixels of an image per latent, along each side."""

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels of latents."""

    @abstractmethod
    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images, float32 [B, c, h, w] each.

        Images [B, C, H, W] with sides that are multiples of the factor.
        """

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Images of latents: [B, c, h, w] -> [B, C, f h, f w]."""

    def bottleneck(self, x: Tensor, noise: Noise) -> Bottleneck:
        """Latents of images in training: random ones of the posterior, by `noise`."""
        mean, std = self.moments(x)
        z = mean + std * noise(tuple(mean.shape[1:]))
        return Bottleneck(z, kl=gaussian_kl(mean, std))

    def decoded(self, z: Tensor) -> Tensor:
        """Images of the latents of a `Bottleneck`."""
        return self.decode(z)

    @property
    def last_weight(self) -> nn.Parameter:
        """Weight of the last layer, on which gradients of losses are compared."""
        raise ValueError(f"{type(self).__name__} names no last layer, which a discriminator needs")

    @property
    def num_codes(self) -> int:
        """Vectors in its codebook; 0 without."""
        return 0

    def codes_of(self, z: Tensor) -> Tensor:
        """Numbers of the codes of latents: [B, c, h, w] -> int64 [B, h, w]."""
        raise ValueError(f"{type(self).__name__} has no codebook")

    def upkeep(self) -> Upkeep | None:
        """State that training needs beside gradients; mostly none."""
        return None

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        """Reconstruction of x [B, C, H, W]; noise and conditions are not read."""
        self.check_shapes(x, cond)
        mean, _ = self.moments(pad_to_multiple(x, (self.factor,) * (x.ndim - 2)))
        return self.decode(mean)[(..., *(slice(side) for side in x.shape[2:]))]


def gaussian_kl(mean: Tensor, std: Tensor) -> Tensor:
    """KL divergence of N(mean, std^2) from N(0, 1) in nats, summed: [B, ...] -> [B]."""
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).flatten(1).sum(1)


# ---- Convolutional autoencoders ----


@dataclass(frozen=True, kw_only=True)
class AutoencoderShape(NetworkConfig):
    """Base of convolutional autoencoders: levels, widths and attention."""

    makes: ClassVar[Makes] = "autoencoder"

    latent_channels: int = 4
    """Channels of the latents."""
    base: int = 32
    """Features at a multiplier of 1."""
    mult: tuple[int, ...] = (1, 2, 2)
    """Features of each level in units of base, from full resolution down; each level after the
    first halves the sides, so that three are a factor of 4."""
    blocks: int = 1
    """Residual blocks per level; the decoder has one more."""
    attention: tuple[int, ...] = ()
    """Levels with self-attention, whatever the size of the input; 0 is full resolution."""
    mid_attention: bool = True
    """True if the lowest resolution has self-attention between its last two blocks."""
    groups: int = 8
    """Groups of all group norms; a divisor of the features of every level."""
    quant_conv: bool = True
    """True for convolutions of 1 x 1 before and behind the latents, as published ones have."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("latent_channels", 4096), ("base", 4096), ("blocks", 64)):
            self.limit(name, 1, most)
        for name in ("num_classes", "augment_dim", "dropout", "jump"):
            if getattr(self, name):
                raise ValueError(f"{name} must be 0 for an autoencoder, not {getattr(self, name)}")
        if not 1 <= len(self.mult) <= 12 or not all(1 <= m <= 64 for m in self.mult):
            raise ValueError(f"mult must be 1 to 12 integers in [1, 64], not {self.mult}")
        if any(not 0 <= level < len(self.mult) for level in self.attention):
            raise ValueError(
                f"attention must be levels in [0, {len(self.mult) - 1}], not {self.attention}"
            )
        if self.groups < 1 or any(width % self.groups for width in self.widths):
            raise ValueError(
                f"groups must divide the features of all levels, {self.widths}, not {self.groups}"
            )

    def inherit(self, old: NetworkConfig, config: object) -> Self:
        """A copy with the channels of the network it replaces; it reads no conditions."""
        return replace(self, channels=old.channels)

    @property
    def widths(self) -> tuple[int, ...]:
        """Features of each level, from full resolution down."""
        return tuple(self.base * m for m in self.mult)

    @property
    def divisor(self) -> int:
        return 2 ** (len(self.mult) - 1)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset()


Shape = TypeVar("Shape", bound=AutoencoderShape)


class ConvAutoencoder(AutoencoderNetwork[Shape], Generic[Shape]):
    """Base of convolutional autoencoders: encoder, decoder, and convolutions around the latents."""

    def __init__(self, config: Shape, *, encoded: int):
        """`encoded` is the number of channels that the encoder makes."""
        super().__init__(config)
        sizes: dict[str, Any] = {
            "blocks": config.blocks,
            "groups": config.groups,
            "attention": config.attention,
            "middle": config.mid_attention,
        }
        latent = config.latent_channels
        self.encoder = Encoder(config.channels, encoded, config.widths, **sizes)
        self.decoder = Decoder(latent, config.channels, config.widths, **sizes)
        self.quant_conv = conv(encoded, encoded, 1) if config.quant_conv else None
        self.post_quant_conv = conv(latent, latent, 1) if config.quant_conv else None

    @property
    def factor(self) -> int:
        return self.config.divisor

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    def encode(self, x: Tensor) -> Tensor:
        """Output of the encoder and the convolution behind it: float32 [B, encoded, h, w]."""
        h = self.encoder(x)
        return (h if self.quant_conv is None else self.quant_conv(h)).float()

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    @property
    def last_weight(self) -> nn.Parameter:
        weight = self.decoder.conv_out.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def units(self) -> list[nn.Module]:
        down, up = self.encoder, self.decoder
        return [*down.down_blocks, down.mid_block, up.mid_block, *up.up_blocks]


# ---- The autoencoder with a Gaussian posterior ----

KL_SIZES: Mapping[str, Mapping[str, Any]] = {
    name: {"base": 128, "blocks": 2, "groups": 32, **fields}
    for name, fields in {
        "kl-f4": {"mult": (1, 2, 4), "latent_channels": 3},
        "kl-f8": {"mult": (1, 2, 4, 4), "latent_channels": 4},
        "kl-f16": {"mult": (1, 1, 2, 2, 4), "latent_channels": 16, "attention": (4,)},
        "kl-f32": {"mult": (1, 1, 2, 2, 4, 4), "latent_channels": 64, "attention": (4, 5)},
    }.items()
}
"""Published sizes of autoencoders with a Gaussian posterior (arXiv 2112.10752)."""


@dataclass(frozen=True, kw_only=True)
class KLConfig(AutoencoderShape):
    """Autoencoder with a Gaussian posterior (KL); the defaults suit a CPU: 0.8M parameters."""

    word: ClassVar[str] = "kl"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = KL_SIZES

    def build(self, *, seed: int = 0) -> "KLAutoencoder":
        return KLAutoencoder(self, encoded=2 * self.latent_channels).init(seed)


class KLAutoencoder(ConvAutoencoder[KLConfig]):
    """Autoencoder whose encoder predicts mean and log-variance of every latent."""

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encode(x).chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCES))
