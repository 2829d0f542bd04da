"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598)."""

from dataclasses import replace

import torch
from torch import Tensor

from patchdiffusion.cond import Cond, Position, Tape
from patchdiffusion.denoiser import Denoiser, discontinuities, parts
from patchdiffusion.guidance.extrapolate import Extrapolation
from patchdiffusion.guidance.interval import Interval


class CFG:
    """D_null + weight (D_cond - D_null), both halves in one batch of twice the size.

    weight 1 is the plain conditional denoiser and costs one evaluation, bit for bit the same;
    0 is the unconditional one. A condition without labels and context cannot be guided:
    `ValueError`. So does another CFG inside, which would drop the class twice.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        weight: float,
        *,
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
        channels: int | None = None,
    ):
        """Guide where interval[0] < sigma <= interval[1]; elsewhere the condition alone counts.

        There, a level that is a number (as solvers have it) costs one evaluation. `rescale` and
        `channels` are those of `Extrapolation`; published DiT models guide 3 of 4 channels.
        """
        if any(isinstance(part, CFG) for part in parts(denoiser)):
            raise ValueError("there is a CFG inside this CFG already; guide once")
        self.denoiser = denoiser
        self.extrapolate = Extrapolation(weight=weight, rescale=rescale, channels=channels)
        self.interval = Interval.of(interval)

    @property
    def discontinuities(self) -> tuple[float, ...]:
        own = () if self.extrapolate.weight == 1 else self.interval.discontinuities
        return (*own, *discontinuities(self.denoiser))

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        position: Position | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        weight = self.extrapolate.weight
        if weight == 1:
            return self.denoiser(x, sigma, cond, position=position, tape=tape)
        if cond is None or (cond.labels is None and cond.context is None):
            raise ValueError(
                f"guidance weight {weight} needs class labels, and none are given; use 1"
            )
        if self.interval.excludes(sigma):
            return self.denoiser(x, sigma, cond, position=position, tape=tape)
        both = self.denoiser(
            torch.cat([x, x]),
            torch.cat([sigma, sigma]) if isinstance(sigma, Tensor) and sigma.ndim else sigma,
            cond.cat(cond.null()),
            position=position and _twice(position),
            tape=tape,
        )
        conditional, unconditional = both.chunk(2)
        guided = self.extrapolate(conditional, unconditional)
        return self.interval.choose(sigma, guided, conditional)


def _twice(position: Position) -> Position:
    """The same place for a batch of twice the size, which no cache may mix with single ones."""
    seeds = None if position.seeds is None else torch.cat([position.seeds, position.seeds])
    return replace(position.within("cfg"), seeds=seeds)


class Unconditional:
    """A denoiser that never learns the class: the base of classifier guidance, or a guide."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser

    @property
    def discontinuities(self) -> tuple[float, ...]:
        return discontinuities(self.denoiser)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        position: Position | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        return self.denoiser(x, sigma, cond and cond.null(), position=position, tape=tape)
