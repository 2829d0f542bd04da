"""The one noise variable: laws to draw it from, paths and conversions around it.

Everything is expressed through sigma, the standard deviation of the noise in data units. A path
z_t = a(t) x0 + s(t) eps is the change of variables sigma = s / a, x = z / a. Sources: Karras et
al., NeurIPS 2022 (arXiv 2206.00364); Song et al., ICLR 2021 (2011.13456); Lai et al. (2510.21890).
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

# ---- Laws: which noise levels training draws ----


class NoiseLaw(Protocol):
    """A distribution of sigma, given by its quantile function; 0 and 1 give the ends of it."""

    def draw(self, u: Tensor) -> Tensor:
        """Sigma at the quantiles u in (0, 1): [B] -> [B]."""
        ...

    def level(self, sigma: Tensor) -> Tensor:
        """The quantile of sigma, the inverse of `draw`: [B] -> [B]."""
        ...


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """ln sigma ~ Normal(mean, std^2) (EDM, table 1).

    The same law as a logit-normal flow time: tau = sigma / (1 + sigma) has logit ln sigma.
    """

    mean: float = -1.2
    """Mean of ln sigma."""
    std: float = 1.2
    """Standard deviation of ln sigma."""

    def __post_init__(self) -> None:
        _check_normal(self, self.mean, self.std)

    def draw(self, u: Tensor) -> Tensor:
        """Sigma at the quantiles u."""
        return (self.mean + self.std * torch.special.ndtri(u)).exp()

    def level(self, sigma: Tensor) -> Tensor:
        """The quantile of sigma."""
        return torch.special.ndtr((sigma.log() - self.mean) / self.std)


@dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """The logit of the flow time ~ Normal(mean, std^2), then shifted (arXiv 2403.03206).

    The same law as LogNormal(mean + ln shift, std): ln sigma is the logit of the flow time, and
    the shift k t / (1 + (k - 1) t) of a time multiplies sigma by k.
    """

    mean: float = 0.0
    """Mean of the logit of the time, 0 at no noise and 1 at noise alone."""
    std: float = 1.0
    """Standard deviation of the logit of the time."""
    shift: float = 1.0
    """Towards more noise if above 1, as large images need."""

    def __post_init__(self) -> None:
        _check_normal(self, self.mean, self.std)
        if not 0 < self.shift < math.inf:
            raise ValueError(f"LogitNormal needs a finite shift > 0, not {self.shift}")

    @property
    def log_normal(self) -> LogNormal:
        """The same law of sigma."""
        return LogNormal(mean=self.mean + math.log(self.shift), std=self.std)

    def draw(self, u: Tensor) -> Tensor:
        """Sigma at the quantiles u."""
        return self.log_normal.draw(u)

    def level(self, sigma: Tensor) -> Tensor:
        """The quantile of sigma."""
        return self.log_normal.level(sigma)


@dataclass(frozen=True, kw_only=True)
class LogUniform:
    """ln sigma uniform between two bounds (the VE law of Song et al.)."""

    sigma_min: float = 0.02
    """Smallest noise level."""
    sigma_max: float = 100.0
    """Largest noise level."""

    def __post_init__(self) -> None:
        check_range(self.sigma_min, self.sigma_max)

    def draw(self, u: Tensor) -> Tensor:
        """Sigma at the quantiles u."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** u

    def level(self, sigma: Tensor) -> Tensor:
        """The quantile of sigma, clamped to [0, 1]."""
        span = math.log(self.sigma_max / self.sigma_min)
        return ((sigma / self.sigma_min).log() / span).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class UniformTime:
    """Time uniform on a path; sigma follows (DDPM: the VP path; rectified flow: the flow path)."""

    path: Literal["vp", "cosine", "flow"] = "vp"
    """Which path the time belongs to."""
    margin: float = 1e-5
    """Times are drawn in (margin, 1 - margin); at the ends sigma is 0 or infinite."""

    def __post_init__(self) -> None:
        if not 0 < self.margin < 0.5:
            raise ValueError(f"UniformTime needs margin in (0, 0.5), not {self.margin}")

    def draw(self, u: Tensor) -> Tensor:
        """Sigma at the quantiles u."""
        return PATHS[self.path].sigma(self.margin + (1 - 2 * self.margin) * u)

    def level(self, sigma: Tensor) -> Tensor:
        """The quantile of sigma, clamped to [0, 1]."""
        t = PATHS[self.path].time(sigma)
        return ((t - self.margin) / (1 - 2 * self.margin)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The levels of another law between two of its quantiles, times a scale."""

    law: NoiseLaw
    low: float = 0.0
    high: float = 1.0
    scale: float = 1.0

    def draw(self, u: Tensor) -> Tensor:
        """Sigma at the quantiles u."""
        return self.law.draw(self.low + (self.high - self.low) * u) * self.scale

    def level(self, sigma: Tensor) -> Tensor:
        """The quantile of sigma, clamped to [0, 1]."""
        u = self.law.level(sigma / self.scale)
        return ((u - self.low) / (self.high - self.low)).clamp(0, 1)


# ---- Paths: z_t = a(t) x0 + s(t) eps ----


class Path(Protocol):
    """The coefficients of a noising path and their time derivatives; t in [0, 1], noise at 1."""

    def a(self, t: Tensor) -> Tensor: ...
    def s(self, t: Tensor) -> Tensor: ...
    def da(self, t: Tensor) -> Tensor: ...
    def ds(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def time(self, sigma: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class VP:
    """Variance-preserving path with beta linear in t (Song et al., equation 33)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _integral(self, t: Tensor) -> Tensor:
        return 0.5 * (self.beta_max - self.beta_min) * t**2 + self.beta_min * t

    def a(self, t: Tensor) -> Tensor:
        return (-0.5 * self._integral(t)).exp()

    def s(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self._integral(t))).sqrt()

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def da(self, t: Tensor) -> Tensor:
        return -0.5 * self._beta(t) * self.a(t)

    def ds(self, t: Tensor) -> Tensor:
        return 0.5 * self._beta(t) * self.a(t) ** 2 / self.s(t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.expm1(self._integral(t)).sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        integral = torch.log1p(sigma**2)
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral).sqrt()
        return 2 * integral / (root + self.beta_min)  # root - beta_min would cancel at small sigma


