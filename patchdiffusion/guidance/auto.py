"""Autoguidance: guidance by a worse version of the model (Karras et al., arXiv 2406.02507)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from patchdiffusion.cond import Call, Cond
from patchdiffusion.denoiser import Denoiser, Wrapper, ask
from patchdiffusion.guidance.base import Surroundings
from patchdiffusion.guidance.extrapolate import Extrapolation, Strength
from patchdiffusion.guidance.interval import Interval
from patchdiffusion.guidance.published import AUTOGUIDANCE
from patchdiffusion.nets.base import Weights


class AutoGuidance(Wrapper):
    """D_guide + weight (D_main - D_guide) under the same condition, which may be none.

    The guide should have the errors of the main model, only larger: the same data and kind of
    network, smaller or less trained. weight 1 is the main denoiser and never calls the guide. With
    `Unconditional(small)` as the guide it is classifier-free guidance at less cost.
    """

    def __init__(
        self,
        main: Denoiser,
        guide: Denoiser,
        weight: float,
        *,
        interval: tuple[float, float] | Interval | None = None,
        rescale: float = 0.0,
        channels: int | None = None,
    ):
        """`interval`, `rescale` and `channels` are those of `CFG`.

        The tape of a call records the main denoiser only.
        """
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


@dataclass(frozen=True, kw_only=True)
class ByModel(Strength):
    """Autoguidance: away from a worse model, smaller or less trained; needs no classes."""

    word: ClassVar[str] = "autoguidance"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {"weight": setting.weight} for name, setting in AUTOGUIDANCE.items()
    }
    model: str | None = None
    """Run or model folder of the worse model."""
    weights: Weights = "averaged"
    """Weights of that model: averaged (EMA) or raw."""

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        """The guided denoiser; raises `ValueError` without a model."""
        if self.model is None:
            raise ValueError("autoguidance needs a worse model: --guidance.model RUN")
        return AutoGuidance(
            denoiser,
            around.models.denoiser(self.model, self.weights, around.levels),
            self.weight,
            interval=self.levels(around),
            rescale=self.rescale,
            channels=self.channels,
        )
