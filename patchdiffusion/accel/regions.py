"""Region-adaptive sampling: only some tokens of a transformer in each step (arXiv 2502.10389).

The other tokens go on along the slope dx/dsigma that they had when they were last computed. Those
that are computed attend to all: keys and values of the others are kept.

Shapes: B batch, C channels, *S sides of the image, T tokens, K active ones.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from patchdiffusion.accel.base import (
    Memories,
    Meter,
    Scaled,
    Stepwise,
    network_of,
)
from patchdiffusion.cond import Cond, Position
from patchdiffusion.denoiser import Denoiser, NetDenoiser, noise_level
from patchdiffusion.guidance.base import Surroundings
from patchdiffusion.nets.base import Network
from patchdiffusion.nets.layers import pad_to_multiple
from patchdiffusion.nets.tokens import AttentionMemory, fold, unfold
from patchdiffusion.paths import per_sample

Prefer = Literal["low", "high"]
Metric = Literal["std", "norm"]
Inputs = tuple[Tensor, Tensor, Cond]


@runtime_checkable
class SomeTokens(Protocol):
    """A network of tokens, some of which can be computed without the others."""

    def check_some(self) -> None:
        """Raise `ValueError` if this network has parts for which all tokens are needed."""
        ...

    def some(
        self,
        x: Tensor,
        noise: Tensor,
        cond: Cond,
        *,
        index: Tensor | None = None,
        memory: AttentionMemory | None = None,
    ) -> Tensor:
        """The output at the patches of the tokens at an index int64 [B, K], in its order.

        [B, K, C * pixels of a patch]; None is all of them. With a memory they attend to all tokens,
        those that are not computed as they were last.
        """
        ...


@dataclass
class Memory:
    """State of one trajectory."""

    slope: Tensor | None = None
    """[B, C, *S], the last slope (x - D) / sigma of every pixel."""
    attention: AttentionMemory | None = None
    drops: Tensor | None = None
    """int64 [B, T], number of steps in which a token was left out."""
    active: Tensor | None = None
    """int64 [B, K], tokens of the current step; None is all of them."""
    index: int = -1
    x: Tensor | None = None
    """The noisy image at the start of the last step, and its noise level."""
    sigma: float = 0.0


def scores(movement: Tensor, patch: tuple[int, ...], metric: Metric) -> Tensor:
    """Scores of tokens from what their pixels do: [B, C, *S] -> [B, T].

    std: the mean over the pixels of the standard deviation over channels, of one channel over the
    pixels; norm: the mean of the norm over channels.
    """
    pixels = unfold(pad_to_multiple(movement, patch), patch)
    pixels = pixels.unflatten(-1, (movement.shape[1], -1))  # [B, T, C, pixels]
    if metric == "norm":
        return pixels.norm(dim=2).mean(-1)
    if movement.shape[1] == 1:
        return pixels[:, :, 0].std(-1, unbiased=False)
    return pixels.std(2, unbiased=False).mean(-1)


def select(score: Tensor, drops: Tensor, count: int, prefer: Prefer, starvation: float) -> Tensor:
    """The `count` tokens of highest priority: int64 [B, K].

    It is the logarithm of the score, negative for low ones first, plus starvation times the number
    of steps in which the token was left out: that always raises it.
    """
    sign = 1.0 if prefer == "high" else -1.0
    priority = sign * score.double().clamp(min=1e-12).log() + starvation * drops
    return priority.argsort(dim=1, descending=True, stable=True)[:, :count]


class RegionAdaptive(Stepwise):
    """A transformer that computes some of its tokens in each step.

    With a ratio of 1, and in steps that are not adaptive, it is the network bit for bit; so it is
    outside of a solver, and with a tape. The score of a token is that of the movement of the noisy
    image in the step before, so that both halves of guidance choose alike. Corrections of a step
    compute the tokens of its first evaluation. Raises `ValueError` for networks without tokens.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        ratio: float = 0.5,
        *,
        start: int = 4,
        resets: tuple[int, ...] = (),
        prefer: Prefer = "low",
        metric: Metric = "std",
        starvation: float = 1.0,
        attend: bool = True,
    ):
        """Steps before `start` and those in `resets` compute all tokens.

        Without `attend` the tokens that are computed attend to one another only.
        """
        net, self.tokens = token_network(denoiser)
        super().__init__(net)
        assert isinstance(net.network, Network)
        self.ratio, self.start, self.resets = ratio, start, frozenset(resets)
        self.prefer: Prefer = prefer
        self.metric: Metric = metric
        self.starvation, self.attend = starvation, attend
        self.patch = net.network.config.token_size
        self.memories = Memories(Memory)
        self.meter = Meter(net.network, self.part)

    def step(
        self, x: Tensor, sigma: Tensor | float, cond: Cond | None, scaled: Scaled, where: Position
    ) -> Tensor:
        inputs, count = scaled.inputs, len(x)
        memory = self.memories.at(where, x)
        self._choose(memory, x, where)
        denoised = scaled.scales.denoised(x, self._computed(memory, inputs))
        level = per_sample(noise_level(sigma, x), x)
        slope = (x - denoised) / level
        if memory.active is not None and memory.slope is not None:
            mask = self._mask(memory.active, x)
            denoised = torch.where(mask, denoised, x - level * memory.slope)
            slope = torch.where(mask, slope, memory.slope)
        memory.slope, memory.index = slope.detach(), where.index
        self.meter.evaluated(count, count if memory.active is None else 0, inputs, where.index)
        self.memories.drop(where)
        return denoised

    def _choose(self, memory: Memory, x: Tensor, where: Position) -> None:
        """The tokens of this step, at its first evaluation."""
        index, sigma = where.index, where.sigmas[where.index]
        goes_on = memory.slope is not None and 0 <= memory.index <= index
        if goes_on and where.stage > 0 and memory.index == index:
            return
        if goes_on and memory.x is not None and memory.sigma != sigma:
            movement = (x - memory.x) / (sigma - memory.sigma)
        else:
            movement = memory.slope
        memory.x, memory.sigma = x.detach(), sigma
        grid = [-(-side // p) for side, p in zip(x.shape[2:], self.patch, strict=True)]
        total = math.prod(grid)
        some = min(total, math.ceil(self.ratio * total))
        dense = not goes_on or index < self.start or index in self.resets or some == total
        if dense or movement is None:
            memory.active = None
            return
        drops = memory.drops
        if drops is None:
            drops = torch.zeros(len(x), total, dtype=torch.int64, device=x.device)
        score = scores(movement, self.patch, self.metric)
        memory.active = select(score, drops, some, self.prefer, self.starvation)
        memory.drops = (drops + 1).scatter_add(1, memory.active, -torch.ones_like(memory.active))

    def _computed(self, memory: Memory, inputs: Inputs) -> Tensor:
        """The output of the network, [B, C, *S]; zero where tokens are left out."""
        x, count = inputs[0], len(inputs[0])
        if memory.active is None:
            memory.attention = AttentionMemory() if self.attend else None
            patches = self.tokens.some(*inputs, memory=memory.attention)
            self.meter.add("full", count, inputs)
        else:
            index = memory.active
            some = self.tokens.some(*inputs, index=index, memory=memory.attention)
            patches = some.new_zeros(count, self._tokens(x), some.shape[-1])
            patches = patches.scatter(1, index[..., None].expand(-1, -1, some.shape[-1]), some)
            # A part that attends to kept tokens is traced behind all of them, which do not count.
            self.meter.add(index.shape[1], count, inputs)
            self.meter.add("full", -count if self.attend else 0, inputs)
        return self._image(patches, x)

    def _tokens(self, x: Tensor) -> int:
        sides = zip(x.shape[2:], self.patch, strict=True)
        return math.prod(-(-side // p) for side, p in sides)

    def _image(self, patches: Tensor, x: Tensor) -> Tensor:
        grid = tuple(-(-side // p) for side, p in zip(x.shape[2:], self.patch, strict=True))
        image = fold(patches, grid, self.patch)
        return image[(..., *(slice(side) for side in x.shape[2:]))]

    def _mask(self, active: Tensor, x: Tensor) -> Tensor:
        """Pixels of the active tokens: bool [B, 1, *S]."""
        mask = torch.zeros(len(x), self._tokens(x), dtype=torch.bool, device=x.device)
        mask = mask.scatter(1, active, True)[..., None]
        return self._image(mask.expand(-1, -1, math.prod(self.patch)), x)

    def part(self, name: Hashable) -> Callable[..., object]:
        """full: all tokens; a number: so many, after all of them if they attend to them."""
        if not isinstance(name, int):
            return self.tokens.some

        def some(x: Tensor, noise: Tensor, cond: Cond) -> Tensor:
            memory = AttentionMemory() if self.attend else None
            if memory is not None:
                self.tokens.some(x, noise, cond, memory=memory)
            index = torch.arange(name, device=x.device).expand(len(x), -1)
            return self.tokens.some(x, noise, cond, index=index, memory=memory)

        return some


def token_network(denoiser: Denoiser) -> tuple[NetDenoiser, SomeTokens]:
    """The denoiser of a network of tokens, and the network; `ValueError` for others."""
    needs = "regions needs a network of tokens, some of which can be computed alone: dit"
    net, tokens = network_of(denoiser, SomeTokens, needs)
    tokens.check_some()
    return net, tokens


# ---- As a part of a sampler ----


@dataclass(frozen=True, kw_only=True)
class Regions:
    """Some tokens of a transformer in each step; others go on as they did (RAS, 2502.10389)."""

    word: ClassVar[str] = "regions"

    ratio: float = 0.5
    """Share of the tokens that are computed in a step; 1 is all of them."""
    start: int = 4
    """Steps at the start that compute all tokens."""
    resets: tuple[int, ...] | None = None
    """Later steps that do so, from 0; None is at 40 and 67 % of the steps."""
    prefer: Prefer = "low"
    """Tokens that are computed first: those whose pixels differ little (low) or much (high)."""
    metric: Metric = "std"
    """Score of a token, from the movement of its pixels: std over channels, or their norm."""
    starvation: float = 1.0
    """Weight of the number of steps in which a token was left out, which raises its priority."""
    attend: bool = True
    """Attend to all tokens, by kept keys and values, and not to active ones alone."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1], not {self.ratio}")
        if self.start < 0:
            raise ValueError(f"start must be at least 0, not {self.start}")
        if any(step < 0 for step in self.resets or ()):
            raise ValueError(f"resets count steps from 0, not {min(self.resets or ())}")
        if not 0 <= self.starvation < math.inf:
            raise ValueError(f"starvation must be at least 0 and finite, not {self.starvation}")

    @classmethod
    def trials(cls) -> "tuple[Regions, ...]":
        """Settings that `speed` tries."""
        return tuple(cls(ratio=ratio) for ratio in (0.75, 0.5, 0.25))

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        """Raises `ValueError` for a network without tokens, and for steps that are not."""
        count, resets = len(around.schedule) - 1, self.resets
        if resets is None:
            resets = (round(0.4 * count), round(count * 2 / 3))
        elif resets and max(resets) >= count:
            raise ValueError(
                f"accelerator.resets must lie in [0, {count - 1}] for {count} steps, not be "
                f"{max(resets)}"
            )
        return RegionAdaptive(
            denoiser,
            self.ratio,
            start=self.start,
            resets=resets,
            prefer=self.prefer,
            metric=self.metric,
            starvation=self.starvation,
            attend=self.attend,
        )
