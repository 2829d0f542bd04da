"""Bodies of LEGO bricks: networks of regions, their contract and the transformer.

A body maps regions to regions of the same size, and nothing but what is in a region, its place and
the condition reaches its output. Any other network of regions may join the union `legoshape.Body`.

Shapes: B batch, P regions of an image, C image channels, n spatial axes, *R sides of a region,
T tokens of a region, D features of a token, E size of the embedding.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.cond import Tape
from patchdiffusion.nets.base import Role
from patchdiffusion.nets.embed import whole_canvas
from patchdiffusion.nets.layers import Linear
from patchdiffusion.nets.tokenblock import Around, MlpKind, NormKind, TokenBlock, modulated
from patchdiffusion.nets.tokens import (
    centers,
    fold,
    grid_positions,
    position_features,
    rotation,
    table_features,
    unfold,
)
from patchdiffusion.patches import Size
from patchdiffusion.rng import subkeys
from patchdiffusion.system.device import full_precision

Positions = Literal["region", "coordinates", "rope"]


class Regions(NamedTuple):
    """The regions of a batch of images, and all that a body may depend on."""

    x: Tensor
    """[B, P, C, *R], the noisy image."""
    below: Tensor | None
    """[B, P, C, *R], the output of the previous brick; None for the first one."""
    pos: Tensor
    """float32 [B or 1, P, n, *R], coordinates on the canvas, x first."""
    emb: Tensor
    """[B, E], noise level and conditions."""
    grid: Size
    """Number of regions along each axis; their product is P."""
    key: Tensor | None = None
    """int64 [B], keys of the dropout; None is none."""
    tape: Tape | None = None
    name: str = ""
    """Name of the brick on the tape."""
    context: Tensor | None = None
    """[B, T', D'], tokens of a condition."""
    mask: Tensor | None = None
    """bool [B, T'], the tokens of the condition that count."""

    @property
    def sides(self) -> Size:
        """Sides of a region, R."""
        return tuple(self.x.shape[3:])

    def keys(self, part: str) -> Tensor | None:
        """Keys of the dropout of a part of the body."""
        return None if self.key is None else subkeys(self.key, f"{self.name}.{part}")

    def record(self, part: str, maps: Tensor, tokens: bool = False) -> None:
        """Put feature maps of the regions, [B P, D, ...], on the tape as those of the image.

        They are [B, D, ...] there, or, as tokens, [B, all tokens, D] in the order of the image;
        of regions that overlap, all are there.
        """
        name = f"{self.name}.{part}"
        if self.tape is None:
            return
        if self.tape.takes(name):
            sides = tuple(maps.shape[2:])
            maps = fold(maps.flatten(1).unflatten(0, (-1, math.prod(self.grid))), self.grid, sides)
            maps = maps.flatten(2).mT if tokens else maps
        self.tape.put(name, maps)


@dataclass(frozen=True)
class Outline:
    """The sizes of a brick that its body is built for."""

    channels: int
    """Channels of the image."""
    axes: int
    patch: int
    """Sides of the patches that are embedded first."""
    depth: int
    width: int
    """Features of the embedding, and of tokens."""
    heads: int
    mlp_ratio: int
    dropout: float
    is_first: bool
    """True if there is no brick below it."""
    context: int = 0
    """Features of the tokens of a condition that it attends to; 0 is none."""

    @property
    def patches(self) -> Size:
        """Sides of a patch along each axis."""
        return (self.patch,) * self.axes

    @property
    def pixels(self) -> int:
        """Pixels of a patch."""
        return self.patch**self.axes


class RegionNetwork(nn.Module, ABC):
    """Base of bodies: regions to features, features to regions."""

    taps: tuple[str, ...] = ()
    """Names of what it puts on the tape, behind that of the brick."""

    @abstractmethod
    def features(self, regions: Regions) -> Tensor:
        """Deep features, before the head: [B, P, T, D]."""

    @abstractmethod
    def finish(self, h: Tensor, regions: Regions) -> Tensor:
        """The output from these features: [B, P, C, *R]."""

    @abstractmethod
    def remove_head(self) -> None:
        """Remove the parts that `features` does not use."""

    def units(self) -> list[nn.Module]:
        """The blocks, which are compiled and sharded one by one; by default none."""
        return []

    def forward(self, regions: Regions) -> Tensor:
        return self.finish(self.features(regions), regions)


class BodyConfig(ABC):
    """Base of the records of bodies."""

    @abstractmethod
    def check(self, outline: Outline) -> None:
        """Raise `ValueError` for a brick that it does not fit."""

    @abstractmethod
    def build(self, outline: Outline) -> RegionNetwork:
        """The network of regions of a brick."""


# ---- The first layer, which all bodies share ----


class BrickStem(nn.Module):
    """Embedding of patches of the image, of the previous brick's output, and of the coordinates.

    Equal to one layer on the concatenated channels, but coordinates are never rounded to low
    precision, and weights of a network without the other inputs fit.
    """

    role: ClassVar[Role] = "stem"
    uncalled: ClassVar[tuple[str, ...]] = ("coordinates",)

    def __init__(self, outline: Outline, width: int):
        super().__init__()
        inputs = outline.channels * outline.pixels
        self.patches = outline.patches
        self.image = Linear(inputs, width)
        self.below = None if outline.is_first else Linear(inputs, width, bias=False)
        self.coordinates = Linear(outline.axes * outline.pixels, width, bias=False)

    def forward(self, regions: Regions) -> Tensor:
        """Regions with sides that are multiples of the patch -> [B, P, T, D]."""
        h = self.image(self._cut(regions.x))
        if self.below is not None and regions.below is not None:
            h = h + self.below(self._cut(regions.below))
        return h + self._exact(self._cut(regions.pos))

    def _cut(self, x: Tensor) -> Tensor:
        """[B, P, C, *R] -> [B, P, T, C pixels]."""
        return unfold(x.flatten(0, 1), self.patches).unflatten(0, x.shape[:2])

    def _exact(self, pos: Tensor) -> Tensor:
        # Fast "float32" products of GPUs (TF32) keep 11 bits: a coarse part and a remainder.
        with full_precision(pos):
            weight = self.coordinates.weight
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            pos = pos.to(weight.dtype)
            coarse = torch.round(pos * 128) / 128
            return F.linear(torch.cat([coarse, pos - coarse], dim=-1), weight.repeat(1, 2))


# ---- Transformers ----


@dataclass(frozen=True, kw_only=True)
class TransformerBody(BodyConfig):
    """Blocks of DiT whose attention stays within a region."""

    word: ClassVar[str] = "transformer"

    positions: Positions = "region"
    """region: the published table of positions inside of the region; coordinates: features of the
    canvas coordinates; rope: coordinates, and queries and keys are rotated by them as well."""
    norm: NormKind = "layer"
    """layer norm or rms norm, without parameters, before attention and MLP."""
    mlp: MlpKind = "gelu"
    """gelu, or swiglu: with a gate and 2/3 of the hidden features."""
    qk_norm: bool = False
    """True if queries and keys are normalized."""

    def __post_init__(self) -> None:
        for name, kind in {"positions": Positions, "norm": NormKind, "mlp": MlpKind}.items():
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")

    def check(self, outline: Outline) -> None:
        width, heads, axes = outline.width, outline.heads, outline.axes
        if width % 8 or width % heads:
            raise ValueError(f"width must be a multiple of 8 and of heads ({heads}), not {width}")
        head = width // heads
        if self.positions == "rope" and (head % 2 or head < 2 * axes):
            raise ValueError(
                f"width / heads must be even and at least {2 * axes} for positions rope, not "
                f"{head}; use fewer heads"
            )

    def build(self, outline: Outline) -> "RegionTransformer":
        return RegionTransformer(self, outline)


class RegionTransformer(RegionNetwork):
    """A transformer of the tokens of a region: stem, blocks, head, all of them as in DiT.

    Shifts, scales and gates are computed once for an image, and are those of all its regions.
    """

    modulates: ClassVar[dict[str, tuple[str, ...]]] = {"out_modulation": ("shift", "scale")}

    def __init__(self, config: TransformerBody, outline: Outline):
        super().__init__()
        self.config, self.patches = config, outline.patches
        self.width = width = outline.width
        self.head_features = width // outline.heads
        self.stem = BrickStem(outline, width)
        self.blocks = nn.ModuleList(
            TokenBlock(
                width,
                outline.heads,
                outline.mlp_ratio,
                drop=outline.dropout,
                norm=config.norm,
                mlp=config.mlp,
                qk_norm=config.qk_norm,
                context=outline.context,
            )
            for _ in range(outline.depth)
        )
        self.out_modulation = Linear(width, 2 * width, scale=0.0, role="modulation")
        self.head = Linear(width, outline.channels * outline.pixels, scale=0.0, role="head")
        self.taps = tuple(f"blocks.{i}" for i in range(outline.depth))

    def units(self) -> list[nn.Module]:
        return list(self.blocks)

    def remove_head(self) -> None:
        del self.out_modulation, self.head

    def features(self, regions: Regions) -> Tensor:
        h = self.stem(regions) + self._places(regions)  # [B, P, T, D]
        emb = regions.emb[:, None, None]
        around = Around(turn=self._turn(regions), context=regions.context, mask=regions.mask)
        for i, block in enumerate(self.blocks):
            h = block(h, emb, regions.keys(f"blocks.{i}"), around).h
            regions.record(f"blocks.{i}", self._maps(h, regions), tokens=True)
        return h

    def finish(self, h: Tensor, regions: Regions) -> Tensor:
        emb = regions.emb[:, None, None]
        with full_precision(emb):
            shift, scale = self.out_modulation(emb).chunk(2, dim=-1)
        h = self.head(modulated(h, shift, scale, self.config.norm))
        out = fold(h.flatten(0, 1), self._tokens(regions), self.patches)
        return out.unflatten(0, h.shape[:2])

    def _tokens(self, regions: Regions) -> Size:
        """Tokens of a region along each axis."""
        return tuple(side // p for side, p in zip(regions.sides, self.patches, strict=True))

    def _maps(self, h: Tensor, regions: Regions) -> Tensor:
        """[B, P, T, D] -> [B P, D, *tokens of a region]."""
        return h.flatten(0, 1).mT.unflatten(-1, self._tokens(regions))

    def _places(self, regions: Regions) -> Tensor:
        """Features of the places of tokens: float32 [1 or B, 1 or P, T, D]."""
        if self.config.positions == "region":
            region = whole_canvas(regions.x[:1, 0])
            return table_features(
                centers(grid_positions(region, self.patches), self.patches), self.width
            )
        pos = regions.pos
        features = position_features(centers(pos.flatten(0, 1), self.patches), self.width)
        return features.unflatten(0, pos.shape[:2])

    def _turn(self, regions: Regions) -> Tensor | None:
        if self.config.positions != "rope":
            return None
        pos = regions.pos.expand(len(regions.x), *regions.pos.shape[1:]).flatten(0, 1)
        return rotation(centers(pos, self.patches), self.head_features)
