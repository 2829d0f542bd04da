"""Where the time of a step goes, and what processes know of each other."""

import json
import os
import time
from pathlib import Path

import pytest

from patchdiffusion.system.place import Place
from patchdiffusion.train import timing as module
from patchdiffusion.train.timing import Phases, heartbeat, whereabouts


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still unless it is told to go on."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_phases_are_disjoint(clock: list[float]) -> None:
    phases = Phases()
    phases.read()
    with phases("data"):
        clock[0] += 1
        with phases("disk"):
            clock[0] += 2
        clock[0] += 4
    clock[0] += 8
    with phases("forward"):
        clock[0] += 16
    seconds, slow = phases.read()
    assert seconds == {"data": 5.0, "disk": 2.0, "start": 8.0, "forward": 16.0}
    assert slow is None
    assert phases.read()[0] == {"start": 0.0}


def test_the_phase_of_an_error_is_remembered(clock: list[float]) -> None:
    phases = Phases()
    with pytest.raises(ZeroDivisionError), phases("forward"), phases("data"):
        _ = 1 / 0
    assert (phases.broken_in, phases.current) == ("data", "start")


def test_a_slow_step_is_told_with_its_reason(clock: list[float]) -> None:
    phases = Phases()
    for step in range(5):
        phases.begin_step(step)
        with phases("forward"):
            clock[0] += 0.5
        with phases("data"):
            clock[0] += 7.0 if step == 3 else 0.1
        phases.end_step()
    _, slow = phases.read()
    assert slow is not None
    assert (slow.step, slow.phase) == (3, "data")
    assert (slow.seconds, slow.in_phase) == (pytest.approx(7.5), pytest.approx(7.0))
    assert phases.read()[1] is None


def test_a_pause_between_steps_is_no_slow_step(clock: list[float]) -> None:
    phases = Phases()
    for step in range(3):
        phases.begin_step(step)
        clock[0] += 0.1
        phases.end_step()
        with phases("samples"):
            clock[0] += 60.0
    assert phases.read()[1] is None


def test_a_sign_of_life(tmp_path: Path) -> None:
    phases, own, other = Phases(), Place(1, 2), Place(0, 2)
    phases.step = 7
    with heartbeat(tmp_path, own, phases):
        file = tmp_path / "ranks" / "rank-0001.json"
        deadline = time.time() + 10
        while not file.exists() and time.time() < deadline:
            time.sleep(0.01)
        facts = json.loads(file.read_text())
        assert (facts["rank"], facts["pid"], facts["step"]) == (1, os.getpid(), 7)
        told = whereabouts(tmp_path, other)
        assert f"rank 1 (process {os.getpid()} on " in told and "s in start of step 7" in told
        os.utime(file, (time.time() - 60, time.time() - 60))
        assert "silent for " in whereabouts(tmp_path, other) or not file.exists()
    assert not (tmp_path / "ranks").exists()  # a good end leaves nothing


def test_an_error_leaves_the_last_sign(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), heartbeat(tmp_path, Place(1, 2), Phases()):
        raise RuntimeError
    assert (tmp_path / "ranks" / "rank-0001.json").exists()


def test_alone_nothing_is_written(tmp_path: Path) -> None:
    with heartbeat(tmp_path, Place(), Phases()):
        pass
    assert not list(tmp_path.iterdir())
    assert whereabouts(tmp_path, Place(0, 2)) == "nothing is known of the others"
