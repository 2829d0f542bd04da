"""The skip topology of U-Nets: encoder, middle and decoder, for blocks of any kind.

Level l works on images of ceil(H / 2^l) x ceil(W / 2^l); level 0 is full resolution.
Shapes: B batch, C image channels, H and W height and width (any size), F features of a level,
E size of the embedding.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor, nn

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets import fused
from patchdiffusion.nets.attention import Attention
from patchdiffusion.nets.base import Network, put
from patchdiffusion.nets.embed import fourier_features, whole_canvas
from patchdiffusion.nets.layers import Conv, Linear
from patchdiffusion.nets.picture import picture_of, pooled, shifted
from patchdiffusion.nets.reader import Reader
from patchdiffusion.nets.shapes import BlockPosition, UNetShape
from patchdiffusion.nets.text import ContextShape, described
from patchdiffusion.nets.tokens import context_of
from patchdiffusion.rng import subkeys

UNetLike = TypeVar("UNetLike", bound=UNetShape)
SideInput = TypeVar("SideInput")
"""Further input of the encoder's levels beside the features, such as an input pyramid."""


Factory = Callable[[BlockPosition, int, int], nn.Module]
"""(position, features in, features out) -> a block, called with (h, emb, key, size): `UNet.run`."""


class Features(NamedTuple):
    """Output of the encoder, input of the decoder."""

    h: Tensor
    """[B, F, H', W'] after the middle."""
    skips: tuple[Tensor, ...]
    """Outputs of the stem and of every block of the encoder."""
    sizes: tuple[tuple[int, int], ...]
    """Height and width of each level."""
    emb: Tensor
    """[B, E]."""
    context: Tensor | None = None
    """[B, T, D], tokens of the condition."""
    context_mask: Tensor | None = None
    """bool [B, T], the tokens of the condition that count."""


def encoder(
    stem: int, widths: list[int], blocks: int, factory: Factory
) -> tuple[nn.ModuleList, list[int]]:
    """The levels of an encoder from full resolution down, and the width of every skip.

    `stem` is the width of the input, `widths` that of each level.
    """
    levels, width, skips = nn.ModuleList(), stem, [stem]
    for level, features in enumerate(widths):
        stage = nn.ModuleDict()
        if level > 0:
            stage["down"] = factory(BlockPosition("enc", level, "down"), width, width)
            skips.append(width)
        for i in range(blocks):
            position = BlockPosition("enc", level, str(i), last=i == blocks - 1)
            stage[str(i)] = factory(position, width, features)
            width = features
            skips.append(width)
        levels.append(stage)
    return levels, skips


def middle(width: int, level: int, factory: Factory) -> nn.ModuleDict:
    """The two blocks between encoder and decoder, at the lowest level."""
    positions = (BlockPosition("mid", level, "0"), BlockPosition("mid", level, "1", last=True))
    return nn.ModuleDict({position.part: factory(position, width, width) for position in positions})


