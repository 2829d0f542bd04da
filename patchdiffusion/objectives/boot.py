"""BOOT: data-free distillation of a denoiser into one step, by bootstrapping its signal.

Gu, Zhai, Zhang, Liu, Susskind (arXiv 2306.05544). x_sigma is the deterministic trajectory of the
teacher from noise, x = sigma_max eps at its start, and y_sigma = x_sigma - sigma eps its signal:
dy / d log sigma = y - D(y + sigma eps, sigma). The student reads eps and sigma and predicts y; it
learns y at one noise level from its own y at a higher one and a step of the teacher. Errors flow
from sigma_max down, where y is D(sigma_max eps): no image is needed, and none is looked at.

The student predicts y only for the start from pure noise. So it samples in one step, and further
steps cannot refine it.
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from patchdiffusion.cond import CONDITIONS, Cond
from patchdiffusion.denoiser import Denoiser, NetDenoiser, expand_sigma
from patchdiffusion.losses import Batch, LossOut, squared_error
from patchdiffusion.noise import check_range
from patchdiffusion.objectives.base import C, Distillation, Distilled, Materials, Settings
from patchdiffusion.objectives.discrete import Levels
from patchdiffusion.parameterisation import Parameterisation, Precond, Scales
from patchdiffusion.paths import VE, Path, per_sample
from patchdiffusion.preconditioning import Affine, Bound
from patchdiffusion.rng import Draws

# ---- The student ----


class SignalScales(NamedTuple):
    """The denoiser at sigma_max, as a function of eps, whose network is told another level."""

    start: Affine
    """At sigma_max."""
    noise: Tensor
    """Noise argument of the network: [B]."""
    sigma_max: float

    @property
    def inner(self) -> Tensor:
        """c_in sigma_max, the factor of eps: [B]."""
        return self.start.inner * self.sigma_max

    def denoised(self, x: Tensor, raw: Tensor) -> Tensor:
        """y from eps and the network's output: shape and dtype of eps."""
        return self.start.denoised(x * self.sigma_max, raw)


@dataclass(frozen=True)
class _OnNetwork:
    base: Bound
    sigma_max: float

    def scales(self, sigma: Tensor) -> SignalScales:
        start = self.base.scales(torch.full_like(sigma, self.sigma_max))
        return SignalScales(start, self.base.scales(sigma).noise, self.sigma_max)


@dataclass(frozen=True, kw_only=True)
class Signal(Precond):
    """A parameterisation for y(eps, sigma), which at sigma_max is D(sigma_max eps, sigma_max).

    So the weights of the teacher are right at the start of the trajectory.
    """

    base: Parameterisation
    sigma_max: float = 80.0

    def scales(self, sigma: Tensor) -> Scales:
        """The four functions of sigma; x is eps."""
        start = self.base.scales(torch.full_like(sigma, self.sigma_max))
        noise = self.base.scales(sigma).noise
        return Scales(start.skip * self.sigma_max, start.out, start.inner * self.sigma_max, noise)

    def on(self, network: nn.Module) -> Bound:
        """The preconditioner of a network whose buffers the parameterisation may read."""
        return _OnNetwork(self.base.on(network), self.sigma_max)


@dataclass(frozen=True, kw_only=True)
class SignalMap:
    """The flow map from pure noise to any lower noise level, x_s = y(eps, s) + s eps."""

    y: Denoiser
    """The network, preconditioned by `Signal`."""
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    path: Path = field(default_factory=VE, init=False)
    gamma: float = field(default=0.0, init=False)

    def times(self, steps: int) -> Tensor:
        """sigma_max and 0: float64 [2]; `ValueError` for more than one step."""
        if steps != 1:
            raise ValueError(
                f"a model of boot samples in one step from pure noise, not in {steps}: use "
                "--steps 1"
            )
        return torch.tensor([self.sigma_max, 0.0], dtype=torch.float64)

    def __call__(
        self, z: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond | None = None
    ) -> Tensor:
        """z [B, C, *S] at sigma_max to level s; `ValueError` for another start."""
        if not (torch.as_tensor(t) >= self.sigma_max * (1 - 1e-6)).all():
            raise ValueError(f"a model of boot starts at noise level {self.sigma_max:g}, not {t}")
        eps, s = z / self.sigma_max, expand_sigma(s, z)
        return self.y(eps, s.clamp(min=self.sigma_min), cond) + per_sample(s, z) * eps


