"""N: losses, gradients and state that are not finite, or explode."""

import statistics
from pathlib import Path
from typing import Any

import harness
import pytest
import tiny
import torch
from commands import names
from harness import LONG, SAVE_ALWAYS, alone, checkpoints, drive, here, status

from patchdiffusion.train import checkpoint, loop
from patchdiffusion.train.report import read_log

STEPS = 96
LONGER: dict[str, Any] = {"config": {"images": 3.0 * STEPS, "optim.schedule.cooldown": 0.0}}


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in read_log(folder) if r["kind"] == kind]


def losses(folder: Path) -> list[float]:
    return [float(str(line[4])) for line in tiny.history(folder)]


def weights_of(folder: Path, step: int, group: str = "weights") -> dict[str, torch.Tensor]:
    where = folder / "checkpoints" / f"step-{step:010d}"
    return checkpoint.read_tensors(where, group, torch.device("cpu"))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- Not finite ----


@pytest.mark.parametrize("gradient_only", [False, True], ids=["n1_nan_loss", "n3_inf_gradient"])
def test_n1_n3_on_one_of_two_ranks(gradient_only: bool, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = {"kind": "scale_loss", "factor": float("nan"), "steps": [5], "rank": 1}
    faults = [{**fault, "gradient_only": gradient_only}, {"kind": "record_draws"}]
    run = {**SAVE_ALWAYS, "keep": 99}
    ended = drive(images, folder, size=2, **LONG, run=run, faults=faults)
    assert [e.code for e in ended] == [0, 0], ended
    for group in ("weights", "optimizer"):
        assert same(weights_of(folder, 5, group), weights_of(folder, 6, group))
    assert not same(weights_of(folder, 6), weights_of(folder, 7))
    (record,) = records(folder, "guard")
    assert (record["step"], record["what"]) == (5, "skipped")
    drawn = sorted(x[1:3] for f in folder.glob("draws-*") for x in harness.lines(f) if x[0] == 5)
    told = [image for group in record["groups"] for image in group["images"]]
    assert told == [image for _, image in drawn]
    assert [g["size"] for g in record["groups"]] == [[16, 16], [8, 8]]
    assert all(len(g["sigma"]) == len(g["images"]) for g in record["groups"])
    assert tiny.history(folder)[-1][-1] == 1  # counted
    what = "gradient" if gradient_only else "loss"
    assert any(names(x, "guard", "step 5", what) for x in ended[0].out.splitlines())


def test_n2_nan_for_ever(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = {"kind": "scale_loss", "factor": float("nan"), "steps": list(range(4, 99))}
    ended = alone(images, folder, **LONG, run=SAVE_ALWAYS, faults=[fault])
    assert (ended.code, status(folder)) == (21, "failed")
    assert names(ended.error, 8, "not finite")
    newest = max(checkpoints(folder))
    assert all(bool(torch.isfinite(x).all()) for x in weights_of(folder, newest).values())
    again = alone(images, folder, **LONG)  # what was wrong is mended
    assert again.code == 0
    assert all(isinstance(line[4], float) for line in tiny.history(folder)[-4:])


@pytest.mark.parametrize("what", ["weights", "averaged", "optimizer"])
def test_n6_state_that_is_not_finite(what: str, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = {"kind": "poke", "what": what, "step": 4}
    ended = alone(images, folder, **LONG, run=SAVE_ALWAYS, faults=[fault])
    assert ended.code == 21
    assert names(ended.error, "not finite")
    assert checkpoints(folder) == [2, 3]
    assert alone(images, folder, **LONG).code == 0


# ---- Exploding ----


@pytest.fixture(scope="module")
def longer(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "longer"
    return tiny.run(tiny.change(tiny.config(images), LONGER["config"]), folder)


def test_n4_a_spike(images: Path, longer: Path, tmp_path: Path) -> None:
    folder, at = tmp_path / "run", 40
    fault = {"kind": "scale_loss", "factor": 1000.0, "steps": [at]}
    ended = alone(images, folder, **LONGER, faults=[fault])
    assert ended.code == 0, ended.err
    (record,) = records(folder, "guard")
    assert (record["step"], record["what"]) == (at, "spike")
    assert record["grad_norm"] > 100 * record["usual_norm"]
    assert any(names(x, "guard", f"step {at}") for x in ended.out.splitlines())
    assert losses(folder)[:at] == losses(longer)[:at]
    ends = [statistics.mean(losses(f)[-30:]) for f in (folder, longer)]
    assert ends[0] == pytest.approx(ends[1], rel=0.05)
    assert records(longer, "guard") == []


def test_n4_the_gradient_of_a_spike_has_the_usual_norm(images: Path, tmp_path: Path) -> None:
    """What the first moments have taken in, where clipping alone would allow much more."""
    folder, at = tmp_path / "run", 40
    config = {**LONGER["config"], "images": 3.0 * (at + 1), "optim.clip": 1e6}
    faults = [{"kind": "scale_loss", "factor": 1000.0, "steps": [at]}]
    faults += [{"kind": "save_every", "steps": at}]
    assert here(images, folder, config=config, run=SAVE_ALWAYS, faults=faults).code == 0
    (record,) = records(folder, "guard")
    before, after = (weights_of(folder, step, "optimizer") for step in (at, at + 1))
    taken = [(after[k] - 0.9 * before[k]) / 0.1 for k in before if k.endswith("/exp_avg")]
    norm = float(torch.nn.utils.get_total_norm(taken))
    assert norm == pytest.approx(record["usual_norm"], rel=1e-3)


def test_n5_a_bad_window_of_images(images: Path, longer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    window = (6 * 40, 6 * 48)  # crops of the steps 40 to 47
    fault = {"kind": "scale_loss", "factor": 1000.0, "positions": window}
    faults = [fault, {"kind": "save_every", "steps": 5}, {"kind": "record_draws"}]
    ended = alone(images, folder, **LONGER, run=SAVE_ALWAYS, faults=faults)
    assert (ended.code, status(folder)) == (0, "finished"), ended.err
    (record,) = records(folder, "rollback")
    assert (record["step"], record["since"], record["spikes_since"]) == (40, 46, 40)
    assert any(names(x, "rollback", "step 46", "step 40") for x in ended.out.splitlines())
    assert losses(folder)[:40] == losses(longer)[:40]
    ends = [statistics.mean(losses(f)[-30:]) for f in (folder, longer)]
    assert ends[0] == pytest.approx(ends[1], rel=0.1)
    # The sequence of images goes on behind what was left out; nothing is drawn twice.
    drawn = [line[0] for line in harness.lines(folder / "draws-0.jsonl")]
    steps = sorted(set(drawn))
    assert steps == list(range(STEPS + 6)) and all(drawn.count(s) == 6 for s in steps)


def test_n5_a_window_that_does_not_end(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = {"kind": "scale_loss", "factor": 1000.0, "positions": (6 * 40, 6 * 999)}
    faults = [fault, {"kind": "save_every", "steps": 5}]
    ended = alone(images, folder, **LONGER, run=SAVE_ALWAYS, faults=faults)
    assert (ended.code, status(folder)) == (22, "failed")
    assert names(ended.error, "exploded", "1 rollback", "--guard.rollbacks")
    assert max(checkpoints(folder)) <= 50
    # The count is part of the run: it cannot be forgotten by starting again.
    again = alone(images, folder, **LONGER, run=SAVE_ALWAYS, faults=faults)
    assert again.code == 22
    assert len(records(folder, "rollback")) == 1


def test_n5_nothing_newer_is_left(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends at once after it went back must not go on from what it went back from."""
    folder, back = tmp_path / "run", loop.roll_back

    def back_and_out(*arguments: Any) -> None:
        assert max(checkpoints(folder)) > 40
        back(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "roll_back", back_and_out)
    fault = {"kind": "scale_loss", "factor": 1000.0, "positions": (6 * 40, 6 * 48)}
    faults = [fault, {"kind": "save_every", "steps": 4}]
    assert here(images, folder, **LONGER, run=SAVE_ALWAYS, faults=faults).code == 130
    assert max(checkpoints(folder)) == 40


def test_n5_on_two_ranks(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = {"kind": "scale_loss", "factor": 1000.0, "positions": (6 * 40, 6 * 48)}
    faults = [fault, {"kind": "save_every", "steps": 5}]
    ended = drive(images, folder, size=2, **LONGER, run=SAVE_ALWAYS, faults=faults)
    assert [e.code for e in ended] == [0, 0], ended
    (record,) = records(folder, "rollback")
    assert (record["step"], record["since"]) == (40, 47)  # all learn of it one step later


def test_n5_without_an_older_checkpoint(images: Path, tmp_path: Path) -> None:
    fault = {"kind": "scale_loss", "factor": 1000.0, "positions": (6 * 40, 6 * 48)}
    ended = alone(images, tmp_path / "run", **LONGER, faults=[fault])
    assert ended.code == 22
    assert names(ended.error, "exploded", "step 40")
