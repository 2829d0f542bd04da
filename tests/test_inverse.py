"""Inverse problems: guides that are exact on Gaussian fields, operators and their transposes."""

import math

import pytest
import torch
from commands import refuses
from torch import Tensor

from patchdiffusion import SamplerConfig, rng
from patchdiffusion.accel.tiles import Tiles
from patchdiffusion.analytic import GaussianField
from patchdiffusion.apps.restore import posterior_sample
from patchdiffusion.guidance.inverse import Descend, Fit, Project, conjugate_gradients, psnr
from patchdiffusion.guidance.operators import (
    Blur,
    Downsample,
    Mask,
    Operator,
    Tomography,
    transposed,
)
from patchdiffusion.guidance.reward import GradientGuidance, Measurement
from patchdiffusion.solvers import heun, solve
from patchdiffusion.solvers.schedules import karras

SIDE = 8
FIELD = GaussianField((SIDE, SIDE))
KNOWN = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(0)) < 0.5
OPERATORS: list[Operator] = [
    Downsample(factor=2),
    Blur(std=1.0),
    Tomography(angles=5),
    Mask(KNOWN),
]


def normal(count: int, *shape: int, name: str = "x") -> Tensor:
    return rng.normal(rng.keys(0, name, 0, torch.arange(count)), shape, torch.float64)


def matrix(operator: Operator) -> Tensor:
    """The operator on one channel as a matrix [m, n]."""
    pixels = torch.eye(SIDE**2, dtype=torch.float64).view(-1, 1, SIDE, SIDE)
    return operator(pixels).flatten(1).mT


def posterior_mean(x: Tensor, sigma: float, a: Tensor, y: Tensor, noise: float) -> Tensor:
    """E[x0 | x, y] of the field by the normal equations, an independent computation: [B, n]."""
    precision = torch.linalg.inv(FIELD.matrix) + torch.eye(SIDE**2) / sigma**2
    precision = precision + a.mT @ a / noise**2
    right = x.flatten(1) / sigma**2 + y.flatten(1) @ a / noise**2
    return torch.linalg.solve(precision, right.mT).mT


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: type(o).__name__)
class TestOperators:
    def test_the_transpose_is_that_of_the_matrix(self, operator: Operator) -> None:
        x = normal(3, 1, SIDE, SIDE)
        y = operator(x)
        torch.testing.assert_close(y.flatten(1), x.flatten(1) @ matrix(operator).mT)
        back = transposed(operator, y, x)
        torch.testing.assert_close(back.flatten(1), y.flatten(1) @ matrix(operator))

    def test_channels_are_measured_alike_and_sizes_are_known(self, operator: Operator) -> None:
        x = normal(2, 3, SIDE, SIDE)
        y = operator(x)
        torch.testing.assert_close(y[:, 1:2], operator(x[:, 1:2]))
        assert operator.image_size(tuple(y.shape[2:])) == (SIDE, SIDE)
        assert operator.guess(y).shape == x.shape
        torch.testing.assert_close(operator.from_picture(operator.to_picture(y)), y)

    @pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
    def test_fit_is_the_posterior_of_a_gaussian_field(
        self, operator: Operator, sigma: float
    ) -> None:
        clean = FIELD.sample(rng.keys(0, "clean", 0, torch.arange(3)))
        x = clean + sigma * normal(3, 1, SIDE, SIDE)
        y = operator(clean) + 0.1 * normal(3, *operator(clean).shape[1:], name="error")
        guide = Fit(operator=operator, y=y, noise=0.1, iterations=100)
        guided = GradientGuidance(FIELD, guide)(x, sigma)
        exact = posterior_mean(x, sigma, matrix(operator), y, 0.1)
        torch.testing.assert_close(guided.flatten(1), exact, rtol=1e-6, atol=1e-8)


def test_fit_equals_the_measurement_of_few_numbers() -> None:
    operator, x = Downsample(factor=4), normal(2, 1, SIDE, SIDE)
    y = torch.full((1, 1, 2, 2), 0.3, dtype=torch.float64)
    fit = Fit(operator=operator, y=y, noise=0.2, iterations=4)  # as many as numbers
    measured = Measurement(measure=lambda x: operator(x).flatten(1), value=y.flatten(), noise=0.2)
    a, b = (GradientGuidance(FIELD, guide)(x, 0.7) for guide in (fit, measured))
    torch.testing.assert_close(a, b)


