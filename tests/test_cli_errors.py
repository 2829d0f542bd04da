"""What the command line refuses: one line and an exit code, never a traceback."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from commands import Capture, fails, names

from patchdiffusion import cli
from patchdiffusion.system.errors import Stop

CFG = "sample trained --guidance cfg --guidance"


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("fly", ["fly", "train", "sample"]),
        ("train fly", ["fly", "glyphs", "folder"]),
        ("train glyphs --fly", ["--fly"]),
        ("train glyphs pictures extra", ["extra"]),
        ("train fly pictures", ["fly"]),
        ("train glyphs missing", ["missing"]),
        ("train cifar10", ["cifar10", "DATA"]),
        ("train glyphs --optim.lr -1", ["lr", "-1.0"]),
        ("train glyphs --optim.lr nan", ["lr", "nan"]),
        ("train glyphs --optim.lr", ["--optim.lr"]),
        ("train glyphs --optim.lr fast", ["--optim.lr", "fast"]),
        ("train glyphs --batch 2.5", ["--batch", "2.5"]),
        ("train glyphs --batch 0", ["batch"]),
        ("train glyphs --images inf", ["images", "inf"]),
        ("train glyphs --data.resolution 7", ["resolution", "7"]),
        ("train glyphs --data.resolution -64", ["resolution", "-64"]),
        ("train glyphs --data.channels 2", ["--data.channels", "1", "3", "4"]),
        ("train glyphs --clock hours", ["--clock", "crops", "steps"]),
        ("train glyphs --keep 1", ["keep", "2", "1"]),
        ("train glyphs --max-hours -1", ["max_hours"]),
        ("train glyphs --patches.probs 0.5 0.2 0.2", ["probs", "0", "1"]),
        ("train glyphs --patches.fractions 1", ["fractions"]),
        ("train glyphs --precond.sigma-data 0", ["sigma_data"]),
        ("train glyphs --noise.std 0", ["std"]),
        ("train glyphs --name a/b", ["name"]),
        ("train glyphs --optim.betas 0.9", ["--optim.betas", "two", "0.9"]),
        ("train glyphs --optim.betas 0.9 1", ["betas"]),
        ("train empty", ["empty"]),
        ("train text", ["1", "text"]),
        ("train cut", ["1", "cut"]),
        ("train notes.txt", ["notes.txt"]),
        ("train pictures --out notes.txt", ["notes.txt"]),
        ("train pictures --out notes.txt/run", ["notes.txt"]),
        ("train pictures --out filled", ["filled"]),
        ("train glyphs --batch 3.5", ["--batch", "whole number", "3.5"]),
        ("train glyphs --images -5", ["images", "positive", "-5.0"]),
        ("train glyphs --images 1e99", ["images", "2^63", "1e+99"]),
        ("train glyphs --device gpu", ["--device", "gpu", "cuda"]),
        ("train glyphs --data.resolution 64x", ["--data.resolution", "two whole numbers", "64x"]),
        ("train glyphs --patches progresive", ["progresive", "--patches progressive"]),
        ("train glyphs --patches.probs 0.5 0.5", ["fractions", "probs", "3", "2"]),
        ("train pictures pictures", ["pictures", "two sets"]),
        ("train trained --network.base 8", ["network.base", "4 -> 8", "--fresh"]),
        ("train trained --data.resolution 64 --dry-run", ["data.resolution", "64", "--fresh"]),
        ("train trained --start-from missing --dry-run --out x", ["missing"]),
        ("train table.csv", ["table.csv", "folder"]),
        ("train meanflow trained", ["trained", "run"]),
        ("bench trained", ["trained", "run"]),
        ("sample trained --batch 0", ["batch", "1", "0"]),
        ("sample trained --threads 0", ["threads", "1", "0"]),
        ("sample trained --weights ema", ["--weights", "ema", "averaged"]),
        ("sample pictures", ["pictures", "patchdiffusion train"]),
        ("train pictures --start-from missing", ["missing"]),
        ("train pictures --network.base 6", ["base", "4", "4096", "6"]),
        ("train pictures --network.attention 9", ["attention"]),
        ("train pictures --network.channels 1", ["3", "channels", "1"]),
        ("sample", ["RUN"]),
        ("sample missing", ["missing"]),
        ("sample filled", ["filled"]),
        ("sample trained --steps 0", ["1", "0"]),
        ("sample trained --steps many", ["--steps"]),
        ("sample trained --count 0", ["count", "1"]),
        ("sample --count 4 trained", ["4 trained", "before", "all flags"]),
        ("sample --no-singles trained", ["trained", "before", "all flags"]),
        ("sample --singles trained", ["trained", "before", "all flags"]),
        ("train --images 4 pictures", ["pictures", "before", "all flags"]),
        ("train pictures --device cuda", ["cuda", "cpu"]),
        ("sample trained --classes zebra", ["zebra", "a", "b"]),
        ("sample trained --guidance two", ["two", "cfg", "autoguidance"]),
        (f"{CFG}.weight -1", ["guidance", "weight", "0", "-1.0"]),
        (f"{CFG}.weight nan", ["guidance", "weight", "0", "nan"]),
        ("sample trained --guidance.weight 2", ["--guidance.weight"]),
        (f"{CFG}.interval 2 1", ["0"]),
        (f"{CFG}.interval 0 inf", ["0", "inf"]),
        (f"{CFG}.rescale 2", ["rescale", "0", "1", "2.0"]),
        (f"{CFG}.channels 4", ["3", "channels", "4"]),
        ("sample trained --threshold dynamic --threshold.quantile 1.5", ["0", "1", "1.5"]),
        ("sample trained --threshold hard", ["hard", "clamp", "dynamic"]),
        ("sample trained --guidance autoguidance", ["--guidance.model"]),
        (
            "sample trained --guidance autoguidance --guidance.model missing",
            ["missing", "exist", "model"],
        ),
        ("sample trained --canvas region --canvas.size 0 4", ["height", "width"]),
        ("sample trained --canvas region --canvas.corner 4", ["region", "2", "4"]),
        ("sample trained --sigma-max 1e30", ["sigma_max", "2^63", "1e+30"]),
        ("sample trained --schedule.rho inf", ["rho", "inf"]),
        ("sample trained --solver heun --solver.churn.amount inf", ["amount", "inf"]),
        ("train glyphs --data.max-enlarge -1", ["max_enlarge", "-1.0", "1"]),
        ("train glyphs --data.max-enlarge inf", ["max_enlarge", "inf"]),
        ("train glyphs --optim.weight-decay 1e30", ["weight_decay", "1e+30", "lr", "1"]),
        ("train glyphs --precond flow --precond.time-scale 1e30", ["time_scale", "2^24", "1e+30"]),
        ("train glyphs --objective consistency --objective.rho 1e30", ["rho", "1e+30", "1280"]),
        ("train glyphs --objective consistency --objective.huber 1e30", ["huber", "1e+30"]),
        ("train glyphs --objective meanflow --objective.std 1e30", ["std", "1e+30"]),
        ("train glyphs --objective meanflow --objective.eps 1e30", ["eps", "1e+30"]),
        ("train glyphs --objective ctm --objective.sigma-max 1e30", ["sigma_max", "1e+30"]),
        ("train glyphs --optim.schedule inverse-sqrt --optim.schedule.warmup 3", ["warmup", "3"]),
        ("train objects.npy", ["objects.npy", "Python", "numbers"]),
        ("sample trained --seed 99999999999999999999", ["64"]),
        ("sample trained --sigma-min 0", ["sigma_min"]),
        ("sample trained --solver euler --solver.churn.amount 3", ["--solver.churn.amount"]),
        ("sample trained --solver ddim --solver.eta 2", ["eta", "0", "1", "2"]),
        ("sample trained --schedule.shift 3", ["--schedule.shift"]),
        ("sample trained --schedule flow --schedule.shift 0", ["shift"]),
        ("sample trained --solver map", ["map"]),
        ("sample trained --solver rk4", ["--solver"]),
        ("sample trained --out filled", ["filled"]),
        ("sample trained --out notes.txt", ["notes.txt"]),
        ("prepare", ["DATA"]),
        ("prepare missing", ["missing"]),
        ("prepare pictures --resolution 7", ["resolution", "7"]),
        ("prepare pictures --holdout 0.9", ["holdout", "0.9"]),
        ("prepare pictures --background no-color", ["no-color"]),
        ("prepare pictures --out notes.txt", ["notes.txt"]),
        ("report", ["RUN"]),
        ("report missing", ["missing"]),
        ("doctor --steps 0", ["steps", "1", "0"]),
    ],
)
def test_errors_are_one_line(
    arguments: str, named: list[str], tmp_path: Path, images: Path, finished: Path, capsys: Capture
) -> None:
    for name in ("empty", "text", "cut", "filled"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "a.png").write_text("hello")
    data = (images / "a" / "00.png").read_bytes()
    (tmp_path / "cut" / "a.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "filled" / "letter").write_text("dear")
    (tmp_path / "notes.txt").write_text("note")
    np.save(tmp_path / "objects.npy", np.array([None, "image"]), allow_pickle=True)
    (tmp_path / "table.csv").write_text("file,label")
    (tmp_path / "pictures").symlink_to(images)
    if "trained" in arguments:
        shutil.copytree(finished, tmp_path / "trained")
    before = tiny.digests(tmp_path)
    assert names(fails(capsys, *arguments.split()), *named)
    assert tiny.digests(tmp_path) == before
    assert not (tmp_path / "runs").exists() and not (tmp_path / "trained/generated").exists()


def test_samples_that_are_not_finite_are_no_pictures(finished: Path, capsys: Capture) -> None:
    sampling = (finished, "--count", 2, "--steps", 2, "--guidance", "cfg")
    shutil.copytree(finished, "trained")
    told = fails(capsys, "sample", "trained", *sampling[1:], "--guidance.weight", 1e38, code=21)
    assert names(told, "step 1 of 2", "guidance.weight", "1e+38", "10")
    assert not list(Path("trained/generated").glob("*/*.png"))


def test_changes_of_a_run_are_few_and_short(finished: Path, capsys: Capture) -> None:
    config = ("--out", finished, "--network", "edm2-xs", "--data.resolution", 16)
    told = fails(capsys, "train", "glyphs", *config)
    assert names(told, "network", "unet", "edm2", "more", "--fresh") and len(told) < 1000


def test_exit_codes_of_stops(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(error: BaseException) -> Callable[[object], None]:
        def run(arguments: object) -> None:
            raise error

        return run

    for error, code, text in (
        (Stop("no checkpoint\nis valid", code=25), 25, "no checkpoint is valid"),
        (PermissionError(13, "Permission denied", "/run"), 2, "/run: Permission denied"),
        (OSError(30, "Read-only file system", "/run"), 2, "/run: Read-only file system; another"),
        (OSError("no such model on the hub"), 2, "no such model on the hub"),
        (ImportError("x is needed"), 2, "x is needed"),
        (ValueError(), 2, "ValueError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ):
        monkeypatch.setitem(cli.COMMANDS, "train", cli.Command(command(error), object))
        assert text in fails(capsys, "train", code=code)


def test_from_the_shell(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "patchdiffusion", "train", "fly"],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("patchdiffusion: error: 'fly' is neither")
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_names_cannot_give_orders_to_a_terminal(capsys: Capture) -> None:
    assert r"run\x1b[31m\u202e " in fails(capsys, "report", "run\x1b[31m\u202e")


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("import sys\nsys.exit(3)", ["SystemExit", "3"]),
        ("raise RuntimeError('bad\\nthing')", ["RuntimeError", "bad thing"]),
        ("def f(:", ["SyntaxError"]),
    ],
)
def test_files_that_cannot_be_imported_are_refused(
    code: str, named: list[str], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "unusable.py").write_text(code)
    assert names(fails(capsys, "--import", "unusable.py", "info", "dit"), "unusable.py", *named)


def test_a_sample_beyond_the_canvas_is_said_to_extrapolate(finished: Path, capsys: Capture) -> None:
    shutil.copytree(finished, "trained")
    sampling = ["sample", "trained", "--count", "1", "--steps", "1", "--canvas", "region"]
    for region, outside in ((["size", "24"], True), (["size", "8"], False)):
        assert cli.main([*sampling, f"--canvas.{region[0]}", region[1]]) == 0
        assert ("extrapolated" in capsys.readouterr().err) == outside
