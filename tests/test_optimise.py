"""Training towards a reward, and the loop that optimises it."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from commands import refuses
from oracles import draws, keys
from torch import Tensor, nn

from patchdiffusion import rng
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.apps.optimise import Round, optimize
from patchdiffusion.cond import Cond, Tape
from patchdiffusion.denoiser import Denoiser, NetDenoiser
from patchdiffusion.guidance.reward import GradientGuidance, Measurement
from patchdiffusion.losses import Batch, DenoisingLoss, LossOut
from patchdiffusion.noise import LogNormal
from patchdiffusion.objectives.reward import LinearReward, PseudoLabeled, RewardWeighted
from patchdiffusion.parameterisation import EDM
from patchdiffusion.solvers import heun, solve
from patchdiffusion.solvers.schedules import karras

# ---- The loop, on a Gaussian and a quadratic reward ----

MEAN = torch.tensor([0.2, -0.4], dtype=torch.float64)
COV = torch.tensor([[0.6, 0.2], [0.2, 0.4]], dtype=torch.float64)
GAUSSIAN = GaussianMixture(MEAN[None], COV[None])
GOAL = torch.tensor([1.5, 1.0], dtype=torch.float64)
CURVATURE = torch.diag(torch.tensor([1.0, 0.8], dtype=torch.float64))


def quadratic(x: Tensor) -> Tensor:
    return -((x - GOAL) @ CURVATURE * (x - GOAL)).sum(1) / 2


def generate(denoiser: Denoiser, k: int) -> Tensor:
    """Pairs of opposite noise at so high a level that the mean of samples has no error."""
    z = rng.normal(keys(20, f"round {k}"), (2,), torch.float64)
    return solve(heun, denoiser, 1e5 * torch.cat([z, -z]), karras(50, 0.002, 1e5))


def guidance(scale: float) -> partial[GradientGuidance]:
    return partial(GradientGuidance, scale=scale)


def means(rounds: list[Round]) -> Tensor:
    return torch.stack([r.samples.mean(0) for r in rounds])


def regularised(scale: float) -> Tensor:
    """The maximum of the reward minus (z - m)^T C^-1 (z - m) / (2 scale)."""
    pull = torch.linalg.inv(COV) / scale
    return torch.linalg.solve(pull + CURVATURE, pull @ MEAN + CURVATURE @ GOAL)


def test_rounds_follow_the_gradient_at_the_mean() -> None:
    """Round 0 is the data, round k + 1 is N(m + scale C grad r(z_k), C)."""
    found = means(list(optimize(GAUSSIAN, quadratic, generate, guidance(0.3), rounds=3)))
    expected = [MEAN]
    for _ in range(3):
        expected.append(MEAN + 0.3 * COV @ CURVATURE @ (GOAL - expected[-1]))
    assert torch.allclose(found, torch.stack(expected), rtol=0, atol=2e-3)


def test_converges_to_the_regularised_optimum() -> None:
    rounds = list(optimize(GAUSSIAN, quadratic, generate, guidance(0.5), rounds=10))
    optimum = regularised(0.5)
    assert float((means(rounds)[-1] - optimum).abs().max()) < 2e-3
    assert float((optimum - GOAL).norm()) > 0.3  # which is not the optimum of the reward
    rewards = [float(r.rewards.mean()) for r in rounds]
    assert rewards[-1] > rewards[0] + 0.5
    assert torch.equal(rounds[-1].rewards, quadratic(rounds[-1].samples))


def test_a_smaller_step_converges_where_whole_steps_do_not() -> None:
    optimum = regularised(4.0)
    whole = means(list(optimize(GAUSSIAN, quadratic, generate, guidance(4.0), rounds=8)))
    assert float((whole[-1] - optimum).norm()) > 10
    damped = means(
        list(optimize(GAUSSIAN, quadratic, generate, guidance(4.0), rounds=12, step=0.2))
    )
    assert float((damped[-1] - optimum).norm()) < 0.02


def test_fine_tuning_moves_on_to_the_optimum_of_the_reward() -> None:
    seen = []

    def finetune(denoiser: Denoiser, last: Round) -> Denoiser:
        seen.append(last)
        return GaussianMixture(last.samples.mean(0)[None], COV[None])

    run = optimize(GAUSSIAN, quadratic, generate, guidance(1.0), rounds=25, finetune=finetune)
    rounds = list(run)
    assert all(a is b for a, b in zip(seen, rounds[1:], strict=True))
    assert float((means(rounds)[-1] - GOAL).norm()) < 0.02


def test_impossible_loops_are_refused() -> None:
    for rounds, step in ((0, 1.0), (3, 0.0), (3, 1.5)):
        run = optimize(GAUSSIAN, quadratic, generate, guidance(1.0), rounds=rounds, step=step)
        with refuses("rounds", "step"):
            next(run)


# ---- Rewards that few images have taught ----


def test_ridge_regression() -> None:
    """The same as least squares with a row sqrt(penalty N) for each weight, none for the offset."""
    x = rng.normal(keys(12), (2, 4), torch.float64) + 0.5
    y = rng.normal(keys(12, "y"), (), torch.float64)
    found = LinearReward.fit(x, y, 0.1)
    rows = torch.cat([x.flatten(1), torch.ones(12, 1).double()], dim=1)
    penalty = torch.cat([torch.eye(8), torch.zeros(8, 1)], dim=1).double() * (0.1 * 12) ** 0.5
    exact = torch.linalg.lstsq(
        torch.cat([rows, penalty]), torch.cat([y, torch.zeros(8).double()])
    ).solution
    assert torch.allclose(found.weight.flatten(), exact[:8], atol=1e-12)
    assert float(found.offset) == pytest.approx(float(exact[8]), abs=1e-12)
    assert torch.allclose(found(x), rows @ exact, atol=1e-12)
    assert found.weight.shape == (2, 4)
    levels = (x * 40 + 128).to(torch.uint8)  # as a pack has them
    for images in (levels, levels.float()):
        told = LinearReward.fit(images, y, 0.1)(images)
        assert float((told - y).square().mean()) < 0.7 * float(y.var(correction=0))
    assert torch.allclose(LinearReward.fit(levels, y, 0.1)(levels), told, atol=1e-5)
    for rewards, penalty in ((y[:5], 0.1), (y, 0.0)):
        with refuses("reward", 12):
            LinearReward.fit(x, rewards, penalty)


# ---- Objectives ----


def batch_of(index: Tensor, images: Tensor, law: LogNormal | None = None) -> Batch:
    none = torch.zeros(len(index))
    box = none.long()[:, None].expand(-1, 4)
    return Batch(images[index], Cond(), index, box, none.bool(), law or LogNormal())


def test_pseudo_labels_reach_the_denoiser() -> None:
    seen = []

    def objective(denoiser: Denoiser, batch: Batch, draws: rng.Draws) -> LossOut:
        seen.append(batch.cond)
        return LossOut(per_sample=batch.images.flatten(1).mean(1))

    images, rewards = torch.rand(9, 3, generator=torch.Generator()), torch.arange(9.0)
    index = torch.tensor([7, 2, 2])
    batch = replace(batch_of(index, images), cond=Cond(labels=index))
    for noise in (0.0, 0.5, 0.5):
        PseudoLabeled(objective, rewards, noise)(GAUSSIAN, batch, draws(len(index)))
    clean, noisy, again = (c.extra for c in seen)
    assert clean is not None and clean.tolist() == [[7.0], [2.0], [2.0]]
    assert noisy is not None and again is not None and torch.equal(noisy, again)
    many = torch.full((4000,), 3)
    PseudoLabeled(objective, rewards, 0.5)(GAUSSIAN, batch_of(many, images), draws(len(many)))
    extra = seen[-1].extra
    assert float(extra.mean()) == pytest.approx(3, abs=0.04)
    assert float(extra.std()) == pytest.approx(0.5, abs=0.03)
    assert seen[0].labels is index


class Constant(nn.Module):
    """Whatever it sees, the image is theta."""

    def __init__(self, theta: Tensor):
        super().__init__()
        self.theta = nn.Parameter(theta)

    def forward(self, x: Tensor, sigma: Tensor | float, cond: object = None, **_: object) -> Tensor:
        return self.theta.expand_as(x)


def test_reward_weights_train_the_tilted_distribution() -> None:
    """The best constant is the mean of the images under weights exp(scale r)."""

    class Flat:
        def __call__(self, sigma: Tensor) -> Tensor:
            return torch.ones_like(sigma)

    images = rng.normal(keys(50), (3,))
    reward = images[:, 0]
    tilted = (2.0 * reward).softmax(0) @ images
    plain = DenoisingLoss(weighting=Flat())
    weighted = RewardWeighted(plain, reward, 2.0)
    index = torch.arange(50)

    def slope(objective: DenoisingLoss | RewardWeighted, theta: Tensor) -> Tensor:
        denoiser = Constant(theta.clone())
        objective(denoiser, batch_of(index, images), draws(len(index))).per_sample.mean().backward()
        assert denoiser.theta.grad is not None
        return denoiser.theta.grad

    assert float(slope(weighted, tilted).abs().max()) < 1e-6
    assert float(slope(plain, images.mean(0)).abs().max()) < 1e-6
    assert float(slope(plain, tilted).norm()) > 0.1
    neutral = RewardWeighted(plain, reward, 0.0)
    assert torch.equal(slope(neutral, tilted), slope(plain, tilted))
    assert float(weighted.weights.mean()) == pytest.approx(1)


# ---- Reward-directed generation in 16 dimensions, data on a plane ----

N, LABELLED = 5000, 200
BASIS = torch.linalg.qr(rng.normal(keys(16, "basis"), (2,))).Q
THETA = BASIS @ torch.tensor([0.8, 0.6])


def support(x: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of x on and off the plane of the data."""
    on = x @ BASIS @ BASIS.T
    return on, x - on


