"""Gates that count, not time: what a step does, and what the command that measures it says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import Capture, fails, works
from stepping import GROUPS, make, take

from patchdiffusion.nets import fused
from patchdiffusion.plans import Group, Stochastic
from patchdiffusion.system import device as machine
from patchdiffusion.train.loop import one_step
from patchdiffusion.train.profile import Operators, measure
from patchdiffusion.train.setup import Training
from patchdiffusion.train.state import Meter

SMALL = replace(tiny.NETWORK, mult=(1,), dropout=0.1)
LAW = Stochastic(fractions=(1.0, 0.5), probs=(0.5, 0.5))


def training(images: Path, folder: Path, law: Stochastic = LAW) -> Training:
    return tiny.training(tiny.config(images, network=SMALL, patches=law, steps=99), folder)


def whole(run: Training) -> tuple[Group, ...]:
    return (Group(run.canvas, 4, 1.0),)


# ---- Gates ----


def test_a_step_waits_for_nothing() -> None:
    stepper, _ = make()
    take(stepper)
    with Operators() as counted:
        stepper(GROUPS, Meter(), step=1, cursor=(1, 9), progress=0.5, seen=0.0)
    assert counted.total > 100
    assert counted.syncs == 0


def test_waiting_is_seen() -> None:
    x = torch.ones(3)
    with Operators() as counted:
        assert float(x.sum()) == 3.0
        assert bool((x == 1).any())
    assert counted.syncs == 2
    assert counted.calls["aten.sum"] == 1


def test_operators_of_a_step(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise these numbers only with a reason: each operator is a launch on a GPU."""
    monkeypatch.setattr(fused, "_library", lambda: (None, "operators (a test)"))
    run = training(images, tmp_path)
    (cost,) = measure(run, [whole(run)], 1)
    parameters = len(list(run.network.parameters()))
    assert parameters == 73
    assert cost.operators <= 740
    assert cost.syncs == 0
    assert cost.copied <= 136_400  # most of it queries, keys and values, and crops as float32


def test_micro_batches_cost_passes_and_nothing_else(images: Path, tmp_path: Path) -> None:
    """The update, the judgement and the log are made once a step."""
    counts = {}
    for size in (None, 2, 1):
        run = tiny.training(
            tiny.config(images, network=SMALL, patches=LAW, micro_batch=size), tmp_path
        )
        counts[size] = measure(run, [whole(run)], 1)[0].operators
    one_pass = counts[2] - counts[None]
    assert counts[1] - counts[2] == 2 * one_pass
    sums = len(list(run.network.parameters()))  # of gradients, one operator each
    assert 0 < counts[None] - (one_pass - sums) < 100


def test_only_the_crop_is_converted(images: Path, tmp_path: Path) -> None:
    """Bytes written for a crop do not grow with the image it is cut from."""
    run = training(images, tmp_path)
    feed = run.stepper.feed
    group = Group((4, 4), 6, 1.0)
    copied = []
    for side in (16, 64):
        feed.images = torch.zeros(40, side, side, 3, dtype=torch.uint8)
        with Operators() as counted:
            feed.batch(group, step=0, position=0, first=0, chunk=range(6))
        copied.append(counted.copied)
    assert copied[0] == copied[1] < 6 * 4 * 4 * 3 * 4 * 4


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_one_graph_for_each_kind_of_block_and_size(images: Path, tmp_path: Path) -> None:
    """Equal blocks share graphs, nothing breaks them, and none is made once each size was met."""
    torch._dynamo.reset()
    run = training(images, tmp_path)
    units = run.network.units()
    machine.compile_units(units, backend="eager")
    half = (Group((8, 8), 8, 1.0),)
    before, made = machine.compiled_graphs(), []
    for groups in (whole(run), half):
        one_step(run, groups)
        made.append(machine.compiled_graphs() - before)
    assert len(units) == 5
    assert made == [3, 6]  # first, middle and last blocks
    with torch._dynamo.config.patch(error_on_recompile=True):
        for groups in (half, whole(run), half, whole(run)):
            one_step(run, groups)
    assert machine.compiled_graphs() - before == made[-1]
    torch._dynamo.reset()


# ---- The command ----


def test_bench_measures_the_mixture(images: Path, tmp_path: Path, capsys: Capture) -> None:
    small = ["--network.base", "4", "--network.mult", "1", "2", "--network.blocks", "1"]
    options = [*small, "--network.attention", "--batch", "4", "--repeats", "1", "--device", "cpu"]
    file = tmp_path / "bench.json"
    for mode in ("stratified", "progressive", "constant-pixels"):
        out = works(capsys, "bench", images, *options, "--patches", mode, "--save", file)
        result = json.loads(file.read_text())
        rows = result["rows"]
        assert list(rows) == ["whole images", "only 8x8", "only 4x4", "mixture"]
        assert all(f"| {name} | " in out for name in rows)
        assert rows["whole images"]["counted_images_against_whole"] == pytest.approx(1.0)
        assert all(row["syncs"] == 0 and row["seconds"] > 0 for row in rows.values())
        if mode == "progressive":  # shares .2, .3, .5 of the area, of which a step has 1, 2, 4
            steps = (0.2 / 1, 0.3 / 2, 0.5 / 4)
            assert rows["mixture"]["equivalents"] == pytest.approx(1 / sum(steps))
    # The law of constant pixels: 1/14, 3/14 and 10/14 of steps with 64, 16 and 4 crops.
    parts = (rows["whole images"], rows["only 8x8"], rows["only 4x4"])
    probs = (10 / 14, 3 / 14, 1 / 14)
    seconds = sum(p * row["seconds"] for p, row in zip(probs, parts, strict=True))
    assert rows["mixture"]["seconds"] == pytest.approx(seconds)
    assert rows["mixture"]["crops"] == pytest.approx(4 * 10 / 14 + 16 * 3 / 14 + 64 / 14)
    assert rows["mixture"]["equivalents"] == pytest.approx(4.0)
    assert result["engine"]["precision"] in ("fp32", "bf16")


def test_bench_refuses(images: Path, capsys: Capture) -> None:
    assert "repeats must be at least 1" in fails(capsys, "bench", images, "--repeats", 0)
    assert "lr must be positive" in fails(capsys, "bench", images, "--optim.lr", -1)


def test_time_outside_is_a_share(images: Path, tmp_path: Path) -> None:
    (cost,) = measure(training(images, tmp_path), [(Group((8, 8), 8, 1.0),)], 2)
    assert 0 < cost.outside < 1
    assert cost.crops == 8 and cost.equivalents == 2.0
    assert cost.memory > 10**7
