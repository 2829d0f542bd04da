"""A transformer over patches: DiT (Peebles & Xie, ICCV 2023, arXiv 2212.09748), for any axes.

Patches become tokens, blocks of self-attention follow, tokens become patches. Sines and cosines of
the canvas coordinates of its center are added to each token, which conditions the network on the
position of a crop of any size. Written from the paper.

Shapes: B batch, C image channels, n spatial axes, *S their lengths, T tokens, D features of a
token, E size of the embedding.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets.attention import TokenAttention
from patchdiffusion.nets.base import Network, NetworkConfig, Role, put
from patchdiffusion.nets.embed import Embedding, whole_canvas
from patchdiffusion.nets.layers import Linear, full_precision, pad_to_multiple
from patchdiffusion.patches import Size
from patchdiffusion.rng import keep_mask, keep_scale, subkeys

FINEST = 64
"""Half periods of the fastest position feature across the canvas; the slowest has one."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(NetworkConfig):
    """A transformer over patches (DiT); the defaults suit a CPU: 1.9M parameters."""

    patch: tuple[int, ...] = (2, 2)
    """Sides of the patches that become tokens, one for each axis of the data: 2 2 for images."""
    width: int = 128
    """Features of a token; a multiple of 8 and of heads."""
    depth: int = 6
    """Number of blocks."""
    heads: int = 4
    """Attention heads."""
    mlp_ratio: int = 4
    """Hidden features of the MLPs in units of the width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.limit("width", 16, 16384)
        self.limit("depth", 1, 256)
        self.limit("heads", 1, 256)
        self.limit("mlp_ratio", 1, 64)
        if not 1 <= len(self.patch) <= 4 or not all(1 <= side <= 256 for side in self.patch):
            raise ValueError(f"patch must be 1 to 4 sides in [1, 256], not {self.patch}")
        if self.width % 8 or self.width % self.heads:
            raise ValueError(f"width must be a multiple of 8 and {self.heads}, not {self.width}")

    @property
    def axes(self) -> int:
        return len(self.patch)

    @property
    def divisor(self) -> int:
        return math.lcm(*self.patch)

    @property
    def reads(self) -> frozenset[str]:
        return super().reads | {"pos"}

    def build(self, *, seed: int = 0) -> "Transformer":
        return Transformer(self, seed=seed)


def tiny(resolution: int = 32, **changes: object) -> TransformerConfig:
    """Configuration for a CPU: 1.9M parameters, at most 16 x 16 tokens at a power of two."""
    patch = max(2, resolution // 16)
    return replace(TransformerConfig(patch=(patch, patch)), **changes)


def for_canvas(canvas: Size, **changes: object) -> TransformerConfig:
    """Configuration for a CPU and any axes: 6 to 11 tokens along the last two, half along more."""
    sides = [2 if length > 1 else 1 for length in canvas[:-2]]
    sides += [max(2, 2 ** round(math.log2(length / 8))) for length in canvas[-2:]]
    return replace(TransformerConfig(patch=tuple(sides)), **changes)


class Tokens(NamedTuple):
    """Input and output of the blocks: tokens, embedding and layout."""

    h: Tensor
    """[B, T, D]."""
    emb: Tensor
    """[B, E], noise level and conditions."""
    grid: tuple[int, ...]
    """Tokens along each axis."""
    size: tuple[int, ...]
    """Lengths of the image along each axis."""


class Transformer(Network[TransformerConfig]):
    """DiT with adaLN-zero blocks: at the start every block is the identity, the output zero.

    `start`, `run` and `finish` may be called one by one, for caches and for blocks of other
    networks.
    """

    def __init__(self, config: TransformerConfig, *, seed: int = 0):
        super().__init__(config)
        width, inner = config.width, config.channels * math.prod(config.patch)
        self.embed = Embedding(
            width // 4, "positional", config.num_classes, config.augment_dim, jump=config.jump
        )
        self.stem = Linear(inner, width, role="stem")
        self.blocks = nn.ModuleList(
            TokenBlock(width, config.heads, config.mlp_ratio * width, drop=config.dropout)
            for _ in range(config.depth)
        )
        self.out_modulation = Linear(width, 2 * width, scale=0.0, role="modulation")
        self.head = Linear(width, inner, scale=0.0, role="head")
        self.init(seed)

    @property
    def taps(self) -> tuple[str, ...]:
        return ("stem", *(f"blocks.{i}" for i in range(self.config.depth)))

    def units(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        """x [B, C, *S], noise [B] -> [B, C, *S]; no dropout unless `cond.seed` is given.

        Raises `ValueError` if the channels of x or the shape of cond.pos [B, n, *S] do not fit.
        """
        return self.finish(self.run(self.start(x, noise, cond, tape=tape), cond, tape=tape))

    def features(self, x: Tensor, noise: Tensor, cond: Cond) -> Tensor:
        """Deep features, after the last block: [B, T, D]."""
        return self.run(self.start(x, noise, cond), cond).h

    def remove_head(self) -> None:
        del self.out_modulation, self.head

    def start(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tokens:
        """Tokens of an image, padded to multiples of the patch by repeating the last pixels."""
        self.check_shapes(x, cond)
        patch, size = self.config.patch, tuple(x.shape[2:])
        pos = whole_canvas(x) if cond.pos is None else cond.pos
        x, pos = pad_to_multiple(x, patch), pad_to_multiple(pos, patch)
        grid = tuple(side // p for side, p in zip(x.shape[2:], patch, strict=True))
        centers = unfold(pos, patch).unflatten(-1, (self.config.axes, -1)).mean(-1)  # [B, T, n]
        # Coordinates are float32, and with them all features between blocks.
        h = self.stem(unfold(x, patch)) + position_features(centers, self.config.width)
        return Tokens(put(tape, "stem", h), self.embed(noise, cond), grid, size)

    def run(self, tokens: Tokens, cond: Cond, *, tape: Tape | None = None) -> Tokens:
        """Apply all blocks; of the condition they read only the seed."""
        h = tokens.h
        for i, block in enumerate(self.blocks):
            name, key = f"blocks.{i}", None
            if cond.seed is not None and self.config.dropout > 0:
                key = subkeys(cond.seed, name)  # hashed outside: one compiled block serves all
            h = put(tape, name, block(h, tokens.emb, key))
        return tokens._replace(h=h)

    def finish(self, tokens: Tokens) -> Tensor:
        """The output of the network from the last tokens: [B, C, *S]."""
        with full_precision(tokens.emb):
            shift, scale = self.out_modulation(tokens.emb)[:, None].chunk(2, dim=-1)
        x = fold(self.head(modulated(tokens.h, shift, scale)), tokens.grid, self.config.patch)
        return x[(..., *(slice(side) for side in tokens.size))]


class TokenBlock(nn.Module):
    """Attention and an MLP, each between a modulated norm and a gate that starts at zero."""

    role: ClassVar[Role] = "mlp"

    def __init__(self, width: int, heads: int, hidden: int, *, drop: float = 0.0):
        super().__init__()
        self.drop = drop
        self.modulation = Linear(width, 6 * width, scale=0.0, role="modulation")
        self.attention = TokenAttention(width, heads)
        self.layer0 = Linear(width, hidden)
        self.layer1 = Linear(hidden, width)

    def forward(self, h: Tensor, emb: Tensor, key: Tensor | None = None) -> Tensor:
        """h [B, T, D], emb [B, E] -> [B, T, D]; `key` int64 [B] are the keys of the dropout."""
        with full_precision(emb):
            parts = self.modulation(emb)[:, None].chunk(6, dim=-1)  # each [B, 1, D]
        shift, scale, gate = parts[:3]
        h = h + gate * self._dropped(self.attention(modulated(h, shift, scale)), key, "attention")
        shift, scale, gate = parts[3:]
        inner = F.gelu(self.layer0(modulated(h, shift, scale)), approximate="tanh")
        return h + gate * self._dropped(self.layer1(inner), key, "mlp")

    def _dropped(self, h: Tensor, key: Tensor | None, name: str) -> Tensor:
        if key is None or self.drop == 0:
            return h
        mask = keep_mask(subkeys(key, name), tuple(h.shape[1:]), self.drop)
        return h * mask * keep_scale(self.drop)


def modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters, then a shift and scale for each sample (adaLN)."""
    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