@dataclass(frozen=True)
class Cosine:
    """a = cos(pi t / 2), s = sin(pi t / 2): the cosine, GVP or TrigFlow path."""

    def a(self, t: Tensor) -> Tensor:
        return (t * (math.pi / 2)).cos()

    def s(self, t: Tensor) -> Tensor:
        return (t * (math.pi / 2)).sin()

    def da(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.s(t)

    def ds(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.a(t)

    def sigma(self, t: Tensor) -> Tensor:
        return (t * (math.pi / 2)).tan()

    def time(self, sigma: Tensor) -> Tensor:
        return sigma.atan() * (2 / math.pi)


@dataclass(frozen=True)
class Flow:
    """a = 1 - t, s = t: the straight path of flow matching."""

    def a(self, t: Tensor) -> Tensor:
        return 1 - t

    def s(self, t: Tensor) -> Tensor:
        return t

    def da(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def ds(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t / (1 - t)

    def time(self, sigma: Tensor) -> Tensor:
        return sigma / (1 + sigma)


@dataclass(frozen=True)
class VE:
    """a = 1, s = t = sigma: the frame of EDM and of everything in this library."""

    def a(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def s(self, t: Tensor) -> Tensor:
        return t

    def da(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def ds(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time(self, sigma: Tensor) -> Tensor:
        return sigma


PATHS: dict[str, Path] = {"vp": VP(), "cosine": Cosine(), "flow": Flow(), "ve": VE()}

# ---- Conversions: every prediction is a change of variables of x0 ----

Prediction = Literal["x0", "eps", "score", "v", "velocity"]


def convert(
    value: Tensor, z: Tensor, t: Tensor, path: Path, source: Prediction, target: Prediction
) -> Tensor:
    """Convert what a network predicts at z_t into another prediction of the same posterior mean.

    v is a eps - s x0 and velocity is dz/dt = a' x0 + s' eps (arXiv 2510.21890). `t` must broadcast
    against `z`. Raises `ValueError` for an unknown prediction.
    """
    for name in (source, target):
        if name not in get_args(Prediction):
            raise ValueError(f"unknown prediction {name!r}, allowed: {get_args(Prediction)}")
    if source == target:
        return value
    a, s, da, ds = path.a(t), path.s(t), path.da(t), path.ds(t)
    # Both directly, not one from the other: next to an end of the path the difference cancels.
    x0 = {
        "x0": lambda: value,
        "eps": lambda: (z - s * value) / a,
        "score": lambda: (z + s**2 * value) / a,
        "v": lambda: (a * z - s * value) / (a**2 + s**2),
        "velocity": lambda: (ds * z - s * value) / (a * ds - da * s),
    }[source]
    eps = {
        "x0": lambda: (z - a * value) / s,
        "eps": lambda: value,
        "score": lambda: -s * value,
        "v": lambda: (s * z + a * value) / (a**2 + s**2),
        "velocity": lambda: (a * value - da * z) / (a * ds - da * s),
    }[source]
    return {
        "x0": x0,
        "eps": eps,
        "score": lambda: -eps() / s,
        "v": lambda: a * eps() - s * x0(),
        "velocity": lambda: da * x0() + ds * eps(),
    }[target]()


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
