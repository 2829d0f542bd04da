"""Sampling schedules: decreasing noise levels with a final 0, float64 [n + 1].

The first is exactly sigma_max and the last before 0 exactly sigma_min, so that intervals that begin
or end at them, as of guidance, include them.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from patchdiffusion.betas import Betas
from patchdiffusion.noise import NoiseLaw, Shift, check_range, check_shift, shift_number
from patchdiffusion.paths import DDPM, PATHS

MOST_STEPS = 1_000_000  # more is a typing error


def karras(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Levels evenly spaced in sigma^(1/rho) (EDM, arXiv 2206.00364, equation 5), then 0."""
    _check_grid(n, sigma_min, sigma_max)
    _check_rho(rho)
    ends = torch.tensor([sigma_min, sigma_max], dtype=torch.float64)
    low, high = (ends ** (1 / rho)).tolist()
    levels = _grid((low + _ramp(n) * (high - low)) ** rho, sigma_min, sigma_max)
    if not bool((levels.diff() < 0).all()):
        raise ValueError(
            f"rho {rho:g} gives no {n} different noise levels from {sigma_max:g} to "
            f"{sigma_min:g}; 7 is usual"
        )
    return levels


def log_uniform(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """Levels evenly spaced in ln sigma, that is in log SNR, then 0: `karras` with a large rho."""
    _check_grid(n, sigma_min, sigma_max)
    return _grid(sigma_min * (sigma_max / sigma_min) ** _ramp(n), sigma_min, sigma_max)


def time_uniform(
    n: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    *,
    path: Literal["vp", "cosine", "flow"] = "vp",
    power: float = 1.0,
) -> Tensor:
    """Levels evenly spaced in t^(1/power) of a path, then 0; power 2 is the quadratic grid of DDIM.

    On the VP path with power 1 these are the evenly spaced times of DDPM (arXiv 2006.11239).
    """
    _check_grid(n, sigma_min, sigma_max)
    if not power > 0:
        raise ValueError(f"power must be positive, not {power}")
    ends = torch.tensor([sigma_min, sigma_max], dtype=torch.float64)
    low, high = PATHS[path].time(ends) ** (1 / power)
    levels = PATHS[path].sigma((low + _ramp(n) * (high - low)) ** power)
    if not bool(((levels > 0) & levels.isfinite()).all()):
        raise ValueError(f"the {path} path does not reach sigma_max {sigma_max} or {sigma_min}")
    return _grid(levels, sigma_min, sigma_max)


def flow_uniform(
    n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, shift: float = 1.0
) -> Tensor:
    """Levels evenly spaced in flow time tau before the shift, then 0 (arXiv 2403.03206, eq. 23).

    The shift tau' = k tau / (1 + (k - 1) tau) is sigma' = k sigma; above 1 it moves steps to high
    noise, which large images need. Both ends are unchanged.
    """
    check_shift(shift)
    _check_grid(n, sigma_min, sigma_max)
    levels = shift * time_uniform(n, sigma_min / shift, sigma_max / shift, path="flow")[:-1]
    return _grid(levels, sigma_min, sigma_max)


def ddpm_table(n: int, sigma_min: float = 0.01, sigma_max: float = 150.0, *, table: DDPM) -> Tensor:
    """Levels of a DDPM table at evenly spaced steps of it, then 0 (DDIM, arXiv 2010.02502, 4.2).

    Raises `ValueError` for more levels than the table has between the ends.
    """
    _check_grid(n, sigma_min, sigma_max)
    ends = torch.tensor([sigma_min, sigma_max], dtype=torch.float64)
    low, high = table.index(ends).clamp(0, table.steps - 1)
    times = (low + _ramp(n) * (high - low)).round() / (table.steps - 1)
    return _distinct(_grid(table.sigma(times), sigma_min, sigma_max), table.steps, "ddpm")


# ---- As parts of a configuration ----


class Spacing(Protocol):
    """A schedule: n noise levels between two ends, then 0."""

    def sigmas(self, n: int, low: float, high: float) -> Tensor:
        """Decreasing noise levels: float64 [n + 1]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Karras:
    """Evenly spaced in sigma^(1/rho) (EDM, arXiv 2206.00364)."""

    rho: float = 7.0
    """Exponent of the spacing; larger values put more steps at low noise."""

    def __post_init__(self) -> None:
        _check_rho(self.rho)

    def sigmas(self, n: int, low: float, high: float) -> Tensor:
        return karras(n, low, high, self.rho)


@dataclass(frozen=True, kw_only=True)
class LogSpaced:
    """Evenly spaced in ln sigma, which is log SNR (DPM-Solver, arXiv 2206.00927)."""

    word: ClassVar[str] = "log_uniform"

    def sigmas(self, n: int, low: float, high: float) -> Tensor:
        return log_uniform(n, low, high)


@dataclass(frozen=True, kw_only=True)
class TimeSpaced:
    """Evenly spaced in the time of DDPM, or of the cosine path (arXiv 2006.11239)."""

    word: ClassVar[str] = "uniform_t"
    path: Literal["vp", "cosine"] = "vp"
    """vp: the variance-preserving path, DDPM in continuous time; cosine: that of v models."""

    def sigmas(self, n: int, low: float, high: float) -> Tensor:
        return time_uniform(n, low, high, path=self.path)


@dataclass(frozen=True, kw_only=True)
class Quadratic:
    """Evenly spaced in the square root of the time of DDPM (DDIM, arXiv 2010.02502)."""

    def sigmas(self, n: int, low: float, high: float) -> Tensor:
        return time_uniform(n, low, high, power=2)


@dataclass(frozen=True, kw_only=True)
class FlowSpaced:
    """Evenly spaced in the time of flow matching, before a shift (SD3, arXiv 2403.03206)."""

    word: ClassVar[str] = "flow"
    shift: Shift = 1.0
    """Factor on the noise levels between the ends; above 1 moves steps to high noise; size: the
    square root of values of an image / 4096."""

    def __post_init__(self) -> None:
        check_shift(self.shift)

    def sigmas(self, n: int, low: float, high: float) -> Tensor:
        return flow_uniform(n, low, high, shift_number(self.shift))


@dataclass(frozen=True, kw_only=True)
class TableSpaced:
    """Levels of a DDPM table, at evenly spaced steps (DDIM, arXiv 2010.02502)."""

    word: ClassVar[str] = "ddpm"
    table: Literal["linear", "cosine"] = "linear"
    """Kind of table, as in `precond.table` of the model."""
    steps: int = 1000
    """Number of steps of the table."""

    def __post_init__(self) -> None:
        DDPM(table=self.table, steps=self.steps)  # raises for an unknown table

    def sigmas(self, n: int, low: float, high: float) -> Tensor:
        return ddpm_table(n, low, high, table=DDPM(table=self.table, steps=self.steps))


@dataclass(frozen=True, kw_only=True)
class BetaSpaced:
    """Levels of any table of betas, at evenly spaced steps of it (DDIM, arXiv 2010.02502)."""

    word: ClassVar[str] = "betas"
    betas: Betas = field(default_factory=Betas)

    def sigmas(self, n: int, low: float, high: float) -> Tensor:
        _check_grid(n, low, high)
        first, last = self.betas.index(torch.tensor([low, high], dtype=torch.float64))
        steps = (first + _ramp(n) * (last - first)).round().long()
        return _distinct(_grid(self.betas.at(steps), low, high), self.betas.steps, "betas")


Schedule = Karras | LogSpaced | TimeSpaced | Quadratic | FlowSpaced | TableSpaced | BetaSpaced
"""The schedules of `--schedule`; each is a `Spacing`."""


# ---- Ends of a schedule ----


def ends(
    sigma_min: float | None, sigma_max: float | None, law: NoiseLaw | None = None
) -> tuple[float, float]:
    """The lowest and the highest level for a model trained with a noise law, any if None.

    The defaults are .002 and 80, clamped to the levels of training. Raises `ValueError` for levels
    that the law never draws.
    """
    low, high = (0.0, math.inf) if law is None else support(law)
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        if value is not None and not low <= value <= high:
            raise ValueError(
                f"{name} {value:g} lies outside the noise levels of training, "
                f"{low:.4g} to {high:.4g}"
            )
    return (
        max(0.002, low) if sigma_min is None else sigma_min,
        min(80.0, high) if sigma_max is None else sigma_max,
    )


def support(law: NoiseLaw) -> tuple[float, float]:
    """The lowest and the highest level that a law draws; 0 and inf if it is unbounded."""
    low, high = law.icdf(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    return low, high


def _ramp(n: int) -> Tensor:
    """n numbers from 1 to 0; for a single step only 1."""
    return torch.linspace(1, 0, n, dtype=torch.float64) if n > 1 else torch.ones(1).double()


def _grid(levels: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    if len(levels) > 1:
        levels[-1] = sigma_min
    levels[0] = sigma_max
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def _distinct(levels: Tensor, steps: int, kind: str) -> Tensor:
    """The levels themselves; `ValueError` if a table has not so many between their ends."""
    if not bool((levels.diff() < 0).all()):
        raise ValueError(
            f"the {kind} table of {steps} steps has no {len(levels) - 1} levels from sigma "
            f"{levels[-2]:g} to {levels[0]:g}; use fewer steps"
        )
    return levels


def _check_rho(rho: float) -> None:
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be positive and finite, not {rho}")


def _check_grid(n: int, sigma_min: float, sigma_max: float) -> None:
    if n < 1:
        raise ValueError(f"steps must be at least 1, not {n}")
    if n > MOST_STEPS:
        raise ValueError(f"steps must be at most {MOST_STEPS:,}, not {n}")
    check_range(sigma_min, sigma_max)
