"""Whole runs: exact, resumable, counted by any clock."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from patchdiffusion.plans import Stratified
from patchdiffusion.system.files import read_json
from patchdiffusion.train import loop, optim
from patchdiffusion.train.optimizers import AdamW
from patchdiffusion.train.report import read_log
from patchdiffusion.train.schedules import Trapezoid
from patchdiffusion.train.settings import Precision, PreviewConfig

Hook = Callable[[int], None]


def after_step(patch: pytest.MonkeyPatch, hook: Hook) -> None:
    """Call a hook with the number of steps done, after each of them."""
    original = loop.one_step

    def one_step(training: loop.Training) -> None:
        original(training)
        hook(training.state.step)

    patch.setattr(loop, "one_step", one_step)


def status(folder: Path) -> str:
    return read_json(folder / "run.json")["status"]


# ---- The same again ----


def test_the_same_configuration_gives_the_same_run(
    images: Path, finished: Path, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    config = tiny.config(images)
    folder = tiny.run(config, tmp_path / "again")
    assert len(tiny.history(folder)) == 4
    assert tiny.history(folder) == tiny.history(finished)
    assert tiny.weights(folder) == tiny.weights(finished)
    assert tiny.digests(folder / "samples") == tiny.digests(finished / "samples")
    assert torch.equal(before, torch.get_rng_state())
    other = tiny.run(replace(config, seed=4), tmp_path / "other")
    assert {line[4] for line in tiny.history(other)}.isdisjoint(
        {line[4] for line in tiny.history(finished)}
    )
    assert set(tiny.weights(other).values()).isdisjoint(tiny.weights(finished).values())


def test_everything_is_in_the_folder(finished: Path) -> None:
    names = sorted(f.name for f in finished.iterdir())
    assert names == ["checkpoints", "config.json", "log.jsonl", "model", "real.png",
                     "run.json", "samples"]  # fmt: skip
    facts = read_json(finished / "run.json")
    assert (facts["status"], facts["step"], facts["images"], facts["length"]) == (
        "finished", 4, 12.0, 12.0,
    )  # fmt: skip
    kinds = [record["kind"] for record in read_log(finished)]
    assert kinds == ["start", "status", "status", "status", "status", "preview"]
    assert [f.name for f in (finished / "samples").iterdir()] == ["0000000012.png"]


def test_the_held_out_loss_is_recorded(finished: Path) -> None:
    record = read_log(finished)[-1]
    held = record["held_out"]
    assert held["loss"] > 0
    assert set(held["sizes"]) == {"16x16", "8x8"}
    assert held["sizes"]["16x16"] == held["loss"]
    assert held["bands"] and all(value > 0 for value in held["bands"].values())
    assert 0 <= record["copy_rate"] <= 1


def test_status_lines_are_for_people(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.run(tiny.config(images, steps=2), tmp_path / "run")
    out = capsys.readouterr().out
    for part in ("images of 16x16, 2 classes", "M parameters", "GMAC", "16x16 + 8x8",
                 "about 2 steps", "GB of disk", "loss", "crops/s", "% of peak", "left",
                 "samples/0000000006.png", "held-out loss", "by noise", "finished in"):  # fmt: skip
        assert part in out, part
    for part in ("skipped", "nan", "None"):
        assert part not in out, part


# ---- Interrupted and continued ----


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "max_hours"])
def test_an_interrupted_run_is_the_same_run(
    how: str, images: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder, changes = tiny.config(images), tmp_path / "run", {}
    if how == "max_hours":
        changes = {"max_hours": 1e-9}
    with monkeypatch.context() as patch:
        if how != "max_hours":
            number = signal.Signals[how]
            after_step(patch, lambda step: os.kill(os.getpid(), number) if step == 2 else None)
        handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        tiny.run(config, folder, **changes)
        assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert status(folder) == "preempted"
    assert read_json(folder / "run.json")["step"] == (1 if how == "max_hours" else 2)
    tiny.run(config, folder)
    assert status(folder) == "finished"
    assert tiny.history(folder) == tiny.history(finished)
    assert tiny.weights(folder) == tiny.weights(finished)


def test_means_over_an_interruption_are_exact(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A status line every second step, a stop between the two: the sums go into a checkpoint."""
    config = tiny.config(images, preview=PreviewConfig(status=2, samples=1, grid=1, sample_steps=1))
    straight = tiny.run(config, tmp_path / "straight")
    with monkeypatch.context() as patch:
        after_step(patch, lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None)
        tiny.run(config, tmp_path / "stopped")
    tiny.run(config, tmp_path / "stopped")
    assert len(tiny.history(straight)) == 3  # after steps 1, 2 and 4
    assert tiny.history(tmp_path / "stopped") == tiny.history(straight)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_interrupted_run_of_low_precision_is_the_same_run(
    precision: Precision, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "FIRST_SCALE", 2.0**22)  # too large: halved while the run goes on
    config = tiny.config(images, steps=12, precision=precision)
    straight = tiny.run(config, tmp_path / "straight")
    with monkeypatch.context() as patch:
        after_step(patch, lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None)
        tiny.run(config, tmp_path / "stopped")
    tiny.run(config, tmp_path / "stopped")
    assert tiny.history(tmp_path / "stopped") == tiny.history(straight)
    assert tiny.weights(tmp_path / "stopped") == tiny.weights(straight)
    skipped = tiny.history(straight)[-1][-1]
    assert skipped == (0 if precision == "bf16" else 5)


