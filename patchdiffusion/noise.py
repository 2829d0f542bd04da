"""Noise laws: which noise levels sigma training draws, given by their quantile functions."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from patchdiffusion.betas import BetaSteps
from patchdiffusion.paths import DDPM, PATHS, Table, check_table, table_sigmas
from patchdiffusion.system.checks import MOST

Shift = float | Literal["size"]
"""Factor of noise levels, of a law or a schedule; `size` is chosen for a size by `for_size`."""

T = TypeVar("T")


class NoiseLaw(Protocol):
    """A distribution of sigma, given by its quantile function; percentiles 0 and 1 are its ends."""

    def icdf(self, u: Tensor) -> Tensor:
        """Sigma at the percentiles u in (0, 1): [B] -> [B]."""
        ...

    def cdf(self, sigma: Tensor) -> Tensor:
        """The percentile of sigma, the inverse of `icdf`: [B] -> [B]."""
        ...


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """ln sigma ~ Normal(mean, std^2) (EDM, arXiv 2206.00364, table 1).

    The same law as a logit-normal flow time: tau = sigma / (1 + sigma) has logit ln sigma.
    """

    word: ClassVar[str] = "lognormal"
    mean: float = -1.2
    """Mean of ln sigma."""
    std: float = 1.2
    """Standard deviation of ln sigma."""

    def __post_init__(self) -> None:
        _check_normal(self, self.mean, self.std)

    def icdf(self, u: Tensor) -> Tensor:
        """Sigma at the percentiles u."""
        return (self.mean + self.std * torch.special.ndtri(u)).exp()

    def cdf(self, sigma: Tensor) -> Tensor:
        """The percentile of sigma."""
        return torch.special.ndtr((sigma.log() - self.mean) / self.std)


@dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """Logit of the flow time ~ Normal(mean, std^2), then shifted (SD3, arXiv 2403.03206).

    The same law as LogNormal(mean + ln shift, std): ln sigma is the logit of the flow time, and
    the shift k t / (1 + (k - 1) t) of a time multiplies sigma by k.
    """

    mean: float = 0.0
    """Mean of the logit of the time, 0 at no noise and 1 at noise alone."""
    std: float = 1.0
    """Standard deviation of the logit of the time."""
    shift: Shift = 1.0
    """Factor of sigma: above 1 shifts to more noise, as large images need; size: the square root of
    values of an image / 4096."""

    def __post_init__(self) -> None:
        _check_normal(self, self.mean, self.std)
        check_shift(self.shift)

    @property
    def log_normal(self) -> LogNormal:
        """The equal log-normal law of sigma."""
        return LogNormal(mean=self.mean + math.log(shift_number(self.shift)), std=self.std)

    def icdf(self, u: Tensor) -> Tensor:
        """Sigma at the percentiles u."""
        return self.log_normal.icdf(u)

    def cdf(self, sigma: Tensor) -> Tensor:
        """The percentile of sigma."""
        return self.log_normal.cdf(sigma)


@dataclass(frozen=True, kw_only=True)
class LogUniform:
    """ln sigma uniform between two bounds (VE of Song et al., arXiv 2011.13456)."""

    word: ClassVar[str] = "loguniform"
    sigma_min: float = 0.02
    """Smallest noise level."""
    sigma_max: float = 100.0
    """Largest noise level."""

    def __post_init__(self) -> None:
        check_range(self.sigma_min, self.sigma_max)

    def icdf(self, u: Tensor) -> Tensor:
        """Sigma at the percentiles u."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** u

    def cdf(self, sigma: Tensor) -> Tensor:
        """The percentile of sigma, clamped to [0, 1]."""
        span = math.log(self.sigma_max / self.sigma_min)
        return ((sigma / self.sigma_min).log() / span).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class UniformTime:
    """Time uniform on a path, which gives sigma (VP: arXiv 2011.13456; flow: 2210.02747)."""

    path: Literal["vp", "cosine", "flow"] = "vp"
    """Path of the time: vp is DDPM, flow is rectified flow."""
    margin: float = 1e-5
    """Times are drawn in (margin, 1 - margin); at the ends sigma is 0 or infinite."""

    def __post_init__(self) -> None:
        if not 0 < self.margin < 0.5:
            raise ValueError(f"UniformTime needs margin in (0, 0.5), not {self.margin}")

    def icdf(self, u: Tensor) -> Tensor:
        """Sigma at the percentiles u."""
        return PATHS[self.path].sigma(self.margin + (1 - 2 * self.margin) * u)

    def cdf(self, sigma: Tensor) -> Tensor:
        """The percentile of sigma, clamped to [0, 1]."""
        t = PATHS[self.path].time(sigma)
        return ((t - self.margin) / (1 - 2 * self.margin)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Truncated:
    """Another law restricted to an interval of its percentiles, times a scale."""

    law: NoiseLaw
    low: float = 0.0
    high: float = 1.0
    scale: float = 1.0

    def icdf(self, u: Tensor) -> Tensor:
        """Sigma at the percentiles u."""
        return self.law.icdf(self.low + (self.high - self.low) * u) * self.scale

    def cdf(self, sigma: Tensor) -> Tensor:
        """The percentile of sigma, clamped to [0, 1]."""
        u = self.law.cdf(sigma / self.scale)
        return ((u - self.low) / (self.high - self.low)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class DDPMSteps:
    """Uniform over the T discrete steps of a table (DDPM, arXiv 2006.11239, algorithm 1)."""

    word: ClassVar[str] = "ddpm-steps"
    table: Table = "linear"
    """linear: beta from 1e-4 to .02 if there are 1000 steps; cosine: that of improved DDPM."""
    steps: int = 1000
    """Number of steps T."""

    def __post_init__(self) -> None:
        check_table(self.table, self.steps)

    def icdf(self, u: Tensor) -> Tensor:
        """Sigma at the percentiles u."""
        step = (u * self.steps).long().clamp(max=self.steps - 1)
        return table_sigmas(self.table, self.steps, u.device)[step].to(u.dtype)

    def cdf(self, sigma: Tensor) -> Tensor:
        """The percentile of the middle of its step, interpolated between steps: in (0, 1)."""
        index = DDPM(table=self.table, steps=self.steps).index(sigma)
        return ((index.clamp(0, self.steps - 1) + 0.5) / self.steps).to(sigma.dtype)


Law = LogNormal | LogitNormal | LogUniform | UniformTime | DDPMSteps | BetaSteps
"""The noise laws of `--noise` and of model files."""


# ---- Shift by size ----


def size_shift(values: int) -> float:
    """Shift for images of so many values, channels times pixels: sqrt(values / 4096).

    An image that is enlarged k times along both axes, whose noise is averaged over k x k pixels,
    is as noisy as before at k sigma (SD3, arXiv 2403.03206, equation 23; 4096: RAE, 2510.11690).
    """
    return math.sqrt(values / 4096)


def for_size(part: T, values: int) -> T:
    """A law or schedule with its shift `size` as a number, others unchanged."""
    if getattr(part, "shift", None) != "size":
        return part
    changed: Any = part
    return replace(changed, shift=size_shift(values))


def check_shift(shift: Shift) -> None:
    """Raise `ValueError` unless this can be a shift."""
    if shift != "size" and not (isinstance(shift, int | float) and 0 < shift < math.inf):
        raise ValueError(f"shift must be positive and finite, or size, not {shift}")


def shift_number(shift: Shift) -> float:
    """The shift; raises `ValueError` for one that depends on a size that is not known."""
    if isinstance(shift, str):
        raise ValueError(
            f"shift is {shift}, and that of the images is not known here; use noise.for_size, or "
            "a number"
        )
    return shift


# ---- Checks ----


def _check_normal(law: object, mean: float, std: float) -> None:
    if not (abs(mean) <= 30 and 0 < std <= 10):  # far beyond anything, and still finite
        raise ValueError(
            f"{type(law).__name__} needs mean in [-30, 30] and std in (0, 10], "
            f"not mean={mean}, std={std}"
        )


def check_range(sigma_min: float, sigma_max: float) -> None:
    """Raise `ValueError` unless these can be the ends of a range of noise levels."""
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"noise levels need 0 < sigma_min < sigma_max < inf, not {sigma_min}, {sigma_max}"
        )
    if not 1 / MOST <= sigma_min < sigma_max <= MOST:
        raise ValueError(
            "noise levels need 2^-63 <= sigma_min < sigma_max <= 2^63, as float32 holds no squares "
            f"of others, not {sigma_min}, {sigma_max}"
        )


def check_sigma_data(value: float) -> None:
    """Raise `ValueError` unless this can be a standard deviation of data."""
    if not 0 < value < 1e18:  # its square must be finite, too
        raise ValueError(f"sigma_data must be positive and finite, not {value}")
