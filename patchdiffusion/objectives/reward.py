"""Training towards a reward that is known of few images: pseudo-labels and reward weights.

A small model of the reward is fitted to the labelled images and asked about all others; the
denoiser is then trained conditionally on what it said (Yuan et al., arXiv 2307.07055). Rewards
are a table over the images of the source, as a crop does not show what its image is worth.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from patchdiffusion.denoiser import Denoiser
from patchdiffusion.losses import Batch, LossOut, Objective
from patchdiffusion.rng import Draws


@dataclass(frozen=True, eq=False)
class LinearReward:
    """<weight, x> + offset."""

    weight: Tensor
    """[*S], its gradient."""
    offset: Tensor | float = 0.0
    """Scalar."""

    @classmethod
    def fit(cls, images: Tensor, rewards: Tensor, penalty: float) -> "LinearReward":
        """Ridge regression on images [N, *S] and rewards [N]: mean squared error + penalty |w|^2.

        Raises `ValueError` if they do not belong together or the penalty is not positive.
        """
        if rewards.shape != (len(images),) or not penalty > 0:
            raise ValueError(
                f"ridge regression needs one reward for each of {len(images)} images and a "
                f"positive penalty, not {list(rewards.shape)} and {penalty}"
            )
        flat, y = images.flatten(1).double(), rewards.double()
        centred = flat - flat.mean(0)
        gram = centred.mT @ centred / len(flat) + penalty * torch.eye(flat.shape[1]).to(flat)
        weight = torch.linalg.solve(gram, centred.mT @ (y - y.mean()) / len(flat))
        offset = y.mean() - flat.mean(0) @ weight
        dtype = torch.promote_types(images.dtype, torch.float32)  # of 8-bit images, too
        return cls(weight.reshape(images.shape[1:]).to(dtype), offset.to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, *S] -> [B]."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return (x * self.weight.to(x)).flatten(1).sum(1) + self.offset


@dataclass(frozen=True, eq=False)
class PseudoLabelled:
    """An objective whose denoiser is told the reward of each image, with noise: `cond.extra`.

    The network must read `cond.extra`; asked for the reward a, it then samples p(x0 | reward a).
    """

    objective: Objective
    """What is minimised."""
    rewards: Tensor
    """[N], what the reward model says of each image of the source."""
    noise: float = 0.0
    """Standard deviation of the noise on them; a tenth of theirs keeps neighbours comparable."""

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        known = _look_up(self.rewards, batch).to(batch.images)[:, None]
        extra = known + self.noise * draws.normal("pseudo-label", (1,))
        cond = replace(batch.cond, extra=extra)
        return self.objective(denoiser, replace(batch, cond=cond), draws)


@dataclass(frozen=True, eq=False)
class RewardWeighted:
    """An objective in which images count exp(scale r): it trains p(x0) exp(scale r(x0)).

    Reward-weighted regression (Peters and Schaal, ICML 2007). The weights average to 1 over the
    source; where the scale is large, few images decide.
    """

    objective: Objective
    """What is minimised."""
    rewards: Tensor
    """[N], of each image of the source."""
    scale: float
    """How much a unit of reward counts: nats."""

    @cached_property
    def weights(self) -> Tensor:
        """N exp(scale r) / sum exp(scale r): [N]."""
        return len(self.rewards) * (self.scale * self.rewards.double()).softmax(0)

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        out = self.objective(denoiser, batch, draws)
        weight = _look_up(self.weights, batch).to(out.per_sample)
        estimate = out.estimate and out.estimate.scaled(weight)
        return replace(out, per_sample=weight * out.per_sample, estimate=estimate)


def _look_up(table: Tensor, batch: Batch) -> Tensor:
    return table.to(batch.index.device)[batch.index]
