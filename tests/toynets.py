"""Toys of networks and of parts of them; `toys.py` makes them members of their families."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.encoders import discriminator, perceptual
from patchdiffusion.nets import legobody, routing, text
from patchdiffusion.nets.base import Network, NetworkConfig
from patchdiffusion.nets.layers import Conv, Linear
from patchdiffusion.nets.tokens import fold


@dataclass(frozen=True, kw_only=True)
class ToyNet(NetworkConfig):
    """One convolution, moved by a number about the image."""

    kernel: int = 3

    @property
    def reads(self) -> frozenset[str]:
        return super().reads | {"extra"}

    def build(self, *, seed: int = 0) -> "OneConvolution":
        return OneConvolution(self).init(seed)


class OneConvolution(Network[ToyNet]):
    """The whole of a toy network."""

    def __init__(self, config: ToyNet):
        super().__init__(config)
        self.conv = Conv(config.channels, config.channels, config.kernel)
        self.conv.role = "conv"  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        moved = 0.0 if cond.extra is None else cond.extra.mean(1).reshape(-1, 1, 1, 1)
        return self.conv(x) + moved

    def units(self) -> list[nn.Module]:
        return [self.conv]


@dataclass(frozen=True, kw_only=True)
class ToyTokens(routing.Route):
    """Some tokens skip the last block."""

    def blocks(self, depth: int) -> range:
        return range(depth - 1, depth)


@dataclass(frozen=True, kw_only=True)
class ToyText(text.TextConfig):
    """A vector for each byte."""

    width: int = 8

    @property
    def features(self) -> int:
        return self.width

    def build(self, *, keeps_magnitude: bool = False) -> "Letters":
        return Letters(self.width)


class Letters(nn.Module):
    """The vectors of the bytes of a text."""

    def __init__(self, width: int):
        super().__init__()
        self.table = text.ByteTable(width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.table(tokens), tokens != 0


@dataclass(frozen=True, kw_only=True)
class ToyBody(legobody.BodyConfig):
    """One layer, from patches to patches."""

    gain: float = 1.0

    def check(self, outline: legobody.Outline) -> None:
        """Fits all bricks."""

    def build(self, outline: legobody.Outline) -> "OneLayer":
        return OneLayer(self.gain, outline)


class OneLayer(legobody.RegionNetwork):
    """The patches of a region, one by one."""

    def __init__(self, gain: float, outline: legobody.Outline):
        super().__init__()
        self.gain, self.patches = gain, outline.patches
        self.stem = legobody.BrickStem(outline, outline.width)
        outputs = outline.channels * outline.pixels
        self.head = Linear(outline.width, outputs, scale=0.0, role="head")

    def features(self, regions: legobody.Regions) -> Tensor:
        return self.stem(regions) * self.gain + regions.emb[:, None, None]

    def finish(self, h: Tensor, regions: legobody.Regions) -> Tensor:
        grid = tuple(a // b for a, b in zip(regions.sides, self.patches, strict=True))
        return fold(self.head(h).flatten(0, 1), grid, self.patches).unflatten(0, h.shape[:2])

    def remove_head(self) -> None:
        del self.head


@dataclass(frozen=True, kw_only=True)
class ToyDistance(perceptual.PerceptualConfig):
    """Difference in brightness."""

    def build(self, teachers: Sequence[Denoiser], device: torch.device) -> perceptual.Distance:
        return lambda x, y: (x - y).flatten(1).mean(1).abs()


@dataclass(frozen=True, kw_only=True)
class ToyAdversary(discriminator.AdversaryConfig):
    """Judges every pixel by its color."""

    width: int = 4

    def network(self, channels: int) -> nn.Module:
        return nn.Sequential(Conv(channels, self.width, 1), nn.ReLU(), Conv(self.width, 1, 1))
