"""D: disks that are full, read-only, or used by others; `test_damage.py` has D4 to D6."""

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import pytest
import tiny
from commands import names
from harness import (
    FILES,
    LONG,
    OLDER,
    SAVE_ALWAYS,
    Ended,
    alone,
    checkpoints,
    here,
    same_run,
    status,
)

from patchdiffusion.system.files import read_json
from patchdiffusion.train import checkpoint, resume
from patchdiffusion.train import status as status_module


def unfinished(folder: Path) -> list[str]:
    """Temporary files and folders in a run."""
    names = [f.name for f in folder.rglob("*")]
    return [name for name in names if name.startswith(".") or name.endswith((".tmp", ".old"))]


def status_lines(ended: Ended) -> list[str]:
    return [line for line in ended.out.splitlines() if "  loss " in line]


# ---- D1, D2: no room ----


def test_d1_disk_full_at_a_save(images: Path, steady: Path, tmp_path: Path) -> None:
    """Saves of steps 2, 4 and 5 fail; those of 1 and 3 do not."""
    folder = tmp_path / "run"
    fault = {"kind": "limit_file_size", "size": 100_000, "saves": [1, 3, 4]}
    ended = alone(images, folder, **LONG, run=SAVE_ALWAYS, faults=[fault])
    assert ended.code == 20
    assert names(ended.error, folder, "File too large")
    assert ended.out.count("warning: cannot save") == 2
    told = ["NOT SAVED: " in line for line in status_lines(ended)]
    assert told == [False, False, True, False, True]
    assert checkpoints(folder) == [3]
    assert checkpoint.fault(folder / "checkpoints" / OLDER) is None
    assert (folder / "checkpoints" / "latest").read_text() == f"{OLDER}\n"
    assert unfinished(folder) == []
    assert read_json(folder / "model" / "config.json")["step"] == 3
    again = here(images, folder, **LONG)
    assert again.code == 0 and "resume    at step 3 " in again.out
    same_run(folder, steady)


