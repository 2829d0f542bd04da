"""The skip topology of U-Nets: encoder, middle and decoder, for blocks of any kind.

Level l works on images of ceil(H / 2^l) x ceil(W / 2^l); level 0 is full resolution.
Shapes: B batch, C image channels, H and W height and width (any size), F features of a level,
E size of the embedding.
"""

from abc import abstractmethod
from typing import Generic, TypeVar

from torch import Tensor, nn

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets import fused
from patchdiffusion.nets.attention import Attention
from patchdiffusion.nets.base import Network, put
from patchdiffusion.nets.controlbranch import EncoderBranch, joined, maps_for, times
from patchdiffusion.nets.cuts import Cut, Encoding, Kept, Passage, within
from patchdiffusion.nets.embed import fourier_features, whole_canvas
from patchdiffusion.nets.gates import Gates, percentiles
from patchdiffusion.nets.layers import Conv, Linear
from patchdiffusion.nets.levels import Features, skip_widths
from patchdiffusion.nets.picture import picture_of, pooled, shifted
from patchdiffusion.nets.reader import Reader
from patchdiffusion.nets.selfcondition import PooledFeatures
from patchdiffusion.nets.shapes import UNetShape
from patchdiffusion.nets.text import ContextShape, Text, described
from patchdiffusion.nets.tokens import context_of
from patchdiffusion.rng import subkeys

UNetLike = TypeVar("UNetLike", bound=UNetShape)
SideInput = TypeVar("SideInput")
"""Further input of the encoder's levels beside the features, such as an input pyramid."""


