"""Runs whose images, or which themselves, are in another place than when they began."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
from commands import Capture, fails, names, works
from test_cli import SMALL

from patchdiffusion.system.files import read_json

MORE = ("--images", "6")


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Path:
    """A run on images in `here`, which is the current folder."""
    here = tmp_path / "here"
    tiny.write_images(here / "photos", 12)
    monkeypatch.chdir(here)
    works(capsys, "train", "folder", "--data.path", "photos", *SMALL, "--name", "photos")
    return here / "runs" / "photos"


def stored(run: Path) -> str:
    return read_json(run / "config.json")["data"]["path"]


def test_a_relative_path_is_stored_whole(
    begun: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stored(begun) == str(tmp_path / "here" / "photos")
    monkeypatch.chdir(tmp_path)
    moved = Path(shutil.move(begun, tmp_path / "elsewhere"))
    assert "resume" in works(capsys, "train", moved, *MORE)


@pytest.mark.parametrize(
    "command",
    [
        ("runs/photos", "--data.path", "new/photos"),
        ("runs/photos", "--data.path=new/photos"),
        ("new/photos",),
        ("folder", "--data.path", "new/photos", "--name", "photos"),
    ],
)
def test_moved_images_go_on(command: tuple[str, ...], begun: Path, capsys: Capture) -> None:
    Path("new").mkdir()
    shutil.move("photos", "new/photos")
    told = fails(capsys, "train", "runs/photos", *MORE)
    assert "train runs/photos --data.path" in told
    assert "resume" in works(capsys, "train", *command, *MORE)
    assert stored(begun) == str(Path("new/photos").resolve())
    assert "finished" in works(capsys, "train", "runs/photos", *MORE)


def test_other_images_are_refused(begun: Path, capsys: Capture) -> None:
    tiny.write_images(Path("other/photos"), 14)
    before = json.dumps(read_json(begun / "config.json"))
    told = fails(capsys, "train", "runs/photos", "--data.path", "other/photos", *MORE)
    assert names(told, "--allow-data-change")
    told = fails(capsys, "train", "other/photos", *MORE)
    assert names(told, "--name", "--out", "--fresh")
    shutil.move("photos", "gone")
    told = fails(capsys, "train", "other/photos", *MORE)
    assert names(told, "--name", "--out", "--fresh")
    assert json.dumps(read_json(begun / "config.json")) == before