def test_d1_older_checkpoints_make_room(
    images: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for two, and three are to be kept."""
    folder, usage = tmp_path / "run", shutil.disk_usage(tmp_path)

    def small(path: object) -> object:
        return usage._replace(free=1000) if len(checkpoints(folder)) > 1 else usage

    monkeypatch.setattr(shutil, "disk_usage", small)
    ended = here(images, folder, run={**SAVE_ALWAYS, "keep": 3})
    assert (ended.code, status(folder)) == (0, "finished")
    assert "cannot save" not in ended.out
    assert checkpoints(folder) == [3, 4]
    same_run(folder, finished)


def test_d1_disk_full_at_the_last_save(images: Path, finished: Path, tmp_path: Path) -> None:
    """A run whose end is not on disk is not finished."""
    folder = tmp_path / "run"
    fault = {"kind": "fill_disk", "free": 1000, "saves": [3]}
    ended = here(images, folder, run=SAVE_ALWAYS, faults=[fault])
    assert (ended.code, status(folder)) == (20, "failed")
    assert here(images, folder).code == 0
    same_run(folder, finished)


def test_d1_disk_full_at_a_grid(
    images: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is for people only cannot end a run."""
    folder = tmp_path / "run"

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(status_module, "save_png", full)
        ended = here(images, folder)
    assert (ended.code, status(folder)) == (0, "finished"), ended.err
    assert ended.out.count("No space left on device") == 1
    assert tiny.weights(folder) == tiny.weights(finished)
    assert here(images, folder).code == 0  # and it is drawn when there is room
    assert tiny.digests(folder / "samples") == tiny.digests(finished / "samples")


def test_d2_quota_almost_reached_at_the_start(images: Path, tmp_path: Path) -> None:
    tiny.training(tiny.config(images), tmp_path / "run")  # the pack is made
    ended = here(images, tmp_path / "run", faults=[{"kind": "fill_disk", "free": 1000}])
    assert ended.code == 2
    needed, free = re.findall(r"\d[\d,]*(?= bytes| are free)", ended.error)
    assert int(needed.replace(",", "")) > 2**26 and free == "1,000"
    assert not (tmp_path / "run").exists()


def test_d2_quota_almost_reached_at_a_save(
    images: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, written = tmp_path / "run", []
    save = checkpoint.save

    def watched(root: Path, step: int, *rest: object) -> Path:
        written.append(step)
        return save(root, step, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(checkpoint, "save", watched)
    fault = {"kind": "fill_disk", "free": 1000, "saves": [1]}
    ended = here(images, folder, run=SAVE_ALWAYS, faults=[fault])
    assert ended.code == 0
    assert any(names(x, "warning", "1,000") for x in ended.out.splitlines())
    assert ["NOT SAVED" in line for line in status_lines(ended)] == [False, False, True, False]
    assert written == [1, 3, 4]  # it was refused before anything was written
    same_run(folder, finished)
    fault = {"kind": "fill_disk", "free": 1000, "saves": [1, 2]}
    ended = here(images, tmp_path / "other", run=SAVE_ALWAYS, faults=[fault])
    assert ended.code == 20 and names(ended.error, "1,000")
    assert checkpoints(tmp_path / "other") == [1]


# ---- D3: no right to write, and nothing left to write to ----


@pytest.fixture(params=["injected", "chmod"])
def unwritable(request: pytest.FixtureRequest) -> Iterator[Callable[[Path], list[dict[str, str]]]]:
    """Makes a folder unwritable, or returns the fault that does so."""
    changed: list[Path] = []

    def forbid(folder: Path) -> list[dict[str, str]]:
        if request.param == "injected":
            return [{"kind": "forbid", "path": str(folder)}]
        changed.append(folder)
        folder.chmod(0o500)
        return []

    if request.param == "chmod" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    yield forbid
    for folder in changed:
        folder.chmod(0o700)


def test_d3_unwritable_folder_at_the_start(
    unwritable: Callable[[Path], list[dict[str, str]]], images: Path, tmp_path: Path
) -> None:
    (tmp_path / "locked").mkdir()
    ended = here(images, tmp_path / "locked" / "run", faults=unwritable(tmp_path / "locked"))
    assert ended.code == 2
    assert names(ended.error, tmp_path / "locked", "Permission denied")
    assert list((tmp_path / "locked").iterdir()) == []


def test_d3_unwritable_checkpoints_at_the_start(
    unwritable: Callable[[Path], list[dict[str, str]]], images: Path, run: Path
) -> None:
    before, faults = tiny.digests(run), unwritable(run / "checkpoints")
    ended = here(images, run, config={"images": 15.0}, faults=faults)
    assert ended.code == 2
    assert names(ended.error, run / "checkpoints", "Permission denied")
    assert tiny.digests(run) == before


def test_d3_folder_removed_in_mid_run(images: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = {"kind": "remove", "path": str(folder), "phase": "data", "step": 2}
    ended = here(images, folder, run=SAVE_ALWAYS, faults=[fault])
    assert (ended.code, status(folder)) == (0, "finished")
    assert ended.out.count(f"warning: {folder} has vanished") == 1
    assert tiny.weights(folder) == tiny.weights(finished)
    assert checkpoints(folder) == [3, 4]
    assert "is finished" in here(images, folder).out  # it is a run like any other


def test_d1_one_checkpoint_for_good_each_time(images: Path, tmp_path: Path) -> None:
    """The first after each 6 images; steps are of 3."""
    folder = tmp_path / "run"
    more = {**SAVE_ALWAYS, "keep_every": 6.0}
    assert here(images, folder, config={"images": 24.0}, run=more).code == 0
    assert checkpoints(folder) == [2, 4, 6, 7, 8]


# ---- D7, D8: others who use the same disk ----


def test_d7_two_trainers_in_one_folder(
    images: Path, steady: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    mark = tmp_path / "hangs"
    hang = {"kind": "sleep", "seconds": 600, "phase": "data", "step": 4, "mark": str(mark)}
    (first,) = harness.start(images, folder, **LONG, run=SAVE_ALWAYS, faults=[hang])
    try:
        harness.wait_until(mark.exists, first)
        with monkeypatch.context() as patch:
            patch.setattr(resume, "LOCK_PATIENCE", 0.1)
            before = tiny.digests(folder)
            second = here(images, folder, **LONG)
        assert tiny.digests(folder) == before
    finally:
        first.kill()
        harness.finish([first])
    assert second.code == 2
    assert names(second.error, folder, first.pid, socket.gethostname())
    assert (folder / "lock").exists()  # a dead process cannot delete it, nor does it hold it
    third = here(images, folder, **LONG)
    assert third.code == 0 and "resume    at step 4" in third.out
    same_run(folder, steady)
    assert not (folder / "lock").exists()


def test_d7_the_lock_is_deleted_and_taken_by_another_trainer(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = {"kind": "seize", "path": str(folder / "lock"), "phase": "data", "step": 2}
    ended = here(images, folder, run=SAVE_ALWAYS, faults=[fault])
    assert ended.code == 24 and names(ended.error, folder)
    assert checkpoints(folder) == [1, 2]  # nothing of it since
    assert status(folder) == "running"  # which the other one is
    assert (folder / "lock").exists()


def test_d7_the_lock_is_deleted(images: Path, finished: Path, tmp_path: Path) -> None:
    """Nobody has taken it: it is made anew, and keeps others out again."""
    folder = tmp_path / "run"
    fault = {"kind": "remove", "path": str(folder / "lock"), "phase": "data", "step": 2}
    ended = here(images, folder, run=SAVE_ALWAYS, faults=[fault])
    assert (ended.code, checkpoints(folder)) == (0, [3, 4])
    assert tiny.weights(folder) == tiny.weights(finished)
    assert not (folder / "lock").exists()


def test_d7_killed_before_it_began(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "lock").write_text("{}")
    (folder / ".config.json.k1ll3d00").write_text("{")
    assert here(images, folder).code == 0
    assert not [f.name for f in folder.iterdir() if f.name.startswith(".")]


def test_d7_another_trainer_was_quicker(
    images: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has waited for the folder finds what the other one has left there."""
    folder, take = tmp_path / "run", resume._take

    def late(*arguments: Any) -> None:
        shutil.copytree(finished, folder)
        take(*arguments)

    monkeypatch.setattr(resume, "_take", late)
    ended = here(images, folder, config={"images": 15.0})
    assert ended.code == 0 and "resume    at step 4" in ended.out


PREPARE = """
import sys, time
from contextlib import contextmanager
from pathlib import Path
from patchdiffusion.data import prepare
from patchdiffusion.data.source import open_source

images, own, go = map(Path, sys.argv[1:])
writer = prepare.pack_writer

@contextmanager
def held(*arguments, **options):
    own.touch()
    while not go.exists():
        time.sleep(0.01)
    with writer(*arguments, **options) as made:
        yield made

prepare.pack_writer = held
pack = prepare.prepare(open_source(images))
pack.verify()
print("pack", pack.fingerprint, pack.path.stat().st_ino)
"""


def test_d7_two_preparations_of_the_same_images(tmp_path: Path) -> None:
    images, marks, go = tiny.write_images(tmp_path / "set"), [], tmp_path / "go"
    processes = []
    try:
        for name in ("first", "second"):
            marks.append(tmp_path / name)
            processes.append(harness.script(PREPARE, images, marks[-1], go))
            if name == "first":
                harness.wait_until(marks[0].exists, processes[0])
        assert processes[1].stdout is not None
        waiting = threading.Timer(30, processes[1].kill)  # it would wait for `go` like the first
        waiting.start()
        line = processes[1].stdout.readline()
        waiting.cancel()
        assert names(line.strip(), processes[0].pid)
        go.touch()
    finally:
        go.touch()
        ended = harness.finish(processes)
    assert [e.code for e in ended] == [0, 0], ended
    assert ended[0].out == ended[1].out  # what is left of it
    assert ended[0].out.startswith("pack ") and not marks[1].exists()


def test_d8_umask(images: Path, tmp_path: Path) -> None:
    flags = ["--network.base", "4", "--network.mult", "1", "--network.blocks", "1"]
    flags += ["--network.attention", "--batch", "4", "--images", "9", "--device", "cpu"]
    flags += ["--preview.samples", "1", "--preview.grid", "1", "--ema.profiles", "0.1"]
    done = subprocess.run(
        [sys.executable, "-m", "patchdiffusion", "train", str(images), "--out", "run", *flags],
        cwd=tmp_path,
        env={**harness.environment(), "PATCHDIFFUSION_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        umask=0o027,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    modes = {str(f.relative_to(tmp_path)): f.stat().st_mode for f in tmp_path.rglob("*")}
    kernels = [modes.pop(name) for name in list(modes) if "kernels" in name]
    assert not any(mode & 0o077 for mode in kernels)  # which are code
    right = (stat.S_IFREG | 0o640, stat.S_IFDIR | 0o750)
    assert {name: oct(mode) for name, mode in modes.items() if mode not in right} == {}
    there = {Path(name).name for name in modes}
    assert there > {*FILES, "config.json", "run.json", "log.jsonl", "report.html", "latest"}
    assert there > {"model.safetensors", "power-0.1.safetensors", "images.bin", "pack.json"}