def test_samples_have_the_posterior_of_the_field() -> None:
    operator = Downsample(factor=2)
    clean = FIELD.sample(rng.keys(3, "clean", 0, torch.arange(1)))
    y = operator(clean)
    guided = GradientGuidance(FIELD, Fit(operator=operator, y=y, noise=0.1, iterations=12))
    count, sigmas = 400, karras(24, 0.01, 40)
    x = solve(heun, guided, sigmas[0] * normal(count, 1, SIDE, SIDE, name="start"), sigmas)
    exact = posterior_mean(
        torch.zeros(1, SIDE**2, dtype=torch.float64), 1e6, matrix(operator), y, 0.1
    )
    a = matrix(operator)
    covariance = torch.linalg.inv(torch.linalg.inv(FIELD.matrix) + a.mT @ a / 0.01)
    std = covariance.diagonal().sqrt()
    assert ((x.flatten(1).mean(0) - exact[0]).abs() / std * math.sqrt(count)).max() < 4.5
    torch.testing.assert_close(x.flatten(1).std(0), std, rtol=0.15, atol=0.0)


@pytest.mark.parametrize("operator", [OPERATORS[0], OPERATORS[3]], ids=["means", "pixels"])
def test_projection_replaces_what_is_measured(operator: Operator) -> None:
    x = normal(2, 1, SIDE, SIDE)
    y = operator(FIELD.sample(rng.keys(0, "clean", 0, torch.arange(2))))
    guided = GradientGuidance(FIELD, Project(operator=operator, y=y), jacobian=False)(x, 1.0)
    torch.testing.assert_close(operator(guided), y)
    change = guided - FIELD(x, 1.0)  # has no part that is not measured
    torch.testing.assert_close(change, transposed(operator, operator(change), x) * _gain(operator))


def _gain(operator: Operator) -> int:
    """A A^T = I / gain for means of disjoint squares, and for pixels."""
    return operator.factor**2 if isinstance(operator, Downsample) else 1


def test_descent_is_the_fit_with_an_exact_estimate() -> None:
    """Far below the noise of the measurement C is nothing to it."""
    operator, x = Blur(std=1.0), normal(2, 1, SIDE, SIDE)
    y = operator(x) + 0.01
    fit = Fit(operator=operator, y=y, noise=1.0, iterations=10)
    descend = Descend(operator=operator, y=y, noise=1.0)
    a, b = (GradientGuidance(FIELD, guide)(x, 0.02) for guide in (fit, descend))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_independent_pixels_have_the_covariance_of_one_pixel() -> None:
    y = torch.full((1, 1, SIDE, SIDE), 0.5, dtype=torch.float64)
    guide = Fit(operator=lambda x: x, y=y, noise=0.3, iterations=1)
    guided = GradientGuidance(
        lambda x, sigma, cond=None, **_: 0 * x, guide, jacobian=False, data_std=0.5
    )
    c = 1 / (1 / 2.0**2 + 1 / 0.5**2)
    torch.testing.assert_close(guided(torch.zeros_like(y), 2.0), y * c / (c + 0.09))


def test_conjugate_gradients_solve_each_sample_by_itself() -> None:
    roots = normal(3, 5, 5)
    matrices = roots @ roots.mT + torch.eye(5)
    right = normal(3, 5, name="right")
    right[1] = 0
    u = conjugate_gradients(lambda v: torch.einsum("bij,bj->bi", matrices, v), right, 5)
    torch.testing.assert_close(u, torch.linalg.solve(matrices, right))


def test_back_projection_and_bicubic_guesses_are_better_than_nothing() -> None:
    yy, xx = torch.meshgrid(*(torch.linspace(-1, 1, 32),) * 2, indexing="ij")
    x = ((xx - 0.2) ** 2 + yy**2 < 0.3).float()[None, None] - 0.5
    for operator, least in ((Tomography(angles=40), 19), (Downsample(factor=2), 18)):
        assert psnr(operator.guess(operator(x)), x).item() > least > psnr(0 * x, x).item()


def test_bad_numbers_are_refused() -> None:
    x = torch.zeros(1, 1, 9, 8)
    with refuses("factor", "0"):
        Downsample(factor=0)
    with refuses("2", "9x8"):
        Downsample(factor=2)(x)
    with refuses("std", "0"):
        Blur(std=0)
    with refuses("square", "9x8"):
        Tomography()(x)
    with refuses("angles", "20", "9x8"):
        Tomography().image_size((9, 8))
    with refuses("noise", "0"):
        Fit(operator=Blur(), y=x, noise=0)


def test_a_prior_of_windows_at_random_offsets() -> None:
    """Windows that move are a prior of patches (PaDIS): they lose half a dB at most."""
    field = GaussianField((16, 16))
    clean = field.sample(rng.keys(0, "clean", 0, torch.arange(3))).float()
    known = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    operator = Mask(known)
    windows = field.crop((6, 6)), SamplerConfig(canvas=Tiles(window=(6, 6)), steps=12)
    for one in clean:
        y, ratios = operator(one[None]), []
        for denoiser, config in (windows, (field, SamplerConfig(steps=12))):
            made = posterior_sample(
                denoiser, operator, y, seeds=range(8), canvas=(16, 16), config=config
            )
            ratios.append(float(psnr(made.mean(0, keepdim=True), one[None])))
        by_windows, whole = ratios
        assert by_windows > float(psnr(operator.guess(y), one[None])) + 2
        assert by_windows > whole - 0.5
