"""Optimization of a reward over samples: rounds of sampling, guided by the reward's gradient.

Guo et al., "Gradient Guidance for Diffusion Models: An Optimization Perspective" (arXiv
2404.14743): the gradient is evaluated at one point per round, the mean of the samples, and samples
stay on the support of the data, because the guidance is C g and not g.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from patchdiffusion.denoiser import Denoiser
from patchdiffusion.guidance.reward import Guide, Reward, Tilt, gradient, rewards_of
from patchdiffusion.objectives.reward import LinearReward


@dataclass(frozen=True)
class Round:
    """Samples of a round, with their rewards and the gradient that guided them."""

    samples: Tensor
    """[N, *S], clean images."""
    rewards: Tensor
    """[N], their rewards."""
    direction: Tensor
    """[*S], the gradient that guided them; 0 in the first round."""


def optimize(
    denoiser: Denoiser,
    reward: Reward,
    generate: Callable[[Denoiser, int], Tensor],
    guidance: Callable[[Denoiser, Guide], Denoiser],
    *,
    rounds: int,
    step: float = 1.0,
    finetune: Callable[[Denoiser, Round], Denoiser] | None = None,
) -> Iterator[Round]:
    """Iterate over rounds: the first unguided, each later one guided by the gradient at the mean
    of the one before.

    `generate` samples [N, *S] from a denoiser, with noise that may depend on the round. `guidance`
    wraps the denoiser, as `partial(GradientGuidance, scale=2.0)`. For N(m, C) and a concave reward
    the mean converges to the maximum of r(z) - (z - m)^T C^-1 (z - m) / (2 scale) if scale C times
    the curvature of r is less than 1; a smaller `step`, the share of the new gradient in the
    direction, damps it if it is more. `finetune` trains the denoiser on a round, which moves m
    towards the maximum of r itself. Raises `ValueError` for impossible numbers.
    """
    if rounds < 1 or not 0 < step <= 1:
        raise ValueError(f"optimize needs rounds >= 1 and 0 < step <= 1, not {rounds}, {step}")
    samples = generate(denoiser, 0)
    direction = torch.zeros_like(samples[0])
    yield (last := Round(samples, rewards_of(reward, samples), direction))
    for k in range(1, rounds + 1):
        (slope,) = gradient(reward, last.samples.mean(0, keepdim=True))
        direction = direction + step * (slope - direction)
        samples = generate(guidance(denoiser, Tilt(LinearReward(direction))), k)
        yield (last := Round(samples, rewards_of(reward, samples), direction))
        if finetune is not None:
            denoiser = finetune(denoiser, last)
