"""Steering by resampling, for rewards without a gradient or with too steep a one.

Feynman-Kac steering (Singhal et al., arXiv 2501.06848) runs many particles and resamples them by
the gain in reward of their clean estimates; best-of-n selects at the end only.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.guidance.reward import Reward, rewards_of
from patchdiffusion.solvers import History, Integrator, Noise, State


@dataclass(frozen=True, kw_only=True)
class Steering:
    """A particle solver of p(x0) exp(scale r(x0)), made of a stochastic solver.

    The batch is a row of groups of particles, which are resampled within their group. Step k
    multiplies their weights by exp(scale (r(D_k) - r(D_k-1))), which telescopes to exp(scale
    r(x0)). A group is resampled when its effective size falls below a share `least` of its size,
    and after the last step, so that the result is unweighted; scale 0 is the solver itself, bit for
    bit. Weights restart if steering starts at a later step. Resampling moves particles within the
    batch and starts a new trajectory, so that caches begin anew.
    """

    solver: Integrator
    """Moves the particles; must be stochastic, or copies stay equal."""
    reward: Reward
    """Clean images [B, *S] -> [B]."""
    scale: float
    """Log-weight of a unit of reward, in nats."""
    particles: int = 64
    """Images in a group; they share one condition."""
    least: float = 0.5
    """Effective size, as a share of the group, below which it is resampled."""
    seed: int = 0
    """Seed of the resampling; use another one for each batch."""

    def __post_init__(self) -> None:
        if self.particles < 1 or not 0 <= self.least <= 1:
            raise ValueError(
                "steering needs particles >= 1 and 0 <= least <= 1, not "
                f"{self.particles} and {self.least}"
            )

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        *,
        cond: Cond | None = None,
        noise: Noise | None = None,
        first: int = 0,
        history: History = (),
        resets: Collection[int] = (),
    ) -> Iterator[State]:
        """Solve for x [G * particles, *S]; `ValueError` without noise or for incomplete groups."""
        if noise is None:
            raise ValueError("steering needs noise: pass noise=, a function of the step index")
        self._check(x, cond)
        last = len(sigmas) - 1
        solver = partial(
            self.solver, denoiser, sigmas=sigmas, cond=cond, noise=noise, resets=resets
        )
        solution = solver(x, first=first, history=history)
        before = log_weight = x.new_zeros(len(x), dtype=torch.float64)
        for step in range(first + 1, last + 1):
            state = next(solution)
            value = self.scale * rewards_of(self.reward, state.denoised).double()
            if not bool(value.isfinite().all()):
                raise ValueError(f"the reward is not finite after step {step}")
            order, log_weight = self._select(log_weight + value - before, step, step == last)
            before = value[order]
            if bool((order != torch.arange(len(order), device=order.device)).any()):
                history = tuple(h[order] for h in state.history)
                state = State(state.x[order], state.denoised[order], step, history)
                solution = solver(state.x, first=step, history=history)
            yield state

    def _select(self, log_weight: Tensor, step: int, all_groups: bool) -> tuple[Tensor, Tensor]:
        """Systematic resampling: source of each particle, int64 [B], and its log-weight [B]."""
        log_weight = log_weight.unflatten(0, (-1, self.particles))
        weight = log_weight.softmax(1)
        group = torch.arange(len(weight), device=weight.device)[:, None]
        slot = torch.arange(self.particles, device=weight.device)
        shift = rng.uniform(rng.keys(self.seed, "resampling", step, group[:, 0]), 1)
        quantiles = (slot + shift) / self.particles
        chosen = torch.searchsorted(weight.cumsum(1), quantiles).clamp(max=self.particles - 1)
        size = 1 / weight.square().sum(1, keepdim=True)
        resampled = (size < self.least * self.particles) | all_groups
        order = group * self.particles + torch.where(resampled, chosen, slot)
        return order.flatten(), log_weight.masked_fill(resampled, 0).flatten()

    def _check(self, x: Tensor, cond: Cond | None) -> None:
        n = self.particles
        if len(x) % n:
            raise ValueError(f"a batch of {len(x)} cannot be divided into groups of {n} particles")

        def alike(t: Tensor) -> Tensor:
            if not torch.equal(t, t[::n].repeat_interleave(n, dim=0)):
                raise ValueError(f"the {n} particles of a group must share one condition")
            return t

        (cond or Cond()).map(alike)


def best_of(samples: Tensor, reward: Reward, count: int) -> Tensor:
    """Best-of-n: the sample of highest reward of each `count`, [N * count, *S] -> [N, *S].

    Its KL divergence from the samples is at most ln count - (count - 1) / count nats. Raises
    `ValueError` if the batch is no multiple of `count`.
    """
    if count < 1 or len(samples) % count:
        raise ValueError(f"{len(samples)} samples cannot be divided into groups of {count}")
    best = rewards_of(reward, samples).reshape(-1, count).argmax(1)
    return samples[best + count * torch.arange(len(best), device=best.device)]
