"""The command `distill`, and runs of the objectives that learn from a trained model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sameruns
import tiny
import torch
from commands import Capture, fails, works
from oracles import batch, draws, gaussian, normal
from PIL import Image
from torch import Tensor

from patchdiffusion import SamplerConfig, TrainConfig, load
from patchdiffusion.cli.children import children
from patchdiffusion.cond import Cond
from patchdiffusion.model import load_model
from patchdiffusion.objectives.boot import BootConfig
from patchdiffusion.objectives.meanflow import MeanFlowConfig, MeanFlowLoss
from patchdiffusion.objectives.mmd import MMDConfig
from patchdiffusion.objectives.progressive import ProgressiveConfig
from patchdiffusion.plans import WHOLE
from patchdiffusion.recipes.distilled import distilled, distilling
from patchdiffusion.train.folder import stored_config
from patchdiffusion.train.report import read_log

KINDS = ("boot", "mmd", "progressive")
SMALL = ("--images", 8, "--preview.samples", 1, "--preview.grid", 2, "--device", "cpu")


class Means:
    """Mean and deviation of each color, an extractor: [B, 3, H, W] -> [B, 6]."""

    def __call__(self, images: Tensor) -> Tensor:
        x = images.float().flatten(2)
        return torch.cat([x.mean(2), x.std(2)], dim=1)


def config(images: Path, teacher: Path, word: str, **changes: Any) -> TrainConfig:
    """Four steps of an objective with this teacher."""
    plain = tiny.config(images)
    if word == "mmd":
        chosen: Any = MMDConfig(steps=(1, 2), bank=4)
        plain = replace(plain, patches=WHOLE, images=16.0)
    elif word == "boot":
        chosen = BootConfig(teacher=str(teacher))
    elif word == "meanflow":
        chosen = MeanFlowConfig(teacher=str(teacher), same=0.5)
    else:
        chosen = ProgressiveConfig(teacher=str(teacher), first=2)
    return replace(chosen.prefers(plain), **changes)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A teacher's run in a folder of its own."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / "finished"))


# ---- Runs ----


@pytest.mark.parametrize("word", [*KINDS, "meanflow"])
def test_a_run_is_resumed_to_the_bit(
    word: str, images: Path, finished: Path, tmp_path: Path
) -> None:
    """Also across the end of a round of progressive distillation."""
    straight = sameruns.check_resumed(config(images, finished, word), tmp_path)
    model = load_model(straight)
    pipeline = load(straight)
    steps = 1 if word == "boot" else 2
    images_ = pipeline.sample(3, config=SamplerConfig(steps=steps))
    again = pipeline.sample(3, config=SamplerConfig(steps=steps), batch=2)
    assert images_.shape == (3, 16, 16, 3) and abs(images_.astype(int) - again).max() <= 1
    assert model.config.objective.few_step
    usual = {"boot": 1, "mmd": 2, "progressive": 1, "meanflow": 2}[word]
    assert pipeline.sampler(SamplerConfig()).steps == usual


@pytest.mark.parametrize("word", ["boot", "progressive", "meanflow"])
def test_passes_are_the_same_training(
    word: str, images: Path, finished: Path, tmp_path: Path
) -> None:
    sameruns.check_micro_batches(config(images, finished, word), tmp_path)


def test_the_velocity_of_a_teacher() -> None:
    """(z - D) / t in the frame of the straight path, instead of eps - x0."""
    z, t = normal(9, (1, 2, 2)), torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    loss = MeanFlowLoss(config=MeanFlowConfig(), teacher=gaussian((1, 2, 2)))
    found = loss._taught(z, t, Cond(), z)
    wide = t[:, None, None, None]
    x0 = gaussian((1, 2, 2))(z / (1 - wide), t / (1 - t))
    eps = (z - (1 - wide) * x0) / wide
    torch.testing.assert_close(found, eps - x0, rtol=0, atol=1e-9)
    assert loss._taught(z, torch.ones(9), Cond(), z).isfinite().all()
    alone = MeanFlowLoss(config=MeanFlowConfig())
    assert alone._taught(z, t, Cond(), z) is z
    assert batch(z).images is z and draws(1).count == 1


# ---- The command ----


def test_the_settings_that_suit(images: Path, finished: Path) -> None:
    plain = tiny.config(images)
    for word in distilling():
        new = distilled(plain, word, finished)
        assert new.name == f"finished-{word}" and new.data == plain.data
        assert type(new.objective).distillation is not None
        assert new.optim.lr <= plain.optim.lr and new.images < plain.images
        assert (new.patches == WHOLE) == (word == "mmd")
        assert new.objective.teachers == (() if word == "mmd" else (finished,))


def test_distill_is_a_run_beside_the_teacher(
    run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    for word in KINDS:
        more = ["--objective.bank", 4] if word == "mmd" else []
        told = works(capsys, "distill", run.name, "--objective", word, *more, *SMALL)
        assert "start     from the averaged weights" in told
        new = run.parent / f"finished-{word}"
        stored = stored_config(new)
        assert stored is not None and stored.images == 8
        assert read_log(new)[0]["start_from"] == str(run.resolve())
        told = works(capsys, "distill", run.name, "--objective", word, *more, *SMALL)
        assert "is finished" in told
        grids = works(capsys, "sample", new, "--count", 2)
        assert str(new) in grids or "generated" in grids
        with Image.open(next((new / "generated").rglob("grid.png"))) as file:
            steps = json.loads(file.info["sampler"])["steps"]
        assert steps == stored.objective.jumps
    names = [folder.name for folder, _ in children(run)]
    assert names == ["finished-boot", "finished-mmd", "finished-progressive"]
    told = works(capsys, "speed", run, "--dry-run", "--count", 1)
    assert "few steps" in told and "--beside" in told and "finished-boot, boot, 1" in told
    assert "1" in works(capsys, "evaluate", "finished-boot", "--features.extractor",
                        "test_distill:Means", "--samples", 4)  # fmt: skip


def test_bad_input_is_one_line(run: Path, capsys: Capture, tmp_path: Path) -> None:
    def error(*arguments: object) -> str:
        return fails(capsys, "distill", *arguments)

    assert "RUN is missing" in error()
    assert "does not exist" in error(tmp_path / "nothing", "--objective", "boot")
    assert "--objective is missing" in error(run)
    assert "allowed are" in error(run, "--objective", "denoising")
    assert "'bot'" in error(run, "--objective", "bot")
    assert "[0]" in error(run, "--objective", "mmd", "--objective.steps", 0)
    assert "power of two" in error(run, "--objective", "progressive", "--objective.first", 6)
    assert "has no configuration" in error(run / "model", "--objective", "boot")
    assert "(8, 8, 3, 2)" in error(run, "--objective", "boot", "--data.resolution", 8)


def test_what_was_trained_is_not_reported_alone(
    images: Path, finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    objective = MMDConfig(features="test_distill:Means", steps=(1,), bank=4)
    few = replace(config(images, finished, "mmd"), objective=objective)
    out = tiny.run(few, tmp_path / "run")
    (scalars,) = {tuple(r["scalars"]) for r in read_log(out) if r["kind"] == "status"}
    assert "mmd test_distill:Means" in scalars and "mmd pixels (held out)" in scalars
    told = fails(capsys, "evaluate", out, "--features.extractor", "test_distill:Means")
    assert "says nothing" in told and "--features.extractor" in told


def test_a_few_step_model_teaches_nothing(
    images: Path, finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tiny.run(config(images, finished, "boot"), tmp_path / "few")
    told = fails(capsys, "distill", out, "--objective", "progressive")
    assert "no denoiser" in told
    with pytest.raises(ValueError, match="few-step model"):
        tiny.training(config(images, out, "progressive"), tmp_path / "other")
    assert "--steps 1" in fails(capsys, "sample", out, "--steps", 2, "--count", 1)