def true_reward(x: Tensor) -> Tensor:
    """Known of few images only: falls off the support."""
    return x @ THETA - 5 * support(x)[1].square().sum(1)


def data() -> tuple[Tensor, LinearReward]:
    """Images, uniform on a disc, and what 200 noisy rewards teach about all of them."""
    u = rng.uniform(keys(N, "u"), 2).float()
    radius, angle = u[:, :1].sqrt(), 2 * torch.pi * u[:, 1:]
    images = radius * torch.cat([angle.cos(), angle.sin()], dim=1) @ BASIS.T
    labels = true_reward(images) + 0.1 * rng.normal(keys(N, "label"), ())
    return images, LinearReward.fit(images[:LABELLED], labels[:LABELLED], 0.01)


def test_a_target_for_the_learned_reward_is_reached_without_training() -> None:
    images, learned = data()
    law = GaussianMixture(images.mean(0)[None], images.double().T.cov()[None])
    x = 80 * rng.normal(keys(500, "start"), (16,))
    for target in (-0.5, 0.0, 0.5):
        guide = Measurement(measure=learned, value=target, noise=0.05)
        found = solve(heun, GradientGuidance(law, guide), x, karras(20))
        assert float(true_reward(found).mean()) == pytest.approx(target, abs=0.12)
        assert float(support(found)[1].norm(dim=1).max()) < 1e-3


