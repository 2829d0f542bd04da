"""A transformer in place of the U-Net: everything a run can do, it does with it, too."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from commands import Capture, fails, works

from patchdiffusion import TrainConfig, load_model
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.objectives import MeanFlowConfig
from patchdiffusion.train import resume

NETWORK = DiTConfig(width=16, depth=2, heads=2, num_classes=2, dropout=0.1)


MODERN = replace(
    NETWORK, depth=4, mlp="swiglu", norm="rms", qk_norm=True, positions="rope", embedding="late",
    modulation="shared", registers=1, value_residual=True, half_blocks=2,
)  # fmt: skip


def config(images: Path, steps: int = 4, **changes: object) -> TrainConfig:
    return tiny.config(images, steps=steps, **{"network": NETWORK} | changes)


def test_it_is_one_word(images: Path, tmp_path: Path, capsys: Capture) -> None:
    """It takes over channels and classes, stops and resumes, samples and reports."""
    run = tmp_path / "run"
    small = "--network.width 16 --network.depth 1 --network.heads 1 --batch 2 --images 8"
    flags = f"--network dit {small} --preview.grid 2 --preview.sample-steps 1 --device cpu"
    works(capsys, "train", images, *flags.split(), "--out", run, "--max-hours", "1e-9")
    works(capsys, "train", images, *flags.split(), "--out", run)
    assert len(tiny.history(run)) > 1
    network = load_model(run).config.network
    assert isinstance(network, DiTConfig)
    assert (network.channels, network.num_classes, network.patch) == (3, 2, (2, 2))
    size = ("--canvas", "region", "--canvas.size", 6, 10)
    works(capsys, "sample", run, "--count", 2, "--steps", 1, *size)
    works(capsys, "report", run)


@pytest.mark.parametrize("network", [NETWORK, MODERN], ids=["plain", "modern"])
def test_resumed_it_is_the_same_run(network: DiTConfig, images: Path, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    tiny.run(config(images, network=network), straight)
    tiny.run(config(images, network=network), broken, max_hours=1e-9)
    assert 0 < len(tiny.history(broken)) < len(tiny.history(straight))
    tiny.run(config(images, network=network), broken)
    assert tiny.weights(broken) == tiny.weights(straight)
    assert tiny.history(broken) == tiny.history(straight)


def test_meanflow_starts_from_a_denoiser(images: Path, tmp_path: Path) -> None:
    """The condition on the jump is neutral: weights without it load."""
    flow = config(images, steps=1, precond=MeanFlowConfig().precond(tiny.config(images).precond))
    tiny.run(flow, tmp_path / "denoiser")
    two_times = tiny.config(
        images, steps=1, network=replace(NETWORK, jump=True), objective=MeanFlowConfig()
    )
    training = tiny.training(two_times, tmp_path / "run", start_from=tmp_path / "denoiser")
    with resume.opened(training):
        given = load_model(tmp_path / "denoiser").network.state_dict()
        own = training.network.state_dict()
        assert all((own[name] == value).all() for name, value in given.items())
        assert set(own) - set(given) == {"embed.jump.weight"} == training.network.neutral()
    tiny.run(two_times, tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--network.patch 2 2 2", "the network has 3 axes, and the images have 2"),
        ("--network.base 8", "--network.base"),
        ("--network.heads 3", "width"),
    ],
)
def test_what_does_not_fit_is_named(
    flags: str, told: str, images: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["--network", "dit", *flags.split(), "--out", tmp_path / "run"]
    assert told in fails(capsys, "train", images, *words)


@pytest.mark.parametrize(
    ("side", "patch", "told"),
    [
        (16, 16, ("only one size is left", "--network.patch with smaller sides")),
        (33, 1, ("1,089 tokens", "--network.patch with larger sides")),
        (32, 1, ("1,024 tokens",)),
    ],
)
def test_hints_are_those_of_a_network_of_tokens(
    images: Path, tmp_path: Path, capsys: Capture, side: int, patch: int, told: tuple[str, ...]
) -> None:
    flags = "--network dit --network.width 16 --network.depth 1 --network.heads 1 --batch 1"
    flags += f" --network.patch {patch} {patch} --data.resolution {side} --device cpu --dry-run"
    out = works(capsys, "train", images, *flags.split(), "--out", tmp_path / "run")
    assert all(hint in out for hint in told) and "--network.mult" not in out
    assert out.count("--network.patch") == len(told) - 1
