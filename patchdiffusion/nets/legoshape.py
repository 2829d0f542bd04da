"""Shapes of LEGO bricks: regions, patches and depths of each, and what all of them share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self, get_args

from patchdiffusion.nets.base import NetworkConfig
from patchdiffusion.nets.legobody import Outline, TransformerBody
from patchdiffusion.nets.legounet import UNetBody
from patchdiffusion.nets.text import ContextShape
from patchdiffusion.patches import Size, size_name

Body = TransformerBody | UNetBody
"""The networks of regions of `--network.body`."""


@dataclass(frozen=True, kw_only=True)
class LegoShape(ContextShape):
    """Base of the configuration of LEGO bricks: its fields, and what follows from them."""

    perturbs: ClassVar[bool] = True
    learns_concepts: ClassVar[bool] = True

    regions: tuple[int, ...] = (4, 8, 0)
    """Sides of the regions that each brick works in, from the first brick to the last; 0 is the
    whole canvas."""
    patches: tuple[int, ...] = (2, 4, 2)
    """Sides of the patches that become tokens, one number for each brick."""
    depths: tuple[int, ...] = (2, 2, 4)
    """Number of blocks of each brick."""
    width: int = 128
    """Features of a token and of the embedding; a multiple of 8 and of heads."""
    heads: int = 4
    """Attention heads."""
    mlp_ratio: int = 4
    """Hidden features of the MLPs in units of the width."""
    body: Body = field(default_factory=TransformerBody)
    """Network that is applied to each region."""
    embedding: Literal["early", "late"] = "late"
    """Classes are added to the noise features before two layers (early, as in EDM) or after them
    (late, as in DiT and LEGO)."""
    brick_dropout: float = 0.0
    """Probability, for each image and each brick but the last, that the bricks above see the output
    of the brick below it instead; with it, the first brick can be skipped in sampling."""
    canvas: tuple[int, ...] = ()
    """Sides of the images, which regions of 0 have; taken from the data."""
    dimensions: int = 2
    """Number of spatial axes of the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.limit("width", 16, 16384)
        self.limit("heads", 1, 256)
        self.limit("mlp_ratio", 1, 64)
        self.limit("dimensions", 1, 4)
        if self.embedding not in get_args(Literal["early", "late"]):
            raise ValueError(f"embedding must be early or late, not {self.embedding!r}")
        if not 0 <= self.brick_dropout < 1:
            raise ValueError(f"brick_dropout must lie in [0, 1), not {self.brick_dropout}")
        lengths = {name: len(getattr(self, name)) for name in ("regions", "patches", "depths")}
        if len(set(lengths.values())) > 1 or not 1 <= len(self.regions) <= 32:
            listed = ", ".join(f"{name} {count}" for name, count in lengths.items())
            raise ValueError(
                f"regions, patches and depths must have one number for each of 1 to 32 bricks, not "
                f"{listed}"
            )
        for name, least, most in (("regions", 0, 65536), ("patches", 1, 256), ("depths", 1, 256)):
            if any(not least <= value <= most for value in getattr(self, name)):
                raise ValueError(
                    f"{name} must lie in [{least}, {most}], not {list(getattr(self, name))}"
                )
        for region, patch in zip(self.regions, self.patches, strict=True):
            if region % patch:
                raise ValueError(
                    f"regions must be multiples of their patches, and {region} is none of {patch}; "
                    f"the nearest is {max(1, round(region / patch)) * patch}"
                )
        if self.canvas and len(self.canvas) != self.dimensions:
            raise ValueError(f"canvas must have {self.dimensions} sides, not {self.canvas}")
        for index in range(len(self.regions)):
            self.body.check(self.outline(index))

    def outline(self, index: int) -> Outline:
        """The sizes of a brick."""
        return Outline(
            channels=self.channels,
            axes=self.dimensions,
            patch=self.patches[index],
            depth=self.depths[index],
            width=self.width,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            dropout=self.dropout,
            is_first=index == 0,
            context=self.attends,
        )

    def inherit(self, old: NetworkConfig, config: object) -> Self:
        """A copy with the contract's fields and the number of axes of the network it replaces."""
        return replace(super().inherit(old, config), dimensions=old.axes)

    def for_canvas(self, canvas: Size) -> Self:
        """A copy that knows the canvas, which regions of 0 have; one that knows it stays.

        Raises `ValueError` for a region that does not divide the canvas.
        """
        if self.canvas or len(canvas) != self.dimensions:
            return self
        for region, patch in zip(self.regions, self.patches, strict=True):
            for side in canvas:
                if side % (min(region, side) if region else patch) or side % patch:
                    fits = [n for n in range(patch, side + 1, patch) if side % n == 0]
                    listed = ", ".join(map(str, fits)) or "none, use a smaller patch"
                    raise ValueError(
                        f"regions must divide the canvas {size_name(canvas)}, and {region or side} "
                        f"of patches of {patch} does not; allowed for a side of {side}: {listed}"
                    )
        return replace(self, canvas=canvas)

    @property
    def axes(self) -> int:
        return self.dimensions

    @property
    def divisor(self) -> int:
        """Least common multiple of the patches and of the regions smaller than the canvas."""
        most = min(self.canvas, default=math.inf if 0 in self.regions else max(self.regions))
        local = [r for r in self.regions if 0 < r < most]
        return math.lcm(*self.patches, *local)

    @property
    def reads(self) -> frozenset[str]:
        seed = {"seed"} if self.brick_dropout else set()
        return super().reads | {"pos"} | seed

    def suits(self, config: Any) -> Mapping[str, Any]:
        """The loss of all bricks, in place of denoising by the last one."""
        return {"objective": "bricks"} if hasattr(config.objective, "log_variance") else {}

    @property
    def exits(self) -> Mapping[str, str]:
        return {f"brick {k + 1}": f"bricks.{k}" for k in range(len(self.regions) - 1)}

    def brick_regions(self, size: Size) -> tuple[Size, ...]:
        """Sides of the regions that each brick works in, for images of a size."""
        sizes = []
        for region in self.regions:
            sides = (region,) * self.dimensions if region else self.canvas or size
            sizes.append(tuple(min(a, b) for a, b in zip(sides, size, strict=True)))
        return tuple(sizes)