class Small(nn.Module):
    """A network of x, noise level and `cond.extra` that cannot extrapolate: it saturates."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(a, 96) for a in (18, 96, 96))
        self.out = nn.Linear(96, 16)
        for p in self.parameters():
            scale = p.shape[-1] ** -0.5 if p.ndim == 2 else 0.0
            p.data = torch.randn(p.shape, generator=generator) * scale

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        assert cond.extra is not None
        h = torch.cat([x, noise[:, None], cond.extra], dim=1)
        for layer in self.layers:
            h = layer(h).tanh()
        return self.out(h)


@pytest.mark.slow
def test_reward_directed_training_follows_the_target_and_then_leaves_the_support() -> None:
    images, learned = data()
    pseudo = learned(images)
    law = LogNormal(mean=-1.5, std=1.5)
    objective = PseudoLabeled(DenoisingLoss(), pseudo, 0.1 * float(pseudo.std()))
    denoiser = NetDenoiser(Small(), EDM(sigma_data=0.18))
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=2e-3)
    steps = 2500
    for step in range(steps):
        index = rng.integers(keys(256, f"batch {step}"), N)
        loss = objective(denoiser, batch_of(index, images, law), draws(len(index), step))
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optimizer.zero_grad()
        loss.per_sample.mean().backward()
        optimizer.step()

    def achieved(target: float) -> tuple[float, float]:
        x = 20 * rng.normal(keys(400, "start"), (16,))
        cond = Cond(extra=torch.full((400, 1), target))
        end = solve(heun, denoiser, x, karras(30, 0.005, 20.0), cond=cond)
        on, off = support(end)
        ratio = off.norm(dim=1).mean() / on.norm(dim=1).mean()
        return float(true_reward(end).mean()), float(ratio)

    targets = (-0.4, 0.0, 0.4, 0.8, 1.5, 3.0)  # the largest reward of the data is 1
    rewards, ratios = zip(*(achieved(a) for a in targets), strict=True)
    assert (rewards[3] - rewards[0]) / 1.2 == pytest.approx(1, abs=0.2)
    assert rewards[5] < rewards[4] < 1.2
    assert ratios[5] > 2 * max(ratios[:3])
