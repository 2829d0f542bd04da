"""I9: classes and labels that are odd, out of range, or missing."""

import io
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import Capture, fails, names, works
from harness import here
from PIL import Image

from patchdiffusion import cli
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source
from patchdiffusion.system.files import read_json, write_json

NAMES = ["10 \u732b", "9 \u72ac", 'say "hi"', "two\nlines", "caf\u00e9", "\U0001f600", "\x1b[2Jx"]
ORDER = ["9 \u72ac", "10 \u732b", "\x1b[2Jx", "caf\u00e9", 'say "hi"', "two\nlines", "\U0001f600"]


def test_i9_names_of_classes(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "set"
    for number, name in enumerate(NAMES):
        tiny.write_images(tmp_path / str(number), 2)
        shutil.copytree(tmp_path / str(number) / "ab"[number % 2], folder / name)
    (folder / "0 empty").mkdir()
    ended = here(folder, tmp_path / "run", config={"network.num_classes": 7})
    assert ended.code == 0, ended.error
    assert read_json(tmp_path / "run" / "model" / "config.json")["classes"] == ORDER
    pack = prepare(open_source(folder), progress=False)
    assert [pack.classes[pack[n].label or 0] for n in range(7)] == ORDER
    assert [pack[n].key.split("/")[0] for n in range(7)] == ORDER
    text = (pack.path / "report.txt").read_text(encoding="utf-8")
    assert "  two\\nlines: 1\n" in text and "  \\x1b[2Jx: 1\n" in text  # one line, and no orders
    assert all(c.isprintable() for c in text.replace("\n", ""))


def test_i9_names_that_cannot_be_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a file, or on a machine of another language, without an error."""
    folder = tmp_path / "set"
    for name, number in (("\u732b", 2), ("\u72ac", 3)):
        (folder / name).mkdir(parents=True)
        Image.fromarray(tiny.picture(number)).save(folder / name / "x.png")
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert cli.main(["prepare", str(folder)]) == 0
    shown.flush()
    assert b"  \\u732b: 1\n" in shown.buffer.getvalue()


def test_i9_one_class(tmp_path: Path) -> None:
    """A single folder is no class."""
    shutil.copytree(tiny.write_images(tmp_path / "both") / "a", tmp_path / "set" / "only")
    ended = here(tmp_path / "set", tmp_path / "run", config={"network.num_classes": 0})
    assert ended.code == 0
    assert read_json(tmp_path / "run" / "model" / "config.json")["classes"] == []
    ended = here(tmp_path / "set", tmp_path / "other")
    assert ended.code == 2
    assert names(ended.error, 2, "--network.num-classes 0")


LABELS = [["a/00.png", 1], ["b/01.png", 0]]


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ([["a/00.png", 1], ["b/01.png", -1]], ["b/01.png", "-1"]),
        ([["a/00.png", 1], ["b/01.png", 10**7]], [10**7, 10**6]),
        ([["a/00.png", 1], ["b/01.png", 10**30]], [10**30, 10**6]),
        ([["a/00.png", 1], ["b/01.png", True]], ["b/01.png", True]),
        ([["a/00.png", 1]], [1, 2, "b/01.png"]),
        ([["a/00.png", 1], [{}, 1]], ["{}"]),
        ([["a/00.png"]], []),
    ],
)
def test_i9_labels_that_are_refused(
    labels: list[Any], named: list[object], tmp_path: Path, capsys: Capture
) -> None:
    folder = tiny.write_images(tmp_path / "set", 2)
    write_json(folder / "dataset.json", {"labels": labels})
    error = fails(capsys, "prepare", folder, "--out", tmp_path / "pack")
    assert names(error, "dataset.json", *named)
    assert not (tmp_path / "pack").exists()


def test_i9_labels_of_images_that_are_missing(tmp_path: Path, capsys: Capture) -> None:
    folder = tiny.write_images(tmp_path / "set", 2)
    write_json(folder / "dataset.json", {"labels": [*LABELS, ["a/gone.png", 7]]})
    out = works(capsys, "prepare", folder, "--out", tmp_path / "pack")
    assert any(names(line, "dataset.json", 1, "a/gone.png") for line in out.splitlines())
    pack = Pack.open(tmp_path / "pack")
    assert pack.classes == ("0", "1") and [pack[n].label for n in range(2)] == [1, 0]
