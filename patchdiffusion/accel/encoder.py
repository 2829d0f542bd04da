"""Faster Diffusion: the encoder of a network is evaluated in a few steps (arXiv 2312.09608).

Its features are decoded at the noise level of every step. Decodings between two key steps do not
depend on one another: they can be computed in one batch.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from patchdiffusion.accel import keysteps
from patchdiffusion.accel.base import (
    Memories,
    Meter,
    Scaled,
    Stepwise,
    check_steps,
    network_of,
)
from patchdiffusion.cond import Cond, Position
from patchdiffusion.denoiser import Denoiser, NetDenoiser
from patchdiffusion.guidance.base import Surroundings
from patchdiffusion.nets.base import Network
from patchdiffusion.nets.cuts import Encoder, Encoding

USUAL_STEPS = 50
"""Steps for which the amount of injected noise is published."""


@dataclass
class Memory:
    """State of one trajectory."""

    encoding: Encoding | None = None
    index: int = -1
    """Step of the encoding."""
    ready: dict[float, Tensor] = field(default_factory=dict)
    """Outputs of the network that were decoded ahead, by noise level."""
    corrects: bool = False
    """True if the solver evaluates more than once in a step."""


@dataclass
class Noise:
    """The unit noise that a trajectory started from."""

    eps: Tensor | None = None


class Propagated(Stepwise):
    """A network whose encoder is evaluated in key steps, and decoded at all noise levels.

    With all steps as keys it is the network bit for bit; so it is outside of a solver, and with a
    tape. Every evaluation of a key step is full. `parallel` decodes up to `at_once` noise levels
    ahead in one batch, for solvers that evaluate at the levels of the schedule. From noise levels
    below `inject_below` on, each step begins with a little of the first noise, inject sqrt(1 +
    sigma^2) eps, times 50 / steps. Raises `ValueError` for a network without an encoder.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        keys: keysteps.Keys | int,
        *,
        blocks: int | None = None,
        parallel: bool = False,
        at_once: int = 8,
        inject: float = 0.0,
        inject_below: float = 1.24,
        rule: keysteps.Rule = "auto",
    ):
        """`keys` are the steps, or the number of those that are found by measurement, by a rule."""
        net, self.parts = encoding_network(denoiser)
        super().__init__(net)
        assert isinstance(net.network, Network)
        self.keys, self.blocks = keys, self.parts.encoder_blocks(blocks)
        self.rule: keysteps.Rule = rule
        self.parallel, self.at_once = parallel, at_once
        self.inject, self.inject_below = inject, inject_below
        self.memories, self.starts = Memories(Memory), Memories(Noise)
        self.meter = Meter(net.network, self.part)

    def step(
        self, x: Tensor, sigma: Tensor | float, cond: Cond | None, scaled: Scaled, where: Position
    ) -> Tensor:
        inputs, count = scaled.inputs, len(x)
        memory = self.memories.at(where, x)
        keys = self._keys(where, inputs)
        memory.corrects = memory.corrects or where.stage > 0
        last = max(key for key in keys if key <= where.index)
        full = memory.encoding is None or not last <= memory.index <= where.index
        full = full or where.index == last
        if full:
            memory.encoding = self.parts.encoded(*inputs, self.blocks)
            memory.index, memory.ready = where.index, {}
            self.meter.add("encode", count, inputs)
        level = sigma if isinstance(sigma, float) else None
        if level is None or level not in memory.ready:
            ahead = self._ahead(memory, keys, where, level, full)
            self._decode(memory, x, cond, inputs, ahead)
            output = memory.ready.pop(_NOW)
        else:
            output = memory.ready[level]
        self.meter.evaluated(count, count if full else 0, inputs, where.index)
        self.memories.drop(where)
        return scaled.scales.denoised(x, output)

    def _keys(self, where: Position, inputs: tuple[Tensor, Tensor, Cond]) -> keysteps.Keys:
        if not isinstance(self.keys, int):
            return self.keys
        shape = tuple(inputs[0].shape[1:])
        search = keysteps.needed(self.net, self.blocks, where.sigmas, shape, self.keys, self.rule)
        # A decoding is what the whole costs more than the encoder.
        self.meter.add("full", search.decoded, inputs)
        self.meter.add("encode", search.encoded - search.decoded, inputs)
        return search.keys

    def _ahead(
        self, memory: Memory, keys: keysteps.Keys, where: Position, level: float | None, full: bool
    ) -> Sequence[float]:
        """Noise levels to decode together with this one: those until the next key step."""
        levels = where.sigmas[:-1]
        if not self.parallel or level not in levels or (full and memory.corrects):
            return ()
        end = min((key for key in keys if key > where.index), default=len(levels))
        first = levels.index(level) + 1
        return levels[first : end + memory.corrects][: self.at_once - 1]

    def _decode(
        self,
        memory: Memory,
        x: Tensor,
        cond: Cond | None,
        inputs: tuple[Tensor, Tensor, Cond],
        ahead: Sequence[float],
    ) -> None:
        """Decode at this noise level and others, in one batch, all of one level together."""
        assert memory.encoding is not None
        _, noise, filled = inputs
        for sigma in ahead:
            _, later, told, _ = self.net.scaled(x, sigma, cond)
            noise, filled = torch.cat([noise, later]), filled.cat(told)
        outputs = memory.encoding.decode(noise, filled).split(len(x))
        memory.ready |= dict(zip((_NOW, *ahead), outputs, strict=True))
        self.meter.add("full", len(noise), inputs)
        self.meter.add("encode", -len(noise), inputs)

    def before_step(self, x: Tensor, position: Position) -> Tensor:
        x = super().before_step(x, position)
        if self.inject == 0:
            return x
        start, sigma = self.starts.at(position, x), position.sigmas[position.index]
        if start.eps is None:
            start.eps = x / sigma
        eps = start.eps
        self.starts.drop(position)
        if sigma >= self.inject_below:
            return x
        amount = self.inject * USUAL_STEPS / (len(position.sigmas) - 1)
        return x + amount * (1 + sigma**2) ** 0.5 * eps

    def part(self, name: Hashable) -> Callable[..., object]:
        """encode: the encoder; full: encoder and decoder."""
        if name == "encode":
            return self._encoded
        return lambda x, noise, cond: self._encoded(x, noise, cond).decode(noise, cond)

    def _encoded(self, x: Tensor, noise: Tensor, cond: Cond) -> Encoding:
        return self.parts.encoded(x, noise, cond, self.blocks)


