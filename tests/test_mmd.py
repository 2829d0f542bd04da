"""MMD-DDM: its statistic, its kernels, the chain it trains, and what it refuses to report alone."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch
from commands import refuses
from oracles import Gaussian, Little, batch, draws, normal
from torch import Tensor

from patchdiffusion import recipes
from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.encoders.embed import Embedding, embedding, pictures, random_features
from patchdiffusion.encoders.features import extractor
from patchdiffusion.encoders.maps import NoImages
from patchdiffusion.objectives.chain import EulerMap, euler_step
from patchdiffusion.objectives.discrepancy import (
    KernelName,
    cubic,
    energy,
    kernel_of,
    median_distance,
    mmd2,
    rbf,
)
from patchdiffusion.objectives.mmd import Matched, MMDConfig, MMDLoss
from patchdiffusion.parameterisation import EDM
from patchdiffusion.plans import WHOLE
from patchdiffusion.solvers import euler, solve
from patchdiffusion.solvers.schedules import karras
from patchdiffusion.system.dist import Team
from patchdiffusion.system.place import Place


class Means:
    """Mean and deviation of each color, an extractor: [B, 3, H, W] -> [B, 6]."""

    def __call__(self, images: Tensor) -> Tensor:
        x = images.float().flatten(2)
        return torch.cat([x.mean(2), x.std(2)], dim=1)


PIXELS = Embedding("pixels", "pixels", lambda x: x.flatten(1))
TWICE = Embedding("twice", "twice", lambda x: 2 * x.flatten(1))


# ---- The statistic ----


@pytest.mark.parametrize("name", get_args(KernelName))
def test_it_is_unbiased(name: KernelName) -> None:
    """Of samples of one law it is 0 on average, and often negative."""
    kernel = kernel_of(name, normal(64, (3,), "kernel"))
    values = torch.stack(
        [mmd2(normal(12, (3,), f"a {i}"), normal(9, (3,), f"b {i}"), kernel) for i in range(400)]
    )
    assert abs(float(values.mean())) < 3 * float(values.std()) / 20
    assert float((values < 0).double().mean()) > 0.3


@pytest.mark.parametrize("name", get_args(KernelName))
def test_the_statistic_by_a_double_loop(name: KernelName) -> None:
    a, b = normal(5, (3,), "a"), normal(7, (3,), "b")
    scale = median_distance(b)

    def k(x: Tensor, y: Tensor) -> float:
        if name == "cubic":
            return float((x @ y) / 3 + 1) ** 3
        gap = float((x - y).norm())
        if name == "energy":
            return -gap
        widths = [scale * f for f in (0.25, 0.5, 1, 2, 4)]
        return sum(float(torch.exp(torch.tensor(-(gap**2) / (2 * h**2)))) for h in widths) / 5

    inside = [
        sum(k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j)
        / (len(x) * (len(x) - 1))
        for x in (a, b)
    ]
    between = sum(k(x, y) for x in a for y in b) / 35
    found = float(mmd2(a, b, kernel_of(name, b)))
    assert found == pytest.approx(sum(inside) - 2 * between, rel=1e-5)
    with refuses("2 samples", 1):
        mmd2(a[:1], b, cubic)


def test_a_median_leaves_out_each_sample_itself() -> None:
    assert median_distance(torch.tensor([[0.0], [3.0]])) == 3
    assert median_distance(torch.zeros(3, 1)) > 0  # no division by zero
    assert torch.isfinite(rbf(torch.zeros(2, 1), torch.zeros(2, 1), [1.0])).all()


def test_energy_has_a_gradient_where_samples_agree() -> None:
    a = torch.zeros(3, 2, requires_grad=True)
    mmd2(a, torch.zeros(4, 2), energy).backward()
    assert a.grad is not None and bool((a.grad == 0).all())


def test_the_cubic_kernel_sees_three_moments_only() -> None:
    """Two laws with the same first three moments differ for the energy kernel alone."""
    u = torch.rand(1500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    two = torch.where(u < 0.5, -1.0, 1.0)
    three = torch.where(u < 1 / 8, -2.0, torch.where(u < 7 / 8, 0.0, 2.0)).flip(0)
    same = mmd2(two[:750], two[750:], cubic)
    assert abs(float(mmd2(two, three, cubic)) - float(same)) < 0.1
    assert float(mmd2(two, three, energy)) > 0.3


def test_the_minimum_over_gaussians_is_the_gaussian_of_the_data() -> None:
    """D(x) = m + (s^2 / (s^2 + sigma^2)) (x - m) of other m and s, by a chain of 3 steps."""
    parameters = torch.tensor([-0.5, 0.0], requires_grad=True)
    real = 0.4 + 0.7 * normal(1024, (1,), "real").float()

    def denoiser(x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        gain = (2 * parameters[1]).exp() / ((2 * parameters[1]).exp() + sigma**2)
        return parameters[0] + gain[:, None] * (x - parameters[0])

    config = MMDConfig(steps=(3,), kernel="cubic", sigma_max=8.0)
    space = Matched.of(PIXELS, "cubic", real)
    loss = MMDLoss(config=config, trained=space, held_out=space)
    optimizer = torch.optim.Adam([parameters], lr=0.05)
    typed: Any = denoiser
    for step in range(150):
        optimizer.zero_grad()
        loss(typed, batch(torch.zeros(512, 1)), draws(512, step)).per_sample.mean().backward()
        optimizer.step()
    with torch.no_grad():
        images = loss.generate(typed, normal(4000, (1,), "x").float(), 3, Cond())
    assert float(images.mean()) == pytest.approx(float(real.mean()), abs=0.07)
    assert float(images.std()) == pytest.approx(float(real.std()), abs=0.07)


# ---- The chain ----


def test_jumps_are_steps_of_euler() -> None:
    x, teacher = 80 * normal(10), Gaussian()
    flow_map = EulerMap(denoiser=teacher)
    times = flow_map.times(4)
    assert times[0] == 80 and times[-1] == 0 and torch.allclose(times[:-1], karras(5)[:4].double())
    found = x
    for t, s in itertools.pairwise(times):
        found = flow_map(found, t, s)
    torch.testing.assert_close(found, solve(euler, teacher, x, times), rtol=0, atol=1e-9)
    assert torch.equal(euler_step(teacher, x, 2.0, 2.0), x)
    with refuses("steps", 0):
        flow_map.times(0)


def gradient(**changes: Any) -> tuple[Tensor, Tensor]:
    network = Little()
    config = MMDConfig(steps=(3,), bank=0, **changes)
    space = Matched.of(PIXELS, "energy", None)
    loss = MMDLoss(config=config, trained=space, held_out=Matched.of(TWICE, "energy", None))
    cond = Cond(seed=torch.arange(8), labels=torch.zeros(8, dtype=torch.int64))
    out = loss(NetDenoiser(network, EDM()), batch(normal(8, (1, 2, 2)).float(), cond), draws(8))
    out.per_sample.mean().backward()
    (found,) = (p.grad for p in network.parameters())
    assert found is not None
    return found, out.per_sample


def test_steps_that_are_computed_again_have_the_same_gradient() -> None:
    (a, one), (b, two) = gradient(checkpoint=True), gradient(checkpoint=False)
    assert torch.equal(one, two) and bool(a.any())
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_the_reported_loss_is_never_near_zero() -> None:
    space = Matched.of(PIXELS, "energy", normal(64, (4,)).float())
    loss = MMDLoss(config=MMDConfig(steps=(1, 2)), trained=space, held_out=space)
    denoiser: Any = Gaussian(0.0, 1.0)
    for step, calls in ((0, 1), (1, 3)):  # one step of the sampler, then two
        out = loss(denoiser, batch(torch.zeros(6, 4)), draws(6, step))
        assert out.reported is not None and float(out.reported.min()) > 0.5
        assert len(denoiser.batches) == calls
        assert list(out.scalars) == ["mmd pixels", "mmd pixels (held out)"]


class Two(Team):
    """Two processes, of which the other one has these features."""

    def __init__(self, rank: int, other: Tensor):
        super().__init__(Place(rank, 2))
        self.other = other

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other] if self.place.rank == 0 else [self.other, value]


def test_processes_compare_all_their_images_together() -> None:
    """The mean of their gradients is that of one process with all images."""
    real = normal(40, (2,), "real").float()
    space = Matched.of(PIXELS, "energy", real)
    weight = torch.tensor(1.3, requires_grad=True)

    def denoiser(x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        return weight * x / 80 + x.roll(1, -1) / 100

    typed: Any = denoiser
    config = MMDConfig(steps=(1,))
    whole = MMDLoss(config=config, trained=space, held_out=space)
    every = draws(8)
    out = whole(typed, batch(torch.zeros(8, 2)), every)
    (expected,) = torch.autograd.grad(out.per_sample.mean(), [weight])

    generated = whole.generate(typed, every.normal("noise", (2,)), 1, Cond()).detach()
    gradients, values = [], []
    for rank in range(2):
        own = slice(4 * rank, 4 * rank + 4)
        part = replace(every, index=every.index[own], rank=every.rank[own])
        other = generated[4 * (1 - rank) : 4 * (1 - rank) + 4]
        loss = replace(whole, team=Two(rank, other))
        found = loss(typed, batch(torch.zeros(4, 2)), part)
        values.append(float(found.per_sample[0].detach()))
        gradients.append(torch.autograd.grad(found.per_sample.mean(), [weight])[0])
    assert values == pytest.approx([float(out.per_sample[0].detach())] * 2, rel=1e-5)
    torch.testing.assert_close(sum(gradients) / 2, expected, rtol=1e-4, atol=1e-6)


# ---- Features ----


def test_saturated_pixels_have_a_gradient() -> None:
    x = torch.tensor([[[[-3.0, 0.0], [1.0, 2.0]]]], requires_grad=True)
    found = pictures(x)
    assert found.shape == (1, 2, 2, 3)
    assert found[0, :, :, 0].tolist() == [[0.0, 127.5], [255.0, 255.0]]
    found.sum().backward()
    assert x.grad is not None and bool((x.grad == 3 * 127.5).all())


@pytest.mark.parametrize("shape", [(1, 8), (1, 8, 8), (3, 8, 8), (2, 4, 8, 8)])
def test_random_features_are_of_any_images(shape: tuple[int, ...]) -> None:
    x = normal(3, shape).float().requires_grad_()
    found = random_features(x)
    assert found.shape == (3, 448) and bool(found.isfinite().all())
    found.sum().backward()
    assert x.grad is not None and bool(x.grad.any())
    assert torch.equal(found, random_features(x))


def test_features_of_pictures_need_pictures() -> None:
    with refuses("test_mmd:Means", "random"):
        embedding("test_mmd:Means", NoImages(), extractor=extractor)
    with pytest.raises(ValueError, match="unknown extractor 'nothing'"):
        embedding("nothing", NoImages(), extractor=extractor)


def test_a_run_and_an_extractor_are_features(images: Path, finished: Path, tmp_path: Path) -> None:
    objective = MMDConfig(features=str(finished), held_out="test_mmd:Means", steps=(1,), bank=4)
    config = replace(tiny.config(images), patches=WHOLE)
    training = tiny.training(replace(objective.prefers(config), batch=4), tmp_path / "run")
    loss = training.objective
    assert isinstance(loss, MMDLoss) and training.teacher is not None
    for space in (loss.trained, loss.held_out):
        x = torch.zeros(2, 3, 16, 16, requires_grad=True)
        assert space.real is not None and len(space.real) == 4
        space.space(x).square().sum().backward()
        assert x.grad is not None and bool(x.grad.any())


# ---- As an objective ----


def test_what_it_brings_and_what_it_refuses(images: Path, tmp_path: Path) -> None:
    config = recipes.with_objective(tiny.config(images), "mmd")
    assert config.preview.sample_steps == 4 and config.objective.jumps == 4
    assert config.objective.minimized == ("random",)
    assert config.patches == tiny.LAW != WHOLE
    with refuses("mmd", "--patches.fractions"):
        tiny.training(config, tmp_path)
    wrong: list[dict[str, Any]] = [
        {"steps": (0, 2)}, {"steps": ()}, {"kernel": "line"}, {"bank": 1}, {"features": "pixels"},
    ]  # fmt: skip
    for changes in wrong:
        with pytest.raises(ValueError, match=next(iter(changes))):
            MMDConfig(**changes)
    matched = MMDConfig(features="inception")
    with refuses("preview.extractor", "inception", "--preview.distance"):
        replace(config, objective=matched, preview=replace(config.preview, distance=8))
