"""Autoencoders with a codebook: latents are vectors of a table (VQ-VAE, arXiv 1711.00937).

The architecture and the names of its parameters are those of `VQModel` in diffusers. Shapes: B
batch, C image channels, c latent channels, h and w sides of latents, K codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from patchdiffusion import rng
from patchdiffusion.nets.autoencoder import (
    AutoencoderShape,
    Bottleneck,
    ConvAutoencoder,
    Noise,
    Upkeep,
)
from patchdiffusion.nets.base import Key, Role
from patchdiffusion.rng import Draws
from patchdiffusion.system.dist import Team

Update = Literal["gradient", "average"]

VQ_SIZES: Mapping[str, Mapping[str, Any]] = {
    name: {"base": 128, "blocks": 2, "groups": 32, **fields}
    for name, fields in {
        "vq-f4": {"mult": (1, 2, 4), "latent_channels": 3, "codes": 8192},
        "vq-f8": {
            "mult": (1, 2, 2, 4),
            "latent_channels": 4,
            "codes": 16384,
            "attention": (3,),
        },
        "vq-f16": {
            "mult": (1, 1, 2, 2, 4),
            "latent_channels": 8,
            "codes": 16384,
            "attention": (4,),
        },
    }.items()
}
"""Published sizes of autoencoders with a codebook (arXiv 2112.10752)."""


@dataclass(frozen=True, kw_only=True)
class VQConfig(AutoencoderShape):
    """Autoencoder with a codebook (VQ); the defaults suit a CPU: 1.0M parameters."""

    word: ClassVar[str] = "vq"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = VQ_SIZES

    codes: int = 256
    """Vectors in the codebook."""
    commitment: float = 0.25
    """Weight of the loss that draws outputs of the encoder to their codes (beta)."""
    update: Update = "gradient"
    """gradient: codes follow a loss that draws them to their outputs of the encoder; average: they
    are moving averages of these."""
    decay: float = 0.99
    """Weight of the past in moving averages, of the codes and of their use."""
    revive: float = 0.05
    """Codes that are used less than this share of equal use become outputs of the encoder; 0 is
    none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.limit("codes", 2, 2**20)
        if self.update not in get_args(Update):
            raise ValueError(f"update must be one of {get_args(Update)}, not {self.update!r}")
        for name in ("decay", "revive"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)}")
        if not 0 <= self.commitment < 1e6:
            raise ValueError(f"commitment must be >= 0 and finite, not {self.commitment}")

    def build(self, *, seed: int = 0) -> "VQAutoencoder":
        return VQAutoencoder(self).init(seed)


class CodeTable(nn.Module):
    """The vectors of a codebook, uniform in (-1/K, 1/K) at the start: [K, c]."""

    role: ClassVar[Role] = "embedding"

    def __init__(self, codes: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(codes, channels))

    def draw(self, key: Key) -> None:
        if not self.weight.is_meta:
            drawn = torch.rand(self.weight.shape, generator=key("weight"), device="cpu")
            with torch.no_grad():
                self.weight.copy_((2 * drawn - 1) / len(drawn))


class VectorQuantizer(nn.Module):
    """Replaces vectors by the nearest ones of a table."""

    def __init__(self, codes: int, channels: int):
        super().__init__()
        self.embedding = CodeTable(codes, channels)

    def codes(self, z: Tensor) -> Tensor:
        """Number of the nearest code: [B, c, h, w] -> int64 [B, h, w]."""
        table = self.embedding.weight.detach().to(z)
        scores = z.detach().movedim(1, -1) @ table.mT  # [B, h, w, K]
        return (table.square().sum(1) - 2 * scores).argmin(-1)

    def vectors(self, codes: Tensor) -> Tensor:
        """Vectors of codes: int64 [B, h, w] -> [B, c, h, w]."""
        return self.embedding.weight[codes].movedim(-1, 1)

    def forward(self, z: Tensor) -> Tensor:
        """z [B, c, h, w] -> the nearest vectors, like z."""
        return self.vectors(self.codes(z)).to(z)


