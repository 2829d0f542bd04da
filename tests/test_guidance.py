"""Classifier-free guidance on distributions for which it is known exactly."""

import math

import pytest
import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.cond import Cond, Step, Tape
from patchdiffusion.denoiser import expand_sigma, per_sample
from patchdiffusion.guidance.cfg import CFG
from patchdiffusion.noise import karras
from patchdiffusion.solvers import heun, solve

TOY = GaussianMixture.toy()


class Two:
    """N(0, std^2) by label: class 0 narrow, no class wide. Counts its calls."""

    conditional = 0.5
    unconditional = 1.0

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.step: Step | None = None

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        step: Step | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        assert cond is not None and cond.labels is not None
        self.batches.append(len(x))
        self.step = step
        var = torch.where(cond.labels < 0, self.unconditional**2, self.conditional**2)
        return per_sample(var / (var + expand_sigma(sigma, x) ** 2), x).to(x) * x


def inputs(count: int = 12) -> tuple[Tensor, Tensor, Cond]:
    key = rng.keys(0, "x", 0, torch.arange(count))
    sigma = 10 ** rng.uniform(key, 1)[:, 0]
    x = rng.normal(key, (2,), torch.float64) * (1 + sigma[:, None])
    return x, sigma, Cond(labels=torch.arange(count) % 3)


def test_weight_1_is_the_denoiser_bit_for_bit_in_one_evaluation() -> None:
    x, sigma, cond = inputs()
    assert torch.equal(CFG(TOY, 1.0)(x, sigma, cond), TOY(x, sigma, cond))
    denoiser = Two()
    CFG(denoiser, 1.0)(x, 1.0, cond)
    assert denoiser.batches == [12]
    assert torch.equal(CFG(TOY, 1.0)(x, sigma), TOY(x, sigma))  # and it needs no labels


def test_weight_0_is_unconditional() -> None:
    x, sigma, cond = inputs()
    assert torch.allclose(CFG(TOY, 0.0)(x, sigma, cond), TOY(x, sigma), atol=1e-14)
    assert not torch.allclose(TOY(x, sigma, cond), TOY(x, sigma), atol=1e-3)


@pytest.mark.parametrize("weight", [0.5, 2.0, 7.5])
def test_extrapolates_from_one_joined_batch(weight: float) -> None:
    x, sigma, cond = inputs()
    null, given = TOY(x, sigma), TOY(x, sigma, cond)
    expected = null + weight * (given - null)
    assert torch.allclose(CFG(TOY, weight)(x, sigma, cond), expected, atol=1e-12)
    assert torch.allclose(CFG(TOY, weight)(x, 2.0, cond)[0], CFG(TOY, weight)(
        x[:1], torch.tensor([2.0]), cond.take(slice(0, 1)))[0])  # fmt: skip
    denoiser, step = Two(), Step(run=0, index=3, stage=1, sigmas=(1.0, 0.0))
    CFG(denoiser, weight)(x, 1.0, cond, step=step)
    assert denoiser.batches == [24] and denoiser.step == step


@pytest.mark.parametrize(("weight", "published"), [(2.0, 0.25), (3.0, 0.125), (5.0, 0.0313)])
def test_guided_gaussian_ends_with_the_known_width(weight: float, published: float) -> None:
    """std = s_c^w s_u^(1 - w), not that of the product of experts."""
    x = 80 * torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    cond = Cond(labels=torch.zeros(2, dtype=torch.int64))
    end = solve(heun, CFG(Two(), weight), x, karras(300), cond=cond)
    start = math.sqrt(80**2 + 0.5**2) ** weight * math.sqrt(80**2 + 1) ** (1 - weight)
    std = end[:, 0] / (x[:, 0] / start)
    assert std.tolist() == pytest.approx([0.5**weight] * 2, rel=5e-3)
    assert 0.5**weight == pytest.approx(published, abs=1e-4)
    assert abs(float(std[0]) - 1 / math.sqrt(weight / 0.25 + 1 - weight)) > 0.05


def test_guidance_needs_labels_or_context() -> None:
    x, sigma, _ = inputs()
    for cond in (None, Cond(), Cond(extra=torch.ones(12, 1))):
        with pytest.raises(ValueError, match=r"guidance weight 3\.0 needs class labels"):
            CFG(TOY, 3.0)(x, sigma, cond)


@pytest.mark.parametrize("weight", [-0.5, math.inf, math.nan])
def test_impossible_weight_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="must be >= 0 and finite"):
        CFG(TOY, weight)


def test_everything_else_in_the_condition_is_the_same_in_both_halves() -> None:
    class Spy(Two):
        def __call__(
            self,
            x: Tensor,
            sigma: Tensor | float,
            cond: Cond | None = None,
            *,
            step: Step | None = None,
            tape: Tape | None = None,
        ) -> Tensor:
            assert cond is not None
            self.cond = cond
            return super().__call__(x, sigma, cond, step=step, tape=tape)

    spy, x = Spy(), torch.ones(2, 1, 3, 3)
    pos, context = torch.rand(2, 2, 3, 3, generator=torch.Generator()), torch.ones(2, 4, 5)
    CFG(spy, 2.0)(x, 1.0, Cond(labels=torch.tensor([0, 1]), pos=pos, context=context))
    assert spy.cond.pos is not None and torch.equal(spy.cond.pos, torch.cat([pos, pos]))
    assert spy.cond.labels is not None and spy.cond.labels.tolist() == [0, 1, -1, -1]
    assert spy.cond.context is not None
    assert spy.cond.context.sum((1, 2)).tolist() == [20, 20, 0, 0]
