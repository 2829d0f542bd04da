"""How to get from noise to an image: the settings of sampling, and what fits together."""

import functools
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from patchdiffusion.denoiser import Denoiser
from patchdiffusion.guidance.auto import AutoGuidance
from patchdiffusion.guidance.cfg import CFG
from patchdiffusion.guidance.extrapolate import Extrapolation
from patchdiffusion.guidance.interval import Interval
from patchdiffusion.guidance.threshold import Clamp, DynamicThreshold
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.objectives import FewStep, denoises
from patchdiffusion.parameterisation import EpsDDPM, EpsVP, Parameterisation
from patchdiffusion.solvers import SOLVERS, Churn, Solver, SolverName
from patchdiffusion.solvers.schedules import (
    ends,
    flow_uniform,
    karras,
    log_uniform,
    support,
    time_uniform,
)


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How to get from noise to an image."""

    solver: Literal["auto", "map"] | SolverName = "auto"
    """auto: map for few-step models, sde_dpmpp_2m for eps, else heun (twice the evaluations)."""
    steps: int | None = None
    """Number of steps; None is 18, or 2 for few-step models."""
    sigma_min: float | None = None
    """Smallest noise level before 0; None is 0.002, or the smallest of training if that is more."""
    sigma_max: float | None = None
    """Noise level to begin with; None is 80, or the largest of training if that is less."""
    grid: Literal["karras", "log_uniform", "uniform_t", "quadratic", "flow"] = "karras"
    """How the levels are spaced: by rho, in log SNR, in time or its root (VP), in flow time."""
    rho: float = 7.0
    """Exponent of the karras spacing."""
    shift: float = 1.0
    """Factor on the noise levels of the flow spacing between its ends."""
    eta: float | None = None
    """Amount of fresh noise of a stochastic solver; None is 0 for ddim and 1 for the others."""
    churn: Churn = field(default_factory=Churn)
    gamma: float | None = None
    """Share of the noise that map draws anew after each jump but the last; None is what suits."""
    guidance: float = 1.0
    """Weight of classifier-free guidance, or of a guide model if there is one; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Guide at levels above the first number, up to the second; None is at all of them."""
    guidance_rescale: float = 0.0
    """Share, 0 to 1, of the contrast that guidance adds which is taken back."""
    guidance_channels: int | None = None
    """Guide so many channels, the first ones; None guides all (DiT models: 3 of 4)."""
    threshold: Literal["auto", "none", "clamp"] | float = "auto"
    """clamp estimates to [-1, 1]; 0.995: dynamic thresholding; auto clamps those made of eps."""

    def __post_init__(self) -> None:
        self.sigmas()  # raises on impossible values
        self._check_guidance()
        if self.rho != 7 and self.grid != "karras":
            raise ValueError(f"rho works with the karras grid only, not with {self.grid}")
        if not self.churn.amount and self.churn != Churn():
            raise ValueError(
                "churn.sigma_min, churn.sigma_max and churn.scale shape the churn, and "
                "churn.amount is 0, which is none"
            )
        if self.shift != 1 and self.grid != "flow":
            raise ValueError(f"shift works with the flow grid only, not with {self.grid}")
        for option in self._options():
            able = [name for name, solver in SOLVERS.items() if option in solver.options]
            if self._name not in able:
                raise ValueError(f"{option} works with {', '.join(able)}, not with {self._name}")
        most = 1.0 if self.solver in ("ddim", "ancestral") else 100.0
        if self.eta is not None and not 0 <= self.eta <= most:
            raise ValueError(f"eta of {self.solver} must be in [0, {most:g}], not {self.eta}")
        if self.gamma is not None and not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], not {self.gamma}")
        if self.gamma is not None and self.solver not in ("auto", "map"):
            raise ValueError(f"gamma works with the map solver only, not with {self.solver}")

    @property
    def count(self) -> int:
        """Number of steps, given or not."""
        if self.steps is None:
            return 2 if self.solver == "map" else 18
        return self.steps

    @property
    def _name(self) -> str:
        return "heun" if self.solver == "auto" else self.solver

    def fitting(
        self, objective: FewStep | None, precond: Parameterisation | None = None
    ) -> "SamplerConfig":
        """The same with the solver and the threshold for a model trained for this.

        An error of eps is sigma times as large in the image, so its estimates are clamped, as in
        DDPM, and fresh noise corrects them later. Raises `ValueError` for a solver or an option
        that such a model does not have.
        """
        if self.solver not in ("auto", "map") and not denoises(objective):
            raise ValueError(
                f"a consistency model denoises in one jump and not step by step: use --solver map, "
                f"not {self.solver}"
            )
        of_eps = objective is None and isinstance(precond, EpsVP | EpsDDPM)
        chosen = self.of_kind(objective is not None and self.solver in ("auto", "map"))
        if self.solver == "auto" and of_eps and not self.churn.amount:
            chosen = replace(chosen, solver="sde_dpmpp_2m")
        if self.threshold != "auto" or chosen.solver == "map":
            return chosen
        return replace(chosen, threshold="clamp" if of_eps else "none")

    def of_kind(self, flow_map: bool) -> "SamplerConfig":
        """The same with the solver and the steps of flow maps, or with those of denoisers.

        Raises `ValueError` for a solver or an option that this kind does not have.
        """
        if self.solver == "map" and not flow_map:
            raise ValueError("the solver map is for few-step models; use heun or euler")
        if not flow_map:
            return replace(self, solver=self._name, steps=self.count)
        if self.solver not in ("auto", "map"):
            raise ValueError(f"a flow map is sampled by the solver map, not by {self.solver}")
        if self.guidance != 1:
            raise ValueError(
                f"a few-step model cannot be guided by {self.guidance} when it is sampled; "
                "MeanFlow is when it is trained: --objective.guidance"
            )
        for name in ("sigma_min", "sigma_max", "grid", "rho", "shift", "threshold"):
            if getattr(self, name) != getattr(SamplerConfig, name):
                raise ValueError(f"{name} works with solvers of denoisers only, not with map")
        chosen = replace(self, solver="map")
        return replace(chosen, steps=chosen.count)

    def _check_guidance(self) -> None:
        Extrapolation(
            weight=self.guidance, rescale=self.guidance_rescale, channels=self.guidance_channels
        )
        Interval.of(self.guidance_interval)
        if self.guidance == 1 and (
            self.guidance_interval or self.guidance_rescale or self.guidance_channels
        ):
            raise ValueError(
                "guidance_interval, guidance_rescale and guidance_channels shape the guidance, and "
                "guidance is 1, which is none"
            )
        if isinstance(self.threshold, int | float) and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be clamp, none or in (0, 1], not {self.threshold}")

    def guided(self, denoiser: Denoiser, guide: Denoiser | None = None) -> Denoiser:
        """The denoiser with guidance, by `guide` if there is one, and then the threshold."""
        if guide is not None and self.guidance == 1:
            raise ValueError("a guide has no effect at guidance 1; set another weight")
        if self.guidance != 1:
            made = (
                functools.partial(CFG, denoiser)
                if guide is None
                else functools.partial(AutoGuidance, denoiser, guide)
            )
            denoiser = made(
                self.guidance,
                interval=self.guidance_interval,
                rescale=self.guidance_rescale,
                channels=self.guidance_channels,
            )
        if self.threshold == "clamp":
            return Clamp(denoiser)
        if isinstance(self.threshold, str):
            return denoiser
        return DynamicThreshold(denoiser, self.threshold)

    def ends(self, law: NoiseLaw | None = None) -> tuple[float, float]:
        """The smallest and the largest noise level of the grid: see `grids.ends`."""
        return ends(self.sigma_min, self.sigma_max, law)

    def sigmas(self, law: NoiseLaw | None = None) -> Tensor:
        """The noise levels, see `ends`: float64 [steps + 1].

        Raises `ValueError` where churn would raise one above those of training.
        """
        levels = self._levels(*self.ends(law))
        if law is not None and self.churn.amount:
            raised = max(s * (1 + self.churn.gamma(s, self.count)) for s in levels.tolist())
            if raised > max(support(law)[1], float(levels[0])):
                raise ValueError(
                    f"churn raises noise to {raised:.4g}, above {support(law)[1]:.4g}, the most in "
                    "training; lower sigma_max, or churn.sigma_max"
                )
        return levels

    def _levels(self, low: float, high: float) -> Tensor:
        match self.grid:
            case "karras":
                return karras(self.count, low, high, self.rho)
            case "log_uniform":
                return log_uniform(self.count, low, high)
            case "uniform_t":
                return time_uniform(self.count, low, high)
            case "quadratic":
                return time_uniform(self.count, low, high, power=2)
            case "flow":
                return flow_uniform(self.count, low, high, self.shift)

    def bound_solver(self) -> Solver:
        """The solver with its options."""
        return functools.partial(SOLVERS[self._name], **self._options())

    @property
    def evaluations(self) -> int:
        """How often a sample asks the network, or the network and its guide."""
        stages = SOLVERS[self._name].stages if self._name in SOLVERS else 1
        return self.count * stages - (stages - 1)

    def _options(self) -> dict[str, object]:
        given = {"churn": self.churn if self.churn.amount else None, "eta": self.eta}
        return {name: value for name, value in given.items() if value is not None}