_NOW = -1.0  # stands for the level of the evaluation, which may be none of the schedule


def encoding_network(denoiser: Denoiser) -> tuple[NetDenoiser, Encoder]:
    """The denoiser of a network of encoder and decoder, and the network.

    Raises `ValueError` for others.
    """
    needs = "faster-diffusion needs a network of encoder and decoder: unet, adm, edm2 or dit"
    return network_of(denoiser, Encoder, needs)


# ---- As a part of a sampler ----


@dataclass(frozen=True, kw_only=True)
class FasterDiffusion:
    """The encoder of the network in key steps only, its decoder in all (2312.09608)."""

    word: ClassVar[str] = "faster-diffusion"

    keys: Literal["auto", "change", "even", "ddim-50", "dpm-20", "dit-250"] = "auto"
    """Steps with the encoder. change: where its features change; even; auto: whichever of both is
    better, measured once on 8 images; ddim-50, dpm-20: published for Stable Diffusion in so many
    steps; dit-250: for DiT."""
    share: float = 0.5
    """Share of the steps that are keys, for auto, change and even."""
    steps: tuple[int, ...] = ()
    """Steps with the encoder, from 0, instead of `keys`."""
    blocks: int | None = None
    """Blocks of a transformer that are its encoder; None is 9 of 14."""
    parallel: bool = False
    """Decode the levels between two key steps in one batch: fewer, larger evaluations."""
    at_once: int = 8
    """Most levels in such a batch."""
    inject: float = 0.0
    """Amount of the first noise that each late step begins with, for 50 steps; 0.003 as
    published."""
    inject_below: float = 3.4
    """Noise level below which steps are late: 3.4 is half of the times of DDPM, 1.2 the last 0.3 of
    them, as published for DiT."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1], not {self.share}")
        if self.steps and (self.keys, self.share) != ("auto", 0.5):
            raise ValueError("steps and keys or share exclude each other: give one of them")
        if any(step < 0 for step in self.steps):
            raise ValueError(f"steps count from 0, not {min(self.steps)}")
        if self.keys in keysteps.PUBLISHED and self.share != 0.5:
            raise ValueError(f"keys {self.keys} is a list; share is for auto, change and even")
        if not 1 <= self.at_once <= 1024:
            raise ValueError(f"at_once must lie in [1, 1024], not {self.at_once}")
        if not 0 <= self.inject <= 1:
            raise ValueError(f"inject must lie in [0, 1], not {self.inject}")
        if not self.inject_below > 0:
            raise ValueError(f"inject_below must be positive, not {self.inject_below}")

    @classmethod
    def trials(cls) -> "tuple[FasterDiffusion, ...]":
        """Settings that `speed` tries."""
        return tuple(cls(share=share) for share in (0.67, 0.5, 0.33))

    def key_steps(self, count: int) -> keysteps.Keys | int:
        """Steps with the encoder, or the number of those that are found by measurement."""
        if self.steps:
            return frozenset({0, *self.steps})
        if self.keys in keysteps.PUBLISHED:
            return frozenset(keysteps.PUBLISHED[self.keys][2])
        some = max(1, round(self.share * count))
        if self.keys == "even" or some == count:
            return keysteps.even(count, some)
        return some

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        """Raises `ValueError` for a network without an encoder, and for steps that are not."""
        net, _ = encoding_network(denoiser)
        count = len(around.schedule) - 1
        check_steps(self.steps, count)
        if self.keys in keysteps.PUBLISHED:
            steps, kind, _ = keysteps.PUBLISHED[self.keys]
            assert isinstance(net.network, Network)
            this = "transformer" if net.network.config.token_size else "U-Net"
            if (steps, kind) != (count, this):
                raise ValueError(
                    f"keys {self.keys} was made for {steps} steps of a {kind}, not {count} of a "
                    f"{this}; use auto"
                )
        return Propagated(
            denoiser,
            self.key_steps(count),
            blocks=self.blocks,
            parallel=self.parallel,
            at_once=self.at_once,
            inject=self.inject,
            inject_below=self.inject_below,
            rule="change" if self.keys == "change" else "auto",
        )
