"""DiT: a transformer over patches (Peebles & Xie, ICCV 2023, arXiv 2212.09748), for any axes.

Patches become tokens, blocks of self-attention follow, tokens become patches. Sines and cosines of
the canvas coordinates of its center are added to each token, which conditions the network on the
position of a crop of any size. Parts of newer transformers are switches. Written from the papers.

Shapes: B batch, C image channels, n spatial axes, *S their lengths, T tokens, D features of a
token, E size of the embedding.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets.base import Network, put
from patchdiffusion.nets.controlbranch import TokenBranch, added_to, additions, copied, hints_of
from patchdiffusion.nets.cuts import Cut, Encoding, Passage
from patchdiffusion.nets.ditblocks import block_of, record, stem_of
from patchdiffusion.nets.ditshape import DiTShape
from patchdiffusion.nets.ditsizes import MODERN, SIZES, jit, patch_for
from patchdiffusion.nets.embed import Embedding, LateEmbedding, switches_of, whole_canvas
from patchdiffusion.nets.experts import place_features
from patchdiffusion.nets.gates import percentiles
from patchdiffusion.nets.layers import Linear, pad_to_multiple
from patchdiffusion.nets.picture import picture_of, pooled, shifted
from patchdiffusion.nets.stages import Merge, Split
from patchdiffusion.nets.text import described
from patchdiffusion.nets.tokenblock import Around, BlockOut, Registers, for_tokens, modulated
from patchdiffusion.nets.tokencuts import cut_of, encoder_blocks, passage
from patchdiffusion.nets.tokens import (
    AttentionMemory,
    Tokens,
    centers,
    fold,
    grid_positions,
    of_tokens,
    pixels_of,
    position_features,
    registered,
    rotation,
    table_features,
    unfold,
    with_context,
)
from patchdiffusion.nets.upcycle import upcycled
from patchdiffusion.patches import Size
from patchdiffusion.rng import subkeys
from patchdiffusion.system.device import full_precision


@dataclass(frozen=True, kw_only=True)
class DiTConfig(DiTShape):
    """A transformer over patches (DiT); the defaults suit a CPU: 1.9M parameters."""

    word: ClassVar[str] = "dit"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = SIZES

    def for_canvas(self, canvas: Size) -> Self:
        """A copy with a side of the patch for each axis; 0 is chosen, see `ditsizes.patch_for`."""
        if not any(self.patch):
            return replace(self, patch=patch_for(canvas, 4 if self.bottleneck else 2))
        if len(self.patch) == 1 < len(canvas):
            return replace(self, patch=self.patch * len(canvas))
        return self

    def suits(self, config: Any) -> Mapping[str, Any]:
        """With a bottleneck the recipe of JiT, see `ditsizes.jit`."""
        denoises = hasattr(config.objective, "weighting")
        return jit(self.width) if self.bottleneck and denoises else {}

    def build(self, *, seed: int = 0) -> "DiT":
        return DiT(self.for_canvas((32,) * self.axes), seed=seed)


def for_canvas(canvas: Size, **changes: object) -> DiTConfig:
    """Modern one for a CPU and any axes: 6 to 11 tokens along the last two, half along more."""
    sides = [2 if length > 1 else 1 for length in canvas[:-2]]
    sides += [max(2, 2 ** round(math.log2(length / 8))) for length in canvas[-2:]]
    return replace(DiTConfig(patch=tuple(sides), **MODERN), **changes)


class DiT(Network[DiTConfig]):
    """DiT with adaLN-zero blocks: at the start every block is the identity, the output zero.

    `start`, `run` and `finish` may be called one by one, for caches, for blocks of other networks
    and for a part of the tokens, see `Tokens`.
    """

    modulates: ClassVar[Mapping[str, tuple[str, ...]]] = {"out_modulation": ("shift", "scale")}

    def __init__(self, config: DiTConfig, *, seed: int = 0):
        super().__init__(config)
        width, pixels = config.width, math.prod(config.patch)
        classes, augment = config.num_classes, config.augment_dim
        switches = switches_of(config)
        if config.embedding != "early":
            last = 127 if config.embedding == "diffusers" else 128
            self.embed = LateEmbedding(width, classes, augment, **switches, last=last)
        else:
            self.embed = Embedding(width // 4, "positional", classes, augment, **switches)
        self.text = config.text.build()
        self.stem = stem_of(config.channels * pixels, config.bottleneck, width)
        self.picture = self.pooled_extra = None
        if config.image_channels:
            inputs = config.image_channels * pixels
            self.picture = Linear(inputs, width, bias=False, neutral=True, role="stem")
        if config.extra_dim:
            self.pooled_extra = Linear(
                config.extra_dim, width, bias=False, neutral=True, role="embedding"
            )
        self.registers = Registers(config.registers, width) if config.registers else None
        self.modulation = (
            Linear(width, 6 * width, scale=0.0, role="modulation")
            if config.modulation == "shared"
            else None
        )
        self.blocks = nn.ModuleList(block_of(config, i) for i in range(config.depth))
        self.gates = config.task_routing.build([width] * config.depth)
        self.merge = Merge(width, config.axes) if config.half_blocks else None
        self.split = Split(width, config.axes) if config.half_blocks else None
        self.stage = config.tokens.build(width, config.depth)
        self.summary = config.self_condition.build(width, width, config.axes)
        self.out_modulation = Linear(width, 2 * width, scale=0.0, role="modulation")
        outputs = config.channels * pixels * (2 if config.learned_variance else 1)
        self.head = Linear(width, outputs, scale=0.0, role="head")
        self.init(seed)

    @property
    def taps(self) -> tuple[str, ...]:
        return ("stem", *(f"blocks.{i}" for i in range(self.config.depth)))

    def units(self) -> list[nn.Module]:
        return [*self.blocks, *(self.gates.units() if self.gates is not None else ())]

    @property
    def expert_taps(self) -> tuple[str, ...]:
        with_experts = (i for i, block in enumerate(self.blocks) if block.experts is not None)
        return tuple(f"blocks.{i}.experts" for i in with_experts)

    def adopted(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights of another transformer; MLPs are copied into the experts of this one."""
        return upcycled(self.config, weights) if self.expert_taps else weights

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        """x [B, C, *S], noise [B] -> [B, C, *S]; no dropout unless `cond.seed` is given.

        Noise may also be a map [B, 1, *S], of which each token reads the mean over its patch.

        Raises `ValueError` if the channels of x, the shape of cond.pos [B, n, *S] or the features
        of cond.context do not fit.
        """
        return self.finish(self.run(self.start(x, noise, cond, tape=tape), cond, tape=tape))

    def counted(self, cond: Cond, size: Size) -> Tensor | None:
        if self.stage is None or cond.seed is None or not self.config.masks:
            return None
        kept = self.stage.choose(cond.seed, self.config.num_tokens(size))
        return pixels_of(kept, self.config.patch, size)

    def features(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        """Deep features, after the last block: [B, T, D]."""
        return self.run(self.start(x, noise, cond, tape=tape), cond, tape=tape).h

    def remove_head(self) -> None:
        del self.out_modulation, self.head

    def start(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tokens:
        """Tokens of an image, padded to multiples of the patch by repeating the last pixels."""
        self.check_shapes(x, cond)
        patch, size, width = self.config.patch, tuple(x.shape[2:]), self.config.width
        coordinates = whole_canvas(x) if cond.pos is None else cond.pos
        picture = None
        if self.picture is not None:
            picture = picture_of(self.config, x, cond)
            x = shifted(self.config, x, picture)
        x, pos = pad_to_multiple(x, patch), centers(pad_to_multiple(coordinates, patch), patch)
        grid = tuple(side // p for side, p in zip(x.shape[2:], patch, strict=True))
        if self.config.positions == "sincos":
            table = pad_to_multiple(grid_positions(coordinates, patch), patch)
            places = table_features(centers(table, patch), width)
        else:
            places = position_features(pos, width)
        # Coordinates are float32, and with them all features between blocks.
        h = self.stem(unfold(x, patch))
        if self.picture is not None and picture is not None:
            h = h + self.picture(unfold(pad_to_multiple(picture, patch), patch))
        h = put(tape, "stem", h + places)
        tokens = Tokens(h, self._embedded(noise, cond), grid, size, pos.expand(x.shape[0], -1, -1))
        tokens = tokens._replace(hints=hints_of(self.controls, cond, x.shape[0], size, places))
        if self.registers is not None:
            tokens = tokens._replace(registers=self.registers.weight.expand(x.shape[0], -1, -1))
        cond = described(self.text, cond, x.shape[0], x.device, self.config.perturb)
        return with_context(tokens, cond, self.config.attends)

    def _embedded(self, noise: Tensor, cond: Cond) -> Tensor:
        """Noise [B], or a map [B, 1, *S] -> [B, E], or [B, T, E]."""
        if noise.ndim == 1:
            return pooled(self.pooled_extra, self.embed(noise, cond), cond)
        levels = unfold(pad_to_multiple(noise, self.config.patch), self.config.patch).mean(-1)
        each = of_tokens(cond, levels.shape[1])
        emb = pooled(self.pooled_extra, self.embed(levels.flatten(), each), each)
        return emb.unflatten(0, levels.shape)

    def run(
        self,
        tokens: Tokens,
        cond: Cond,
        first: int = 0,
        last: int | None = None,
        *,
        tape: Tape | None = None,
    ) -> Tokens:
        """Apply the blocks first ... last - 1, by default all.

        Of `cond` they read only the seed and the percentile.

        Tokens may be a part of those of the image in any order, outside the stage of half
        resolution. Registers are not on the tape, nor tokens that skip a block in training.
        """
        if self.gates is not None and first == 0 and tape is not None and torch.is_grad_enabled():
            self.gates.put_losses(tape, percentiles(cond, tokens.h))
        for blocks in self._stretches(first, self.config.depth if last is None else last):
            if self.merge is not None and blocks[0] == self.config.half[0]:
                tokens = self.merge(tokens)
            if self.split is not None and blocks[0] == self.config.half[-1] + 1:
                tokens = self.split(tokens)._replace(summary=tokens.summary)
            if self.stage is not None and blocks.start == self.stage.blocks.start:
                tokens = self.stage.enter(tokens, cond.seed)
            tokens = self._run(tokens, blocks, cond, tape)
            if self.summary is not None and blocks.stop == self._pooled_after:
                places = tokens.pos if tokens.outer is None else tokens.outer.pos
                tokens = tokens._replace(summary=self.summary(tokens.h, places))
            if self.stage is not None and blocks.stop == self.stage.blocks.stop:
                tokens = self.stage.leave(tokens, cond.seed)._replace(summary=tokens.summary)
        return tokens

    def _stretches(self, first: int, last: int) -> Iterator[range]:
        """The blocks first ... last - 1, in parts of the same tokens."""
        part = self.config.half if self.stage is None else self.stage.blocks
        cuts = {c for c in (part.start, part.stop) if part and first < c < last}
        if first < self._pooled_after < last:
            cuts.add(self._pooled_after)
        for start, stop in itertools.pairwise([first, *sorted(cuts), last]):
            if start < stop:
                yield range(start, stop)

    @property
    def _pooled_after(self) -> int:
        return self.config.self_condition.after(self.config.depth)

    def _conditioned(self, tokens: Tokens) -> Tensor:
        """The embedding that blocks see, with the summary of earlier features if there is one."""
        if self.summary is None:
            return tokens.emb
        return self.summary.conditioned(tokens.emb, tokens.summary)

    def _run(self, tokens: Tokens, blocks: range, cond: Cond, tape: Tape | None) -> Tokens:
        values, config = tokens.values, self.config
        emb = self._conditioned(tokens)
        if self.modulation is not None:
            with full_precision(emb):
                emb = self.modulation(emb)
        h, emb, count = registered(tokens, emb)
        around = Around(context=tokens.context, mask=tokens.context_mask)
        if config.positions == "rope":
            turn = rotation(tokens.pos, config.width // config.heads, count)
            around = around._replace(turn=turn)
        if self.config.experts.chooses:
            around = around._replace(places=place_features(tokens.pos, count))
        gates = None if self.gates is None else self.gates.begin(percentiles(cond, h))

        def step(i: int, block: nn.Module, h: Tensor, values: Tensor | None, name: str) -> BlockOut:
            key = None
            if cond.seed is not None and config.dropout > 0:
                key = subkeys(cond.seed, name)  # hashed outside: one compiled block serves all
            attended = None if tokens.memory is None else partial(tokens.memory.attend, i)
            now = around._replace(values=values, attended=attended)
            if self.gates is None:
                return block(h, emb, key, now)
            gate = self.gates(i, h, gates)
            out = block(gate * h, emb, key, now)
            return out._replace(h=out.h + (1 - gate) * h)

        added = tokens.added
        for i in blocks:
            name = f"blocks.{i}"
            if 0 < i <= len(added):
                h = added_to(h, added[i - 1])
            out = step(i, self.blocks[i], h, values, name)
            h, values = out.h, values if out.values is None else out.values
            if i == 0 and tokens.hints:
                added = additions(self.controls, tokens.hints, h, step)
            if out.routed is not None and tape is not None:
                record(config.experts, f"{name}.experts", out.routed, count, tape)
            put(tape, name, h[:, count:])
        registers = None if tokens.registers is None else h[:, :count]
        tokens = tokens._replace(hints=(), added=added)
        return tokens._replace(h=h[:, count:], registers=registers, values=values)

    def control_branch(self, blocks: int = 0) -> TokenBranch:
        config, fresh = self.config, self.config.build()
        count = copied(blocks, min([config.depth, *config.half[:1]]), config.depth)
        parts = fresh.stem, list(fresh.blocks)[:count]
        return TokenBranch(*parts, config.width, config.patch, config.channels)

    def cut(self, first: int | None = None, last: int | None = None) -> Cut:
        """So many blocks at the start and at the end, by default a quarter of them each.

        The first block gives its values to others and is never left out; a stage of fewer tokens is
        left out as a whole, or not at all.
        """
        return cut_of(self.config.depth, self._fewer, first, last)

    def opened(
        self, x: Tensor, noise: Tensor, cond: Cond, cut: Cut, *, tape: Tape | None = None
    ) -> Passage:
        tokens = self.start(x, noise, cond, tape=tape)
        return passage(self, tokens, cond, (cut.first, self.config.depth - cut.last), tape)

    def encoder_blocks(self, blocks: int | None = None) -> int:
        """Number of blocks of the encoder, by default 9 of 14, as 18 of 28 in Faster Diffusion."""
        return encoder_blocks(self.config.depth, self._fewer, blocks)

    def encoded(
        self, x: Tensor, noise: Tensor, cond: Cond, blocks: int, *, tape: Tape | None = None
    ) -> Encoding:
        tokens = self.run(self.start(x, noise, cond, tape=tape), cond, 0, blocks, tape=tape)

        def decode(noise: Tensor, cond: Cond) -> Tensor:
            several = tokens.repeated(noise.shape[0])._replace(emb=self._embedded(noise, cond))
            return self.finish(self.run(several, cond, blocks))

        return Encoding((tokens.h,), decode)

    @property
    def _fewer(self) -> range:
        """Blocks of a stage of fewer tokens, with the one before which these are split again."""
        half = self.config.half
        if half:
            return range(half.start, half.stop + 1)
        return range(0) if self.stage is None else self.stage.blocks

    def finish(self, tokens: Tokens, *, variance: bool = False) -> Tensor:
        """The output of the network from the last tokens: [B, C, *S].

        With `variance`, the channels of the variance follow. Raises `ValueError` unless there is a
        token for every patch.
        """
        if not tokens.is_whole:
            raise ValueError(
                f"the output needs {math.prod(tokens.grid)} tokens, not {tokens.h.shape[1]}; put "
                "selected ones back by Tokens.scatter"
            )
        x = fold(self._patches(tokens), tokens.grid, self.config.patch)
        x = x[(..., *(slice(side) for side in tokens.size))]
        return x if variance else x[:, : self.config.channels]

    def _patches(self, tokens: Tokens) -> Tensor:
        """The output at the patches of tokens, with the channels of the variance."""
        with full_precision(tokens.emb):
            shift, scale = for_tokens(self.out_modulation(tokens.emb)).chunk(2, dim=-1)
        return self.head(modulated(tokens.h, shift, scale, self.config.norm))

    def check_some(self) -> None:
        """Raise `ValueError` if some of the tokens cannot be computed without the others."""
        if self.controls:
            raise ValueError("a branch controls the network, and needs all of its tokens")
        if self.config.half:
            raise ValueError(
                "network.half_blocks merges neighboring tokens, so that none can be left out"
            )
        if self.config.experts.needs_all_tokens:
            raise ValueError(
                "network.experts choice compares the tokens of an image, so that none can be left "
                "out"
            )

    def some(
        self,
        x: Tensor,
        noise: Tensor,
        cond: Cond,
        *,
        index: Tensor | None = None,
        memory: AttentionMemory | None = None,
    ) -> Tensor:
        tokens = self.start(x, noise, cond)._replace(memory=memory)
        if memory is not None:
            memory.index = None if index is None else tokens.with_registers(index)
        if index is not None:
            tokens = tokens.select(index)
        patches = self._patches(self.run(tokens, cond))
        return patches[..., : self.config.channels * math.prod(self.config.patch)]
