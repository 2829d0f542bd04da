"""A linear autoencoder, exactly invertible: the oracle of latents."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.model import ModelConfig, save_model
from patchdiffusion.nets import Network
from patchdiffusion.nets.autoencoder import AutoencoderNetwork
from patchdiffusion.nets.base import Makes, NetworkConfig
from patchdiffusion.nets.heads import AutoencoderHead
from patchdiffusion.noise import LogNormal
from patchdiffusion.parameterisation import EDM
from patchdiffusion.system import families


@dataclass(frozen=True, kw_only=True)
class LinearCodec(NetworkConfig):
    """Blocks of pixels times an orthogonal matrix; latents are Gaussian of one deviation."""

    makes: ClassVar[Makes] = "autoencoder"

    side: int = 2
    """Pixels of a block along each side."""
    spread: float = 0.1
    """Standard deviation of each latent."""

    @property
    def divisor(self) -> int:
        return self.side

    @property
    def reads(self) -> frozenset[str]:
        return frozenset()

    def build(self, *, seed: int = 0) -> "LinearAutoencoder":
        return LinearAutoencoder(self, seed)


class LinearAutoencoder(AutoencoderNetwork[LinearCodec]):
    """z = scale * Q (block of pixels) + shift, with channels of different size."""

    def __init__(self, config: LinearCodec, seed: int):
        super().__init__(config)
        count = config.channels * config.side**2
        square = torch.randn(count, count, generator=torch.Generator().manual_seed(seed))
        self.matrix = nn.Parameter(torch.linalg.qr(square).Q)
        self.scale = torch.linspace(0.5, 3.0, count)[:, None, None]
        self.shift = torch.linspace(-1.0, 2.0, count)[:, None, None]

    @property
    def factor(self) -> int:
        return self.config.side

    @property
    def latent_channels(self) -> int:
        return len(self.matrix)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        blocks = F.pixel_unshuffle(x, self.factor)
        mean = torch.einsum("ij,bjhw->bihw", self.matrix, blocks) * self.scale + self.shift
        return mean, torch.full_like(mean, self.config.spread)

    def decode(self, z: Tensor) -> Tensor:
        blocks = torch.einsum("ji,bjhw->bihw", self.matrix, (z - self.shift) / self.scale)
        return F.pixel_shuffle(blocks, self.factor)


if Path(sys.argv[0]).parent.name == "patchdiffusion":  # a command that imports the file
    families.add(Network, LinearCodec)


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[None]:
    """The codec is a network within a module of tests that imports this."""
    families.add(Network, LinearCodec)
    yield
    families.remove(Network, LinearCodec)


def save_codec(folder: Path, *, seed: int = 0, channels: int = 3, **changes: object) -> Path:
    """The model folder of a linear codec."""
    config = LinearCodec(channels=channels, **changes)  # pyright: ignore[reportArgumentType]
    model = ModelConfig(
        network=config,  # pyright: ignore[reportArgumentType]
        head=AutoencoderHead(),
        precond=EDM(),
        noise=LogNormal(),
        canvas=(8, 8),
    )
    state = config.build(seed=seed).state_dict()
    save_model(folder, model, state, state)
    return folder
