"""Sampling from a trained model: classes, guidance, options."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import refuses
from torch import Tensor

from patchdiffusion import SamplerConfig, load
from patchdiffusion.guidance.cfg import ClassifierFree
from patchdiffusion.paths import DDPM
from patchdiffusion.sampling.canvas import AutoCanvas, CanvasRegion
from patchdiffusion.solvers import DDIM, Ancestral, Churn, Euler, Heun, Method, Solver
from patchdiffusion.solvers.schedules import (
    FlowSpaced,
    Karras,
    LogSpaced,
    Quadratic,
    Schedule,
    TableSpaced,
    TimeSpaced,
    ddpm_table,
    flow_uniform,
    karras,
    log_uniform,
    time_uniform,
)
from patchdiffusion.system.families import members

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
    with refuses(wanted, "cat", "dog"):
        tiny.pipeline().labels(1, [wanted])


def test_a_model_without_classes_takes_none() -> None:
    with refuses("classes"):
        tiny.pipeline(0).sample(1, classes=[0])


def test_classes_and_guidance_change_the_image() -> None:
    pipe = tiny.pipeline()
    a, b = (pipe.sample(1, classes=[c], config=FAST) for c in (0, 1))
    c, d = (
        pipe.sample(1, classes=[0], config=replace(FAST, guidance=ClassifierFree(weight=g)))
        for g in (1.0, 3.0)
    )
    assert not (a == b).all()
    assert (a == c).all() and not (a == d).all()
    null = pipe.sample(1, classes=[-1], config=FAST)
    unguided = pipe.sample(
        1, classes=[0], config=replace(FAST, guidance=ClassifierFree(weight=0.0))
    )
    assert abs(null.astype(int) - unguided).max() <= 1


def test_guidance_needs_classes() -> None:
    with refuses("classes"):
        tiny.pipeline(0).sample(1, config=replace(FAST, guidance=ClassifierFree()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be at least 1, not 0"),
        ({"batch": 0}, "batch must be at least 1, not 0"),
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
        (lambda: DDIM(eta=1.5), "eta.*1.5"),
        (lambda: CanvasRegion(size=(0, 4)), r"positive height and width, not \(0, 4\)"),
        (lambda: CanvasRegion(size=(4, 4, 4)).place((8, 8)), r"size of a region needs 2 numbers"),
        (lambda: CanvasRegion(corner=(1,)).place((8, 8)), r"corner of a region needs 2 numbers"),
        (lambda: SamplerConfig(schedule=FlowSpaced(shift=-1.0)), "shift"),
        (lambda: SamplerConfig(schedule=Karras(rho=0.0)), "rho"),
        (lambda: SamplerConfig(steps=0), "steps must be at least 1, not 0"),
        (lambda: TableSpaced(steps=3), "steps.*3"),
    ],
)  # fmt: skip
def test_impossible_values(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


METHODS = [member for member in members(Solver) if issubclass(member, Method)]


@pytest.mark.parametrize("solver", METHODS)
def test_every_solver_samples_from_a_model(solver: Callable[[], Any]) -> None:
    image = tiny.pipeline().sample(1, config=SamplerConfig(solver=solver(), steps=4))
    assert image.shape == (1, *tiny.CANVAS, 3) and image.std() > 0


@pytest.mark.parametrize(
    ("keywords", "config"),
    [
        ({}, SamplerConfig()),
        ({"steps": 3}, SamplerConfig(steps=3)),
        ({"guidance": 2}, SamplerConfig(guidance=ClassifierFree(weight=2.0))),
        ({"guidance": 1}, SamplerConfig()),
        ({"guidance": "cfg", "steps": 2}, SamplerConfig(guidance=ClassifierFree(), steps=2)),
        (
            {"solver": "euler", "schedule": "flow"},
            SamplerConfig(solver=Euler(), schedule=FlowSpaced()),
        ),
        ({"solver": DDIM()}, SamplerConfig(solver=DDIM())),
        ({"size": (16, 8)}, SamplerConfig(canvas=AutoCanvas(size=(16, 8)))),
        ({"size": 16}, SamplerConfig(canvas=AutoCanvas(size=(16,)))),
    ],
)
def test_keywords_are_settings(keywords: dict[str, Any], config: SamplerConfig) -> None:
    """With and without a configuration, of which the other settings stay."""
    pipeline = tiny.pipeline()
    assert np.array_equal(
        pipeline.sample(2, **{"steps": 4, **keywords}),
        pipeline.sample(2, config=config if config.steps else replace(config, steps=4)),
    )
    given = SamplerConfig(sigma_max=20.0, steps=4)
    expected = replace(config, sigma_max=20.0, steps=config.steps or 4)
    found = pipeline.sample(2, config=given, **keywords)
    assert np.array_equal(found, pipeline.sample(2, config=expected))


def test_words_that_are_unknown() -> None:
    for name in ("solver", "schedule", "guidance"):
        with refuses(f"unknown {name}", "'nothing'"):
            tiny.pipeline().sample(1, **{name: "nothing"})  # pyright: ignore[reportArgumentType]


def test_options_reach_the_solver() -> None:
    def image(solver: Solver) -> np.ndarray:
        return tiny.pipeline().sample(2, config=SamplerConfig(steps=4, solver=solver))

    plain = image(Euler())
    assert (image(DDIM()) == plain).all()
    assert not (image(Ancestral()) == plain).all()
    assert (image(DDIM(eta=1.0)) == image(Ancestral())).all()
    assert not (image(Heun(churn=Churn(amount=9.0))) == image(Heun())).all()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Karras(rho=5.0), lambda: karras(9, 0.01, 50.0, 5.0)),
        (LogSpaced(), lambda: log_uniform(9, 0.01, 50.0)),
        (TimeSpaced(), lambda: time_uniform(9, 0.01, 50.0)),
        (TimeSpaced(path="cosine"), lambda: time_uniform(9, 0.01, 50.0, path="cosine")),
        (Quadratic(), lambda: time_uniform(9, 0.01, 50.0, power=2.0)),
        (FlowSpaced(shift=3.0), lambda: flow_uniform(9, 0.01, 50.0, 3.0)),
        (
            TableSpaced(table="cosine", steps=500),
            lambda: ddpm_table(9, 0.01, 50.0, table=DDPM(table="cosine", steps=500)),
        ),
    ],
)
def test_schedules_of_the_sampler(schedule: Schedule, expected: Callable[[], Tensor]) -> None:
    config = SamplerConfig(steps=9, sigma_min=0.01, sigma_max=50.0, schedule=schedule)
    assert torch.equal(config.sigmas(), expected())


# ---- A run ----


def test_a_run_samples_with_either_weights(finished: Path, tmp_path: Path) -> None:
    averaged, raw = (load(finished, weights=w) for w in ("averaged", "raw"))
    a, b = (p.sample(2, config=FAST) for p in (averaged, raw))
    assert a.shape == (2, 16, 16, 3) and not (a == b).all()
    moved = shutil.copytree(finished / "model", tmp_path / "elsewhere")
    assert (load(moved).sample(2, config=FAST) == a).all()
    low = load(finished, precision="bf16").sample(2, config=FAST)
    assert abs(low.astype(int) - a).mean() < 8
