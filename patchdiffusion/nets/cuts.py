"""The contract of networks that run in parts, so that what changes little is kept between steps.

A network is an outer part, which sees the noisy image of this step, around an inner one, whose
output may be that of an earlier step; or an encoder, whose output is kept, and a decoder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from patchdiffusion.cond import Cond, Tape

Kept = tuple[Tensor, ...]
"""Output of the inner part of a network: features that may be kept, scaled and added."""


class Cut(NamedTuple):
    """Blocks of the outer part of a network; see `Cuttable.cut`."""

    first: int
    """Number of blocks before the inner part."""
    last: int = 0
    """Number of blocks after it; of a U-Net those that meet the first ones."""


@dataclass(frozen=True)
class Passage:
    """A forward pass that stands in front of the inner part of a network."""

    signal: Tensor
    """Features of the outer part, [B, ...]: how they change tells how the inner part does."""
    full: Callable[[], tuple[Tensor, Kept]]
    """Compute the output of the network, [B, C, *S], and what may be kept of the inner part.

    The output is that of the network bit for bit.
    """
    reuse: Callable[[Kept], Tensor]
    """The output with what was kept, without the inner part."""


@dataclass(frozen=True)
class Encoding:
    """The output of the encoder of a network."""

    features: tuple[Tensor, ...]
    """Its levels, each [B, ...], to measure how much they change."""
    decode: Callable[[Tensor, Cond], Tensor]
    """The output of the network at noise [B] or, for several noise levels at once, [G B].

    The condition is of as many samples; those of one level stand together.
    """


@runtime_checkable
class Cuttable(Protocol):
    """A network that runs in parts."""

    def cut(self, first: int | None = None, last: int | None = None) -> Cut:
        """A cut with so many blocks before and after the inner part; None is a usual number.

        Raises `ValueError` for numbers of blocks that leave no inner part.
        """
        ...

    def opened(
        self, x: Tensor, noise: Tensor, cond: Cond, cut: Cut, *, tape: Tape | None = None
    ) -> Passage:
        """Run the blocks before the inner part; arguments are those of the network."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """A network of an encoder, and of a decoder that does not see the noisy image."""

    def encoder_blocks(self, blocks: int | None = None) -> int:
        """Number of blocks of the encoder; None is the usual one, `ValueError` for others."""
        ...

    def encoded(
        self, x: Tensor, noise: Tensor, cond: Cond, blocks: int, *, tape: Tape | None = None
    ) -> Encoding:
        """Run the encoder; arguments are those of the network, and its number of blocks."""
        ...


def within(name: str, value: int, least: int, most: int, blocks: str) -> int:
    """A number of blocks; `ValueError` unless it lies in [least, most]."""
    if not least <= value <= most:
        raise ValueError(f"{name} must be {least} to {most} {blocks}, not {value}")
    return value


def repeated(x: Tensor, count: int) -> Tensor:
    """x [B, ...] again and again: [count, ...], count a multiple of B."""
    return x if len(x) == count else x.repeat(count // len(x), *(1 for _ in x.shape[1:]))
