"""D4 to D6: files of a run that give back other bytes than they were given, or other facts."""

import os
import shutil
from pathlib import Path

import harness
import pytest
import tiny
import torch
from commands import Capture, fails, names
from harness import FILES, NEWEST, OLDER, SAVE_ALWAYS, checkpoints, here, same_run
from safetensors.torch import load

from patchdiffusion.system.files import read_json, write_json
from patchdiffusion.train import checkpoint, resume
from patchdiffusion.train.report import read_log

# ---- D4, D5: files that are cut or changed ----


def cut(file: Path, size: int) -> None:
    os.truncate(file, file.stat().st_size - size)


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_d4_truncated_file(
    name: str, images: Path, finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    half = (finished / "checkpoints" / NEWEST / name).stat().st_size // 2
    for size in (1, 100, half):
        folder = Path(shutil.copytree(finished, tmp_path / str(size)))
        newest = folder / "checkpoints" / NEWEST
        cut(newest / name, size)
        training = tiny.training(tiny.config(images), folder)
        with resume.opened(training):
            assert training.state.step == 3
        out = capsys.readouterr().out
        assert any(names(line, "warning", newest / name) for line in out.splitlines())
        assert f"resume    at step 3 from {newest.with_name(OLDER)}" in out
        assert f"renamed   to {newest}.damaged-1" in out
        assert checkpoints(folder) == [1, 2, 3]
        assert (newest.with_name(f"{NEWEST}.damaged-1") / name).exists()


def test_d4_a_run_over_a_truncated_file(images: Path, run: Path, finished: Path) -> None:
    cut(run / "checkpoints" / NEWEST / "optimizer.safetensors", 1000)
    assert here(images, run, run=SAVE_ALWAYS).code == 0
    same_run(run, finished)
    assert checkpoints(run) == [3, 4]  # two are kept, and the damaged one is neither
    assert (run / "checkpoints" / f"{NEWEST}.damaged-1").is_dir()
    cut(run / "checkpoints" / NEWEST / "optimizer.safetensors", 1000)
    assert here(images, run).code == 0
    assert (run / "checkpoints" / f"{NEWEST}.damaged-2").is_dir()


def test_d4_a_truncated_file_does_not_count(run: Path) -> None:
    """Found when older checkpoints are deleted, it does not take the place of a whole one."""
    cut(run / "checkpoints" / NEWEST / "weights.safetensors", 1)
    checkpoint.prune(run / "checkpoints", keep=2)
    assert checkpoints(run) == [2, 3, 4]


def test_d5_flipped_byte_in_tensor_data(images: Path, run: Path, finished: Path) -> None:
    file = run / "checkpoints" / NEWEST / "weights.safetensors"
    before = load(file.read_bytes())
    flip(file, -3)
    after = load(file.read_bytes())  # nobody else would notice
    assert sum(not torch.equal(before[k], after[k]) for k in before) == 1
    ended = here(images, run)
    assert ended.code == 0
    assert any(names(line, file, "digest") for line in ended.out.splitlines())
    same_run(run, finished)
    assert (run / "checkpoints" / f"{NEWEST}.damaged-1").is_dir()


def test_d5_flipped_byte_in_all(images: Path, run: Path) -> None:
    for file in (run / "checkpoints").glob("*/averaged.safetensors"):
        flip(file, -3)
    before = tiny.digests(run)
    ended = here(images, run)
    assert ended.code == 25
    assert names(ended.error, run / "checkpoints", "--fresh")
    assert tiny.digests(run) == before


# ---- D6: files that are missing, new, edited, or of another version ----


@pytest.mark.parametrize("name", FILES)
def test_d6_missing_file(name: str, images: Path, run: Path, capsys: Capture) -> None:
    newest = run / "checkpoints" / NEWEST
    (newest / name).unlink()
    training = tiny.training(tiny.config(images), run)
    with resume.opened(training):
        assert training.state.step == 3
    out = capsys.readouterr().out
    assert "warning: skipping a checkpoint: " in out and str(newest / name) in out


def test_d6_additional_file(images: Path, run: Path) -> None:
    (run / "checkpoints" / NEWEST / "notes.txt").write_text("the good one")
    ended = here(images, run)
    assert ended.code == 0 and "is finished" in ended.out and not ended.warnings


def test_d6_configuration_edited_by_hand(images: Path, run: Path, capsys: Capture) -> None:
    stored = read_json(run / "config.json")
    stored["optim"]["lr"] = 0.02
    stored["optim"]["schedule"]["warmup"] = 0.2
    write_json(run / "config.json", stored)
    before = tiny.digests(run)
    error = fails(capsys, "train", run)  # what is stored against what was trained
    assert names(error, "optim.lr: 0.01 -> 0.02", "warmup: 0.1 -> 0.2")
    ended = here(images, run)  # what is asked for against what is stored
    assert ended.code == 2
    assert names(ended.error, "optim.lr: 0.02 -> 0.01", "warmup: 0.2 -> 0.1")
    assert tiny.digests(run) == before


def test_d6_other_flags(images: Path, run: Path) -> None:
    before = tiny.digests(run)
    config = {"optim.lr": 0.5, "batch": 8, "data.resolution": 8, "images": 15.0}
    ended = here(images, run, config=config)
    assert ended.code == 2
    for text in ("batch: 4 -> 8", "optim.lr: 0.01 -> 0.5", "data.resolution: None -> 8"):
        assert text in ended.error
    assert "images: " not in ended.error  # which may change
    assert "--allow-config-change" in ended.error
    assert tiny.digests(run) == before


def test_d6_other_flags_that_are_allowed(images: Path, run: Path) -> None:
    config = {"optim.lr": 0.5, "images": 15.0}
    ended = here(images, run, config=config, run={"allow_config_change": True})
    assert ended.code == 0
    assert any(names(x, "warning", "optim.lr: 0.01 -> 0.5") for x in ended.out.splitlines())
    changes = [r["fields"] for r in read_log(run) if r["kind"] == "config change"]
    assert changes == [["optim.lr: 0.01 -> 0.5"]]
    assert read_json(run / "config.json")["optim"]["lr"] == 0.5
    assert len(tiny.history(run)) == 5
    again = here(images, run, config=config)
    assert again.code == 0 and "is finished" in again.out


def test_d6_checkpoint_of_another_format(images: Path, run: Path) -> None:
    newest = run / "checkpoints" / NEWEST
    write_json(newest / "state.json", {**read_json(newest / "state.json"), "format": 99})
    harness.reseal(newest)
    assert checkpoint.fault(newest) is None
    ended = here(images, run)
    assert ended.code == 2 and names(ended.error, newest, checkpoint.FORMAT, "--fresh")
