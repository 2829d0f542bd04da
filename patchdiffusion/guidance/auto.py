"""Guiding a model with a bad version of itself (Karras et al., arXiv 2406.02507)."""

from torch import Tensor

from patchdiffusion.cond import Call, Cond
from patchdiffusion.denoiser import Denoiser, Wrapper, ask
from patchdiffusion.guidance.extrapolate import Extrapolation
from patchdiffusion.guidance.interval import Interval


class AutoGuidance(Wrapper):
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
        # At weight 1 the guide is never asked.
        super().__init__(*((main,) if weight == 1 else (main, guide)))
        self.extrapolate = Extrapolation(weight=weight, rescale=rescale, channels=channels)
        self.interval = Interval.of(interval)

    @property
    def edges(self) -> tuple[float, ...]:
        return () if self.extrapolate.weight == 1 else self.interval.discontinuities

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        main = ask(self.inner[0], x, sigma, cond, call.within("main"))
        if self.extrapolate.weight == 1 or self.interval.excludes(sigma):
            return main
        guide = ask(self.inner[1], x, sigma, cond, call.within("guide").untaped())
        return self.interval.choose(sigma, self.extrapolate(main, guide), main)
