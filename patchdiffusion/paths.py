"""Noising paths z_t = a(t) x0 + s(t) eps, the table of DDPM, and conversions between predictions.

Everything is expressed through sigma, the standard deviation of the noise in data units: a path is
the change of variables sigma = s / a, x = z / a. Sources: Karras et al., NeurIPS 2022 (arXiv
2206.00364); Song et al., ICLR 2021 (2011.13456); Lai et al. (2510.21890).
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """Shape [B] as [B, 1, ...] so that it broadcasts against x; a map [B, 1, *S] as it is."""
    if value.ndim == x.ndim:
        return value
    return value.reshape(-1, *[1] * (x.ndim - 1))


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
    """a = 1, s = t = sigma: the frame of EDM and of all denoisers in this library."""

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


# ---- The table of DDPM ----
# Step i of T has abar_i = (1 - beta_0) ... (1 - beta_i), that is, sigma_i = sqrt(1 / abar_i - 1).
# Ho et al., NeurIPS 2020 (arXiv 2006.11239), section 4: beta linear; Nichol and Dhariwal, ICML
# 2021 (2102.09672), equation 17: abar the square of a cosine.


Table = Literal["linear", "cosine"]


@lru_cache
def table_sigmas(table: Table, steps: int, device: torch.device) -> Tensor:
    """Every sigma_i, increasing: float64 [steps]."""
    if table == "linear":  # the sum of all betas does not depend on their number
        beta = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps)
    else:
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        abar = ((time + 0.008) / 1.008 * (math.pi / 2)).cos() ** 2
        beta = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    return torch.expm1(-torch.log1p(-beta).cumsum(0)).sqrt().to(device)


@dataclass(frozen=True, kw_only=True)
class DDPM:
    """The variance-preserving path whose times i / (T - 1) are the discrete steps i.

    Between two steps ln sigma is linear in time, and is extrapolated beyond the table.
    """

    table: Table = "linear"
    """linear: beta from 1e-4 to .02 if there are 1000 steps; cosine: that of improved DDPM."""
    steps: int = 1000
    """Number of steps T."""

    def __post_init__(self) -> None:
        check_table(self.table, self.steps)

    def index(self, sigma: Tensor) -> Tensor:
        """The step of a sigma, interpolated between steps: float64, in the table [0, T - 1]."""
        logs = self._logs(sigma)
        log = sigma.double().log()
        above = torch.searchsorted(logs, log.contiguous()).clamp(1, self.steps - 1)
        below = above - 1
        part = (log - logs[below]) / (logs[above] - logs[below])
        return below + part

    def time(self, sigma: Tensor) -> Tensor:
        return (self.index(sigma) / (self.steps - 1)).to(sigma.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        below, slope = self._piece(t)
        part = t.double() - below.double() / (self.steps - 1)
        return (self._logs(t)[below] + slope * part).exp().to(t.dtype)

    def a(self, t: Tensor) -> Tensor:
        return (1 + self.sigma(t) ** 2).rsqrt()

    def s(self, t: Tensor) -> Tensor:
        return self.sigma(t) * self.a(t)

    def da(self, t: Tensor) -> Tensor:
        return -self.s(t) * self.ds(t) / self.a(t)  # a^2 + s^2 = 1

    def ds(self, t: Tensor) -> Tensor:
        return self.a(t) ** 2 * self.s(t) * self._piece(t)[1].to(t.dtype)

    def _logs(self, like: Tensor) -> Tensor:
        return table_sigmas(self.table, self.steps, like.device).log()

    def _piece(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The last step at or before a time, and d ln sigma / dt after it."""
        logs = self._logs(t)
        below = (t.detach().double() * (self.steps - 1)).long().clamp(0, self.steps - 2)
        return below, (logs[below + 1] - logs[below]) * (self.steps - 1)


def check_table(table: str, steps: int) -> None:
    """Raise `ValueError` for an unknown table or number of steps."""
    if table not in get_args(Table):
        raise ValueError(f"unknown table {table!r}, allowed: {get_args(Table)}")
    if not 25 <= steps <= 100_000:  # below, a linear beta exceeds 1
        raise ValueError(f"steps must lie in [25, 100000], not {steps}")


# ---- Conversions: every prediction is a change of variables of x0 ----

Prediction = Literal["x0", "eps", "score", "v", "velocity"]


def convert(
    value: Tensor, z: Tensor, t: Tensor, path: Path, source: Prediction, target: Prediction
) -> Tensor:
    """Convert a prediction at z_t into another prediction of the same posterior mean.

    v is a eps - s x0 and velocity is dz/dt = a' x0 + s' eps (arXiv 2510.21890). `t` must broadcast
    against `z`. Raises `ValueError` for an unknown prediction.
    """
    for name in (source, target):
        if name not in get_args(Prediction):
            raise ValueError(f"unknown prediction {name!r}, allowed: {get_args(Prediction)}")
    if source == target:
        return value
    a, s, da, ds = path.a(t), path.s(t), path.da(t), path.ds(t)
    # Each from the prediction, not one from the other: near an end of the path they would cancel.
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