# ---- Patches and positions ----


def unfold(x: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Cut into patches: [B, C, *S], sides multiples of the patch -> [B, T, C * pixels of a patch].

    Tokens are in the order of their axes, the last one fastest.
    """
    n = len(patch)
    for axis in reversed(range(n)):
        x = x.unflatten(2 + axis, (-1, patch[axis]))  # [B, C, g1, p1, g2, p2, ...]
    grid, inner = range(2, 2 + 2 * n, 2), range(3, 3 + 2 * n, 2)
    return x.permute(0, *grid, 1, *inner).flatten(1 + n).flatten(1, n)


def fold(h: Tensor, grid: tuple[int, ...], patch: tuple[int, ...]) -> Tensor:
    """The inverse of `unfold`: [B, T, C * pixels of a patch] -> [B, C, *S]."""
    n = len(patch)
    x = h.unflatten(-1, (-1, *patch)).unflatten(1, grid)  # [B, g1, g2, ..., C, p1, p2, ...]
    pairs = (axis for i in range(n) for axis in (1 + i, 2 + n + i))
    x = x.permute(0, 1 + n, *pairs)  # [B, C, g1, p1, g2, p2, ...]
    for axis in range(n):
        x = x.flatten(2 + axis, 3 + axis)
    return x


def position_features(pos: Tensor, width: int) -> Tensor:
    """Sines and cosines of canvas coordinates: [B, T, n] in [-1, 1] -> float32 [B, T, width].

    Every axis has width // (2 n) frequencies, evenly spaced in the logarithm from half a period
    across the canvas to `FINEST`; the remaining features are zero.
    """
    count = width // (2 * pos.shape[-1])
    steps = torch.arange(count, device=pos.device, dtype=torch.float32) / max(count - 1, 1)
    angles = pos.float()[..., None] * (math.pi / 2 * FINEST**steps)  # [B, T, n, count]
    features = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(2)
    return F.pad(features, (0, width - features.shape[-1]))