KILLED = """
import os, signal, sys
from pathlib import Path
import tiny, torch
from patchdiffusion.train import loop, status
torch.set_num_threads(1)
status.measured_peak = lambda device, precision: 1e9
original = loop.one_step
def one_step(training):
    original(training)
    if training.state.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
loop.one_step = one_step
tiny.run(tiny.config(Path(sys.argv[1])), Path(sys.argv[2]), save_minutes=0.0)
"""


def test_a_killed_run_is_the_same_run(images: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(images), str(folder)],
        cwd=Path(__file__).parent,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert status(folder) == "running"  # it had no time to say otherwise
    assert [f.name for f in sorted((folder / "checkpoints").iterdir())][-1] == "step-0000000002"
    tiny.run(tiny.config(images), folder)
    assert tiny.history(folder) == tiny.history(finished)
    assert tiny.weights(folder) == tiny.weights(finished)


def test_a_second_interrupt_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with loop.stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_training_works_in_another_thread(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    thread = threading.Thread(target=tiny.run, args=(tiny.config(images, steps=1), folder))
    thread.start()
    thread.join()
    assert status(folder) == "finished"


def test_a_finished_run_is_left_as_it_is(
    images: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tiny.digests(finished)
    tiny.run(tiny.config(images), finished)
    assert "is finished; a larger --images extends it" in capsys.readouterr().out
    after = tiny.digests(finished)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed <= {"log.jsonl"}
    assert status(finished) == "finished"


def test_a_finished_run_can_be_extended(images: Path, tmp_path: Path) -> None:
    constant = AdamW(lr=1e-2, schedule=Trapezoid(warmup=0.0, cooldown=0.0))
    short, long = (tiny.config(images, steps=n, optim=constant) for n in (2, 4))
    tiny.run(short, tmp_path / "extended")
    folder = tiny.run(long, tmp_path / "extended")
    straight = tiny.run(long, tmp_path / "straight")
    assert tiny.history(folder) == tiny.history(straight)
    assert tiny.weights(folder) == tiny.weights(straight)
    assert read_json(folder / "run.json")["length"] == 12.0


def test_sizes_with_levels_and_pitches_of_their_own(images: Path, tmp_path: Path) -> None:
    law = Stratified(
        fractions=(1.0, 1.0, 0.5),
        probs=(0.5, 0.25, 0.25),
        percentiles=((0.0, 1.0), (0.5, 1.0), (0.0, 0.5)),
        pitches=(1, 2, 1),
    )
    folder = tiny.run(tiny.config(images, patches=law), tmp_path / "run")
    (*_, status) = (r for r in read_log(folder) if r["kind"] == "status")
    assert set(status["sizes"]) == {"16x16", "8x8@2[0.5-1]", "8x8[0-0.5]"}
    (*_, watched) = (r for r in read_log(folder) if r["kind"] == "preview")
    assert set(watched["held_out"]["sizes"]) == {"16x16", "8x8"}  # crops of all levels
