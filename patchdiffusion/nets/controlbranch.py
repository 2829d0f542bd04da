"""Branches that control a frozen network by maps: trained copies of its first blocks.

Their outputs pass layers that are zero at first, so that the network is itself, bit for bit. For
U-Nets the encoder is copied (ControlNet, Zhang et al., arXiv 2302.05543), for transformers the
first blocks (PixArt-delta, arXiv 2401.05252):

    c <- copy_0(x + zero(embed(map) + positions));  x <- block_1(x + zero_1(c))
    c <- copy_i(c);                                 x <- block_(i+1)(x + zero_(i+1)(c))

where x are the features behind block 0. Shapes: B batch, T tokens, R registers, D features, *S
sides, K maps.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.cond import Cond
from patchdiffusion.nets.base import Network
from patchdiffusion.nets.changes import Trained
from patchdiffusion.nets.controlmaps import COLORS, ControlMaps
from patchdiffusion.nets.layers import Conv, Linear, pad_to_multiple
from patchdiffusion.nets.picture import resized
from patchdiffusion.nets.tokens import Hint, unfold
from patchdiffusion.patches import Size
from patchdiffusion.system import families
from patchdiffusion.system.dist import local

BRANCH = "@control"
"""Place of a branch among the changes of an adapter: beside the network, not at a layer of it."""

Strength = float | Tensor
"""Factor of what a branch adds, for all samples or for each, [B]."""
Controls = Sequence[tuple[Any, Strength]]
"""The branches beside a network, each with its strength."""


class ControlBranch(Trained, ABC):
    """Base of branches."""

    maps: tuple[ControlMaps, ...] = ()
    """Maps of which a condition in training has all, and each sample uses one."""

    @property
    def count(self) -> int:
        """Number of maps."""
        return max(1, len(self.maps))

    def chosen(self, control: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None]:
        """The map that each sample uses, [B, 3, *S], of those it is given, and its gate."""
        if control.shape[1] != COLORS:
            raise ValueError(
                f"cond.control must have {COLORS} channels for each branch, not {control.shape[1]}"
            )
        return control, None

    def kind_of(self, word: str = "") -> ControlMaps:
        """The map of this word among its own, by default the first; `ValueError` for another."""
        words = {families.word(type(kind)): kind for kind in self.maps}
        if word and word not in words:
            raise ValueError(
                f"condition is {word!r}, and the branch was trained with {', '.join(words)}"
            )
        return words[word] if word else self.maps[0]

    def instructed(self, cond: Cond, word: str = "", text: str = "") -> Cond:
        """A condition that says which map it has, by its word, or by a text."""
        if text:
            raise ValueError("the branch is one of a single map, and reads no instruction")
        return cond

    def open(self, gate: Tensor | None) -> None:
        """Set the weights of its parts for a pass that follows."""

    def start(self, network: Network) -> None:
        """Copy the weights of a network into those of its copies."""
        source = dict(network.named_parameters()) | dict(network.named_buffers())
        with torch.no_grad():
            for name, target in self.copies().items():
                local(target).copy_(local(source[name]))

    @abstractmethod
    def copies(self) -> dict[str, Tensor]:
        """Weights that are copies of those of the network, by the names there."""

    def units(self) -> list[nn.Module]:
        """The repeated blocks, which are compiled one by one."""
        return []


def times(strength: Strength, x: Tensor) -> Tensor:
    """x [B, ...] with the strength of each sample."""
    if isinstance(strength, Tensor):
        return strength.reshape(-1, *[1] * (x.ndim - 1)) * x
    return x if strength == 1 else strength * x


def maps_for(controls: Controls, cond: Cond, batch: int, size: Size) -> list[Tensor]:
    """The maps of each branch, [B, 3 K, *S] in [-1, 1] as pictures; none without a condition.

    Raises `ValueError` for a condition of another batch or number of channels.
    """
    control = cond.control
    if control is None or not controls:
        return []
    if control.ndim != 2 + len(size) or len(control) != batch or control.shape[1] % len(controls):
        raise ValueError(
            f"cond.control must be {[batch, COLORS * len(controls)]} and {len(size)} sides, not "
            f"{list(control.shape)}"
        )
    return list((2 * resized(control.float(), size) - 1).chunk(len(controls), dim=1))


def fitted(colors: Tensor, channels: int) -> Tensor:
    """Maps [B, 3, *S] as pictures of so many channels: one is their mean, more repeat them."""
    if channels == 1:
        return colors.mean(1, keepdim=True)
    return colors[:, [i % COLORS for i in range(channels)]]


# ---- Transformers ----

Step = Callable[[int, nn.Module, Tensor, Tensor | None, str], Any]
"""(number, block, h [B, R + T, D], values, name of the dropout) -> `BlockOut`."""


class TokenBranch(ControlBranch):
    """Copies of the first blocks of a transformer, and of its embedding of patches."""

    def __init__(
        self, stem: nn.Module, blocks: Sequence[nn.Module], width: int, patch: Size, channels: int
    ):
        """Takes `stem` and `blocks` for its own; `width` is D, `channels` are those of images."""
        super().__init__()
        self.patch, self.channels = patch, channels
        self.stem = stem
        self.entry = Linear(width, width, scale=0.0, role="stem")
        self.blocks = nn.ModuleList(blocks)
        self.exits = nn.ModuleList(
            Linear(width, width, scale=0.0, role="head") for _ in self.blocks
        )

    def copies(self) -> dict[str, Tensor]:
        parts = {"stem": self.stem, "blocks": self.blocks}
        return {f"{at}.{n}": p for at, part in parts.items() for n, p in part.named_parameters()}

    def units(self) -> list[nn.Module]:
        return list(self.blocks)

    def hint(self, control: Tensor, cond: Cond, places: Tensor) -> Hint:
        """Embedded maps [B, T, D] of [B, 3 K, *S], with the features of their places."""
        colors, gate = self.chosen(control, cond)
        x = pad_to_multiple(fitted(colors, self.channels), self.patch)
        return Hint(self.stem(unfold(x, self.patch)) + places, gate)

    def forward(self, h: Tensor, hint: Hint, step: Step) -> list[Tensor]:
        """Additions to the tokens before the blocks 1, 2 ... of the network: [B, T, D] each.

        `h` [B, R + T, D] are the features behind its first block.
        """
        self.open(hint.gate)
        first = h.shape[1] - hint.h.shape[1]
        h = added_to(h, self.entry(hint.h))
        out, values = [], None
        for i, (block, leave) in enumerate(zip(self.blocks, self.exits, strict=True)):
            result = step(i, block, h, values, f"control.{i}")
            h = result.h
            values = values if result.values is None else result.values
            out.append(leave(h[:, first:]))
        return out


def copied(blocks: int, end: int, depth: int) -> int:
    """Number of blocks that are copied, by default half of them.

    Their outputs enter before the blocks up to `end`. Raises `ValueError` for an impossible number.
    """
    most = min(end, depth) - 1
    if most < 1:
        raise ValueError(
            f"a branch needs a transformer with at least 2 blocks at full resolution, not {end}"
        )
    if not 0 <= blocks <= most:
        raise ValueError(f"blocks must lie in [0, {most}] for this network, not {blocks}")
    return blocks or max(1, min(depth // 2, most))


def hints_of(
    controls: Controls, cond: Cond, batch: int, size: Size, places: Tensor
) -> tuple[Hint, ...]:
    """The start of every branch beside a transformer."""
    maps = maps_for(controls, cond, batch, size)
    return tuple(b.hint(m, cond, places) for (b, _), m in zip(controls, maps, strict=False))


def additions(
    controls: Controls, hints: Sequence[Hint], h: Tensor, step: Step
) -> tuple[Tensor, ...]:
    """Sums over all branches of their additions before the blocks 1, 2 ...: [B, T, D] each."""
    total: list[Tensor] = []
    for (branch, strength), hint in zip(controls, hints, strict=True):
        for i, part in enumerate(branch(h, hint, step)):
            part = times(strength, part)
            if i < len(total):
                total[i] = total[i] + part
            else:
                total.append(part)
    return tuple(total)


def added_to(h: Tensor, part: Tensor) -> Tensor:
    """Features [B, R + T, D] with a part [B, T, D] that is added to all but the registers."""
    count = h.shape[1] - part.shape[1]
    return torch.cat([h[:, :count], h[:, count:] + part], dim=1) if count else h + part


# ---- U-Nets ----


class EncoderBranch(ControlBranch):
    """Copy of a U-Net without its decoder, whose input is joined by a map."""

    def __init__(self, network: Network, widths: Sequence[int]):
        """Takes `network` for its own; `widths` are those of its skips, and of the middle."""
        super().__init__()
        network.remove_head()
        self.network: Any = network
        stem = widths[0]
        self.embed = Conv(COLORS, stem, role="stem")
        self.entry = Conv(stem, stem, 1, scale=0.0, role="stem")
        self.exits = nn.ModuleList(Conv(w, w, 1, scale=0.0, role="head") for w in widths)

    def copies(self) -> dict[str, Tensor]:
        return dict(self.network.named_parameters()) | dict(self.network.named_buffers())

    def units(self) -> list[nn.Module]:
        return self.network.units()

    def hint(self, control: Tensor, cond: Cond) -> Hint:
        """Embedded maps [B, F, H, W] of [B, 3 K, H, W]."""
        colors, gate = self.chosen(control, cond)
        return Hint(self.entry(F.silu(self.embed(colors))), gate)

    def begun(self, x: Tensor, noise: Tensor, cond: Cond, control: Tensor) -> tuple[Any, Any]:
        """Features of the stem, joined by a map [B, 3 K, H, W], and the side input of level 1."""
        features, side = self.network._begun(x, noise, cond, None)
        h = features.h + self.hint(control, cond).h
        return features._replace(h=h, skips=(h,)), side


def joined(controls: Controls, branches: Sequence[Any], skip: Tensor, number: int) -> Tensor:
    """A skip of a U-Net with those of the same number of its branches, which have features."""
    for (branch, strength), (features, _) in zip(controls, branches, strict=False):
        skip = skip + times(strength, branch.exits[number](features.skips[number]))
    return skip
