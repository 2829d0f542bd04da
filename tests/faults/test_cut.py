"""I2: a pack that loses its end while it is read, by a step, a preview or an evaluation."""

import itertools
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import harness
import pytest
import tiny
from commands import Capture, fails
from harness import here

from patchdiffusion.data import pack as pack_module
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source


@pytest.mark.parametrize("mapped", [False, True])
def test_i2_a_pack_that_is_cut_short(
    mapped: bool, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a mapped file beyond its end would kill the process."""
    monkeypatch.setattr(pack_module, "SMALL", 0 if mapped else 2**20)
    pack = prepare(open_source(images), tmp_path / "pack", progress=False)
    data = pack.path / "images.bin"
    fault = {"kind": "cut", "path": str(data), "phase": "data", "step": 2}
    ended = here(pack.path, tmp_path / "run", faults=[fault])
    assert ended.code == 23 and str(data) in ended.error
    assert harness.status(tmp_path / "run") == "failed"


@pytest.mark.parametrize("where", ["evaluation", "samples"])
def test_i2_a_pack_that_is_cut_short_in_a_preview(
    where: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_module, "SMALL", 0)
    pack = prepare(open_source(images), tmp_path / "pack", progress=False)
    data = pack.path / "images.bin"
    fault = {"kind": "cut_in", "path": str(data), "where": where, "time": 0}
    ended = here(pack.path, tmp_path / "run", faults=[fault])
    assert ended.code == 23 and str(data) in ended.error
    assert harness.status(tmp_path / "run") == "failed"
    assert not list((tmp_path / "run" / "samples").glob("0*.png"))


def test_i2_a_pack_that_is_cut_short_in_an_evaluation(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """No number that is computed from it is written or kept."""
    monkeypatch.setattr(pack_module, "SMALL", 0)
    pack = prepare(open_source(images), tmp_path / "pack", progress=False)
    run = tiny.run(tiny.config(pack.path, steps=1), tmp_path / "run")
    owner, data = import_module("patchdiffusion.metrics.evaluate"), pack.path / "images.bin"
    original, calls = owner.held_out_losses, itertools.count()

    def cut(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 2:  # two are timed
            os.truncate(data, 1)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, "held_out_losses", cut)
    command = ("evaluate", run, "--features.extractor", "none")
    assert str(data) in fails(capsys, *command, code=23)
    assert not list((run / "evaluations").glob("0*.json"))
    assert not list(run.glob("evaluations/**/*.npy"))
