"""Crop sizes: fractions of the canvas, rounded to pixels, with their probabilities."""

import itertools
import math
from dataclasses import dataclass, field
from typing import Literal, Self, get_args

from patchdiffusion.noise import LogNormal, NoiseLaw, Truncated
from patchdiffusion.patches import Size, size_name
from patchdiffusion.system import families

Multiplier = Literal["inverse_side", "inverse_area", "one"]
LossNorm = Literal["area", "mean"]

_ALL = (0.0, 1.0)  # percentiles


@dataclass(frozen=True)
class PatchSize:
    """One size of a plan: relative area a, probability, batch multiplier, share of the gradient."""

    size: Size
    area: float
    prob: float
    multiplier: float
    share: float
    pitch: int = 1
    noise: NoiseLaw = field(default_factory=LogNormal)


@dataclass(frozen=True, kw_only=True)
class PatchLaw:
    """Crop sizes as fractions of every axis of the canvas, with their probabilities."""

    fractions: tuple[float, ...] = (1.0, 0.5, 0.25)
    """Crop sides relative to the canvas; 1 is the whole image. The time of clips is a side too."""
    probs: tuple[float, ...] = (0.5, 0.3, 0.2)
    """Probability of each size, summing to 1; the share of whole images is the paper's p."""
    multiplier: Multiplier = "inverse_side"
    """Growth of the number of crops as they shrink; the paper uses 1, 2, 4: inverse_side."""
    loss_norm: LossNorm = "area"
    """area: a crop's gradient counts with its area, as in the paper; mean: all crops alike."""
    percentiles: tuple[tuple[float, float], ...] = ()
    """Noise levels of each size, from one quantile of the run's noise law to another; by default
    every size sees all of them."""
    pitches: tuple[int, ...] = ()
    """Image pixels that make a pixel of each size along a side: fraction 1 and pitch 2 is the
    whole image at half its resolution, with half the noise; by default 1 for every size."""

    def __post_init__(self) -> None:
        if not self.fractions or len(self.fractions) != len(self.probs):
            raise ValueError(
                "fractions and probs need the same length, at least 1, "
                f"not {len(self.fractions)} and {len(self.probs)}"
            )
        if not all(0 < f <= 1 for f in self.fractions):
            raise ValueError(f"fractions must lie in (0, 1], not {self.fractions}")
        if not all(p >= 0 for p in self.probs) or abs(sum(self.probs) - 1) > 1e-6:
            raise ValueError(f"probs must be >= 0 and sum to 1, not {self.probs}")
        for name, kind in (("multiplier", Multiplier), ("loss_norm", LossNorm)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}, allowed: {get_args(kind)}"
                )
        for name, values in (("percentiles", self.percentiles), ("pitches", self.pitches)):
            if values and len(values) != len(self.fractions):
                raise ValueError(f"{name} needs one entry per fraction, or none, not {len(values)}")
        if not all(0 <= low < high <= 1 for low, high in self.percentiles):
            raise ValueError(f"percentiles need 0 <= low < high <= 1, not {self.percentiles}")
        if not all(pitch >= 1 for pitch in self.pitches):
            raise ValueError(f"pitches must be at least 1, not {self.pitches}")

    @classmethod
    def whole(cls) -> Self:
        """The plan of whole images only: ordinary diffusion training."""
        return cls(fractions=(1.0,), probs=(1.0,))

    def inherit(self, old: object, config: object) -> Self:
        """A copy with the crop sizes of the plan that it replaces."""
        return families.copy_fields(self, old)

    def sizes(
        self, canvas: Size, divisor: int = 1, noise: NoiseLaw | None = None
    ) -> tuple[PatchSize, ...]:
        """The distinct sizes with a positive probability, largest first.

        The noise law is that of the run, None the default one. Raises `ValueError` for sizes that
        do not fit the canvas.
        """
        probs: dict[tuple[Size, int, NoiseLaw], float] = {}
        views = (self.pitches or itertools.repeat(1), self.percentiles or itertools.repeat(_ALL))
        for fraction, prob, pitch, levels in zip(self.fractions, self.probs, *views, strict=False):
            size = rounded(canvas, divisor, fraction, pitch)
            view = (size, pitch, _noise(noise or LogNormal(), pitch, levels))
            probs[view] = probs.get(view, 0.0) + prob
        whole, power = math.prod(canvas), self._power(len(canvas))
        rows = [(math.prod(view[0]) / whole, view, p) for view, p in probs.items() if p]
        rows.sort(key=lambda row: (row[0], row[1][0]), reverse=True)
        shares = [p * area if self.loss_norm == "area" else p for area, _, p in rows]
        return tuple(
            PatchSize(size, area, p, area**power, share / sum(shares), pitch, law)
            for (area, (size, pitch, law), p), share in zip(rows, shares, strict=True)
        )

    def rounding(self, canvas: Size, divisor: int) -> str:
        """Clause about sizes that the divisor of a network changes by 5 % or more, else empty."""
        views = [
            (f, pitch, rounded(canvas, divisor, f, pitch))
            for f, prob, pitch in zip(
                self.fractions, self.probs, self.pitches or itertools.repeat(1), strict=False
            )
            if prob
        ]
        if len({view[1:] for view in views}) == 1 < len(views):
            return f"only one size is left: sides are multiples of {divisor}"
        changed = {
            f"{f:g}": size_name(size)
            for f, pitch, size in views
            if abs(size[-1] * pitch / canvas[-1] / f - 1) >= 0.05
        }
        if not changed:
            return ""
        told = ", ".join(f"{f} is {name}" for f, name in changed.items())
        return f"{told}: sides are multiples of {divisor}"

    def _power(self, axes: int) -> float:
        """Exponent of the relative area in the number of crops."""
        return {"inverse_side": -1 / axes, "inverse_area": -1.0, "one": 0.0}[self.multiplier]


def rounded(canvas: Size, divisor: int, fraction: float, pitch: int) -> Size:
    """A fraction of each side in pixels of the network, a multiple of its divisor."""
    if fraction == 1 and pitch == 1:
        return canvas
    sides = []
    for side in canvas:
        most = side if pitch == 1 else side // pitch // divisor * divisor
        if most < 1:
            raise ValueError(
                f"a canvas of {canvas} is too small for pitch {pitch} and a network that "
                f"divides sides by {divisor}"
            )
        nearest = round(fraction * side / pitch / divisor) * divisor
        sides.append(min(max(nearest, divisor), most))
    return tuple(sides)


def _noise(law: NoiseLaw, pitch: int, levels: tuple[float, float]) -> NoiseLaw:
    if pitch == 1 and levels == _ALL:
        return law
    return Truncated(law=law, low=levels[0], high=levels[1], scale=1 / pitch)
