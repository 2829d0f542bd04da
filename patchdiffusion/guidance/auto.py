"""Guiding a model with a bad version of itself (Karras et al., arXiv 2406.02507)."""

from torch import Tensor

from patchdiffusion.cond import Cond, Position, Tape
from patchdiffusion.denoiser import Denoiser, discontinuities
from patchdiffusion.guidance.extrapolate import Extrapolation
from patchdiffusion.guidance.interval import Interval


class AutoGuidance:
    """D_guide + weight (D_main - D_guide) under the same condition, which may be none.

    The guide should fail as the main model does, only more: the same data and kind of network,
    smaller or less trained. weight 1 is the main denoiser and never calls the guide. With
    `Unconditional(small)` as the guide it is classifier-free guidance at less cost.
    """

    def __init__(
        self,
        main: Denoiser,
        guide: Denoiser,
        weight: float,
        *,
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
        channels: int | None = None,
    ):
        """`interval`, `rescale` and `channels` are those of `CFG`.

        The tape of a call records the main denoiser only.
        """
        self.main = main
        self.guide = guide
        self.extrapolate = Extrapolation(weight=weight, rescale=rescale, channels=channels)
        self.interval = Interval.of(interval)

    @property
    def discontinuities(self) -> tuple[float, ...]:
        if self.extrapolate.weight == 1:
            return discontinuities(self.main)
        return (
            *self.interval.discontinuities,
            *discontinuities(self.main),
            *discontinuities(self.guide),
        )

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        position: Position | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        main = self.main(x, sigma, cond, position=position and position.within("main"), tape=tape)
        if self.extrapolate.weight == 1 or self.interval.excludes(sigma):
            return main
        guide = self.guide(x, sigma, cond, position=position and position.within("guide"))
        return self.interval.choose(sigma, self.extrapolate(main, guide), main)
