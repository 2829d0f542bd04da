"""Multigrid: the published schedule, steps of equal cost, the plain loop as its neutral case."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from commands import Capture, fails, names, refuses
from sameruns import check_resumed

from patchdiffusion.multigrid import Multigrid
from patchdiffusion.noise import LogNormal, Truncated
from patchdiffusion.patches import Size
from patchdiffusion.plans import Clock, Group, PatchPlan, Stratified, advance

CLIP: Size = (32, 224, 224)
WHOLE = Multigrid(sides=(1.0,), times=(1.0,), short=(), final=0.0)
CLOCKS: tuple[Clock, ...] = ("equivalents", "crops", "steps")


def run(plan: PatchPlan, length: float) -> list[Group]:
    """Groups of all steps of a run of this length in the units of its clock."""
    done, steps = 0.0, []
    while done < length:
        groups = plan.draw(seed=0, step=len(steps), progress=done / length)
        done += advance(groups, plan.canvas, plan.clock)
        steps += groups
    return steps


# ---- The published schedule ----


def test_the_published_numbers_of_crops() -> None:
    """Long shapes x short cycle; the same number of steps, and so 46, 23, 20, 10 % of the crops."""
    plan = PatchPlan(CLIP, 8, replace(Multigrid.published(), passes=(1.0,), final=0.0))
    steps = [[groups[0] for _, groups in kinds] for _, kinds in plan.stages]
    assert [[g.count // 8 for g in part] for part in steps] == [
        [16, 8, 8], [8, 4, 4], [8, 4, 2], [4, 2, 1]
    ]  # fmt: skip
    assert [part[-1].size for part in steps] == [
        (8, 158, 158), (16, 158, 158), (16, 224, 224), (32, 224, 224)
    ]  # fmt: skip
    assert [part[-1].lr for part in steps] == [8, 4, 2, 1]
    assert all(group.lr == part[-1].lr for part in steps for group in part)
    means = [sum(g.count for g in part) / 24 for part in steps]
    assert means == pytest.approx([10.667, 5.333, 4.667, 2.333], abs=1e-3)
    assert [m / sum(means) for m in means] == pytest.approx([0.464, 0.232, 0.203, 0.101], abs=1e-3)
    assert sum(means) / 4 == pytest.approx(5.75)


def test_the_published_epochs_of_kinetics() -> None:
    """Changes of shape in 1.5 x 239 epochs, by a clock that counts clips as epochs do.

    The last shape of the third pass, which ends at 329, is that of the final part.
    """
    plan = PatchPlan(CLIP, 8, Multigrid.published(), clock="crops")
    starts = [round(start * 239 * 1.5) for start, _ in plan.stages]
    assert starts == [0, 73, 110, 142, 158, 205, 228, 248, 259, 291, 308, 322]
    final = plan.stages[-1][1]
    assert [groups[0].count // 8 for _, groups in final] == [4, 2, 1]
    # 5.75 times fewer steps for the same number of clips, and 3.83 times for 1.5 times as many.
    clips = sum(share * groups[0].count for share, groups in plan.kinds("crops")) / 8
    assert clips / 1.5 == pytest.approx(5.75 / 1.5, rel=0.15)


# ---- What follows from the plan ----


@pytest.mark.parametrize("canvas", [(32, 32), (24, 40), CLIP, (100,)])
@pytest.mark.parametrize("view", ["crop", "coarse", "both"])
def test_all_steps_cost_the_same(canvas: Size, view: str) -> None:
    if len(canvas) > 2 and view != "crop":
        with refuses("view", view, "crop"):
            PatchPlan(canvas, 64, Multigrid(view=view), divisor=4)  # type: ignore[arg-type]
        return
    plan = PatchPlan(canvas, 64, Multigrid(view=view), divisor=4)  # type: ignore[arg-type]
    for _, (group,) in plan.kinds():
        area = math.prod(group.size) / math.prod(canvas)
        assert group.count * area == pytest.approx(64, abs=area)
        assert all(a % 4 == 0 or a == b for a, b in zip(group.size, canvas, strict=True))
    cost = plan.cost()
    assert cost.step == pytest.approx(1, abs=0.01)
    steps = run(plan, 300 * 64)
    assert len(steps) == pytest.approx(300, abs=2)


@pytest.mark.parametrize("clock", CLOCKS)
def test_shapes_of_the_long_cycle_get_equally_many_steps(clock: Clock) -> None:
    law = Multigrid(passes=(2.0, 1.0), final=0.25)
    plan = PatchPlan((8, 64, 64), 32, law, divisor=8, clock=clock)
    total = sum(share * advance(groups, plan.canvas, clock) for share, groups in plan.kinds(clock))
    steps = run(plan, 1200 * total)
    assert len(steps) == pytest.approx(1200, abs=3)
    for share, (group,) in plan.kinds(clock):
        assert steps.count(group) == pytest.approx(1200 * share, abs=4)
    first = [group for _, groups in plan.stages[0][1] for group in groups]
    assert {g.size[0] for g in first} == {8}  # a quarter of 8 frames, for a network that needs 8
    assert all(group.size == plan.canvas for group in steps[-290:])


def test_without_a_clip_times_do_not_count() -> None:
    plan = PatchPlan((32, 32), 16, Multigrid(), divisor=8)
    sizes = [[groups[0].size[0] for _, groups in kinds] for _, kinds in plan.stages]
    assert sizes == [[16, 24, 24], [16, 24, 32], [32, 32, 32]]
    assert [start for start, _ in plan.stages] == pytest.approx([0, 0.425, 0.85], abs=0.01)


def test_learning_rate_and_loss_follow_a_stated_rule() -> None:
    for rate, factor in (("linear", 2.0), ("sqrt", 2**0.5), ("none", 1.0)):
        plan = PatchPlan((32, 32), 16, Multigrid(rate=rate))  # type: ignore[arg-type]
        rates = [{g.lr for _, (g,) in kinds} for _, kinds in plan.stages]
        assert rates == [{factor}, {1.0}, {1.0}]
    groups = [groups[0] for _, groups in PatchPlan((32, 32), 16, Multigrid(weight="area")).kinds()]
    assert [g.weight for g in groups] == [math.prod(g.size) / 32**2 for g in groups]
    assert {groups[0].weight for _, groups in PatchPlan((32, 32), 16, Multigrid()).kinds()} == {1.0}


def test_coarse_views_have_less_noise_and_the_whole_image() -> None:
    law = Multigrid(view="both", short=(0.5,), final=0.0)
    plan = PatchPlan((32, 32), 16, law, divisor=4, noise=LogNormal(mean=0.3))
    drawn = [plan.draw(seed=0, step=i, progress=0.9)[0] for i in range(4)]
    assert [(g.size[0], g.pitch) for g in drawn] == [(16, 1), (32, 1), (16, 2), (32, 1)]
    assert drawn[2].noise == Truncated(law=LogNormal(mean=0.3), scale=0.5)
    assert drawn[0].noise == LogNormal(mean=0.3)


def test_impossible_values_are_refused(images: Path, capsys: Capture) -> None:
    for changes, parts in (
        ({"sides": (1.0,)}, ("sides", "times", 1, 4)),
        ({"sides": (0.0, 1.0, 1.0, 1.0)}, ("sides", 0.0)),
        ({"short": (1.5,)}, ("short", 1.5)),
        ({"passes": (0.0,)}, ("passes", 0.0)),
        ({"passes": ()}, ("passes",)),
        ({"final": 1.5}, ("final", 1.5)),
        ({"view": "zoom"}, ("view", "zoom", "both")),
        ({"counts": "some"}, ("counts", "some")),
        ({"rate": "cubic"}, ("rate", "cubic")),
        ({"weight": "sum"}, ("weight", "sum")),
    ):
        with refuses(*parts):
            replace(Multigrid(), **changes)
    with refuses("progress"):
        PatchPlan((8, 8), 4, Multigrid()).draw(seed=0, step=0)
    told = fails(capsys, "train", images, *["--patches", "multigrid", "--patches.final", "2"])
    assert names(told, "final", 2.0) or names(told, "final", 2)


# ---- In a run ----


def test_one_shape_trains_the_plain_model(images: Path, tmp_path: Path) -> None:
    config = tiny.config(images, patches=Stratified.whole(), images=16.0)
    plain = tiny.run(config, tmp_path / "plain")
    other = tiny.run(replace(config, patches=WHOLE), tmp_path / "multigrid")
    assert tiny.history(other) == tiny.history(plain)
    assert tiny.weights(other) == tiny.weights(plain)


@pytest.mark.parametrize("clock", ["equivalents", "crops"])
def test_a_run_is_resumed_to_the_bit(clock: Clock, images: Path, tmp_path: Path) -> None:
    law = Multigrid(view="both")
    config = tiny.config(images, patches=law, images=36.0, clock=clock)
    check_resumed(config, tmp_path)
    training = tiny.training(config, tmp_path)
    assert training.total_steps == pytest.approx(len(tiny.history(tmp_path / "straight")), abs=2)
