"""What few-step models learn of three Gaussians in the plane, and the page that tells it."""

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def toy() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield importlib.import_module("few_steps")


@pytest.fixture(scope="module")
def ring(toy: ModuleType) -> Iterator[ModuleType]:
    """The script of the targets, whose data are those of the other one meanwhile."""
    module = importlib.import_module("few_steps_ring")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "DATA", module.DATA)
        yield module


def test_the_distance_of_shifted_points_is_the_shift(toy: ModuleType) -> None:
    points = toy.data()
    shifted = points + torch.tensor([0.3, 0.4])
    assert toy.distance(points, shifted) == pytest.approx(0.5 / math.sqrt(2), rel=1e-4)
    assert toy.distance(points, points) == 0


def test_one_step_is_learned_quickly(toy: ModuleType) -> None:
    """A tenth of the training: one jump is better than an exact step of Euler, to the mean."""
    real = toy.data()
    mean = real.mean(dim=0).expand_as(real)
    found = toy.distance(toy.samples(toy.meanflow(400), 1), real)
    assert found < toy.distance(mean, real) / 2


@pytest.mark.slow
def test_one_step_is_as_good_as_many(toy: ModuleType) -> None:
    """The distance in one step: at most twice that of 20 of flow matching, a third of one."""
    real = toy.data()
    flow = toy.flow_matching(4000)
    many, one = (toy.distance(toy.samples(flow, steps), real) for steps in (20, 1))
    for kind in ("MeanFlow", "consistency training (iCT)", "consistency distillation"):
        found = toy.distance(toy.samples(toy.MODELS[kind](4000), 1), real)
        assert found <= 2 * many and found < one / 3, (kind, found, many, one)


def test_the_page_has_the_numbers_of_the_script(toy: ModuleType) -> None:
    page = (Path(__file__).parents[1] / "docs" / "few-steps.md").read_text()
    result = json.loads(toy.RESULT.read_text())
    assert "\n".join(toy.table(result)) in page
    assert f"{result['two draws of the data']} apart" in page
    assert f"{result['training steps']:,} steps of batch {toy.BATCH}" in page
    assert result["date"] in page and result["torch"].split("+")[0] in page
    rows = result["sliced Wasserstein-2"]
    one, many = (rows["flow matching, Euler"][toy.STEPS.index(n)] for n in (1, 20))
    for name, row in rows.items():  # what the slow test demands of a new training
        plain = name.startswith(("flow", "exact"))
        most = 3 * many if name == "MMD-DDM" else 2 * many  # for several numbers of steps at once
        assert plain or (row[0] <= most and row[0] < one / 3), name


# ---- Targets of distillation ----


def check_targets(result: dict[str, dict[str, float]]) -> None:
    """BOOT 20 times nearer than two steps, MMD-DDM 5 times nearer and nearer than ten."""
    assert result["BOOT, paired error"]["1"] < result["teacher, paired error"]["2"] / 20
    base = result["denoiser, energy distance"]
    for kernel in ("cubic", "rbf", "energy"):
        if f"MMD-DDM, {kernel}" in result:
            assert result[f"MMD-DDM, {kernel}"]["3"] < min(base["3"] / 5, base["10"]), kernel


def test_the_page_has_the_targets(ring: ModuleType) -> None:
    page = (Path(__file__).parents[1] / "docs" / "few-steps.md").read_text()
    result = json.loads(ring.RESULT.read_text())
    check_targets(result)
    mean, flow = (result[f"{name}, energy distance"]["1"] for name in ("MeanFlow", "flow matching"))
    assert mean < flow / 5 and f"{mean:.4f}" in page and f"{flow:.4f}" in page
    for name, row in result.items():
        if "MMD" in name or "BOOT" in name or "tangent" in name:
            few = row if "tangent" not in name else {n: row[n] for n in ("1", "2")}
            assert all(f"{value:.4f}" in page for value in few.values()), name


@pytest.mark.slow
def test_the_targets_are_met(ring: ModuleType) -> None:
    teacher, base = ring.EulerMap(denoiser=ring.DATA), ring.denoiser()
    chain, few = ring.EulerMap(denoiser=base), ring.matched(base, "energy")
    check_targets(
        {
            "teacher, paired error": {"2": ring.paired(teacher, 2)},
            "BOOT, paired error": {"1": ring.paired(ring.boot(), 1)},
            "denoiser, energy distance": {str(n): ring.energy_distance(chain, n) for n in (3, 10)},
            "MMD-DDM, energy": {"3": ring.energy_distance(few, 3)},
        }
    )
