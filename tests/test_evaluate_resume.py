"""Evaluations that are interrupted go on where they were, and end with the same numbers."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import Capture, fails, names, works

from patchdiffusion.metrics import memorise
from patchdiffusion.system.parts import Parts, in_batches

FEW = ("--samples", 6, "--batch", 3, "--steps", 1, "--reference", 4, "--bits.images", 2,
       "--bits.steps", 1, "--device", "cpu")  # fmt: skip
MEANS = "lasting:means"
MODULE = """
import os
import signal

import torch

seen = 0


def means():
    def features(images):
        global seen
        seen += len(images)
        if seen > int(os.environ.get("DIES_AFTER", 10**9)):
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.cat([images.float().mean((2, 3)), images.float().std((2, 3))], dim=1)

    return features
"""


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run that may be changed, and an extractor in a file."""
    (tmp_path / "lasting.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lasting", raising=False)
    return Path(shutil.copytree(finished, tmp_path / "run"))


def result(run: Path, number: int = 1) -> dict[str, Any]:
    return json.loads((run / "evaluations" / f"{number:04d}.json").read_text())


def interrupt_after_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C as soon as another batch of anything is written."""
    write = Parts.write

    def interrupting(self: Parts, numbers: range, array: np.ndarray) -> None:
        write(self, numbers, array)
        if self.folder is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "write", interrupting)


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        (True, 10),  # losses, likelihoods, 2 batches each of real, images, features, copies
        (False, 6),  # features of code that may have changed are not kept
    ],
)
def test_an_evaluation_may_be_interrupted_after_every_batch(
    file: bool, parts: int, run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command gets one batch further, and the last one has nothing left to write."""
    monkeypatch.setattr(memorise, "CHUNK", 3 * 16 * 16 * 3)
    if not file:
        monkeypatch.setattr(importlib.import_module("lasting"), "__file__", None)
    command = ("evaluate", run, *FEW, "--features.extractor", MEANS)
    works(capsys, *command)
    folder = run / "evaluations" / "unfinished" / "0001"
    interrupt_after_a_part(monkeypatch)
    for _ in range(parts):
        assert names(fails(capsys, *command, code=130), folder)
    out = works(capsys, *command)
    assert "resume" in out
    assert "all is measured" in out or not file
    assert result(run, 2) == result(run, 1)
    assert sorted(f.name for f in (run / "evaluations").iterdir()) == ["0001.json", "0002.json"]


def test_an_evaluation_that_is_killed_goes_on(run: Path, capsys: Capture) -> None:
    command = ("evaluate", run, *FEW, "--features.extractor", MEANS)
    words = [sys.executable, "-m", "patchdiffusion", *map(str, command)]
    environment = {**os.environ, "DIES_AFTER": "18"}
    killed = subprocess.run(words, cwd=run.parent, env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    folder = run / "evaluations" / "unfinished" / "0001"
    assert list(folder.rglob("*.npy"))
    assert names(works(capsys, *command).splitlines()[0], "resume", folder)
    works(capsys, *command)
    assert result(run, 2) == result(run, 1)
    assert not folder.parent.exists()


def test_another_evaluation_leaves_it_alone(
    run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other settings, other weights, or for another file."""
    command = ("evaluate", run, *FEW, "--features.extractor", MEANS)
    with monkeypatch.context() as patch:
        interrupt_after_a_part(patch)
        fails(capsys, *command, code=130)
    folder = run / "evaluations" / "unfinished"
    before = tiny.digests(folder)
    others = (("--seed", 5), ("--weights", "raw"), ("--save", tmp_path / "x.json"))
    for other in (*others, ("--held-out", 3), ("--bits.images", 1)):
        assert "resume" not in works(capsys, *command, *other)
        assert tiny.digests(folder) == before
    assert [f.name for f in tmp_path.glob("x.json*")] == ["x.json"]
    assert "resume" in works(capsys, *command)
    assert not folder.exists()


def test_what_is_damaged_is_made_again(
    run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("evaluate", run, *FEW, "--features.extractor", MEANS)
    works(capsys, *command)
    with monkeypatch.context() as patch:
        interrupt_after_a_part(patch)
        for _ in range(6):
            fails(capsys, *command, code=130)
    parts = list(run.rglob(".parts/**/*.npy"))
    for file in parts[1:]:
        content = bytearray(file.read_bytes())
        content[-8] ^= 1  # of a value, before the checksum
        file.write_bytes(content)
    parts[0].write_bytes(parts[0].read_bytes()[:-1])
    assert len(parts) > 2
    works(capsys, *command)
    assert result(run, 2) == result(run, 1)


def test_a_refused_evaluation_leaves_nothing(run: Path, capsys: Capture) -> None:
    fails(capsys, "evaluate", run, "--features.extractor", "none", "--held-out", 0)
    assert not (run / "evaluations").exists()


def test_parts() -> None:
    assert list(in_batches(range(3, 8), 2)) == [range(3, 5), range(5, 7), range(7, 8)]
    assert Parts().within("x").once(range(2), lambda part: torch.ones(len(part))).tolist() == [1, 1]
    assert Parts().written() == []
