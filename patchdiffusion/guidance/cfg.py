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
from patchdiffusion.system.dist import Team
from patchdiffusion.system.place import place


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
        team: Team | None = None,
    ):
        """Guide where interval[0] < sigma <= interval[1]; elsewhere it is D_cond.

        There, a level that is a number (as in solvers) costs one evaluation. `rescale` and
        `channels` are those of `Extrapolation`; published DiT models guide 3 of 4 channels.
        `drops` names the fields of the condition that D_null lacks; those that `negative`, of
        batch 1, gives have its values instead, for all samples. Of a team of two processes, which
        work on the same images, rank 0 evaluates D_cond and rank 1 D_null: equal to the two passes
        of one process. Raises `ValueError` for a larger team.
        """
        super().__init__(denoiser)
        if sum(isinstance(part, CFG) for part in self.walk()) > 1:
            raise ValueError("there is a CFG inside this CFG already; guide once")
        self.extrapolate = Extrapolation(weight=weight, rescale=rescale, channels=channels)
        self.interval = Interval.of(interval)
        self.drops = drops
        self.negative = negative
        self.team = team or Team()
        if self.team.size > 2:
            raise ValueError(
                "guidance.split divides the conditional and the unconditional half among 2 "
                f"processes, not {self.team.size}: torchrun --nproc-per-node 2"
            )

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
        halves = self._divided if self.team.size == 2 else self._together
        conditional, unconditional = halves(x, sigma, cond, call)
        guided = self.extrapolate(conditional, unconditional)
        return self.interval.choose(sigma, guided, conditional)

    def _together(
        self, x: Tensor, sigma: Tensor | float, cond: Cond, call: Call
    ) -> tuple[Tensor, Tensor]:
        """D_cond and D_null in one batch."""
        both = ask(
            self.inner[0],
            torch.cat([x, x]),
            torch.cat([sigma, sigma]) if isinstance(sigma, Tensor) and sigma.ndim else sigma,
            Cond.cat(*self._both(cond, x)),
            _twice(call),
        )
        conditional, unconditional = both.chunk(2)
        return conditional, unconditional

    def _divided(
        self, x: Tensor, sigma: Tensor | float, cond: Cond, call: Call
    ) -> tuple[Tensor, Tensor]:
        """D_cond by rank 0 and D_null by rank 1."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("halves of guidance on two processes have no gradient; do not split")
        rank = self.team.place.rank
        one = ask(self.inner[0], x, sigma, self._both(cond, x)[rank], call.within("cfg").untaped())
        both = one.new_zeros(2, *one.shape)
        both[rank] = one
        conditional, unconditional = self.team.all_reduce(both)
        return conditional, unconditional

    def _both(self, cond: Cond, x: Tensor) -> tuple[Cond, Cond]:
        """The condition of D_cond and that of D_null."""
        null = cond.without(*self.drops)
        if self.negative is not None:
            one = self.negative.to(x.device)
            given = {name: getattr(one, name) for name in self.drops if one.gives(name)}
            none = one.without(*given)
            absent = {name: getattr(none, name) for name in given if not cond.gives(name)}
            cond = replace(cond, **{name: _for_all(v, x) for name, v in absent.items()})
            null = replace(null, **{name: _for_all(v, x) for name, v in given.items()})
        return cond, null


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
    split: bool = False
    """Evaluate the conditional half on one process and the other one on a second one of torchrun,
    which work on the same images."""

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
            team=Team(place()) if self.split else None,
        )
