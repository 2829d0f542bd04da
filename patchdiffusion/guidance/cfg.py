"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from patchdiffusion.cond import CONDITIONS, Call, Cond
from patchdiffusion.denoiser import Denoiser, Wrapper, ask
from patchdiffusion.guidance.base import Surroundings
from patchdiffusion.guidance.extrapolate import Extrapolation, Strength
from patchdiffusion.guidance.interval import Interval
from patchdiffusion.guidance.published import INTERVALS


class CFG(Wrapper):
    """D_null + weight (D_cond - D_null), both halves in one batch of twice the size.

    weight 1 is the conditional denoiser, bit for bit and at its cost; 0 is the unconditional one.
    Raises `ValueError` for a condition without labels, context and tokens unless there is a
    negative one, and for a CFG inside, which would drop the class twice.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        weight: float,
        *,
        interval: tuple[float, float] | Interval | None = None,
        rescale: float = 0.0,
        channels: int | None = None,
        drops: tuple[str, ...] = CONDITIONS,
        negative: Cond | None = None,
    ):
        """Guide where interval[0] < sigma <= interval[1]; elsewhere it is D_cond.

        There, a level that is a number (as in solvers) costs one evaluation. `rescale` and
        `channels` are those of `Extrapolation`; published DiT models guide 3 of 4 channels.
        `drops` names the fields of the condition that D_null lacks; those that `negative`, of
        batch 1, gives have its values instead, for all samples.
        """
        super().__init__(denoiser)
        if sum(isinstance(part, CFG) for part in self.walk()) > 1:
            raise ValueError("there is a CFG inside this CFG already; guide once")
        self.extrapolate = Extrapolation(weight=weight, rescale=rescale, channels=channels)
        self.interval = Interval.of(interval)
        self.drops = drops
        self.negative = negative

    @property
    def edges(self) -> tuple[float, ...]:
        return () if self.extrapolate.weight == 1 else self.interval.discontinuities

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        weight = self.extrapolate.weight
        if weight == 1:
            return ask(self.inner[0], x, sigma, cond, call)
        cond = cond or Cond()
        if self.negative is None and not cond.gives(*self.drops):
            raise ValueError(
                f"guidance weight {weight} needs class labels or a text, but none are given; use "
                "1, or autoguidance for a model without classes"
            )
        if self.interval.excludes(sigma):
            return ask(self.inner[0], x, sigma, cond, call)
        both = ask(
            self.inner[0],
            torch.cat([x, x]),
            torch.cat([sigma, sigma]) if isinstance(sigma, Tensor) and sigma.ndim else sigma,
            self._both(cond, x),
            _twice(call),
        )
        conditional, unconditional = both.chunk(2)
        guided = self.extrapolate(conditional, unconditional)
        return self.interval.choose(sigma, guided, conditional)

    def _both(self, cond: Cond, x: Tensor) -> Cond:
        """The condition of D_cond, then that of D_null, in one batch."""
        null = cond.without(*self.drops)
        if self.negative is not None:
            one = self.negative.to(x.device)
            given = {name: getattr(one, name) for name in self.drops if one.gives(name)}
            none = one.without(*given)
            absent = {name: getattr(none, name) for name in given if not cond.gives(name)}
            cond = replace(cond, **{name: _for_all(v, x) for name, v in absent.items()})
            null = replace(null, **{name: _for_all(v, x) for name, v in given.items()})
        return cond.cat(null)


def _for_all(value: Tensor, x: Tensor) -> Tensor:
    """The value of a batch of 1 for every sample of x."""
    return value.expand(len(x), *value.shape[1:])


def _twice(call: Call) -> Call:
    """The call of the doubled batch, with a slot of its own so that no cache mixes them."""
    position = call.within("cfg").position
    if position is None or position.seeds is None:
        return replace(call, position=position)
    seeds = torch.cat([position.seeds, position.seeds])
    return replace(call, position=replace(position, seeds=seeds))


class Unconditional(Wrapper):
    """A denoiser without the class condition: the base of classifier guidance, or a guide."""

    def __init__(self, denoiser: Denoiser, drops: tuple[str, ...] = CONDITIONS):
        """`drops` names the fields of the condition that are removed."""
        super().__init__(denoiser)
        self.drops = drops

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        return ask(self.inner[0], x, sigma, cond and cond.without(*self.drops), call)


@dataclass(frozen=True, kw_only=True)
class ClassifierFree(Strength):
    """Classifier-free guidance: away from the model without a class; twice the cost."""

    word: ClassVar[str] = "cfg"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = INTERVALS

    negative: str = ""
    """Text to lead away from (negative prompt), for models of captions; empty is no text."""

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        """Raises `ValueError` for a model without classes, or never trained without its own."""
        if self.weight != 1:
            around.models.require_condition()
            around.models.require_unconditional()
        return CFG(
            denoiser,
            self.weight,
            interval=self.levels(around),
            rescale=self.rescale,
            channels=self.channels,
            drops=tuple(dict.fromkeys((*CONDITIONS, *around.models.drops()))),
            negative=around.models.prompt(self.negative) if self.negative else None,
        )