class VQAutoencoder(ConvAutoencoder[VQConfig]):
    """Autoencoder that decodes vectors of a codebook; its latents are those before quantization."""

    def __init__(self, config: VQConfig):
        super().__init__(config, encoded=config.latent_channels)
        self.quantize = VectorQuantizer(config.codes, config.latent_channels)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encode(x)
        return z, torch.zeros_like(z)

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(self.quantize(z))

    def bottleneck(self, x: Tensor, noise: Noise) -> Bottleneck:
        """Codes with the gradient of the latents (straight through), and the loss of both."""
        z = self.encode(x)
        codes = self.quantize.codes(z)
        vectors = self.quantize.vectors(codes).to(z)
        pulled = (vectors - z.detach()).square().flatten(1).mean(1)
        committed = (vectors.detach() - z).square().flatten(1).mean(1)
        if self.config.update == "average":
            pulled = pulled * 0.0  # the table is part of the graph, for DistributedDataParallel
        loss = pulled + self.config.commitment * committed
        return Bottleneck(z + (vectors - z).detach(), penalty=loss, encoded=z.detach(), codes=codes)

    def decoded(self, z: Tensor) -> Tensor:
        return super().decode(z)

    @property
    def num_codes(self) -> int:
        return self.config.codes

    def codes_of(self, z: Tensor) -> Tensor:
        return self.quantize.codes(z)

    def upkeep(self) -> "CodebookUpkeep":
        return CodebookUpkeep(self)


class CodebookUpkeep(Upkeep):
    """Moving averages of a codebook: how often codes are used, and codes that are averages.

    All numbers are sums over the crops of a step, over all processes, so that these stay equal.
    """

    used: Tensor
    """float32 [K], moving average of the use of each code; 1 is equal use."""
    step: Tensor
    """float32 [K, 2 + 2 c] of this step: how often each code was used, whether there is a candidate
    to replace it, the candidate, and the sum of the outputs of the encoder that it stands for."""
    average: Tensor
    """float32 [K, 1 + c], moving averages of the first and the last columns of `step`."""

    def __init__(self, network: VQAutoencoder):
        super().__init__()
        self.config = network.config
        self.table = [network.quantize.embedding.weight]  # in a list: it is the network's own
        codes, channels = self.table[0].shape
        start = torch.ones(codes, 1 + channels)
        start[:, 1:] = self.table[0].detach().cpu()
        self.register_buffer("used", torch.ones(codes))
        self.register_buffer("step", torch.zeros(codes, 2 + 2 * channels))
        self.register_buffer("average", start)

    @torch.no_grad()
    def observe(self, latents: Bottleneck, draws: Draws) -> None:
        """Count the codes of some crops, and take candidates to replace codes from them."""
        assert latents.encoded is not None and latents.codes is not None
        z = latents.encoded.flatten(2).movedim(1, 2)  # [B, P, c]
        codes, channels = latents.codes.flatten(), z.shape[2]
        ones = torch.ones_like(codes, dtype=torch.float32)
        self.step[:, 0].index_add_(0, codes, ones)
        self.step[:, 2 + channels :].index_add_(0, codes, z.flatten(0, 1))
        numbers = torch.arange(len(self.used), device=z.device)
        # Each crop of the first group of a step has candidates for some codes, at random places.
        match = numbers[:, None] % draws.count == draws.rank
        match &= draws.index == draws.rank
        place = rng.integers(rng.keys(draws.seed, "codes", draws.step, numbers), z.shape[1])
        candidate = z[match.float().argmax(1), place]
        has = match.any(1, keepdim=True)
        new = torch.cat([has.float(), torch.where(has, candidate, 0.0)], dim=1)
        self.step[:, 1 : 2 + channels] += new

    @torch.no_grad()
    def after_step(self, applied: Tensor, team: Team) -> None:
        """Update averages and codes; codes that are not used become outputs of the encoder."""
        table, config = self.table[0], self.config
        channels, does = table.shape[1], applied.to(self.used) > 0
        step = team.all_reduce(self.step.clone())
        self.step.zero_()
        count, fresh = step[:, 0], step[:, 2 : 2 + channels]
        share = count / count.mean().clamp(min=1e-12)
        self.used.copy_(torch.where(does, self.used.lerp(share, 1 - config.decay), self.used))
        now = torch.cat([count[:, None], step[:, 2 + channels :]], dim=1)
        average = self.average.lerp(now, 1 - config.decay)
        self.average.copy_(torch.where(does, average, self.average))
        if config.update == "average":
            size = self.average[:, :1].clamp(min=1e-5)
            table.copy_(torch.where(does, self.average[:, 1:] / size, table))
        dead = (does & (self.used < config.revive) & (step[:, 1] > 0))[:, None]
        table.copy_(torch.where(dead, fresh, table))
        self.used.copy_(torch.where(dead[:, 0], 1.0, self.used))
        weight = self.average[:, :1].mean().clamp(min=1e-5).expand(len(table), 1)
        revived = torch.cat([weight, fresh * weight], dim=1)
        self.average.copy_(torch.where(dead, revived, self.average))

    def numbers(self) -> Mapping[str, Tensor]:
        """Share of the codes that the crops of this step used, so far and in this process.

        Not by `used`: revived codes are set to equal use there, so that all seem to be used.
        """
        return {"codes used": (self.step[:, 0] > 0).float().mean()}
