"""Shapes of U-Nets: what the configurations of DDPM++, ADM and EDM2 share."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from patchdiffusion.nets.base import NetworkConfig
from patchdiffusion.nets.gates import NoTaskRouting
from patchdiffusion.nets.layers import Resample
from patchdiffusion.nets.selfcondition import NoSelfConditioning, SelfCondition
from patchdiffusion.nets.taskrouting import TaskRouting
from patchdiffusion.system import families


@dataclass(frozen=True)
class BlockPosition:
    """Position of a block in a U-Net."""

    half: str
    """enc, mid or dec."""
    level: int
    part: str
    """down, up, or the number of the block within its level."""
    last: bool = False
    """True for the last block of its level."""

    @property
    def resample(self) -> Resample:
        """Kind of resampling inside the block."""
        return "down" if self.part == "down" else "up" if self.part == "up" else "none"


@dataclass(frozen=True, kw_only=True)
class UNetShape(NetworkConfig):
    """Base of the configurations of U-Nets: levels, widths, attention and coordinates."""

    pictures: ClassVar[bool] = True
    perturbs: ClassVar[bool] = True
    gated: ClassVar[bool] = False
    """True if its blocks can be gated by the noise level."""

    base: int = 128
    """Features at a multiplier of 1; a multiple of 4."""
    mult: tuple[int, ...] = (1, 2, 2, 2)
    """Features of each level in units of base, from full resolution down."""
    blocks: int = 4
    """Residual blocks per level."""
    attention: tuple[int, ...] = (2,)
    """Levels with self-attention, whatever the size of the input; 0 is full resolution."""
    coordinates: bool = True
    """True if the network is conditioned on the canvas coordinates of every pixel."""
    fourier_features: int = 0
    """Number of frequencies of sines and cosines of the coordinates; 0 is the coordinates."""
    self_condition: SelfCondition = field(default_factory=NoSelfConditioning)
    """Pooled features for later blocks (DDAE++)."""
    task_routing: TaskRouting = field(default_factory=NoTaskRouting)
    """Features that blocks see."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_routing.reads and not (self.gated and self.task_routing.in_unets):
            word, rule = families.word(type(self)), families.word(type(self.task_routing))
            allowed = "none or dtr" if self.gated else "none"
            raise ValueError(f"task_routing must be {allowed} for {word}, not {rule}")
        self.limit("blocks", 1, 64)
        self.limit("fourier_features", 0, 16)
        if not 4 <= self.base <= 4096 or self.base % 4:
            raise ValueError(f"base must be a multiple of 4 in [4, 4096], not {self.base}")
        if not 1 <= len(self.mult) <= 12 or not all(1 <= m <= 64 for m in self.mult):
            raise ValueError(f"mult must be 1 to 12 integers in [1, 64], not {self.mult}")
        if any(not 0 <= level < self.levels for level in self.attention):
            raise ValueError(
                f"attention must be levels in [0, {self.levels - 1}], not {self.attention}"
            )

        block = getattr(self.self_condition, "block", 0)
        if block:
            raise ValueError(
                f"self_condition.block must be 0 for a U-Net, whose middle is pooled, not {block}"
            )

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.mult)

    @property
    def widths(self) -> list[int]:
        """Features of each level, from full resolution down."""
        return [self.base * m for m in self.mult]

    @property
    def position_channels(self) -> int:
        """Number of coordinate channels."""
        return (4 * self.fourier_features or 2) if self.coordinates else 0

    @property
    def divisor(self) -> int:
        return 2 ** (self.levels - 1)

    @property
    def reads(self) -> frozenset[str]:
        pos = {"pos"} if self.coordinates else set()
        return super().reads | pos | self.task_routing.reads


@dataclass(frozen=True, kw_only=True)
class HeadedShape(UNetShape):
    """Base of U-Nets that attend in every block of a level, by heads of equal width."""

    head_width: int = 64
    """Features of an attention head; a divisor of the features of every level with attention."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.limit("head_width", 4, 4096)
        attending = {*self.attention, self.levels - 1}  # the middle attends, too
        common = math.gcd(*(self.widths[level] for level in attending))
        if common % self.head_width:
            fits = next(n for n in range(min(self.head_width, common), 0, -1) if common % n == 0)
            widths = ", ".join(str(self.widths[level]) for level in sorted(attending))
            raise ValueError(
                f"head_width must divide the features of levels with attention, {widths}, "
                f"not be {self.head_width}; type --network.head-width {fits}"
            )

    def heads(self, position: BlockPosition, width: int) -> int:
        """Number of attention heads of a block, 0 for none."""
        attends = {
            "enc": position.part != "down" and position.level in self.attention,
            "mid": not position.last,
            "dec": position.part != "up" and position.level in self.attention,
        }[position.half]
        return width // self.head_width if attends else 0
