"""Sampling from a trained model: classes, guidance, options."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from patchdiffusion import SamplerConfig, load
from patchdiffusion.solvers import Churn

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
        ({"size": (0, 4)}, r"positive height and width, not \(0, 4\)"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
    ],
)
def test_impossible_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.pipeline().sample(**{"count": 2, "config": FAST, **options})  # pyright: ignore[reportArgumentType]


def test_churn_belongs_to_two_stages() -> None:
    with pytest.raises(
        ValueError, match="churn works with heun, midpoint, ralston, not with euler"
    ):
        SamplerConfig(solver="euler", churn=Churn(amount=1.0))


# ---- A run ----


def test_a_run_samples_with_either_weights(finished: Path, tmp_path: Path) -> None:
    averaged, raw = (load(finished, weights=w) for w in ("averaged", "raw"))
    a, b = (p.sample(2, config=FAST) for p in (averaged, raw))
    assert a.shape == (2, 16, 16, 3) and not (a == b).all()
    moved = shutil.copytree(finished / "model", tmp_path / "elsewhere")
    assert (load(moved).sample(2, config=FAST) == a).all()
    low = load(finished, precision="bf16").sample(2, config=FAST)
    assert abs(low.astype(int) - a).mean() < 8