class UNet(Network[UNetLike], Generic[UNetLike, SideInput]):
    """A U-Net: stem, encoder, middle, decoder, head; its features pass through `encode`, `decode`.

    A subclass fills `enc`, `mid` and `dec` and writes `embedding`, `begin` and `finish`. On the
    tape are `stem`, `enc.<level>.down`, `enc.<level>.<block>`, `mid.<block>`, `dec.<level>.up` and
    `dec.<level>.<block>`. The same names key the dropout.
    """

    picture: nn.Module | None
    """Convolution of the picture that the network is conditioned on."""
    pooled_extra: Linear | None
    """Layer of the pooled embedding that it is conditioned on."""
    summary: PooledFeatures | None
    """Layers behind the features that condition the decoder."""
    gates: Gates | None
    """Shares of the features that blocks see at a noise level."""
    text: nn.Module | None
    """Text encoder inside the network."""
    readers: nn.ModuleDict | None
    """Attention to the tokens of a condition, by the name of the block before it."""
    enc: nn.ModuleList
    mid: nn.ModuleDict
    dec: nn.ModuleList

    def _add_readers(self) -> None:
        """Let every block with self-attention read the tokens of a condition, if there are any."""
        config = self.config
        self.text = self.readers = None
        if isinstance(config, ContextShape) and config.attends:
            self.text = self.text_encoder(config.text)
            self.readers = nn.ModuleDict()
            for name, block in self._named_blocks():
                reader = self.reader(getattr(block, "attention", None), config.attends)
                if reader is not None:
                    self.readers[name.replace(".", "_")] = reader

    def text_encoder(self, text: Text) -> nn.Module | None:
        """The text encoder inside the network."""
        return text.build()

    def reader(self, attention: nn.Module | None, context: int) -> nn.Module | None:
        """Attention to a condition of so many features, after a block with this self-attention."""
        if not isinstance(attention, Attention):
            return None
        return Reader(attention.proj.out_channels, context)

    def _named_blocks(self) -> list[tuple[str, nn.Module]]:
        """All blocks by their names on the tape."""
        enc = [(f"enc.{level}.{part}", block) for level, part, block in self._down()]
        dec = [(f"dec.{level}.{part}", block) for level, part, block in self._up()]
        return [*enc, *((f"mid.{part}", b) for part, b in _parts(self.mid)), *dec]

    @abstractmethod
    def embedding(self, noise: Tensor, cond: Cond) -> Tensor:
        """Noise level and conditions as one vector: [B, E]."""

    @abstractmethod
    def begin(self, x: Tensor, cond: Cond) -> tuple[Tensor, SideInput]:
        """Features of level 0, and the side input of level 1; `ValueError` for wrong shapes."""

    def add_conditions(self, stem: int, emb: int) -> None:
        """Make the parts for conditions, own features and gates, if there are any.

        The widths are those of the stem and the embedding.
        """
        self._add_readers()
        self.skip_widths = skip_widths(stem, self.config.widths, self.config.blocks)
        config = self.config
        self.summary = config.self_condition.build(config.widths[-1], emb, config.axes)
        self.gates = config.task_routing.build([])
        self.picture = self.pooled_extra = None
        if config.image_channels:
            self.picture = Conv(config.image_channels, stem, bias=False, neutral=True, role="stem")
        if config.extra_dim:
            self.pooled_extra = Linear(
                config.extra_dim, emb, bias=False, neutral=True, role="embedding"
            )

    def pictured(self, picture: Tensor) -> Tensor:
        """Features of level 0 of a picture, which are added to those of the image."""
        assert self.picture is not None
        return self.picture(picture)

    def descend(self, level: int, h: Tensor, side: SideInput) -> tuple[Tensor, SideInput]:
        """Combine the features after down-sampling to a level with the side input, or neither."""
        return h, side

    def join(self, h: Tensor, skip: Tensor) -> Tensor:
        """The features of the decoder with those of the encoder: [B, F, H, W] both."""
        return fused.join(h, skip)

    @abstractmethod
    def finish(self, h: Tensor) -> Tensor:
        """The output of the network from the last features: [B, F, H, W] -> [B, C, H, W]."""

    @property
    def taps(self) -> tuple[str, ...]:
        enc = [f"enc.{level}.{part}" for level, part, _ in self._down()]
        dec = [f"dec.{level}.{part}" for level, part, _ in self._up()]
        return ("stem", *enc, *(f"mid.{part}" for part in self.mid), *dec)

    def units(self) -> list[nn.Module]:
        stages = [*self.enc, *self.dec, self.mid, *([self.readers] if self.readers else [])]
        chosen = {id(block) for stage in stages for block in stage.children()}
        return [module for module in self.modules() if id(module) in chosen]

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        """x [B, C, H, W], noise [B] -> [B, C, H, W]; no dropout unless `cond.seed` is given.

        Raises `ValueError` if the channels of x or the shape of cond.pos [B, 2, H, W] do not fit.
        """
        return self.decode(self.encode(x, noise, cond, tape=tape), cond, tape=tape)

    def encode(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Features:
        """Stem, encoder and middle."""
        features, _ = self._descend(*self._begun(x, noise, cond, tape), cond, tape)
        return self._middle(features, cond, tape)

    def decode(self, features: Features, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        """Decoder and head; of the condition it reads only the seed and the percentile.

        Replace `features.emb` to decode for another noise level.
        """
        return self.finish(self._ascend(features, cond, tape))

    # ---- In parts ----

    def cut(self, first: int | None = None, last: int | None = None) -> Cut:
        """The stem and `first` blocks of the encoder, and the blocks that meet their outputs.

        By default the blocks of full resolution, at most 3. What is kept is the input of the first
        block of the decoder that meets them (DeepCache, arXiv 2312.00858).
        """
        if last is not None:
            raise ValueError(
                f"last must be left out for a U-Net, not {last}: the decoder starts where it meets "
                "the first blocks"
            )
        usual = min(self.config.blocks, 3)
        most = len(self._down())
        blocks = "blocks of the encoder after the stem"
        return Cut(within("first", usual if first is None else first, 0, most, blocks))

    def opened(
        self, x: Tensor, noise: Tensor, cond: Cond, cut: Cut, *, tape: Tape | None = None
    ) -> Passage:
        shallow, side = self._descend(*self._begun(x, noise, cond, tape), cond, tape, 0, cut.first)
        turn = self._meeting(cut.first)

        def full() -> tuple[Tensor, Kept]:
            deep, _ = self._descend(shallow, side, cond, tape, cut.first)
            deep = self._middle(deep, cond, tape)
            h = self._ascend(deep, cond, tape, 0, turn)
            kept = (h,) if deep.summary is None else (h, deep.summary)
            return reuse(kept), kept

        def reuse(kept: Kept) -> Tensor:
            h, summary = kept if len(kept) == 2 else (*kept, None)
            features = shallow._replace(h=h, summary=summary)
            return self.finish(self._ascend(features, cond, tape, turn))

        return Passage(shallow.h, full, reuse)

    def encoder_blocks(self, blocks: int | None = None) -> int:
        """Number of blocks of the encoder, which cannot be chosen."""
        if blocks is not None:
            raise ValueError(
                f"blocks must be left out for a U-Net, not {blocks}: its encoder is all of it"
            )
        return len(self._down())

    def encoded(
        self, x: Tensor, noise: Tensor, cond: Cond, blocks: int, *, tape: Tape | None = None
    ) -> Encoding:
        features = self.encode(x, noise, cond, tape=tape)

        def decode(noise: Tensor, cond: Cond) -> Tensor:
            emb = pooled(self.pooled_extra, self.embedding(noise, cond), cond)
            return self.decode(features.repeated(noise.shape[0])._replace(emb=emb), cond)

        return Encoding((*features.skips, features.h), decode)

    def _down(self) -> list[tuple[int, str, nn.Module]]:
        """Blocks of the encoder, with their levels and parts."""
        return [(level, *part) for level, stage in enumerate(self.enc) for part in _parts(stage)]

    def _up(self) -> list[tuple[int, str, nn.Module]]:
        """Blocks of the decoder, with their levels and parts."""
        levels = reversed(list(enumerate(self.dec)))
        return [(level, *part) for level, stage in levels for part in _parts(stage)]

    def _meeting(self, block: int) -> int:
        """Number of the block of the decoder that meets one of the encoder; 0 is the stem."""
        meets = [i for i, (_, part, _) in enumerate(self._up()) if part != "up"]
        return meets[-1 - block]

    def _begun(
        self, x: Tensor, noise: Tensor, cond: Cond, tape: Tape | None
    ) -> tuple[Features, SideInput]:
        """The stem."""
        emb = pooled(self.pooled_extra, self.embedding(noise, cond), cond)
        context, mask = self._context(cond, x, emb)
        self.check_shapes(x, cond)
        if self.picture is None:
            h, side = self.begin(x, cond)
        else:
            picture = picture_of(self.config, x, cond)
            h, side = self.begin(shifted(self.config, x, picture), cond)
            h = h + self.pictured(picture)
        h = put(tape, "stem", h)
        features = Features(h, (h,), (_size(h),), emb, context, mask)
        maps = maps_for(self.controls, cond, x.shape[0], _size(x))
        opened = (
            branch.begun(x, noise, cond, control)
            for (branch, _), control in zip(self.controls, maps, strict=False)
        )
        return features._replace(branches=tuple(opened)), side

    def _descend(
        self,
        features: Features,
        side: SideInput,
        cond: Cond,
        tape: Tape | None,
        start: int = 0,
        stop: int | None = None,
    ) -> tuple[Features, SideInput]:
        """The blocks start ... stop - 1 of the encoder, by default all; h is that of the last."""
        h, skips, sizes = features.h, list(features.skips), list(features.sizes)
        told, cond = cond, features.told(cond)
        for level, part, block in self._down()[start:stop]:
            name = f"enc.{level}.{part}"
            h = self.run(name, block, h, features.emb, cond)
            if part == "down":
                h, side = self.descend(level, h, side)
                sizes.append(_size(h))
            skips.append(put(tape, name, h))
        branches = tuple(
            branch.network._descend(own, other, told, None, start, stop)
            for (branch, _), (own, other) in zip(self.controls, features.branches, strict=False)
        )
        skips, sizes = tuple(skips), tuple(sizes)
        return features._replace(h=h, skips=skips, sizes=sizes, branches=branches), side

    def _middle(self, features: Features, cond: Cond, tape: Tape | None) -> Features:
        h, told, cond = features.h, cond, features.told(cond)
        for part, block in _parts(self.mid):
            name = f"mid.{part}"
            h = put(tape, name, self.run(name, block, h, features.emb, cond))
        branches = []
        for (branch, strength), (own, side) in zip(self.controls, features.branches, strict=False):
            own = branch.network._middle(own, told, None)
            h = h + times(strength, branch.exits[-1](own.h))
            branches.append((own, side))
        features = features._replace(branches=tuple(branches))
        if self.summary is None:
            return features._replace(h=h)
        pos = cond.pos if self.config.coordinates else None
        pos = whole_canvas(features.skips[0]) if pos is None else pos
        summary = self.summary(h.flatten(2).mT, pos.flatten(2).mT)
        return features._replace(h=h, summary=summary)

    def _ascend(
        self,
        features: Features,
        cond: Cond,
        tape: Tape | None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """The blocks start ... stop - 1 of the decoder, which meet the last of the skips first."""
        h, skips, cond = features.h, list(features.skips), features.told(cond)
        emb = features.emb
        if self.summary is not None:
            emb = self.summary.conditioned(emb, features.summary)
        for level, part, block in self._up()[start:stop]:
            if part != "up":
                skip = skips.pop()
                h = self.join(h, joined(self.controls, features.branches, skip, len(skips)))
            name = f"dec.{level}.{part}"
            h = self.run(name, block, h, emb, cond, features.sizes[level])
            h = put(tape, name, h)
        return h

    def control_branch(self, blocks: int = 0) -> EncoderBranch:
        if blocks:
            raise ValueError(
                f"blocks must be 0 for a U-Net, whose whole encoder is copied, not {blocks}"
            )
        return EncoderBranch(self.config.build(), self.skip_widths)

    def features(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        """Deep features, after the middle: [B, H' W', F]."""
        return self.encode(x, noise, cond, tape=tape).h.flatten(2).mT

    def _context(self, cond: Cond, x: Tensor, emb: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Tokens of the condition and their mask, after one that means that there are none."""
        config = self.config
        if not isinstance(config, ContextShape) or not config.attends:
            return None, None
        return context_of(
            described(self.text, cond, x.shape[0], x.device, config.perturb), config.attends, emb
        )

    def remove_head(self) -> None:
        self.dec = nn.ModuleList()
        self.summary = None
        if self.readers is not None:
            names = [name for name in self.readers if name.startswith("dec_")]
            for name in names:
                del self.readers[name]

    def positions(self, x: Tensor, cond: Cond) -> Tensor | None:
        """Coordinate channels of the input, float32 [B or 1, P, H, W]; None if it has none.

        Raises `ValueError` for wrong shapes of x or of the coordinates.
        """
        self.check_shapes(x, cond)
        if not self.config.coordinates:
            return None
        pos = whole_canvas(x) if cond.pos is None else cond.pos
        frequencies = self.config.fourier_features
        return fourier_features(pos, frequencies) if frequencies else pos

    def run(
        self,
        name: str,
        block: nn.Module,
        h: Tensor,
        emb: Tensor,
        cond: Cond,
        size: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """Call a block; `size` is the height and width of the output of an up-sampling one."""
        # Names are hashed outside the block, so that one compiled block serves all of them.
        key = None
        if cond.seed is not None and self.config.dropout > 0:
            key = subkeys(cond.seed, name)
        if self.gates is None:
            h = block(h, emb, key, size)
        else:
            gate = self.gates(0, h, self.gates.begin(percentiles(cond, h)))
            h = block(gate * h, emb, key, size, h)
        if self.readers is None or cond.context is None:
            return h
        reader = name.replace(".", "_")
        if reader not in self.readers:
            return h
        return self.readers[reader](h, cond.context, cond.context_mask)


def _size(h: Tensor) -> tuple[int, int]:
    return h.shape[-2], h.shape[-1]


def _parts(stage: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(stage.named_children())