# ---- The objective ----


@dataclass(frozen=True, kw_only=True)
class BootConfig(Distilled):
    """BOOT, distillation of a denoiser into one step without any images (arXiv 2306.05544)."""

    few_step: ClassVar[bool] = True
    denoises: ClassVar[bool] = False
    shards: ClassVar[bool] = False
    distillation: ClassVar[Distillation | None] = Distillation(lr=0.3, images=0.5, law=True)

    teacher: str | None = None
    """Run or model whose denoiser is distilled."""
    sigma_min: float = 0.002
    """Noise level at which the signal is taken for the image."""
    sigma_max: float = 80.0
    """Noise level at which sampling starts."""
    rho: float = 7.0
    """Exponent of the spacing of the noise levels."""
    delta: float = 0.04
    """Length of a step of the teacher, as a share of the way from sigma_min to sigma_max."""
    heun: float = 0.5
    """Last share of the run in which the teacher steps by Heun's rule instead of Euler's."""
    beta: float = 1.0
    """Weight of the error at pure noise (boundary loss)."""
    boundary: float = 0.1
    """Share of samples that are used for it."""
    guidance: float = 1.0
    """Weight of classifier-free guidance of the teacher; 1 is none."""

    def __post_init__(self) -> None:
        check_range(self.sigma_min, self.sigma_max)
        if not 0 < self.rho < math.inf or not 0 < self.delta <= 0.5:
            raise ValueError(
                f"boot needs a finite rho > 0 and delta in (0, 0.5], not {self.rho}, {self.delta}"
            )
        if not (0 <= self.heun <= 1 and 0 <= self.boundary < 1 and 0 <= self.beta < math.inf):
            raise ValueError(
                "boot needs heun in [0, 1], boundary in [0, 1) and a finite beta >= 0, "
                f"not {self.heun}, {self.boundary}, {self.beta}"
            )
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"boot needs guidance >= 0 and finite, not {self.guidance}")
        self.levels.check(1 + math.ceil(1 / self.delta))

    @property
    def levels(self) -> Levels:
        """The noise levels between the ends."""
        return Levels(sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)

    @property
    def jumps(self) -> int:
        """One."""
        return 1

    @property
    def jump_counts(self) -> tuple[int, ...]:
        """One, as further jumps are impossible."""
        return (1,)

    def prefers(self, config: C) -> C:
        """The noise law of the parameterisation, a network of one time, previews in one step."""
        return replace(
            config,
            objective=self,
            noise=config.precond.default_noise(),
            network=replace(config.network, jump=False),
            preview=replace(config.preview, sample_steps=1),
        )

    def check(self, config: Settings) -> None:
        """Raise `ValueError` for predictions of noise, and for guidance without classes."""
        self.precond(config.precond)
        if self.guidance != 1 and not config.network.reads & set(CONDITIONS):
            raise ValueError(
                f"objective.guidance is {self.guidance}, which needs a teacher with classes or "
                "captions; leave it at 1"
            )

    def precond(self, chosen: Parameterisation) -> Signal:
        """That of the signal; `ValueError` for a network that predicts noise."""
        if chosen.predicts_eps:
            raise ValueError(
                f"boot predicts the image from noise, and the precond {chosen} predicts the noise, "
                "whose error is multiplied by the noise level: use a teacher of edm, flow, v or x0"
            )
        return Signal(base=chosen, sigma_max=self.sigma_max)

    @property
    def passes(self) -> float:
        """One of the student, one of the teacher, another for Heun's rule; more with guidance."""
        return 1.0 + (1.0 + self.heun) * (1 + (self.guidance != 1))

    def build(self, materials: Materials) -> "BootLoss":
        """The loss; `ValueError` without a teacher."""
        if not materials.teachers:
            raise ValueError(
                "boot needs a teacher: --objective.teacher RUN, or patchdiffusion distill RUN "
                "--objective boot"
            )
        return BootLoss(config=self, teacher=materials.teachers[0])

    def product(self, denoiser: NetDenoiser) -> SignalMap:
        """The map from pure noise."""
        return SignalMap(y=denoiser, sigma_min=self.sigma_min, sigma_max=self.sigma_max)


