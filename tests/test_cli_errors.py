"""What the command line refuses: one line and an exit code, never a traceback."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from commands import Capture, fails

from patchdiffusion import cli
from patchdiffusion.system.errors import Stop

CFG = "sample trained --guidance cfg --guidance"


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("fly", "unknown command 'fly'; commands are train, sample"),
        ("train fly", "'fly' is neither an existing path nor a recipe; recipes are glyphs, folder"),
        ("train glyphs --fly", "unknown flag --fly"),
        ("train glyphs pictures extra", "'extra' is one argument too many"),
        ("train fly pictures", "'fly' is neither"),
        ("train glyphs missing", "'missing' does not exist"),
        ("train cifar10", "the recipe cifar10 needs images: patchdiffusion train cifar10 DATA"),
        ("train glyphs --optim.lr -1", "lr must be positive and finite, not -1.0"),
        ("train glyphs --optim.lr nan", "lr must be positive and finite, not nan"),
        ("train glyphs --optim.lr", "--optim.lr must be a number, not nothing"),
        ("train glyphs --optim.lr fast", "--optim.lr must be a number, not 'fast'"),
        ("train glyphs --batch 2.5", "--batch must be a whole number, not '2.5'"),
        ("train glyphs --batch 0", "batch must be positive"),
        ("train glyphs --images inf", "images must be positive and finite, not inf"),
        ("train glyphs --data.resolution 7", "resolution is 7; allowed is one side or"),
        ("train glyphs --data.resolution -64", "resolution is -64"),
        ("train glyphs --data.channels 2", "--data.channels must be one of 1, 3, 4 or none, not"),
        ("train glyphs --clock hours", "--clock must be one of equivalents, crops, steps, not"),
        ("train glyphs --keep 1", "keep must be at least 2, not 1"),
        ("train glyphs --max-hours -1", "max_hours must be positive"),
        ("train glyphs --patches.probs 0.5 0.2 0.2", "probs must be >= 0 and sum to 1"),
        ("train glyphs --patches.fractions 1", "fractions and probs need the same length"),
        ("train glyphs --precond.sigma-data 0", "sigma_data must be positive"),
        ("train glyphs --noise.std 0", "std in"),
        ("train glyphs --name a/b", "name must be usable as a folder name"),
        ("train glyphs --optim.betas 0.9", "--optim.betas must be 2 values, each a number"),
        ("train glyphs --optim.betas 0.9 1", "betas must lie in"),
        ("train empty", "empty holds no images"),
        ("train text", "1 of 1 images of text cannot be used"),
        ("train cut", "1 of 1 images of cut cannot be used"),
        ("train notes.txt", "notes.txt is a file of another kind"),
        ("train pictures --out notes.txt", "notes.txt"),
        ("train pictures --out notes.txt/run", "notes.txt"),
        ("train pictures --out filled", "filled is not empty and holds no run"),
        ("train pictures --start-from missing", "missing holds no model"),
        ("train pictures --network.base 6", "base must be a multiple of 4 in [4, 4096], not 6"),
        ("train pictures --network.attention 9", "attention must be levels in"),
        ("train pictures --network.channels 1", "the images have 3 channels and the network 1"),
        ("sample", "RUN is missing: Folder of a run or model; type patchdiffusion sample RUN"),
        ("sample missing", "missing holds no model"),
        ("sample filled", "filled holds no model"),
        ("sample trained --steps 0", "at least 1 step, not 0"),
        ("sample trained --steps many", "--steps"),
        ("sample trained --count 0", "count and batch must be at least 1"),
        ("sample trained --classes zebra", "unknown class 'zebra'; this model has 0 a, 1 b"),
        ("sample trained --guidance 2", "none, cfg, autoguidance, classifier, not '2'"),
        (f"{CFG}.weight -1", "the guidance weight must be >= 0 and finite, not -1.0"),
        (f"{CFG}.weight nan", "the guidance weight must be >= 0 and finite, not nan"),
        ("sample trained --guidance.weight 2", "unknown flag --guidance.weight"),
        (f"{CFG}.interval 2 1", "0 <= low <= high < inf"),
        (f"{CFG}.interval 0 inf", "0 <= low <= high < inf"),
        (f"{CFG}.rescale 2", "rescale must lie in [0, 1], not 2.0"),
        (f"{CFG}.channels 4", "3 channels cannot be guided as 4"),
        ("sample trained --threshold dynamic --threshold.quantile 1.5", "in (0, 1], not 1.5"),
        ("sample trained --threshold hard", "auto, none, clamp, dynamic, not 'hard'"),
        ("sample trained --guidance autoguidance", "needs a worse model: --guidance.model"),
        (
            "sample trained --guidance autoguidance --guidance.model missing",
            "missing holds no model",
        ),
        ("sample trained --canvas region --canvas.size 0 4", "positive height and width"),
        ("sample trained --canvas region --canvas.size 4", "a region needs 2 numbers, not (4,)"),
        ("sample trained --seed 99999999999999999999", "seeds must be 64-bit integers"),
        ("sample trained --sigma-min 0", "sigma_min"),
        ("sample trained --solver euler --solver.churn.amount 3", "--solver.churn.amount"),
        ("sample trained --solver ddim --solver.eta 2", "eta must be in [0, 1], not 2"),
        ("sample trained --schedule.shift 3", "unknown flag --schedule.shift"),
        ("sample trained --schedule flow --schedule.shift 0", "shift must be positive and finite"),
        ("sample trained --solver map", "map is for few-step models"),
        ("sample trained --solver rk4", "--solver"),
        ("sample trained --out filled", "filled exists and is not empty; nothing is overwritten"),
        ("sample trained --out notes.txt", "notes.txt exists and is not empty"),
        ("prepare", "DATA is missing"),
        ("prepare missing", "'missing' does not exist"),
        ("prepare pictures --resolution 7", "resolution is 7"),
        ("prepare pictures --holdout 0.9", "holdout is 0.9"),
        ("prepare pictures --background no-colour", "no-colour"),
        ("prepare pictures --out notes.txt", "notes.txt is a file"),
        ("report", "RUN is missing"),
        ("report missing", "missing holds no run"),
        ("doctor --steps 0", "steps must be at least 1, not 0"),
    ],
)
def test_errors_are_one_line(
    arguments: str, message: str, tmp_path: Path, images: Path, finished: Path, capsys: Capture
) -> None:
    for name in ("empty", "text", "cut", "filled"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "a.png").write_text("hello")
    data = (images / "a" / "00.png").read_bytes()
    (tmp_path / "cut" / "a.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "filled" / "letter").write_text("dear")
    (tmp_path / "notes.txt").write_text("note")
    (tmp_path / "pictures").symlink_to(images)
    if "trained" in arguments:
        shutil.copytree(finished, tmp_path / "trained")
    before = tiny.digests(tmp_path)
    assert message in fails(capsys, *arguments.split())
    assert tiny.digests(tmp_path) == before
    assert not (tmp_path / "runs").exists() and not (tmp_path / "trained/generated").exists()


def test_the_closest_flags_are_named(capsys: Capture) -> None:
    for flags, allowed in (
        ("--preview.grd 3", "--preview.grid"),
        ("--btach 3", "--batch"),
        ("--sigma-data 0.5", "--precond.sigma-data"),
        ("--no-batch", "--batch"),
    ):
        error = fails(capsys, "train", "glyphs", *flags.split())
        assert error.startswith(f"unknown flag {flags.split()[0]}, allowed: ") and allowed in error


def test_exit_codes_of_stops(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(error: BaseException) -> Callable[[object], None]:
        def run(arguments: object) -> None:
            raise error

        return run

    for error, code, text in (
        (Stop("no checkpoint\nis valid", code=25), 25, "no checkpoint is valid"),
        (PermissionError(13, "Permission denied", "/run"), 2, "Permission denied: '/run'"),
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
