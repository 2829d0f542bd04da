"""LEGO bricks: a stack of networks, most of which only see small regions (arXiv 2310.06389).

Every brick predicts what the whole stack predicts, from the noisy image and the output of the brick
below: F_1 = G_1(x, m), F_k = G_k(F_(k-1), x, m), with m the canvas coordinates of every pixel. G_k
cuts its input into regions and maps each by the same network. Written from the description of the
paper; weights of its authors are loaded by `interop.lego`.

Shapes: B batch, C image channels, n spatial axes, *S their lengths, E size of the embedding.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets.base import Network, put
from patchdiffusion.nets.count import macs_of_call
from patchdiffusion.nets.cuts import Cut, Kept, Passage, within
from patchdiffusion.nets.embed import Embedding, LateEmbedding, switches_of, whole_canvas
from patchdiffusion.nets.layers import pad_to_multiple
from patchdiffusion.nets.legobody import RegionNetwork, Regions
from patchdiffusion.nets.legoshape import LegoShape
from patchdiffusion.nets.legosizes import SIZES
from patchdiffusion.nets.text import described
from patchdiffusion.nets.tiling import Tiling
from patchdiffusion.nets.tokens import context_of
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

    def forward(self, inputs: "Inputs") -> Tensor:
        """The output of the brick: [B, C, *S]."""
        return inputs.where.merge(self.body(self.cut(inputs)))

    def cut(self, inputs: "Inputs") -> Regions:
        """The input of its body."""
        x, below, pos, emb, where, key, tape, context, mask = inputs
        z = None if below is None else where.cut(below)
        return Regions(
            where.cut(x), z, where.cut(pos), emb, where.grid, key, tape, self.name, context, mask
        )


class Inputs(NamedTuple):
    """All that a brick depends on."""

    x: Tensor
    """[B, C, *S], the noisy image."""
    below: Tensor | None
    """[B, C, *S], the output of the brick below; None for the first one."""
    pos: Tensor
    """[B or 1, n, *S], coordinates on the canvas."""
    emb: Tensor
    """[B, E], noise level and conditions."""
    where: Tiling
    """Places of its regions."""
    key: Tensor | None = None
    """int64 [B], keys of the dropout; None is none."""
    tape: Tape | None = None
    context: Tensor | None = None
    """[B, T', D'], tokens of a condition."""
    mask: Tensor | None = None
    """bool [B, T'], the tokens of the condition that count."""


class Lego(Network[LegoConfig]):
    """A stack of bricks; its output is that of the last one.

    On the tape are the output of each brick as `bricks.<k>`, [B, C, *S], and the tokens (or feature
    maps) of each block as `bricks.<k>.<block>`.
    """

    def __init__(self, config: LegoConfig, *, seed: int = 0):
        super().__init__(config)
        width, classes, augment = config.width, config.num_classes, config.augment_dim
        switches = switches_of(config)
        if config.embedding == "late":
            self.embed = LateEmbedding(width, classes, augment, **switches)
        else:
            self.embed = Embedding(width // 4, "positional", classes, augment, **switches)
        self.text = config.text.build()
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
        tape: Tape | None = None,
    ) -> list[Tensor]:
        """Outputs [B, C, *S] of some bricks, by default all, in order.

        A brick above one that is left out is given the output of the one below that, zero if there
        is none. Raises `ValueError` for bricks that there are not, and if the first one is left out
        of a network that was trained without `brick_dropout`.
        """
        chosen, inputs = self._chosen(bricks), self._inputs(x, noise, cond, tape)
        below = torch.zeros_like(inputs[0].x)
        outputs = []
        for k in chosen:
            out = self._bricks()[k](inputs[k]._replace(below=below if k else None))
            outputs.append(put(tape, f"bricks.{k}", _cropped(out, tuple(x.shape[2:]))))
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

    def _inputs(
        self, x: Tensor, noise: Tensor, cond: Cond, tape: Tape | None = None
    ) -> list[Inputs]:
        """The inputs of every brick but for the output below, padded to multiples of patches."""
        self.check_shapes(x, cond)
        pos = whole_canvas(x) if cond.pos is None else cond.pos
        multiple = (math.lcm(*self.config.patches),) * self.config.axes
        x, pos = pad_to_multiple(x, multiple), pad_to_multiple(pos, multiple)
        key = cond.seed if self.config.dropout > 0 else None
        emb = self.embed(noise, cond)
        context, mask = self._context(cond, emb)
        return [
            Inputs(x, None, pos, emb, where, key, tape, context, mask)
            for where in self._tilings(tuple(x.shape[2:]))
        ]

    def _context(self, cond: Cond, emb: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Tokens of the condition and their mask, after one that means that there are none."""
        cond = described(self.text, cond, emb.shape[0], emb.device, self.config.perturb)
        return context_of(cond, self.config.attends, emb)

    def _tilings(self, size: Size) -> list[Tiling]:
        """Places of the regions of each brick in padded images of a size."""
        return [Tiling(size, region) for region in self.config.brick_regions(size)]

    def _passed(self, out: Tensor, below: Tensor, cond: Cond, k: int) -> Tensor:
        """The input of the next brick: the output of this one, unless it is dropped."""
        drop = self.config.brick_dropout
        if cond.seed is None or not drop or k == self.num_bricks - 1:
            return out
        dropped = bernoulli(subkeys(cond.seed, f"brick {k}"), drop)
        return torch.where(dropped.view(-1, *(1,) * (out.ndim - 1)), below.to(out.dtype), out)

    def cut(self, first: int | None = None, last: int | None = None) -> Cut:
        """So many bricks at the start and at the end, by default all but the costliest one.

        What is kept is the change that the bricks between them make to the output.
        """
        count, axes = self.num_bricks, self.config.axes
        if count < 2:
            raise ValueError("this network has a single brick, of which nothing can be kept")
        costs = zip(self.config.depths, self.config.patches, strict=True)
        tokens = [depth / patch**axes for depth, patch in costs]
        costliest = max(range(count), key=lambda k: (tokens[k], k))
        if first is None:
            first = costliest if last is None else count - 1 - last
        if last is None:
            last = count - 1 - max(first, costliest)
        first = within("first", first, 0, count - 1, f"of {count} bricks")
        last = within("last", last, 0, count - 1 - first, f"of {count} bricks")
        if not first + last:
            raise ValueError(f"first and last must leave out some of the {count} bricks, not all")
        return Cut(first, last)

    def opened(
        self, x: Tensor, noise: Tensor, cond: Cond, cut: Cut, *, tape: Tape | None = None
    ) -> Passage:
        inputs, size = self._inputs(x, noise, cond, tape), tuple(x.shape[2:])
        end = self.num_bricks - cut.last

        def run(below: Tensor, start: int, stop: int) -> Tensor:
            for k in range(start, stop):
                out = self._bricks()[k](inputs[k]._replace(below=below if k else None))
                put(tape, f"bricks.{k}", _cropped(out, size))
                below = self._passed(out, below, cond, k)
            return below

        shallow = run(torch.zeros_like(inputs[0].x), 0, cut.first)

        def full() -> tuple[Tensor, Kept]:
            deep = run(shallow, cut.first, end)
            return _cropped(run(deep, end, self.num_bricks), size), (deep - shallow,)

        def reuse(kept: Kept) -> Tensor:
            return _cropped(run(shallow + kept[0], end, self.num_bricks), size)

        return Passage(shallow, full, reuse)

    def features(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        """Deep features of the last brick: [B, places, F]."""
        inputs, *others = self._inputs(x, noise, cond, tape)
        for k, (brick, above) in enumerate(zip(self._bricks()[:-1], others, strict=True)):
            below = torch.zeros_like(inputs.x) if inputs.below is None else inputs.below
            inputs = above._replace(below=self._passed(brick(inputs), below, cond, k))
        last = self._bricks()[-1]
        return last.body.features(last.cut(inputs)).flatten(1, 2)

    def remove_head(self) -> None:
        self._bricks()[-1].body.remove_head()

    def macs_of_bricks(self, size: int | Size) -> tuple[int, ...]:
        """Multiply-accumulates of each brick for one image; the first has those of the embedding.

        Their sum is `count(network, size).macs`.
        """
        sides = (size,) * self.config.axes if isinstance(size, int) else size
        images = (
            torch.empty(1, self.config.channels, *sides, device="meta"),
            torch.empty(1, device="meta"),
        )

        def shared(x: Tensor, noise: Tensor) -> list[Inputs]:
            return self._inputs(x, noise, Cond())

        def through(k: int, x: Tensor, noise: Tensor) -> Tensor:
            inputs = shared(x, noise)[k]
            return self._bricks()[k](inputs._replace(below=inputs.x if k else None))

        rest = macs_of_call(self, shared, *images)
        costs = [
            macs_of_call(self, partial(through, k), *images) - rest for k in range(self.num_bricks)
        ]
        return (costs[0] + rest, *costs[1:])


def _cropped(x: Tensor, size: Size) -> Tensor:
    return x[(..., *(slice(side) for side in size))]
