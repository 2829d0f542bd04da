"""Consistency trajectory models: one network that jumps between any two noise levels.

Kim et al. (arXiv 2310.02279), in the VE frame, with their adversarial term as an option. The
network g(x, t, s) is an EDM denoiser conditioned on the relative length of the jump, 1 - s / t, by
`cond.jump`; at jump 0 it is E[x0 | x].
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import Denoiser, NetDenoiser, expand_sigma
from patchdiffusion.encoders.discriminator import Adversary, AdversaryConfig, NoAdversary
from patchdiffusion.losses import Batch, LossOut, estimated, squared_error
from patchdiffusion.noise import check_range
from patchdiffusion.objectives.adversarial import AdversarialTerm, adversarial_term, check_axes
from patchdiffusion.objectives.base import C, Distillation, Distilled, Materials, Settings
from patchdiffusion.objectives.discrete import Levels, heun_step
from patchdiffusion.parameterisation import EDM, Parameterisation
from patchdiffusion.patches import Size
from patchdiffusion.paths import VE, Path, per_sample
from patchdiffusion.rng import Draws, integers
from patchdiffusion.solvers.schedules import karras
from patchdiffusion.weighting import EDMWeight, Weighting

FLAG = "--objective.adversary"


@dataclass(frozen=True, kw_only=True)
class TrajectoryMap:
    """The flow map G(x, t, s) = (s / t) x + (1 - s / t) g(x, t, s)."""

    g: Denoiser
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    path: Path = field(default_factory=VE, init=False)
    gamma: float = field(default=0.0, init=False)

    def times(self, steps: int) -> Tensor:
        """Noise levels spaced like those of EDM, then 0: float64 [steps + 1]."""
        levels = karras(steps + 1, self.sigma_min, self.sigma_max)[:-1]
        return torch.cat([levels[:-1], levels.new_zeros(1)])

    def __call__(
        self, z: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond | None = None
    ) -> Tensor:
        """z [B, C, *S] at noise level t > 0 to level s, both [B] or scalars."""
        t, s = expand_sigma(t, z), expand_sigma(s, z)
        keep = per_sample(s / t, z)
        jump = replace(cond or Cond(), jump=1 - s / t)
        return (keep * z + (1 - keep) * self.g(z, t, jump)).to(z.dtype)


@dataclass(frozen=True, kw_only=True)
class CTMConfig(Distilled):
    """Consistency trajectory models, with an adversary or without; distillation with a teacher."""

    few_step: ClassVar[bool] = True
    estimates: ClassVar[bool] = True
    shards: ClassVar[bool] = False
    distillation: ClassVar[Distillation | None] = Distillation(lr=0.3, images=0.5)
    sigma_min: float = 0.002
    """Smallest noise level of the jumps that are trained."""
    sigma_max: float = 80.0
    """Noise level at which sampling starts."""
    levels: int = 18
    """Number of noise levels of the grid, between which jumps are trained."""
    steps: int = 1
    """Most grid steps of the solver before the jump that it is compared with."""
    denoising: float = 1.0
    """Weight of the denoising loss, beside the error of the jumps."""
    adversary: Adversary = field(default_factory=NoAdversary)
    """Discriminator of images and the ends of jumps."""
    teacher: str | None = None
    """Run or model whose denoiser the solver uses (distillation); None is the averaged weights."""

    def __post_init__(self) -> None:
        check_range(self.sigma_min, self.sigma_max)
        possible = 2 <= self.levels <= 10**6 and 1 <= self.steps < self.levels
        if not (possible and 0 <= self.denoising < math.inf):
            raise ValueError(
                "ctm needs 2 <= levels <= 1000000, 1 <= steps < levels and a finite "
                f"denoising >= 0, not {self.levels}, {self.steps}, {self.denoising}"
            )

    def prefers(self, config: C) -> C:
        """The noise law of the parameterisation, a network of two times, previews in two steps."""
        return replace(
            config,
            objective=self,
            noise=config.precond.default_noise(),
            network=replace(config.network, jump=True),
            preview=replace(config.preview, sample_steps=2),
        )

    def check(self, config: Settings) -> None:
        """Raise `ValueError` for a network of one time or another parameterisation than EDM's."""
        self.precond(config.precond)
        if "jump" not in config.network.reads:
            raise ValueError("ctm needs a network of two times: set --network.jump")
        check_axes(self.adversary, config.network.axes, FLAG)

    def precond(self, chosen: Parameterisation) -> EDM:
        """EDM's; `ValueError` for any other."""
        if not isinstance(chosen, EDM):
            raise ValueError(f"ctm needs the parameterisation EDM, not {chosen}: use --precond edm")
        return chosen

    @property
    def passes(self) -> float:
        """3 of the jump with its backward pass, 2 of the target's jump with gradients to its input,
        2 without gradients, and 2 for each step of the solver; 2 for the balance of an adversary,
        which are gradients to that input."""
        adversary = self.adversary
        balance = 0.0
        if isinstance(adversary, AdversaryConfig) and adversary.balanced:
            balance = 2 * (1 - adversary.start)
        return 3.0 + 2.0 + 2.0 + 2.0 * self.steps + balance

    def build(self, materials: Materials) -> "TrajectoryLoss":
        """The loss, with the averaged weights as target and a discriminator if there is one.

        Raises `ValueError` for crops that the discriminator cannot judge.
        """
        return TrajectoryLoss(
            config=self,
            target=materials.average(),
            teacher=next(iter(materials.teachers), None),
            weighting=materials.precond.default_weighting(),
            adversary=adversarial_term(self.adversary, materials, FLAG),
        )

    def product(self, denoiser: NetDenoiser) -> TrajectoryMap:
        """The flow map between any two noise levels."""
        return TrajectoryMap(g=denoiser, sigma_min=self.sigma_min, sigma_max=self.sigma_max)