@dataclass(frozen=True, kw_only=True)
class BootLoss:
    """|y(eps, s) - sg[y(eps, t) + kappa (D - y(eps, t))]|^2 / delta^2, kappa = 1 - s / t.

    D is the teacher's estimate at the student's own state, x = y(eps, t) + t eps; with Heun's rule
    it is the mean of that and the estimate at the end of the step. A share of the samples have the
    boundary loss instead: s is sigma_max and the target D(sigma_max eps), which is what the same
    equation is with y = 0 and kappa = 1. Of the batch only shape and condition are read.
    """

    config: BootConfig
    teacher: Denoiser
    """Estimates E[x0 | x]."""

    def levels(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Noise levels t and s < t, float32 [B], and bool [B], True for the boundary (t = s)."""
        config = self.config
        u = config.delta + (1 - config.delta) * draws.stratified("sigma")
        t, s = (config.levels.at(share, 2) for share in (u, u - config.delta))
        at_start = draws.bernoulli("boundary", config.boundary)
        t, s = (torch.where(at_start, config.sigma_max, level) for level in (t, s))
        return t, s, at_start

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        config, cond = self.config, batch.cond
        eps = draws.normal("noise", tuple(batch.images.shape[1:]))
        t, s, at_start = self.levels(draws)
        heun = batch.progress >= 1 - config.heun
        with torch.no_grad():
            still = replace(cond, seed=None)  # no dropout in the target
            y = torch.where(per_sample(at_start, eps), 0.0, denoiser(eps, t, still))
            target = self.target(y, eps, t, s, at_start, still, heun=heun)
        square = squared_error(denoiser(eps, s, cond), target)
        inside = 1 / (config.delta**2 * (1 - config.boundary))
        edge = config.beta / max(config.boundary, 1e-9)
        error, far = square.detach(), t > config.levels.at(torch.tensor(0.5), 2).to(t)
        scalars = {
            "signal error, noisy half": (error * (far & ~at_start)).mean(),
            "signal error, clean half": (error * ~far).mean(),
        }
        weight = torch.where(at_start, edge, inside)
        return LossOut(per_sample=weight * square, scalars=scalars)

    def target(
        self,
        y: Tensor,
        eps: Tensor,
        t: Tensor,
        s: Tensor,
        at_start: Tensor,
        cond: Cond,
        *,
        heun: bool,
    ) -> Tensor:
        """The signal at level s after one step of the teacher from y at level t: like y."""
        kappa = per_sample(torch.where(at_start, 1.0, 1 - s / t), y)
        estimate = self.estimate(y + per_sample(t, y) * eps, t, cond)
        end = y + kappa * (estimate - y)
        if not heun:
            return end
        second = self.estimate(end + per_sample(s, y) * eps, s, cond)
        mean = torch.where(per_sample(at_start, y), estimate, (estimate + second) / 2)
        return y + kappa * (mean - y)

    def estimate(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """The teacher's estimate of E[x0 | x], guided if that is configured: like x."""
        estimate, weight = self.teacher(x, sigma, cond), self.config.guidance
        if weight == 1 or not cond.gives(*CONDITIONS):
            return estimate
        null = self.teacher(x, sigma, cond.without(*CONDITIONS))
        return null + weight * (estimate - null)
