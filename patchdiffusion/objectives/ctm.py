"""Consistency trajectory models: one network that jumps between any two noise levels.

Kim et al. (arXiv 2310.02279), without the adversarial term, in the VE frame. The network g(x, t, s)
is an EDM denoiser that reads the relative length of the jump, 1 - s / t, from `cond.jump`; at
span 0 it is E[x0 | x].
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import Denoiser, expand_sigma
from patchdiffusion.losses import Batch, LossOut, denoising_error
from patchdiffusion.objectives.discrete import Levels, heun_step
from patchdiffusion.paths import VE, Path, per_sample
from patchdiffusion.rng import Draws, integers
from patchdiffusion.solvers.schedules import karras
from patchdiffusion.weighting import EDMWeight, Weighting


@dataclass(frozen=True, kw_only=True)
class TrajectoryMap:
    """G(x, t, s) = (s / t) x + (1 - s / t) g(x, t, s)."""

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
        told = replace(cond or Cond(), jump=1 - s / t)
        return keep * z + (1 - keep) * self.g(z, t, told)


@dataclass(frozen=True, kw_only=True)
class TrajectoryLoss:
    """Soft consistency and the denoising loss of g(x, t, t).

    A jump from t to s must end where a solver from t to u and a jump from u to s end; both ends are
    compared after a last jump to 0 with the weights of the target, through which the gradient flows
    into the first jump. The levels t > u >= s are on the grid of EDM.
    """

    target: Denoiser
    """g with weights that are not trained, such as an average."""
    teacher: Denoiser | None = None
    """E[x0 | x] of the solver; None is g(x, t, t) of the target."""
    weighting: Weighting = field(default_factory=EDMWeight)
    levels: int = 18
    """Noise levels of the grid."""
    steps: int = 1
    """Solver steps from t to u, which are as many levels apart at most."""
    denoising: float = 1.0
    """Weight of the denoising loss."""
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if self.levels < 2 or self.steps < 1 or not self.denoising >= 0:
            raise ValueError(
                "the loss needs levels >= 2, steps >= 1 and denoising >= 0, "
                f"not {self.levels}, {self.steps}, {self.denoising}"
            )

    def times(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Places of t, u and s on the grid, t > u >= s: int64 [B] each."""
        t = 1 + integers(draws.keys("from"), self.levels - 1)
        s = integers(draws.keys("to"), t)
        u = t - 1 - integers(draws.keys("solver"), (t - s).clamp(max=self.steps))
        return t, u, s

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        images, noise = batch.images, draws.normal("noise", tuple(batch.images.shape[1:]))
        cond = batch.cond
        sigma = batch.noise.icdf(draws.stratified("sigma")).to(torch.float32)
        error = denoising_error(denoiser, images, noise, sigma, cond)

        own, target = TrajectoryMap(g=denoiser), TrajectoryMap(g=self.target)
        places = self.times(draws)
        t, u, s = (self._level(place) for place in places)
        x = images + per_sample(t, images) * noise
        with torch.no_grad():
            solved = self._solve(x, *places[:2], replace(cond, seed=None))
            goal = target(target(solved, u, s, cond), s, 0.0, cond)
        end = target(own(x, t, s, cond), s, 0.0, cond)
        square = (end - goal).square().flatten(1).mean(1)
        return LossOut(
            per_sample=square + self.denoising * self.weighting(sigma) * error,
            scalars={"trajectory error": square.detach().mean()},
        )

    def _level(self, place: Tensor) -> Tensor:
        grid = Levels(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        return grid.at(place, self.levels)

    def _solve(self, x: Tensor, t: Tensor, u: Tensor, cond: Cond) -> Tensor:
        """From place t to place u, one level of the grid at a time."""
        for done in range(self.steps):
            before, after = (torch.maximum(t - n, u) for n in (done, done + 1))
            x = heun_step(
                self.teacher or self.target, x, self._level(before), self._level(after), cond
            )
        return x