def decoder(widths: list[int], skips: list[int], blocks: int, factory: Factory) -> nn.ModuleList:
    """The levels of a decoder, in the order of the encoder; `skips` are those of `encoder`."""
    levels, width, skips = nn.ModuleList(), widths[-1], list(skips)
    for level, features in reversed(list(enumerate(widths))):
        stage = nn.ModuleDict()
        if level < len(widths) - 1:
            stage["up"] = factory(BlockPosition("dec", level, "up"), width, width)
        for i in range(blocks + 1):
            position = BlockPosition("dec", level, str(i), last=i == blocks)
            stage[str(i)] = factory(position, width + skips.pop(), features)
            width = features
        levels.insert(0, stage)
    return levels


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
            self.text = config.text.build()
            self.readers = nn.ModuleDict()
            for name, block in self._named_blocks():
                attention = getattr(block, "attention", None)
                if isinstance(attention, Attention):
                    reader = Reader(attention.proj.out_channels, config.attends)
                    self.readers[name.replace(".", "_")] = reader

    def _named_blocks(self) -> list[tuple[str, nn.Module]]:
        """All blocks by their names on the tape."""
        enc = [(f"enc.{i}.{part}", b) for i, s in enumerate(self.enc) for part, b in _parts(s)]
        dec = [(f"dec.{i}.{part}", b) for i, s in enumerate(self.dec) for part, b in _parts(s)]
        return [*enc, *((f"mid.{part}", b) for part, b in _parts(self.mid)), *dec]

    @abstractmethod
    def embedding(self, noise: Tensor, cond: Cond) -> Tensor:
        """Noise level and conditions as one vector: [B, E]."""

    @abstractmethod
    def begin(self, x: Tensor, cond: Cond) -> tuple[Tensor, SideInput]:
        """Features of level 0, and the side input of level 1; `ValueError` for wrong shapes."""

    def add_conditions(self, stem: int, emb: int) -> None:
        """Make the parts for picture, pooled embedding and texts, if there are any.

        The widths are those of the stem and the embedding.
        """
        self._add_readers()
        config = self.config
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
        enc = [f"enc.{i}.{part}" for i, stage in enumerate(self.enc) for part, _ in _parts(stage)]
        levels = reversed(list(enumerate(self.dec)))
        dec = [f"dec.{i}.{part}" for i, stage in levels for part, _ in _parts(stage)]
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
        emb = pooled(self.pooled_extra, self.embedding(noise, cond), cond)
        context, mask = self._context(cond, x, emb)
        cond = replace(cond, context=context, context_mask=mask)
        self.check_shapes(x, cond)
        if self.picture is None:
            h, side = self.begin(x, cond)
        else:
            picture = picture_of(self.config, x, cond)
            h, side = self.begin(shifted(self.config, x, picture), cond)
            h = h + self.pictured(picture)
        skips, sizes = [put(tape, "stem", h)], []
        for level, stage in enumerate(self.enc):
            for part, block in stage.named_children():
                name = f"enc.{level}.{part}"
                h = self.run(name, block, h, emb, cond)
                if part == "down":
                    h, side = self.descend(level, h, side)
                skips.append(put(tape, name, h))
            sizes.append((h.shape[-2], h.shape[-1]))
        for part, block in self.mid.named_children():
            h = put(tape, f"mid.{part}", self.run(f"mid.{part}", block, h, emb, cond))
        return Features(h, tuple(skips), tuple(sizes), emb, context, mask)

    def decode(self, features: Features, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        """Decoder and head; of the condition it reads only the seed.

        Replace `features.emb` to decode for another noise level.
        """
        cond = replace(cond, context=features.context, context_mask=features.context_mask)
        h, skips = features.h, list(features.skips)
        for level in reversed(range(len(self.dec))):
            for part, block in self.dec[level].named_children():
                if part != "up":
                    h = self.join(h, skips.pop())
                name = f"dec.{level}.{part}"
                h = self.run(name, block, h, features.emb, cond, features.sizes[level])
                h = put(tape, name, h)
        return self.finish(h)

    def features(self, x: Tensor, noise: Tensor, cond: Cond) -> Tensor:
        """Deep features, after the middle: [B, H' W', F]."""
        return self.encode(x, noise, cond).h.flatten(2).mT

    def _context(self, cond: Cond, x: Tensor, emb: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Tokens of the condition and their mask, after one that means that there are none."""
        config = self.config
        if not isinstance(config, ContextShape) or not config.attends:
            return None, None
        return context_of(
            described(self.text, cond, len(x), x.device, config.perturb), config.attends, emb
        )

    def remove_head(self) -> None:
        self.dec = nn.ModuleList()
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
        h = block(h, emb, key, size)
        if self.readers is None or cond.context is None:
            return h
        reader = name.replace(".", "_")
        if reader not in self.readers:
            return h
        return self.readers[reader](h, cond.context, cond.context_mask)


def _parts(stage: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(stage.named_children())
