"""LEGO bricks: a stack of networks, most of which only see small regions (arXiv 2310.06389).

Every brick predicts what the whole stack predicts, from the noisy image and the output of the brick
below: F_1 = G_1(x, m), F_k = G_k(F_(k-1), x, m), with m the canvas coordinates of every pixel. G_k
cuts its input into regions and maps each by the same network. Written from the description of the
paper; weights of its authors are loaded by `interop.lego`.

Shapes: B batch, C image channels, n spatial axes, *S their lengths, E size of the embedding.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets.base import Network, put
from patchdiffusion.nets.count import macs_of
from patchdiffusion.nets.embed import Embedding, LateEmbedding, whole_canvas
from patchdiffusion.nets.layers import pad_to_multiple
from patchdiffusion.nets.legobody import RegionNetwork, Regions
from patchdiffusion.nets.legoshape import LegoShape
from patchdiffusion.nets.legosizes import SIZES
from patchdiffusion.nets.tiling import Tiling, tiling
from patchdiffusion.patches import Size
from patchdiffusion.rng import bernoulli, subkeys


@dataclass(frozen=True, kw_only=True)
class LegoConfig(LegoShape):
    """LEGO bricks, each of which predicts the image; the defaults suit a CPU: 2.6M parameters."""

    word: ClassVar[str] = "lego"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = SIZES

    def build(self, *, seed: int = 0) -> "Lego":
        if 0 in self.regions and not self.canvas:
            raise ValueError(
                "regions has a 0, which the size of images decides: use for_canvas, or give sides"
            )
        return Lego(self, seed=seed)


class Brick(nn.Module):
    """A network of regions, applied to every region of images of any size.

    At the start all bricks return zero.
    """

    def __init__(self, body: RegionNetwork, name: str):
        super().__init__()
        self.body, self.name = body, name

    def forward(
        self,
        x: Tensor,
        below: Tensor | None,
        pos: Tensor,
        emb: Tensor,
        where: Tiling,
        key: Tensor | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        """x and the output below [B, C, *S], coordinates [B or 1, n, *S], emb [B, E] -> [B, C, *S].

        `where` says where the regions lie.
        """
        regions = self.cut(x, below, pos, emb, where, key, tape)
        return where.merge(self.body(regions))

    def cut(
        self,
        x: Tensor,
        below: Tensor | None,
        pos: Tensor,
        emb: Tensor,
        where: Tiling,
        key: Tensor | None = None,
        tape: Tape | None = None,
    ) -> Regions:
        """The input of its body; see `forward`."""
        z = None if below is None else where.cut(below)
        return Regions(where.cut(x), z, where.cut(pos), emb, where.grid, key, tape, self.name)


class Lego(Network[LegoConfig]):
    """A stack of bricks; its output is that of the last one.

    On the tape are the output of each brick as `bricks.<k>`, [B, C, *S], and the tokens (or feature
    maps) of each block as `bricks.<k>.<block>`.
    """

    def __init__(self, config: LegoConfig, *, seed: int = 0):
        super().__init__(config)
        width, classes, augment = config.width, config.num_classes, config.augment_dim
        if config.embedding == "late":
            self.embed = LateEmbedding(width, classes, augment, jump=config.jump)
        else:
            self.embed = Embedding(width // 4, "positional", classes, augment, jump=config.jump)
        self.bricks = nn.ModuleList(
            Brick(config.body.build(config.outline(k)), f"bricks.{k}")
            for k in range(len(config.regions))
        )
        self.init(seed)

    @property
    def num_bricks(self) -> int:
        """Number of bricks."""
        return len(self.bricks)

    @property
    def needs_first(self) -> bool:
        """True if the others were never trained without the output of the first brick."""
        return not self.config.brick_dropout

    @property
    def taps(self) -> tuple[str, ...]:
        names = ((f"bricks.{k}", brick.body.taps) for k, brick in enumerate(self._bricks()))
        return tuple(tap for name, taps in names for tap in (*(f"{name}.{t}" for t in taps), name))

    def units(self) -> list[nn.Module]:
        return [unit for brick in self._bricks() for unit in brick.body.units()]

    def _bricks(self) -> list[Brick]:
        return [brick for brick in self.bricks if isinstance(brick, Brick)]

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        """x [B, C, *S], noise [B] -> [B, C, *S]; no dropout unless `cond.seed` is given.

        Raises `ValueError` if the channels of x or the shape of cond.pos [B, n, *S] do not fit.
        """
        return self.run(x, noise, cond, tape=tape)[-1]

    def run(
        self,
        x: Tensor,
        noise: Tensor,
        cond: Cond,
        *,
        bricks: Collection[int] | None = None,
        offsets: Sequence[tuple[int, ...]] | None = None,
        tape: Tape | None = None,
    ) -> list[Tensor]:
        """Outputs [B, C, *S] of some bricks, by default all, in order.

        A brick above one that is left out is given the output of the one below that, zero if there
        is none. `offsets` are the first pixels of the regions of each brick, multiples of its
        patch: a border then has a full region of its own, which overlaps with the next one and of
        which only the part is used that no other region covers.

        Raises `ValueError` for bricks and offsets that there are not, and if the first brick is
        left out of a network that was trained without `brick_dropout`.
        """
        chosen = self._chosen(bricks)
        padded, pos = self._padded(x, cond)
        size = tuple(x.shape[2:])
        emb, where = self.embed(noise, cond), self._tilings(size, offsets)
        below = torch.zeros_like(padded)
        outputs = []
        for k in chosen:
            brick = self._bricks()[k]
            out = brick(
                padded, below if k else None, pos, emb, where[k], self._dropout_key(cond), tape
            )
            outputs.append(put(tape, f"bricks.{k}", _cropped(out, size)))
            below = self._passed(out, below, cond, k)
        return outputs

    def _chosen(self, bricks: Collection[int] | None) -> list[int]:
        count = self.num_bricks
        chosen = list(range(count)) if bricks is None else sorted(set(bricks))
        if not chosen or not 0 <= chosen[0] <= chosen[-1] < count:
            raise ValueError(f"bricks must be some of 0 to {count - 1}, not {sorted(bricks or ())}")
        if chosen[0] and not self.config.brick_dropout:
            raise ValueError(
                f"bricks must have the first one, 0, not start at {chosen[0]}: the others were "
                "never without it, since network.brick_dropout is 0"
            )
        return chosen

    def _padded(self, x: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Image and coordinates, with sides that are multiples of all patches."""
        self.check_shapes(x, cond)
        pos = whole_canvas(x) if cond.pos is None else cond.pos
        multiple = (math.lcm(*self.config.patches),) * self.config.axes
        return pad_to_multiple(x, multiple), pad_to_multiple(pos, multiple)

    def _tilings(
        self, size: Size, offsets: Sequence[tuple[int, ...]] | None = None
    ) -> list[Tiling]:
        """Places of the regions of each brick in images of a size."""
        multiple = math.lcm(*self.config.patches)
        size = tuple(-(-side // multiple) * multiple for side in size)
        if offsets is None:
            offsets = [(0,) * len(size)] * self.num_bricks
        if len(offsets) != self.num_bricks:
            raise ValueError(
                f"offsets must be one for each of {self.num_bricks} bricks, not {len(offsets)}"
            )
        parts = zip(self.config.brick_regions(size), offsets, self.config.patches, strict=True)
        return [tiling(size, region, offset, patch) for region, offset, patch in parts]

    def _dropout_key(self, cond: Cond) -> Tensor | None:
        return cond.seed if self.config.dropout > 0 else None

    def _passed(self, out: Tensor, below: Tensor, cond: Cond, k: int) -> Tensor:
        """The input of the next brick: the output of this one, unless it is dropped."""
        drop = self.config.brick_dropout
        if cond.seed is None or not drop or k == self.num_bricks - 1:
            return out
        dropped = bernoulli(subkeys(cond.seed, f"brick {k}"), drop)
        return torch.where(dropped.view(-1, *(1,) * (out.ndim - 1)), below.to(out.dtype), out)

    def features(self, x: Tensor, noise: Tensor, cond: Cond) -> Tensor:
        """Deep features of the last brick: [B, places, F]."""
        padded, pos = self._padded(x, cond)
        emb, where = self.embed(noise, cond), self._tilings(tuple(x.shape[2:]))
        below, key = torch.zeros_like(padded), self._dropout_key(cond)
        *others, last = self._bricks()
        for k, brick in enumerate(others):
            out = brick(padded, below if k else None, pos, emb, where[k], key)
            below = self._passed(out, below, cond, k)
        regions = last.cut(padded, below if others else None, pos, emb, where[-1], key)
        return last.body.features(regions).flatten(1, 2)

    def remove_head(self) -> None:
        self._bricks()[-1].body.remove_head()

    def macs_of_bricks(self, size: int | Size) -> tuple[int, ...]:
        """Multiply-accumulates of each brick for one image; the first has those of the embedding.

        Their sum is `count(network, size).macs`.
        """
        axes = self.config.axes
        sides = (size,) * axes if isinstance(size, int) else size
        multiple = math.lcm(*self.config.patches)
        padded = tuple(-(-side // multiple) * multiple for side in sides)
        x = torch.empty(1, self.config.channels, *padded, device="meta")
        pos = torch.empty(1, axes, *padded, device="meta")
        emb = torch.empty(1, self.config.width, device="meta")
        noise = torch.empty(1, device="meta")
        costs = [
            macs_of(brick, x, x if k else None, pos, emb, where)
            for k, (brick, where) in enumerate(
                zip(self._bricks(), self._tilings(sides), strict=True)
            )
        ]
        return (costs[0] + macs_of(self.embed, noise, Cond()), *costs[1:])


def _cropped(x: Tensor, size: Size) -> Tensor:
    return x[(..., *(slice(side) for side in size))]
