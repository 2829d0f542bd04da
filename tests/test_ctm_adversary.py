"""The adversary of consistency trajectory models: its balance, its time, and runs with it."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sameruns
import tiny
import torch
from commands import Capture, fails, refuses, works
from oracles import batch, draws, normal
from safetensors.torch import load_file
from torch import Tensor, nn

from patchdiffusion import load
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.encoders.discriminator import (
    NoAdversary,
    PatchGAN,
    discriminator_loss,
    generator_loss,
)
from patchdiffusion.losses import LossOut
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.objectives.adversarial import AdversarialTerm, last_matrix
from patchdiffusion.objectives.base import Materials, Stages
from patchdiffusion.objectives.ctm import CTMConfig, TrajectoryLoss, TrajectoryMap
from patchdiffusion.parameterisation import EDM
from patchdiffusion.paths import per_sample
from patchdiffusion.plans import WHOLE
from patchdiffusion.train import checkpoint
from patchdiffusion.train.config import TrainConfig

NETWORK = replace(tiny.NETWORK, jump=True, num_classes=0)
GAN = PatchGAN(width=4, layers=2, start=0.5, warmup=0.25, limit=1e9)
CONFIG = CTMConfig(levels=9, adversary=GAN)


class Parts:
    """Network, average, discriminator and loss, of images 16 x 16."""

    def __init__(self, config: CTMConfig = CONFIG):
        network = NETWORK.build()
        tiny.randomize(network, scale=0.1)
        self.denoiser = NetDenoiser(network, EDM())
        average = NetDenoiser(copy.deepcopy(network).requires_grad_(False), EDM())
        self.materials = Materials(network=network, average=lambda: average)
        self.loss: TrajectoryLoss = config.build(self.materials)
        self.images = normal(6, (3, 16, 16)).float().clamp(-1, 1)

    @property
    def discriminator(self) -> nn.Module:
        return self.materials.learned["discriminator"]

    def __call__(self, progress: float = 1.0) -> LossOut:
        return self.loss(self.denoiser, batch(self.images, progress=progress), draws(6))

    def gradients(self, of: nn.Module, progress: float = 1.0) -> dict[str, Tensor]:
        self.denoiser.zero_grad()
        self.materials.learned.zero_grad()
        self(progress).per_sample.mean().backward()
        return {n: p.grad.clone() for n, p in of.named_parameters() if p.grad is not None}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def end_of(parts: Parts) -> tuple[Tensor, Tensor]:
    """The end of the first jump, after a last jump of the average, and the error of the jumps."""
    loss, x0 = parts.loss, parts.images
    t, _, s = (loss._level(index) for index in loss.times(draws(6)))
    x = x0 + per_sample(t, x0) * draws(6).normal("noise", (3, 16, 16))
    student, target = TrajectoryMap(g=parts.denoiser), TrajectoryMap(g=loss.target)
    return target(student(x, t, s), s, 0.0), parts().scalars["trajectory error"]


def test_the_loss_by_hand() -> None:
    """Jumps and denoising, plus the generator and the discriminator, on the end of the jump."""
    parts, plain = Parts(), Parts(replace(CONFIG, adversary=NoAdversary()))
    out, base = parts(), plain()
    end, error = end_of(parts)
    torch.testing.assert_close(error, base.scalars["trajectory error"])
    real, fake = parts.discriminator(parts.images), parts.discriminator(end)
    balance = out.scalars["adversarial weight"]
    expected = base.per_sample + 0.5 * balance * generator_loss(fake, "hinge")
    expected = expected + discriminator_loss(real, fake, "hinge")
    torch.testing.assert_close(out.per_sample, expected)
    assert out.reported is not None and torch.equal(out.reported, base.per_sample)
    assert not any(value.requires_grad for value in out.scalars.values())


def test_gradients_on_the_last_layer_are_balanced() -> None:
    """That of the adversary has `weight` times the norm of that of the jumps."""
    for weight in (0.5, 2.0):
        config = replace(CONFIG, denoising=0.0, adversary=replace(GAN, weight=weight))
        parts, plain = Parts(config), Parts(replace(config, adversary=NoAdversary()))
        (name,) = [
            n
            for n, p in parts.denoiser.network.named_parameters()
            if p is last_matrix(parts.materials.network)
        ]
        total = parts.gradients(parts.denoiser.network)[name]
        alone = plain.gradients(plain.denoiser.network)[name]
        assert float((total - alone).norm() / alone.norm()) == pytest.approx(weight, rel=1e-2)


def test_one_backward_pass_trains_both() -> None:
    """The discriminator is trained on constant images, as by a pass of its own."""
    parts = Parts()
    both = parts.gradients(parts.discriminator)
    end, _ = end_of(parts)
    parts.discriminator.zero_grad()
    real, fake = parts.discriminator(parts.images), parts.discriminator(end.detach())
    discriminator_loss(real, fake, "hinge").mean().backward()
    for name, p in parts.discriminator.named_parameters():
        torch.testing.assert_close(both[name], p.grad)


def test_the_discriminator_comes_first() -> None:
    """Nothing before its warm-up, then it alone, then both."""
    parts, plain = Parts(), Parts(replace(CONFIG, adversary=NoAdversary()))
    base = plain.gradients(plain.denoiser.network)
    for progress, phase in ((0.2, ""), (0.3, " discriminator"), (0.5, " adversary")):
        assert parts.loss.phase(progress) == phase == Stages((parts.loss,)).phase(progress)
        found = parts.gradients(parts.denoiser.network, progress)
        assert same(found, base) == (phase != " adversary")
        learned = parts.gradients(parts.discriminator, progress)
        assert any(g.any() for g in learned.values()) == bool(phase)
    assert plain.loss.phase(1.0) == "" and not plain.materials.learned
    assert torch.equal(plain().per_sample, plain(0.0).per_sample)


def test_its_operations_are_counted() -> None:
    term = Parts().loss.adversary
    assert isinstance(term, AdversarialTerm)
    half = Parts(replace(CONFIG, adversary=replace(GAN, start=0.75))).loss
    assert term.operations((16, 16)) == 1.5 * half.operations((16, 16)) > 0  # 3/4 and 1/2 of a run
    assert Parts(CTMConfig()).loss.operations((16, 16)) == 0
    assert CONFIG.passes == CTMConfig(levels=9).passes + 1


def test_crops_that_are_too_small_and_other_data() -> None:
    with refuses("12 pixels", "8x8", "--objective.adversary.layers 1"):
        groups = TrainConfig().plan((8, 8)).groups
        CONFIG.build(Materials(network=NETWORK.build(), average=lambda: None, groups=groups))  # pyright: ignore
    video = DiTConfig(patch=(1, 2, 2), jump=True)
    with refuses("3 axes", "--objective.adversary none"):
        TrainConfig(network=video, objective=CONFIG)
    TrainConfig(network=video, objective=CTMConfig())


# ---- Runs ----


def config(images: Path, **changes: Any) -> TrainConfig:
    """Four steps on whole images, of which the discriminator takes part in three."""
    gan = replace(GAN, start=0.5, warmup=0.25, limit=1.0)
    chosen = replace(CONFIG, adversary=replace(gan, **changes))
    return replace(chosen.prefers(tiny.config(images)), patches=WHOLE, images=16.0)


def test_a_run_is_resumed_to_the_bit(images: Path, tmp_path: Path) -> None:
    """The discriminator and its moments are in the checkpoints, and not in the model."""
    straight = sameruns.check_resumed(config(images), tmp_path)
    newest = max((straight / "checkpoints").iterdir())
    stored = checkpoint.read_tensors(newest, "objective", torch.device("cpu"))
    assert {"discriminator.layers.0.weight", "discriminator.layers.0.weight/exp_avg"} <= set(stored)
    saved = load_file(straight / "model" / "model.safetensors")
    assert not [name for name in saved if "discriminator" in name]
    model = load(straight)
    assert model.model.config.objective.adversary == config(images).objective.adversary  # pyright: ignore
    assert model.sample(2, steps=1).shape == (2, 16, 16, 3)


def test_from_the_command_line(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    """A model is distilled with an adversary; wrong settings are one line."""
    words = (
        "distill",
        finished,
        "--objective",
        "ctm",
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
    )
    gan = ("--objective.adversary", "patchgan", "--objective.adversary.width", 4)
    error = fails(capsys, *words, *gan)
    assert "--objective.adversary.layers 1" in error
    assert "start must lie in [0, 1)" in fails(
        capsys, *words, *gan, "--objective.adversary.start", 1
    )
    assert "one of feature-heads" in fails(capsys, *words, "--objective.adversary", "critic")
    layers = ("--objective.adversary.layers", 1)
    works(capsys, *words, *gan, *layers, "--images", 16, "--preview.grid", 2)
    objective: Any = load(tmp_path / "run").model.config.objective
    assert objective.adversary == PatchGAN(width=4, layers=1)