@dataclass(frozen=True, kw_only=True)
class TrajectoryLoss:
    """Soft consistency and the denoising loss of g(x, t, t) (arXiv 2310.02279).

    A jump from t to s must agree with a solver from t to u and a jump from u to s; both results are
    compared after a last jump to 0 with the weights of the target, through which the gradient flows
    into the first jump. The levels t > u >= s are on the grid of EDM. The adversary tells that end
    from images; its gradient is balanced with that of the error of the jumps.
    """

    config: CTMConfig
    target: Denoiser
    """g with weights that are not trained, such as an average."""
    teacher: Denoiser | None = None
    """Estimates E[x0 | x] in the solver; None is g(x, t, t) of the target."""
    weighting: Weighting = field(default_factory=EDMWeight)
    """Weight of the denoising loss."""
    adversary: AdversarialTerm | None = None

    def times(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Grid indices of the levels t > u >= s: int64 [B] each."""
        t = 1 + integers(draws.keys("from"), self.config.levels - 1)
        s = integers(draws.keys("to"), t)
        u = t - 1 - integers(draws.keys("solver"), (t - s).clamp(max=self.config.steps))
        return t, u, s

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        images, noise = batch.images, draws.normal("noise", tuple(batch.images.shape[1:]))
        cond = batch.cond
        sigma = batch.noise.icdf(draws.stratified("sigma")).to(torch.float32)
        weight = self.config.denoising * self.weighting(sigma)
        estimate = estimated(denoiser, batch, noise, sigma, weight)
        error = squared_error(estimate.denoised, images)

        student, target = TrajectoryMap(g=denoiser), TrajectoryMap(g=self.target)
        indices = self.times(draws)
        t, u, s = (self._level(index) for index in indices)
        x = images + per_sample(t, images) * noise
        with torch.no_grad():
            solved = self._solve(x, *indices[:2], replace(cond, seed=None))
            goal = target(target(solved, u, s, cond), s, 0.0, cond)
        end = target(student(x, t, s, cond), s, 0.0, cond)
        square = squared_error(end, goal)
        out = LossOut(
            per_sample=square + estimate.weight * error,
            scalars={"trajectory error": square.detach().mean()},
            estimate=estimate,
        )
        if self.adversary is None:
            return out
        more, shown = self.adversary(images, end, square, batch.progress)
        return replace(
            out,
            per_sample=out.per_sample + more,
            scalars={**out.scalars, **shown},
            reported=out.per_sample.detach(),
        )

    def phase(self, progress: float) -> str:
        """Part of the run, by which typical gradients differ; see `Adversarial.phase`."""
        return "" if self.adversary is None else self.adversary.phase(progress)

    def operations(self, size: Size) -> float:
        """Operations of the discriminator for one crop of a size."""
        return 0.0 if self.adversary is None else self.adversary.operations(size)

    def _level(self, index: Tensor) -> Tensor:
        grid = Levels(sigma_min=self.config.sigma_min, sigma_max=self.config.sigma_max)
        return grid.at(index, self.config.levels)

    def _solve(self, x: Tensor, t: Tensor, u: Tensor, cond: Cond) -> Tensor:
        """Solve from grid index t to u, one level at a time."""
        for done in range(self.config.steps):
            before, after = (torch.maximum(t - n, u) for n in (done, done + 1))
            x = heun_step(
                self.teacher or self.target, x, self._level(before), self._level(after), cond
            )
        return x
