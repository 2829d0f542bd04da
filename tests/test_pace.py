"""The time left of a run, from the speed of each kind of step, with invented seconds."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny

from patchdiffusion.patches import Size
from patchdiffusion.plans import Group, PatchPlan, Plan, Progressive, Stochastic, equivalents
from patchdiffusion.train import outlook
from patchdiffusion.train.forecast import Forecast
from patchdiffusion.train.loop import one_step
from patchdiffusion.train.outlook import learn_pace
from patchdiffusion.train.pace import MEMORY, Pace, kind_of
from patchdiffusion.train.report import read_log
from patchdiffusion.train.save import Saver
from patchdiffusion.train.setup import Training
from patchdiffusion.train.status import Status

CANVAS = (32, 32)
FLOPS: dict[Size, int] = {(32, 32): 1000, (16, 16): 240, (8, 8): 57}
SECONDS = {"8x8": 0.5, "16x16": 0.7, "32x32": 2.0}
"""Of a step."""
WARM_UP = 100.0


def plan_of(law: Plan) -> PatchPlan:
    return PatchPlan(CANVAS, 16, law, divisor=4)


def kinds(law: Plan) -> dict[str, tuple[Group, ...]]:
    return {kind_of(groups): groups for _, groups in plan_of(law).kinds()}


def run_steps(pace: Pace, steps: Sequence[tuple[Group, ...]], slower: float = 1.0) -> None:
    """Note steps, of which the first of a kind warms up, and measure their seconds."""
    total, warm = 0.0, set(pace.measured)
    for groups in steps:
        seconds = SECONDS[kind_of(groups)] * slower
        seconds += 0.0 if kind_of(groups) in warm else WARM_UP
        warm.add(kind_of(groups))
        pace.count(groups, seconds)
        total += seconds
    pace.measure(total)


def test_the_time_left_is_that_of_the_steps() -> None:
    plan = plan_of(Progressive())
    pace, forecast = Pace(FLOPS), Forecast(plan, "equivalents", 40_000.0, FLOPS, 0.0)
    for groups in kinds(Progressive()).values():
        run_steps(pace, [groups, groups])
    seen, spent, before = 0.0, 0.0, {}
    while seen < forecast.length:
        before[seen] = spent
        groups = plan.draw(seed=0, step=0, progress=seen / forecast.length)
        seen, spent = seen + equivalents(groups, CANVAS), spent + SECONDS[kind_of(groups)]
    for now, gone in list(before.items())[::500]:
        assert forecast.left(now, pace.seconds) == pytest.approx(spent - gone, abs=5.0)
    assert forecast.left(forecast.length, Pace(FLOPS).seconds) == 0


def test_the_first_step_of_a_kind_is_no_measurement() -> None:
    pace, (large, *_) = Pace(FLOPS), kinds(Progressive()).values()
    run_steps(pace, [large])
    assert pace.seconds(large) == math.inf and not pace.rates
    for _ in range(2):
        pace.count(large, 2.0)
    pace.measure(4.0)
    assert pace.seconds(large) == pytest.approx(2.0)
    assert pace.rates == {"32x32": pytest.approx(pace.operations(large) / 2.0)}


def test_kinds_within_one_measurement_are_told_apart_by_what_is_known() -> None:
    pace, steps = Pace(FLOPS), kinds(Stochastic())
    for groups in steps.values():
        run_steps(pace, [groups, groups])
    run_steps(pace, [*steps.values(), *steps.values()])
    for kind, groups in steps.items():
        assert pace.seconds(groups) == pytest.approx(SECONDS[kind])


def test_old_measurements_fade() -> None:
    pace, (large, *_) = Pace(FLOPS), kinds(Progressive()).values()
    pace.add([large] * 100, 200.0)
    pace.add([large] * 100, 10 * MEMORY)
    assert pace.seconds(large) == pytest.approx(10 * MEMORY / 100, rel=1e-3)


def test_a_kind_to_come_is_as_fast_as_rehearsed_and_as_slowed_down_as_the_others() -> None:
    pace, steps = Pace(FLOPS), kinds(Progressive())
    assert all(pace.seconds(groups) == math.inf for groups in steps.values())
    rehearsal = Pace(FLOPS)
    for kind in ("8x8", "32x32"):
        rehearsal.add([steps[kind]], SECONDS[kind])
    pace.rehearsed = rehearsal.measured
    assert pace.seconds(steps["32x32"]) == pytest.approx(2.0)
    run_steps(pace, [steps["8x8"]] * 3, slower=3.0)
    assert pace.seconds(steps["8x8"]) == pytest.approx(1.5)
    assert pace.seconds(steps["32x32"]) == pytest.approx(6.0)
    # Neither run nor rehearsed: the operations of the kind of the nearest area.
    rate = pace.operations(steps["32x32"]) / 6.0
    assert pace.seconds_of(1e6, (24, 24)) == pytest.approx(1e6 / rate)
    assert pace.seconds_of(1e6, (9, 9)) == pytest.approx(1e6 / pace.rates["8x8"])


def test_a_rehearsal_changes_nothing_and_knows_all_kinds(images: Path, tmp_path: Path) -> None:
    config = tiny.change(tiny.config(images, steps=400), {"patches": Progressive()})
    training = tiny.training(config, tmp_path / "run")
    names = {kind_of(groups) for _, groups in training.plan.kinds(config.clock)}
    before = {name: p.clone() for name, p in training.network.named_parameters()}
    learn_pace(training, one_step)
    assert set(training.pace.rehearsed) == names and not training.pace.measured
    assert all(p.equal(before[name]) for name, p in training.network.named_parameters())
    assert training.state.step == 0 and not (tmp_path / "run").exists()
    status = Status(training, Saver(training))
    assert 0 < status.seconds_left() < math.inf


def test_a_resumed_run_knows_the_pace_of_its_log(finished: Path, images: Path) -> None:
    training = tiny.training(tiny.config(images, steps=400), finished)
    learn_pace(training, one_step)
    rates = [r["rates"] for r in read_log(finished) if r["kind"] == "status"]
    assert rates[0] == {}  # the first step warms up
    assert training.pace.rates == pytest.approx(rates[-1]) and rates[-1]


@pytest.mark.parametrize("rates", [5, "fast", {"8x8": 0.0, "16x16": None, "1x1": 2.0}])
def test_nonsense_in_a_log_is_no_pace(images: Path, tmp_path: Path, rates: object) -> None:
    training = tiny.training(tiny.config(images, steps=4), tmp_path / "run")
    (tmp_path / "run").mkdir()
    record = {"kind": "status", "step": 1, "rates": rates}
    (tmp_path / "run" / "log.jsonl").write_text(json.dumps(record) + "\n")
    learn_pace(training, one_step)
    assert not training.pace.measured


def test_a_network_that_takes_long_is_not_rehearsed_before_a_run(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.change(tiny.config(images, steps=400), {"patches": Progressive()})
    training = tiny.training(config, tmp_path / "run")
    monkeypatch.setattr(outlook, "TRIAL", max(training.flops.values()) - 1)
    learn_pace(training, one_step)
    assert not training.pace.rehearsed


@pytest.mark.parametrize(("slow", "steps"), [(-1.0, 1), (1e9, outlook.TIMED)])
def test_a_slow_step_is_timed_once(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: float, steps: int
) -> None:
    monkeypatch.setattr(outlook, "SLOW", slow)
    training, made = tiny.training(tiny.config(images), tmp_path / "run"), []
    kinds = training.plan.kinds(training.config.clock)

    def counted(run: Training, groups: tuple[Group, ...]) -> None:
        made.append(groups)
        one_step(run, groups)

    outlook.rehearse_kinds(training, counted)
    assert len(made) == len(kinds) * (1 + steps)  # one warms up
