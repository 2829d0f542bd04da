"""Configuration files: what `--print-config` prints, `--config` reads; flags win."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import Capture, fails, names, works

from patchdiffusion.system.files import read_json


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def settings(capsys: Capture, *arguments: object) -> Any:
    return json.loads(works(capsys, "train", *arguments, "--print-config"))


@pytest.mark.parametrize(
    "arguments",
    [
        "glyphs",
        "moving-glyphs",
        "classifier",
        "meanflow DATA",
        "cifar10 DATA --objective ctm",
        "DATA --patches stochastic --objective.weighting p2 --optim muon --data.no-flip",
        "DATA --precond ddpm --objective.log-variance 16 --additions contrast",
        "DATA --network dit --ema.profiles 0.05 0.1 --micro-batch 3 --name other",
        "DATA --optim.role-lr head 0.5 stem 2 --precision fp32 --preview.extractor none",
    ],
)
def test_a_round_trip_is_exact(
    arguments: str, images: Path, tmp_path: Path, capsys: Capture
) -> None:
    typed = arguments.replace("DATA", str(images)).split()
    first = works(capsys, "train", *typed, "--print-config")
    (tmp_path / "run.json").write_text(first)
    assert works(capsys, "train", "--config", "run.json", "--print-config") == first
    assert not (tmp_path / "runs").exists()


def test_a_run_is_repeated_from_its_file(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    stored = read_json(finished / "config.json")
    assert settings(capsys, finished) == stored
    assert settings(capsys, "--config", finished / "config.json") == stored
    changed = settings(capsys, "--config", finished / "config.json", "--seed", 7)
    assert changed == stored | {"seed": 7}


def test_toml_with_words_for_types(images: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "run.toml").write_text(
        f"""
        images = 5000
        batch = 8
        optim.lr = 2e-4
        noise = "logit-normal"
        additions = ["contrast"]
        [data]
        path = "{images}"
        resolution = [8, 12]
        flip = true
        [patches]
        type = "stochastic"
        fractions = [1, 0.5]
        probs = [0.25, 0.75]
        """
    )
    flags = (
        *("--images", "5k", "--batch", 8, "--optim.lr", 2e-4, "--noise", "logit-normal"),
        *("--additions", "contrast", "--data.resolution", "8x12", "--data.flip"),
        *("--patches", "stochastic", "--patches.fractions", "1,.5", "--patches.probs", ".25,.75"),
    )
    assert settings(capsys, "--config", "run.toml") == settings(capsys, images, *flags)


def test_presets_are_words(images: Path, tmp_path: Path, capsys: Capture) -> None:
    """With the channels and axes of the images; flags change them, in any order."""
    flags = ("--network.patch", "8x8", "--network", "dit-s/4", "--network.norm", "rms")
    typed = settings(capsys, images, *flags)
    network = typed["network"]
    assert (network["width"], network["depth"], network["heads"]) == (384, 12, 6)
    assert (network["patch"], network["norm"], network["num_classes"]) == ([8, 8], "rms", 2)
    (tmp_path / "run.toml").write_text("[network]\ntype = 'dit-s/4'\nnorm = 'rms'\npatch = [8, 8]")
    assert settings(capsys, images, "--config", "run.toml") == typed
    again = settings(capsys, images, *flags, "--config", "run.toml")
    assert again == typed
    other = settings(capsys, images, "--network", "dit-b/2", "--config", "run.toml")["network"]
    assert (other["width"], other["patch"], other["norm"]) == (768, [2, 2], "layer")
    clips = settings(capsys, "moving-glyphs", "--network", "dit-s/4")["network"]
    assert (clips["patch"], clips["width"]) == ([4, 4, 4], 384)


def test_flags_win(images: Path, tmp_path: Path, capsys: Capture) -> None:
    written = {
        "batch": 8,
        "data": {"flip": True, "path": "glyphs"},
        "noise": {"type": "LogUniform"},
    }
    written["noise"] |= {"sigma_min": 0.1}
    (tmp_path / "run.json").write_text(json.dumps(written))
    config = ("--config", "run.json")
    made = settings(capsys, images, "--batch", 4, "--data.no-flip", "--noise", "lognormal", *config)
    assert (made["batch"], made["data"]["flip"]) == (4, False)
    assert made["data"]["path"] == str(images.resolve())
    assert made["noise"]["type"] == "LogNormal"
    kept = settings(capsys, images, *config)
    assert (kept["batch"], kept["data"]["flip"], kept["noise"]["sigma_min"]) == (8, True, 0.1)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("btach = 3", ["bad.toml", "btach", "batch"]),
        ("lr = 3", ["bad.toml", "lr", "--optim.lr"]),
        ("[optim]\nlearning = 3", ["bad.toml", "optim.learning", "lr"]),
        ("[network]\ntype = 'vit'", ["bad.toml", "network", "vit", "dit"]),
        ("noise = 'laplace'", ["noise", "laplace", "lognormal"]),
        ("batch = 'many'", ["batch", "many"]),
        ("batch = {a = 1}", ["bad.toml", "batch"]),
        ("data = 3", ["bad.toml", "data", "3"]),
        ("batch = ", ["bad.toml", "TOML"]),
        ("[noise]\nshift = 2", ["noise.shift", "--noise logit-normal"]),
    ],
)
def test_wrong_files(text: str, parts: list[str], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "bad.toml").write_text(text)
    assert names(fails(capsys, "train", "glyphs", "--config", "bad.toml"), *parts)


def test_what_is_no_file(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "run.yaml").write_text("batch: 3")
    (tmp_path / "list.json").write_text("[]")
    for file, part in (("none.toml", "file"), ("run.yaml", ".toml"), ("list.json", "fields")):
        assert names(fails(capsys, "train", "glyphs", "--config", file), file, part)
    assert names(fails(capsys, "train", "glyphs", "--config"), "--config", "one")


def test_code_that_only_a_file_names_is_refused(tmp_path: Path, capsys: Capture) -> None:
    written = {"preview": {"distance": 4, "extractor": "theirs:code"}}
    (tmp_path / "run.json").write_text(json.dumps(written))
    assert names(fails(capsys, "train", "glyphs", "--config", "run.json"), "theirs:code")
