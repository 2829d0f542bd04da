"""What somebody meant: nearest names, words of other programs, flags of what is not chosen."""

import functools
import re
from pathlib import Path

import pytest
from commands import Capture, fails, names

from patchdiffusion import cli
from patchdiffusion.cli.habits import HABITS
from patchdiffusion.cli.techniques import reachable
from patchdiffusion.cli.words import nearest
from patchdiffusion.solvers import Solver
from patchdiffusion.system.families import words

FLAG = re.compile(r"--([A-Za-z][\w.-]*)")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--lr 1e-4", "--optim.lr"),
        ("--batch-size 8", "--batch"),
        ("--batch_size 8", "--batch"),
        ("--epochs 5", "--images"),
        ("--steps 100", "--images"),
        ("--resolution 64", "--data.resolution"),
        ("--image-size 64", "--data.resolution"),
        ("--flip", "--data.flip"),
        ("--gpus 2", "torchrun"),
        ("--fp16", "--precision"),
        ("--output-dir x", "--out"),
        ("--resume", "again"),
        ("--wandb", "--track"),
        ("--optim.learning-rate 1", "--optim.lr"),
        ("--optim.momentum 0.9", "--optim muon --optim.momentum 0.9"),
        ("--additions.contrast.weight 1", "--additions contrast"),
        ("--preview.grd 3", "--preview.grid"),
        ("--btach 3", "--batch"),
        ("--no-batch", "--batch"),
        ("--sigma-data 0.5", "--precond.sigma-data"),
        ("--preview.qqqq", "--preview.grid"),
        ("--qqqq", "--help"),
        ("--device gpu", "cuda"),
        ("--network transformer", "--network dit"),
        ("--network dit-q/4", "--network dit-s/4"),
        ("--network dit-xxl/2", "--network dit-xl/2"),
        ("--precond epsilon", "--precond eps"),
    ],
)
def test_training(typed: str, meant: str, capsys: Capture) -> None:
    error = fails(capsys, "train", "glyphs", *typed.split())
    assert names(error.replace(typed.split()[0], "", 1), meant), error


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--cfg 3", "--guidance cfg"),
        ("--guidance.weight 3", "--guidance cfg --guidance.weight 3"),
        ("--solver.churn.amount 3", "--solver.churn"),
        ("--negative-prompt cat", "--negative"),
        ("-n 4", "--count"),
        ("--num-samples 4", "--count"),
        ("--num-inference-steps 4", "--steps"),
        ("--solver euler_a", "--solver ancestral"),
        ("--solver dpm++2m", "--solver dpmpp_2m"),
        ("--solver huen", "--solver heun"),
    ],
)
def test_sampling(typed: str, meant: str, capsys: Capture) -> None:
    error = fails(capsys, "sample", "run", *typed.split())
    assert meant in error.replace(typed.split()[0], "", 1), error


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("DPM++ 2M Karras", "dpmpp_2m"),
        ("DPM++ 2M SDE", "sde_dpmpp_2m"),
        ("Euler a", "ancestral"),
        ("k_heun", "heun"),
        ("DPM++ SDE Karras", "sde_dpmpp_1"),
        ("plms", "ab2"),
        ("unipc_multistep", "unipc"),
    ],
)
def test_names_of_solvers(word: str, expected: str) -> None:
    assert nearest(word, words(Solver))[0] == expected


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("smaple x", ["smaple", "sample"]),
        ("eval x", ["eval", "evaluate"]),
        ("photos", ["photos", "train photos"]),
        ("runs/faces", ["runs/faces", "sample runs/faces"]),
        ("train", ["patchdiffusion train ./photos", "glyphs"]),
        ("bench --images 3", ["patchdiffusion bench ./photos", "glyphs"]),
        ("train ./fotos", ["./fotos", "photos"]),
        ("train glyph", ["glyph", "glyphs"]),
        ("train photos others", ["photos", "others", "two sets"]),
        ("train photos glyphs", ["glyphs photos"]),
        ("train fly photos", ["fly", "glyphs"]),
        ("train https://here.there/x", ["https://here.there/x", "URL"]),
        ("train --data.path=hf://cifar10", ["hf://cifar10", "URL"]),
        ("sample s3://here/x", ["s3://here/x", "URL"]),
        ("sample", ["RUN", "runs/faces"]),
        ("sample runs/face", ["runs/face", "runs/faces"]),
        ("sample faces", ["faces", "runs/faces"]),
        ("report photos", ["photos", "runs/faces"]),
        ("average nowhere", ["nowhere", "runs/faces"]),
        ("evaluate nowhere", ["nowhere", "runs/faces"]),
        ("sample photos/letter.txt", ["photos/letter.txt", "file", "runs/faces"]),
    ],
)
def test_subjects(
    arguments: str,
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "others", "runs/faces"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "photos" / "letter.txt").write_text("dear")
    for name in ("config.json", "log.jsonl"):
        (tmp_path / "runs" / "faces" / name).write_text("{}")
    assert names(fails(capsys, *arguments.split()), *parts)


def test_a_place_without_runs(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert names(fails(capsys, "sample", "x"), "x", "train ./photos", "runs/photos")


def test_words_of_a_refusal_are_sorted(capsys: Capture) -> None:
    error = fails(capsys, "sample", "run", "--solver", "qqqq")
    listed = re.search("one of (.*), not", error)
    assert listed is not None
    assert listed[1].split(", ") == sorted(words(Solver))


def test_habits_lead_to_flags_that_exist() -> None:
    every = set().union(*map(flags_of, cli.COMMANDS), {"nproc-per-node"})  # that of torchrun
    for habit in HABITS:
        flags = FLAG.findall(habit.meant)
        assert set(flags) <= every, habit
        for command in habit.commands.split() if habit.meant.startswith("--") else ():
            assert flags[0] in flags_of(command), (habit, command)


@functools.cache
def flags_of(command: str) -> set[str]:
    slots = list(reachable([cli.COMMANDS[command].arguments()]))
    return {s.name for s in slots} | {s.negative for s in slots if s.hint is bool}
