"""The fields of a transformer over patches, and what follows from them without building one."""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self, get_args

from patchdiffusion.nets.base import NetworkConfig
from patchdiffusion.nets.experts import MlpExperts, MlpShape, NoExperts
from patchdiffusion.nets.gates import NoTaskRouting
from patchdiffusion.nets.routing import AllTokens, Routing
from patchdiffusion.nets.selfcondition import NoSelfConditioning, SelfCondition
from patchdiffusion.nets.taskrouting import TaskRouting
from patchdiffusion.nets.text import ContextShape
from patchdiffusion.nets.tokenblock import MlpKind, ModulationKind, NormKind, hidden_features
from patchdiffusion.patches import Size

Positions = Literal["coordinates", "sincos", "rope"]
EmbeddingPlace = Literal["early", "late", "diffusers"]


@dataclass(frozen=True, kw_only=True)
class DiTShape(ContextShape):
    """Base of the configuration of DiT: its fields, their limits, and what follows from them."""

    pictures: ClassVar[bool] = True
    perturbs: ClassVar[bool] = True
    learns_concepts: ClassVar[bool] = True

    patch: tuple[int, ...] = (0, 0)
    """Sides of the patches that become tokens: one for each axis of the data, 2 2 for images, or
    one for all axes; 0 chooses about a 16th of the image (without one, of 32 pixels), from 2, with
    a bottleneck from 4, to 32."""
    width: int = 128
    """Features of a token; a multiple of 8 and of heads."""
    depth: int = 6
    """Number of blocks."""
    heads: int = 4
    """Attention heads."""
    mlp_ratio: int = 4
    """Hidden features of the MLPs in units of the width."""
    mlp: MlpKind = "gelu"
    """gelu, or swiglu: with a gate and 2/3 of the hidden features, so about as many parameters."""
    norm: NormKind = "layer"
    """layer norm or rms norm, without parameters, before attention and MLP."""
    qk_norm: bool = False
    """True if queries and keys are normalized, which keeps long training in low precision
    stable."""
    positions: Positions = "coordinates"
    """coordinates: features of the canvas coordinates; sincos: those of the published table, in
    tokens; rope: coordinates, and queries and keys are rotated by them as well."""
    embedding: EmbeddingPlace = "early"
    """Classes are added to the noise features before two layers (early, as in EDM) or after them
    (late, as in DiT; diffusers: the same with the frequencies of its DiTTransformer2DModel)."""
    modulation: ModulationKind = "full"
    """Shifts, scales and gates of each block: a full matrix, one that all blocks share with an
    offset for each, or one of low rank."""
    registers: int = 0
    """Learned tokens without a place, which all others attend to."""
    value_residual: bool = False
    """True if values of later attentions are mixed with those of the first one."""
    bottleneck: int = 0
    """Features between the pixels of a patch and its token, as in JiT, whose parameterisation and
    noise law the network then brings; 0 is none."""
    half_blocks: int = 0
    """Blocks in the middle of the depth that work at half resolution, on a quarter of the
    tokens."""
    tokens: Routing = field(default_factory=AllTokens)
    """Tokens that pass through all blocks in training, which is cheaper with fewer of them."""
    self_condition: SelfCondition = field(default_factory=NoSelfConditioning)
    """Pooled features of the network itself that condition its later blocks (DDAE++)."""
    task_routing: TaskRouting = field(default_factory=NoTaskRouting)
    """Features that blocks see at a noise level: all, a share (DTR), or by experts (Switch-DiT)."""
    experts: MlpExperts = field(default_factory=NoExperts)
    """MLPs of each block, of which every token uses a few."""
    learned_variance: bool = False
    """True if there are output channels for a variance, which is not used; for published
    weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.limit("width", 16, 16384)
        self.limit("depth", 1, 256)
        self.limit("heads", 1, 256)
        self.limit("mlp_ratio", 1, 64)
        self.limit("registers", 0, 1024)
        self.limit("bottleneck", 0, 16384)
        kinds = {"mlp": MlpKind, "norm": NormKind, "positions": Positions}
        kinds |= {"embedding": EmbeddingPlace, "modulation": ModulationKind}
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        sides_fit = all(1 <= side <= 256 for side in self.patch) or not any(self.patch)
        if not 1 <= len(self.patch) <= 4 or not sides_fit:
            raise ValueError(f"patch must be 1 to 4 sides in [1, 256], or all 0, not {self.patch}")
        if self.width % 8 or self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of 8 and of heads ({self.heads}), not {self.width}"
            )
        head = self.width // self.heads
        if self.positions == "rope" and (head % 2 or head < 2 * self.axes):
            raise ValueError(
                f"width / heads must be even and at least {2 * self.axes} for positions rope, not "
                f"{head}; use fewer heads"
            )
        if not 0 <= self.half_blocks <= self.depth - 2 * (self.half_blocks > 0) or (
            self.half_blocks and (self.depth - self.half_blocks) % 2
        ):
            raise ValueError(
                f"half_blocks must leave an even number of the {self.depth} blocks, at least 2, "
                f"not {self.half_blocks}"
            )
        self.tokens.check(self.depth, self.half_blocks)
        if (hidden := self.mlp_shape.hidden) and self.experts.hidden(hidden) < 1:
            raise ValueError(
                f"experts must have hidden features, and {hidden} of the MLP are divided among too "
                "many; use a wider network, or experts.size"
            )
        self.self_condition.after(self.depth)

    def inherit(self, old: NetworkConfig, config: object) -> Self:
        """A copy with the contract's fields and, for equal sides of the patch, the axes of old."""
        new = super().inherit(old, config)
        if len(self.patch) == old.axes or len(set(self.patch)) > 1:
            return new
        return replace(new, patch=self.patch[:1] * old.axes)

    @property
    def token_size(self) -> Size:
        return self.patch

    @property
    def axes(self) -> int:
        return len(self.patch)

    @property
    def divisor(self) -> int:
        if not any(self.patch):
            return 1
        return math.lcm(*self.patch) * (2 if self.half_blocks else 1)

    @property
    def reads(self) -> frozenset[str]:
        seed = {"seed"} if self.tokens.is_random else set()
        return super().reads | {"pos"} | seed | self.task_routing.reads

    @property
    def mlp_shape(self) -> MlpShape:
        """Shape of the MLP of a block."""
        hidden = hidden_features(self.width, self.mlp_ratio, self.mlp)
        return MlpShape(self.width, hidden, self.mlp == "swiglu", self.axes)

    @property
    def smooth_in_noise(self) -> bool:
        return not (self.experts.chooses or self.task_routing.reads)

    @property
    def masks(self) -> bool:
        return self.tokens.masks

    @property
    def noise_patch(self) -> tuple[int, ...] | None:
        return None if self.task_routing.reads else self.patch

    @property
    def half(self) -> range:
        """Numbers of the blocks at half resolution."""
        start = (self.depth - self.half_blocks) // 2
        return range(start, start + self.half_blocks)
