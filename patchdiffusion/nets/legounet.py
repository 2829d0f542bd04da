"""Bodies of LEGO bricks that are small U-Nets of each region.

Shapes: B batch, P regions of an image, T patches of a region, F features of level 0.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from patchdiffusion.nets.attention import Attention
from patchdiffusion.nets.fused import join
from patchdiffusion.nets.layers import Block, Conv, Norm
from patchdiffusion.nets.legobody import BodyConfig, BrickStem, Outline, RegionNetwork, Regions
from patchdiffusion.nets.levels import decoder, encoder, middle
from patchdiffusion.nets.shapes import BlockPosition
from patchdiffusion.nets.tokens import fold
from patchdiffusion.rng import bits


@dataclass(frozen=True, kw_only=True)
class UNetBody(BodyConfig):
    """A small U-Net of each region, for images; depths are its blocks per level."""

    word: ClassVar[str] = "unet"

    base: int = 32
    """Features at a multiplier of 1; a multiple of 4."""
    mult: tuple[int, ...] = (1, 2)
    """Features of each level in units of base, from patches of pixels down."""

    def __post_init__(self) -> None:
        if not 4 <= self.base <= 4096 or self.base % 4:
            raise ValueError(f"base must be a multiple of 4 in [4, 4096], not {self.base}")
        if not 1 <= len(self.mult) <= 8 or not all(1 <= m <= 64 for m in self.mult):
            raise ValueError(f"mult must be 1 to 8 integers in [1, 64], not {self.mult}")

    def check(self, outline: Outline) -> None:
        if outline.axes != 2:
            raise ValueError(
                f"body unet is for images of 2 axes, not {outline.axes}; use body transformer"
            )
        if outline.context:
            raise ValueError("body unet reads no texts and no context; use body transformer")

    def build(self, outline: Outline) -> "RegionUNet":
        return RegionUNet(self, outline)


class RegionUNet(RegionNetwork):
    """A U-Net of the patches of a region, with attention at its lowest level.

    Nothing crosses the border of a region: convolutions see zeros there.
    """

    def __init__(self, config: UNetBody, outline: Outline):
        super().__init__()
        self.patches, self.drop = outline.patches, outline.dropout
        widths = [config.base * m for m in config.mult]

        def block(position: BlockPosition, cin: int, cout: int) -> Block:
            attends = position.half == "mid" and not position.last
            return Block(
                cin,
                cout,
                outline.width,
                resample=position.resample,
                drop=outline.dropout,
                attention=Attention(cout) if attends else None,
            )

        self.stem = BrickStem(outline, config.base)
        self.enc, skips = encoder(config.base, widths, outline.depth, block)
        self.mid = middle(widths[-1], len(widths) - 1, block)
        self.dec = decoder(widths, skips, outline.depth, block)
        self.out_norm = Norm(widths[0])
        self.out_conv = Conv(widths[0], outline.channels * outline.pixels, scale=0.0, role="head")
        enc = [f"enc.{i}.{part}" for i, stage in enumerate(self.enc) for part, _ in _parts(stage)]
        levels = reversed(list(enumerate(self.dec)))
        dec = [f"dec.{i}.{part}" for i, stage in levels for part, _ in _parts(stage)]
        self.taps = (*enc, *(f"mid.{part}" for part, _ in _parts(self.mid)), *dec)

    def units(self) -> list[nn.Module]:
        return [block for stage in (*self.enc, self.mid, *self.dec) for block in stage.children()]

    def remove_head(self) -> None:
        del self.out_norm, self.out_conv

    def features(self, regions: Regions) -> Tensor:
        tokens = self.stem(regions).flatten(0, 1).mT
        grid = tuple(side // p for side, p in zip(regions.sides, self.patches, strict=True))
        h = tokens.unflatten(-1, grid)
        skips, sizes = [h], []
        for level, stage in enumerate(self.enc):
            for part, block in _parts(stage):
                h = self._run(f"enc.{level}.{part}", block, h, regions)
                skips.append(h)
            sizes.append((h.shape[-2], h.shape[-1]))
        for part, block in _parts(self.mid):
            h = self._run(f"mid.{part}", block, h, regions)
        for level, stage in reversed(list(enumerate(self.dec))):
            for part, block in _parts(stage):
                h = h if part == "up" else join(h, skips.pop())
                h = self._run(f"dec.{level}.{part}", block, h, regions, sizes[level])
        return h.flatten(2).mT.unflatten(0, regions.x.shape[:2])

    def finish(self, h: Tensor, regions: Regions) -> Tensor:
        grid = tuple(side // p for side, p in zip(regions.sides, self.patches, strict=True))
        maps = self.out_conv(self.out_norm(h.flatten(0, 1).mT.unflatten(-1, grid), silu=True))
        return fold(maps.flatten(2).mT, grid, self.patches).unflatten(0, h.shape[:2])

    def _run(
        self,
        name: str,
        block: nn.Module,
        h: Tensor,
        regions: Regions,
        size: tuple[int, int] = (0, 0),
    ) -> Tensor:
        count = math.prod(regions.grid)
        key = regions.keys(name) if self.drop > 0 else None
        if key is not None:
            key = bits(key, count).flatten()  # each region has its own
        h = block(h, regions.emb.repeat_interleave(count, dim=0), key, size)
        regions.record(name, h)
        return h


def _parts(stage: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(stage.named_children())
