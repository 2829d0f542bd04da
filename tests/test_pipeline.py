"""Sampling from a trained model: classes, guidance, options."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from patchdiffusion import SamplerConfig, load
from patchdiffusion.solvers import Churn, SolverName
from patchdiffusion.solvers.schedules import flow_uniform, karras, log_uniform, time_uniform

FAST = SamplerConfig(steps=3)


def test_classes_by_name_and_number() -> None:
    pipe = tiny.pipeline()

    def labels(*classes: str | int) -> list[int]:
        found = pipe.labels(5, classes)
        assert found is not None
        return found.tolist()

    assert labels("dog") == [1] * 5
    assert labels("dog", "cat") == [1, 0, 1, 0, 1]
    assert labels(1, "2", -1) == [1, 2, -1, 1, 2]
    assert labels("7") == [2] * 5  # a name, although it looks like a number
    assert labels() == [0, 1, 2, 0, 1]
    everything = pipe.labels(4)
    assert everything is not None and everything.tolist() == [0, 1, 2, 0]
    assert tiny.pipeline(0).labels(4) is None


@pytest.mark.parametrize("wanted", ["bird", 3, "3", -2, "1.0", "", "--1", "\u00b2"])
def test_unknown_classes_are_listed(wanted: str | int) -> None:
    with pytest.raises(ValueError, match=r"unknown class .*; this model has 0 cat, 1 dog, 2 7"):
        tiny.pipeline().labels(1, [wanted])


def test_a_model_without_classes_takes_none() -> None:
    with pytest.raises(ValueError, match="was trained without classes"):
        tiny.pipeline(0).sample(1, classes=[0])


def test_classes_and_guidance_change_the_image() -> None:
    pipe = tiny.pipeline()
    a, b = (pipe.sample(1, classes=[c], config=FAST) for c in (0, 1))
    c, d = (pipe.sample(1, classes=[0], config=replace(FAST, guidance=g)) for g in (1.0, 3.0))
    assert not (a == b).all()
    assert (a == c).all() and not (a == d).all()
    null = pipe.sample(1, classes=[-1], config=FAST)
    unguided = pipe.sample(1, classes=[0], config=replace(FAST, guidance=0.0))
    assert abs(null.astype(int) - unguided).max() <= 1


def test_guidance_needs_classes() -> None:
    with pytest.raises(ValueError, match="needs class labels"):
        tiny.pipeline(0).sample(1, config=replace(FAST, guidance=2.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count and batch must be at least 1, not 0 and 64"),
        ({"batch": 0}, "count and batch must be at least 1"),
        ({"size": (0, 4)}, r"size .* not \(0, 4\)"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
    ],
)
def test_impossible_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.pipeline().sample(**{"count": 2, "config": FAST, **options})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplerConfig(solver="euler", churn=Churn(amount=1.0)),
         "churn works with heun, midpoint, ralston, not with euler"),
        (lambda: SamplerConfig(solver="dpmpp_2m", churn=Churn(amount=1.0)), "not with dpmpp_2m"),
        (lambda: SamplerConfig(solver="ancestral", churn=Churn(amount=1.0)), "not with ancestral"),
        (lambda: SamplerConfig(eta=0.0),
         "eta works with ddim, ancestral, sde_dpmpp_1, .*, euler_maruyama, not with heun"),
        (lambda: SamplerConfig(solver="unipc", eta=1.0), "eta works with .*, not with unipc"),
        (lambda: SamplerConfig(solver="ddim", eta=1.5), r"eta of ddim must be in \[0, 1\], not 1"),
        (lambda: SamplerConfig(solver="sde_dpmpp_1", eta=-1.0), r"in \[0, 100\], not -1"),
        (lambda: SamplerConfig(solver="euler_maruyama", eta=float("nan")), "not nan"),
        (lambda: SamplerConfig(shift=3.0), "shift works with the flow grid only, not with karras"),
        (lambda: SamplerConfig(grid="flow", shift=-1.0), "shift must be positive and finite"),
        (lambda: SamplerConfig(grid="flow", rho=5.0), "rho works with the karras grid only"),
    ],
)  # fmt: skip
def test_impossible_combinations(make: Callable[[], SamplerConfig], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("solver", get_args(SolverName))
def test_every_solver_samples_from_a_model(solver: SolverName) -> None:
    image = tiny.pipeline().sample(1, config=SamplerConfig(solver=solver, steps=4))
    assert image.shape == (1, *tiny.CANVAS, 3) and image.std() > 0


def test_options_reach_the_solver() -> None:
    def image(**given: object) -> np.ndarray:
        config = SamplerConfig(**{"steps": 4, **given})  # pyright: ignore[reportArgumentType]
        return tiny.pipeline().sample(2, config=config)

    plain = image(solver="euler")
    assert (image(solver="ddim") == plain).all()
    assert (image(solver="ancestral", eta=0.0) == plain).all()
    assert not (image(solver="ancestral") == plain).all()
    assert (image(solver="ddim", eta=1.0) == image(solver="ancestral")).all()
    assert not (image(churn=Churn(amount=9.0)) == image()).all()


@pytest.mark.parametrize(
    ("given", "grid"),
    [
        ({"rho": 5.0}, lambda: karras(9, 0.01, 50.0, 5.0)),
        ({"grid": "log_uniform"}, lambda: log_uniform(9, 0.01, 50.0)),
        ({"grid": "uniform_t"}, lambda: time_uniform(9, 0.01, 50.0)),
        ({"grid": "quadratic"}, lambda: time_uniform(9, 0.01, 50.0, power=2.0)),
        ({"grid": "flow", "shift": 3.0}, lambda: flow_uniform(9, 0.01, 50.0, 3.0)),
    ],
)
def test_grids_of_the_sampler(given: dict[str, object], grid: Callable[[], Tensor]) -> None:
    config = SamplerConfig(steps=9, sigma_min=0.01, sigma_max=50.0, **given)  # pyright: ignore[reportArgumentType]
    assert torch.equal(config.sigmas(), grid())


# ---- A run ----


def test_a_run_samples_with_either_weights(finished: Path, tmp_path: Path) -> None:
    averaged, raw = (load(finished, weights=w) for w in ("averaged", "raw"))
    a, b = (p.sample(2, config=FAST) for p in (averaged, raw))
    assert a.shape == (2, 16, 16, 3) and not (a == b).all()
    moved = shutil.copytree(finished / "model", tmp_path / "elsewhere")
    assert (load(moved).sample(2, config=FAST) == a).all()
    low = load(finished, precision="bf16").sample(2, config=FAST)
    assert abs(low.astype(int) - a).mean() < 8
