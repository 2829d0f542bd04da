"""Where commands put what they make, and who may start them."""

import shutil
from pathlib import Path

import pytest
import tiny
from commands import Capture, fails, names, works
from test_cli import SMALL

from patchdiffusion.cli.places import home, new_file, run_of
from patchdiffusion.system.files import read_json

FEW = ("--count", 1, "--steps", 1, "--device", "cpu")
LOSS = ("--features.extractor", "none", "--samples", 0, "--held-out", 2, "--device", "cpu")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_what_is_made_with_an_average_lies_beside_it(run: Path, capsys: Capture) -> None:
    average = run / "averages" / "std-0.1"
    shutil.copytree(run / "model", average)
    assert (home(run), home(run / "model"), home(average)) == (run, run, average)
    assert run_of(average) == run_of(run / "model") == run
    works(capsys, "sample", average, *FEW)
    assert (average / "generated" / "0001" / "grid.png").exists()
    works(capsys, "evaluate", average, *LOSS)
    assert "held_out" in read_json(average / "evaluations" / "0001.json")


def test_numbers_are_claimed(tmp_path: Path) -> None:
    assert [new_file(tmp_path, ".json").name for _ in range(2)] == ["0001.json", "0002.json"]


def test_evaluate_names_what_is_missing(run: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("x")
    save = tmp_path / "file" / "x.json"
    assert names(fails(capsys, "evaluate", run, *LOSS, "--save", save), tmp_path / "file")
    config = run / "config.json"
    stored = read_json(config)["data"]["path"]
    config.write_text(config.read_text().replace(stored, str(tmp_path / "moved")))
    assert names(fails(capsys, "evaluate", run, *LOSS), run, tmp_path / "moved", "--data")
    works(capsys, "evaluate", run, *LOSS, "--data", stored)


@pytest.mark.parametrize("command", ["prepare x", "average run", "report run", "doctor"])
def test_commands_of_one_process_say_so(
    command: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert names(fails(capsys, *command.split()), command.split()[0], "2", "torchrun")


def test_a_link_gives_its_own_name(
    tmp_path: Path, images: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").symlink_to(images)
    works(capsys, "train", "./photos", *SMALL)
    assert tiny.weights(tmp_path / "runs" / "photos")
