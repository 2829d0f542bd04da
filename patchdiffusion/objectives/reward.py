"""Training towards a reward measured for few images: pseudo-labels and reward weights.

A small reward model is fitted to the labeled images and predicts the others; the denoiser is then
trained conditioned on the predictions (Yuan et al., arXiv 2307.07055). Rewards are a table over
the images of the source, as they belong to whole images, not to crops.
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
    """A linear reward, <weight, x> + offset."""

    weight: Tensor
    """[*S], the gradient of the reward."""
    offset: Tensor | float = 0.0
    """Reward of the image 0, a scalar."""

    @classmethod
    def fit(cls, images: Tensor, rewards: Tensor, penalty: float) -> "LinearReward":
        """Ridge regression on images [N, *S] and rewards [N]: mean squared error + penalty |w|^2.

        Raises `ValueError` if their numbers differ or the penalty is not positive.
        """
        if rewards.shape != (len(images),) or not penalty > 0:
            raise ValueError(
                f"ridge regression needs one reward for each of {len(images)} images and a "
                f"positive penalty, not {list(rewards.shape)} and {penalty}"
            )
        flat, y = images.flatten(1).double(), rewards.double()
        centered = flat - flat.mean(0)
        gram = centered.mT @ centered / len(flat) + penalty * torch.eye(flat.shape[1]).to(flat)
        weight = torch.linalg.solve(gram, centered.mT @ (y - y.mean()) / len(flat))
        offset = y.mean() - flat.mean(0) @ weight
        dtype = torch.promote_types(images.dtype, torch.float32)  # of 8-bit images, too
        return cls(weight.reshape(images.shape[1:]).to(dtype), offset.to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """Rewards of images x [B, *S]: [B]."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return (x * self.weight.to(x)).flatten(1).sum(1) + self.offset


@dataclass(frozen=True, eq=False)
class PseudoLabeled:
    """An objective conditioned on the reward of each image, with noise, by `cond.extra`.

    The network must read `cond.extra`; conditioned on the reward a, it samples p(x0 | reward a).
    """

    objective: Objective
    """The objective of the conditional denoiser."""
    rewards: Tensor
    """[N], predicted reward of each image of the source."""
    noise: float = 0.0
    """Standard deviation of the noise on the rewards; a tenth of theirs, say, to smooth them."""

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        rewards = _look_up(self.rewards, batch).to(batch.images)[:, None]
        extra = rewards + self.noise * draws.normal("pseudo-label", (1,))
        cond = replace(batch.cond, extra=extra)
        return self.objective(denoiser, replace(batch, cond=cond), draws)


@dataclass(frozen=True, eq=False)
class RewardWeighted:
    """An objective with weight exp(scale r) on each image: it trains p(x0) exp(scale r(x0)).

    Reward-weighted regression (Peters and Schaal, ICML 2007). The weights average to 1 over the
    source; at a large scale a few images dominate.
    """

    objective: Objective
    """The objective that is weighted."""
    rewards: Tensor
    """[N], reward of each image of the source."""
    scale: float
    """Log-weight of a unit of reward, in nats."""

    @cached_property
    def weights(self) -> Tensor:
        """Weight of each image, N exp(scale r) / sum exp(scale r): [N]."""
        return len(self.rewards) * (self.scale * self.rewards.double()).softmax(0)

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        out = self.objective(denoiser, batch, draws)
        weight = _look_up(self.weights, batch).to(out.per_sample)
        estimate = out.estimate and out.estimate.scaled(weight)
        return replace(out, per_sample=weight * out.per_sample, estimate=estimate)


def _look_up(table: Tensor, batch: Batch) -> Tensor:
    return table.to(batch.index.device)[batch.index]
