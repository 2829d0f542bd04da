"""Stochastic solvers keep the distribution: exactly on a Gaussian, by sampling on a mixture."""

import math

import pytest
import torch
from commands import refuses
from oracles import TOY, exact_moments, keys, noise_of, noisy
from torch import Tensor

from patchdiffusion.solvers import (
    DDIM,
    Churn,
    EulerMaruyama,
    Heun,
    Integrator,
    Midpoint,
    Ralston,
    SDEDPMpp1,
    SDEDPMpp2M,
    ancestral,
    brownian,
    euler_maruyama,
    heun,
    sde_dpmpp_2m,
    solve,
)
from patchdiffusion.solvers.schedules import flow_uniform, karras

# ---- Moments on a Gaussian, without sampling ----


@pytest.mark.parametrize(
    ("solver", "order", "most"),
    [
        (ancestral, 1, 0.016),
        (DDIM(eta=0.5), 1, 0.010),
        (SDEDPMpp1(eta=0.5), 1, 0.012),
        (euler_maruyama, 1, 0.002),
        (EulerMaruyama(eta=3.0), 1, 0.006),
        (EulerMaruyama(diffusion="constant"), 1, 0.003),
        (EulerMaruyama(path="ve"), 1, 0.007),
        (EulerMaruyama(path="vp"), 1, 0.003),
        (sde_dpmpp_2m, 2, 6e-4),
        (SDEDPMpp2M(eta=0.5), 2, 4e-4),
        (Heun(churn=Churn(amount=20.0)), 2, 1e-3),
        (Midpoint(churn=Churn(amount=20.0)), 2, 1e-3),
        (Ralston(churn=Churn(amount=20.0)), 2, 1e-3),
    ],
)
def test_marginal_of_a_gaussian(solver: Integrator, order: int, most: float) -> None:
    """The end is N(0.3, 0.5^2) up to an error of the order of the solver."""
    (_, few), (mean, many) = (exact_moments(solver, karras(n)) for n in (100, 200))
    assert abs(mean - 0.3) < 1e-3
    assert abs(many - 0.5) < most
    assert order - 0.25 < math.log2(abs(few - 0.5) / abs(many - 0.5)) < order + 0.7


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_marginal_where_steps_are_spaced_in_flow_time(eta: float) -> None:
    sigmas = flow_uniform(200, 0.002, 80.0)
    for solver, most in ((EulerMaruyama, 2e-3), (SDEDPMpp2M, 1.1e-3)):
        assert abs(exact_moments(solver(eta=eta), sigmas)[1] - 0.5) < most


# ---- A mixture ----


def truth() -> tuple[Tensor, Tensor]:
    mean = TOY.weights @ TOY.means
    second = sum(
        w * (torch.outer(m, m) + v * torch.eye(2))
        for w, m, v in zip(TOY.weights, TOY.means, (0.15**2, 0.25**2, 0.2**2), strict=True)
    )
    return mean, second - torch.outer(mean, mean)


@pytest.mark.parametrize(
    "solver",
    [
        Heun(churn=Churn(amount=40.0)),
        ancestral,
        sde_dpmpp_2m,
        SDEDPMpp2M(eta=0.5),
        euler_maruyama,
        EulerMaruyama(diffusion="constant"),
    ],
)
def test_marginal_of_a_mixture(solver: Integrator) -> None:
    """Mean and covariance stay those of the mixture however much noise is replaced."""
    count, sigmas = 3000, karras(80, 0.01, 10.0)
    noise = noise_of(keys(count), (2,), torch.float64)
    end = solve(solver, TOY, noisy(count), sigmas, noise=noise)
    mean, cov = truth()
    assert float((end.mean(0) - mean).abs().max()) < 4 * math.sqrt(float(cov.max()) / count)
    assert float((end.T.cov() - cov).abs().max()) < 0.04
    plain = solve(heun, TOY, noisy(count), sigmas)
    assert float((end - plain).norm(dim=1).mean()) > 0.3  # and it did something


# ---- One path for all grids ----


def increments(sigmas: Tensor, count: int = 4000) -> Tensor:
    noise = brownian(keys(count), (2,), sigmas, torch.float64)
    return torch.stack([noise(i) for i in range(len(sigmas) - 1)])


def test_brownian_increments_are_standard_normal_and_independent() -> None:
    z = increments(karras(6, 0.01, 80.0)[:-1]).flatten(1)
    correlation = z @ z.T / z.shape[1]
    assert torch.allclose(correlation, torch.eye(5).double(), rtol=0, atol=4 / math.sqrt(8000))
    assert float(z.mean().abs()) < 4 / math.sqrt(40000)
    kurtosis = float(z.pow(4).mean())
    assert kurtosis == pytest.approx(3, abs=0.1)


def test_a_coarse_grid_has_the_path_of_a_fine_one() -> None:
    fine = karras(13, 0.01, 80.0)[:-1]
    width = fine.log().diff().abs().sqrt()[:, None, None]
    parts = increments(fine, 20) * width
    coarse = fine[::4]
    whole = increments(coarse, 20) * coarse.log().diff().abs().sqrt()[:, None, None]
    assert torch.allclose(parts.reshape(3, 4, 20, 2).sum(1), whole, rtol=0, atol=1e-12)


def test_more_steps_give_the_same_image_on_a_brownian_path() -> None:
    def end(steps: int, same: bool) -> Tensor:
        sigmas = karras(steps, 0.05, 10.0)
        path = brownian(keys(50), (2,), sigmas, torch.float64)
        noise = path if same else noise_of(keys(50), (2,), torch.float64)
        return solve(sde_dpmpp_2m, TOY, noisy(50), sigmas, noise=noise)

    kept, lost = (
        float((end(40, same) - end(80, same)).norm(dim=1).median()) for same in (True, False)
    )
    assert kept < 0.1 * lost


def test_brownian_paths_end_somewhere() -> None:
    with refuses(10000, 20000):
        brownian(keys(2), (2,), torch.tensor([2e4, 1.0, 0.0]))
    with refuses(0.0001, "5e-05"):
        brownian(keys(2), (2,), torch.tensor([1.0, 5e-5, 0.0]))
    assert brownian(keys(2), (3,), karras(4))(3).isfinite().all()  # the step to 0
