"""R: a run that is killed, stopped or restarted is the run that was not."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pytest
import tiny
import torch
from commands import Capture, names
from harness import LONG, SAVE_ALWAYS, alone, checkpoints, drive, here, same_run, status, torchrun

from patchdiffusion import cli, rng
from patchdiffusion.data import ready
from patchdiffusion.train import checkpoint
from patchdiffusion.train import status as status_lines
from patchdiffusion.train.log import RunLog
from patchdiffusion.train.report import read_log, write_report

EVERY_THIRD = {"kind": "save_every", "steps": 3}


def kill(step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "send", "name": "SIGKILL", "phase": "after", "step": step, **more}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_r1_kill_between_steps(seed: int, images: Path, steady: Path, tmp_path: Path) -> None:
    folder, step = tmp_path / "run", 4 + rng.seed_of("kill", seed) % 10
    step += step % 3 == 0  # so that something has to be done again
    spec = {**LONG, "run": SAVE_ALWAYS}
    ended = alone(images, folder, **spec, faults=[EVERY_THIRD, kill(step)])
    assert ended.code == -signal.SIGKILL
    assert status(folder) == "running"  # it had no time to say otherwise
    saved = step // 3 * 3  # it died before it could save or tell the step it had made
    assert max(checkpoints(folder)) == saved
    assert alone(images, folder, **spec).code == 0
    same_run(folder, steady)
    replayed = [r["step"] for r in read_log(folder) if r.get("replayed")]
    assert replayed == list(range(saved + 1, step + 1))


def test_r2_kill_one_of_two_ranks(images: Path, steady_pair: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = kill(7, rank=1, mark=str(tmp_path / "killed"))
    faults = [EVERY_THIRD, fault]
    ended = torchrun(images, folder, "--max-restarts=1", **LONG, run=SAVE_ALWAYS, faults=faults)
    assert ended.code == 0, ended.err
    assert "resume    at step 6" in ended.out
    same_run(folder, steady_pair)
    assert [r["step"] for r in read_log(folder) if r.get("replayed")] in ([7], [7, 8])


def test_r2_the_others_end(images: Path, tmp_path: Path) -> None:
    """Without a launcher that starts all again."""
    ended = drive(images, tmp_path / "run", size=2, **LONG, faults=[kill(5, rank=1)])
    assert [e.code for e in ended] == [24, -signal.SIGKILL], ended
    assert names(ended[0].error, "another process", "rank 0")
    assert status(tmp_path / "run") == "failed"


STAGES = ["file 1", "file 2", "manifest", "rename", "pointer"]


@pytest.mark.parametrize("stage", STAGES)
def test_r3_kill_during_a_save(stage: str, images: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = {"kind": "die_in_save", "stage": stage, "save": 2}
    ended = alone(images, folder, run=SAVE_ALWAYS, faults=[fault])
    assert ended.code == -signal.SIGKILL
    done = stage in ("rename", "pointer")
    assert checkpoints(folder) == ([1, 2, 3] if done else [1, 2])
    named = (folder / "checkpoints" / "latest").read_text().strip()
    assert named == f"step-{3 if stage == 'pointer' else 2:010d}"
    again = alone(images, folder)
    assert again.code == 0, again.err
    assert f"resume    at step {3 if done else 2}" in again.out
    assert not list((folder / "checkpoints").glob("*.tmp"))
    same_run(folder, finished)


def test_r3_files_are_flushed_before_they_get_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut keeps names and loses content, unless that was flushed before."""
    told: list[str] = []
    flush, rename = os.fsync, Path.rename

    def flushing(handle: int) -> None:
        told.append(f"flush {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        flush(handle)

    def renaming(path: Path, target: Path) -> Path:
        told.append(f"rename {path.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(Path, "rename", renaming)
    root, name = tmp_path / "checkpoints", "step-0000000007"
    checkpoint.save(root, 7, {"weights": {"a": torch.zeros(3)}}, {})
    named = told.index(f"rename {name}.tmp")
    content = ("weights.safetensors", "state.json", "manifest.json", f"{name}.tmp")
    assert {f"flush {file}" for file in content} <= set(told[:named])
    assert told[named + 1] == "flush checkpoints"


@pytest.mark.parametrize("stage", ["rename", "pointer"])
def test_r3_kill_before_the_last_model(
    stage: str, images: Path, finished: Path, tmp_path: Path
) -> None:
    """All is done; only the model is missing."""
    folder = tmp_path / "run"
    config = {"ema.profiles": [0.1], "ema.snapshots": 1}
    fault = {"kind": "die_in_save", "stage": stage, "save": 4}  # after the snapshot
    ended = alone(images, folder, config=config, run=SAVE_ALWAYS, faults=[fault])
    assert ended.code == -signal.SIGKILL and checkpoints(folder)[-1] == 4
    again = harness.here(images, folder, config=config)
    assert again.code == 0 and "is finished" in again.out
    same_run(folder, finished)
    assert sorted(f.name for f in (folder / "snapshots").iterdir()) == ["latest", "step-0000000004"]


def test_r3_kill_between_a_snapshot_and_its_checkpoint(images: Path, tmp_path: Path) -> None:
    folder, straight = tmp_path / "run", tmp_path / "straight"
    config = {"ema.profiles": [0.1], "ema.snapshots": 2}
    here(images, straight, config=config)
    fault = {"kind": "die_in_save", "stage": "pointer", "save": 1}
    ended = alone(images, folder, config=config, run=SAVE_ALWAYS, faults=[fault])
    assert ended.code == -signal.SIGKILL
    assert status(folder) == "running"
    assert "running" not in write_report(folder).read_text()  # who is dead does not run
    assert status(folder) == "failed"
    assert checkpoints(folder) == [1]
    assert (folder / "snapshots" / "step-0000000002").exists()
    assert here(images, folder, config=config).code == 0
    for number in (2, 4):
        name = f"snapshots/step-{number:010d}/power-0.1.safetensors"
        assert (folder / name).read_bytes() == (straight / name).read_bytes()
    same_run(folder, straight)


def test_r3_kill_between_samples_and_their_record(
    images: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, record = tmp_path / "run", RunLog.record

    def killed(self: RunLog, kind: str, **values: Any) -> None:
        if kind == "preview":
            raise KeyboardInterrupt
        record(self, kind, **values)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "record", killed)
        assert here(images, folder).code == 130
    assert status(folder) == "failed"
    assert (folder / "samples" / "0000000012.png").exists()
    for _ in range(2):  # recorded once, and not again
        assert here(images, folder).code == 0
        same_run(folder, finished)
        assert [r["images"] for r in read_log(folder) if r["kind"] == "preview"] == [12.0]


def test_r8_stopped_while_samples_are_caught_up(images: Path, tmp_path: Path) -> None:
    """Nothing is trained before the samples of where the run stands are drawn."""
    folder, straight, config = tmp_path / "run", tmp_path / "straight", {"preview.samples": 2}
    here(images, straight, config=config)
    for _ in range(2):  # first on the way, then while it catches up
        fault = {"kind": "send_in", "name": "SIGTERM", "where": "samples", "time": 0}
        assert here(images, folder, config=config, faults=[fault]).code == 0
        assert (status(folder), checkpoints(folder)) == ("preempted", [2])
    assert here(images, folder, config=config).code == 0
    same_run(folder, straight)
    told, expected = (
        [(r["kind"], r["step"]) for r in read_log(f) if r["kind"] in ("status", "preview")]
        for f in (folder, straight)
    )
    assert told == expected


@pytest.mark.parametrize("clock", ["crops", "steps"])
def test_r1_every_clock(clock: str, images: Path, tmp_path: Path) -> None:
    folder, straight = tmp_path / "run", tmp_path / "straight"
    length = {"crops": 32.0, "steps": 6.0}[clock]
    config = {"clock": clock, "images": length, "preview.samples": 3, "ema.half_life": 4.0}
    here(images, straight, config=config)
    ended = alone(images, folder, config=config, run=SAVE_ALWAYS, faults=[kill(3)])
    assert ended.code == -signal.SIGKILL and checkpoints(folder) == [2, 3]
    assert here(images, folder, config=config).code == 0
    same_run(folder, straight)


def draws(folder: Path) -> dict[int, list[list[Any]]]:
    """What was drawn in each step by all ranks, in the order of the step."""
    found: dict[int, dict[int, list[Any]]] = {}
    for file in folder.glob("draws-*.jsonl"):
        for line in harness.lines(file):
            step, index, *rest = line
            found.setdefault(step, {})[index] = rest
    return {step: [rows[i] for i in sorted(rows)] for step, rows in found.items()}


def test_r4_another_number_of_ranks(images: Path, steady: Path, tmp_path: Path) -> None:
    """1 -> 2 -> 1 ranks: the same images, levels, crops and flips in every step."""
    folder, straight = tmp_path / "run", tmp_path / "straight"
    record = {"kind": "record_draws"}
    config = {**LONG["config"], "data.flip": True}

    def stop(step: int) -> dict[str, Any]:
        return {"kind": "send", "name": "SIGTERM", "phase": "after", "step": step}

    assert alone(images, straight, config=config, faults=[record]).code == 0
    for size, faults in ((1, [stop(3)]), (2, [stop(8)]), (1, [])):
        ended = drive(images, folder, size=size, config=config, faults=[record, *faults])
        assert [e.code for e in ended] == [0] * size, ended
        assert "not bit-identical" in ended[0].out or size == 1
    assert status(folder) == "finished"
    got, expected = draws(folder), draws(straight)
    assert got == expected
    assert sorted(expected) == list(range(16)) and len(expected[0]) == 6
    losses = [[float(str(x[4])) for x in tiny.history(f)] for f in (folder, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_r5_other_micro_batches(images: Path, steady: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stop = {"kind": "send", "name": "SIGTERM", "phase": "after", "step": 5}
    record = {"kind": "record_draws"}
    assert alone(images, folder, **LONG, faults=[record, stop]).code == 0
    config = {**LONG["config"], "micro_batch": 1}
    assert alone(images, folder, config=config, faults=[record]).code == 0
    straight = tmp_path / "straight"
    assert alone(images, straight, **LONG, faults=[record]).code == 0
    assert draws(folder) == draws(straight)
    losses = [[float(str(x[4])) for x in tiny.history(f)] for f in (folder, steady)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_r6_sigterm_for_one_of_two_ranks(images: Path, steady_pair: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = {"kind": "send", "name": "SIGTERM", "phase": "backward", "step": 5, "rank": 1}
    ended = drive(images, folder, size=2, **LONG, faults=[fault])
    assert [e.code for e in ended] == [0, 0], ended
    assert status(folder) == "preempted"
    (step,) = checkpoints(folder)
    assert step in (6, 7)  # all learn of it one step later
    assert checkpoint.fault(folder / "checkpoints" / f"step-{step:010d}") is None
    ended = drive(images, folder, size=2, **LONG)
    assert [e.code for e in ended] == [0, 0], ended
    same_run(folder, steady_pair)


def test_r6_sigusr1(images: Path, finished: Path, tmp_path: Path) -> None:
    """Schedulers can send it some time before they end a job."""
    folder = tmp_path / "run"
    fault = {"kind": "send", "name": "SIGUSR1", "phase": "forward", "step": 1}
    ended = alone(images, folder, faults=[fault])
    assert (ended.code, status(folder)) == (0, "preempted")
    assert checkpoints(folder) == [2]
    assert here(images, folder).code == 0
    same_run(folder, finished)


def test_r7_one_interrupt(images: Path, steady: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = {"kind": "send", "name": "SIGINT", "phase": "forward", "step": 4}
    ended = alone(images, folder, **LONG, faults=[fault])
    assert (ended.code, status(folder)) == (0, "preempted")
    assert checkpoints(folder) == [5]
    assert alone(images, folder, **LONG).code == 0
    same_run(folder, steady)


def test_r7_two_interrupts(images: Path, steady: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = {"kind": "send", "name": "SIGINT", "phase": "forward", "step": 4, "times": 2}
    ended = alone(images, folder, **LONG, run=SAVE_ALWAYS, faults=[fault])
    assert ended.code == 130 and ended.error
    assert checkpoints(folder) == [3, 4]
    assert alone(images, folder, **LONG).code == 0
    same_run(folder, steady)


STOPS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


def raising(name: str) -> Callable[..., Any]:
    """A function that only sends this process a signal."""

    def send(*given: Any, **options: Any) -> None:
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(10)  # the handler raises in here

    return send


@pytest.mark.parametrize("name", STOPS)
@pytest.mark.parametrize("command", ["train", "prepare"])
def test_r7_a_signal_while_images_are_prepared(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """There is nothing to save: the same command begins again."""
    data = tmp_path / "data"
    handlers = [signal.getsignal(getattr(signal, n)) for n in STOPS]
    monkeypatch.setattr(ready, "ready", raising(name))
    more = ("--out", tmp_path / "out")
    given = [str(a) for a in (command, tiny.write_images(data, count=8), *more)]
    assert cli.main(given) == (0 if command == "train" else 130)
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in capsys.readouterr().err
    assert handlers == [signal.getsignal(getattr(signal, n)) for n in STOPS]


@pytest.mark.parametrize("name", STOPS)
@pytest.mark.parametrize("command", ["train", "sample"])
def test_r7_a_signal_while_the_program_starts(
    command: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """It must end there and then: an exception can abort an import of C++."""

    def ended(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(cli, "import_module", raising(name))
    monkeypatch.setattr(os, "_exit", ended)
    with pytest.raises(SystemExit) as caught:
        cli.main([command])
    assert caught.value.code == (0 if command == "train" else 130)
    told = capsys.readouterr()
    assert len((told.out + told.err).splitlines()) == 1


def test_r7_a_signal_while_the_report_is_written(
    images: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_report: None
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setattr(status_lines, "write_report", raising("SIGTERM"))
    assert here(images, folder).code == 0
    assert status(folder) == "finished" and not (folder / "lock").exists()
    same_run(folder, finished)


@pytest.mark.parametrize("ignored", [False, True])
def test_r7_the_terminal_is_closed(
    ignored: bool, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C, unless `nohup` has had SIGHUP ignored."""
    folder, before = tmp_path / "run", signal.getsignal(signal.SIGHUP)
    fault = {"kind": "send", "name": "SIGHUP", "phase": "forward", "step": 1}
    if ignored:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ended = here(images, folder, faults=[fault])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (ended.code, status(folder)) == (0, "finished" if ignored else "preempted")


@pytest.mark.parametrize("phase", ["samples", "evaluation", "save"])
def test_r8_sigterm_in_between(phase: str, images: Path, steady: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = {**LONG["config"], "preview.samples": 4}
    straight = tmp_path / "straight"
    tiny.run(tiny.change(tiny.config(images), config), straight)
    fault = {"kind": "send_in", "name": "SIGTERM", "where": phase, "time": 1}
    ended = alone(images, folder, config=config, faults=[fault])
    assert (ended.code, status(folder)) == (0, "preempted"), ended.err
    assert "will be drawn when the run is resumed" in ended.out
    drawn = 0 if phase == "save" else 1  # before it was told to stop
    assert len(tiny.digests(folder / "samples")) == drawn
    assert alone(images, folder, config=config).code == 0
    assert tiny.history(folder) == tiny.history(straight)
    assert tiny.weights(folder) == tiny.weights(straight)
    assert tiny.digests(folder / "samples") == tiny.digests(straight / "samples")
    watched = [r["images"] for r in read_log(folder) if r["kind"] == "preview"]
    assert watched == [12.0, 24.0, 36.0, 48.0]


def test_r9_time_budget(images: Path, steady: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    slow = [{"kind": "sleep", "seconds": 0.5, "phase": "data", "step": s} for s in range(3, 16)]
    ended = alone(images, folder, **LONG, run={"max_hours": 4.0 / 3600}, faults=slow)
    assert (ended.code, status(folder)) == (0, "preempted")
    times = [r["time"] for r in read_log(folder)]
    assert times[-1] - times[0] < 4.0 + 0.5 + 0.5  # the budget, a step, and some air
    (step,) = checkpoints(folder)
    assert 3 < step < 16
    assert alone(images, folder, **LONG).code == 0
    same_run(folder, steady)
