"""Alignment without an encoder: LayerSync and Self-Flow."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from commands import Capture, fails, refuses
from little import alive
from mapped import DIT, batch_of, materials
from oracles import draws
from sameruns import check_micro_batches, check_resumed
from torch import Tensor

from patchdiffusion import TrainConfig
from patchdiffusion.cond import Tape
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.losses import DenoisingLoss
from patchdiffusion.noise import LogNormal
from patchdiffusion.objectives import LayerSyncConfig, SelfFlowConfig
from patchdiffusion.objectives.layersync import LayerSyncLoss
from patchdiffusion.objectives.selfflow import SelfFlowLoss, TwoLevels
from patchdiffusion.parameterisation import EDM
from patchdiffusion.train.parallel import LossModule

LAW = LogNormal()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Mean cosine of tokens [B, T, D]."""
    return F.cosine_similarity(a, b, dim=2).mean(1)


# ---- LayerSync ----


def test_an_early_block_is_drawn_to_a_later_one() -> None:
    loss = LayerSyncConfig().add(DenoisingLoss(), materials(replace(DIT, depth=6)))
    assert isinstance(loss, LayerSyncLoss)
    assert (loss.early.name, loss.late.name) == ("blocks.1", "blocks.3")
    network, batch = alive(replace(DIT, depth=6)), batch_of(2, (8, 8))
    denoiser = NetDenoiser(network, EDM())
    out, base = (each(denoiser, batch, draws(2)) for each in (loss, DenoisingLoss()))
    tape = Tape(wants=("blocks.1", "blocks.3"))
    DenoisingLoss()(denoiser.recording(tape), batch, draws(2))
    expected = -cosines(*tape.activations.values())
    term = (out.per_sample - base.per_sample) / 0.2
    torch.testing.assert_close(term, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.scalars["layersync"], expected.mean().detach())
    assert out.reported is not None and torch.equal(out.reported, base.per_sample)


def test_no_gradient_passes_through_the_later_block() -> None:
    network, batch = alive(replace(DIT, depth=6)), batch_of(2, (8, 8))
    loss = LayerSyncConfig(weight=1.0).add(DenoisingLoss(), materials(replace(DIT, depth=6)))
    grads: list[dict[str, Tensor]] = []
    for each in (loss, DenoisingLoss()):
        network.zero_grad()
        each(NetDenoiser(network, EDM()), batch, draws(2)).per_sample.sum().backward()
        parameters = network.named_parameters()
        grads.append({n: p.grad.clone() for n, p in parameters if p.grad is not None})
    changed = {n for n in grads[0] if not torch.equal(grads[0][n], grads[1][n])}
    later = (*(f"blocks.{i}" for i in range(2, 6)), "head", "out_modulation")
    assert changed and not any(name.startswith(later) for name in changed)
    assert any(name.startswith("blocks.1") for name in changed)


def test_layers_of_unets_and_what_does_not_match() -> None:
    loss = LayerSyncConfig().add(DenoisingLoss(), materials(tiny.NETWORK))
    assert isinstance(loss, LayerSyncLoss)
    assert loss.early.name.startswith("enc.1") and loss.late.name.startswith("dec.1")
    batch = batch_of(2, (8, 8), labels=True)
    assert loss(NetDenoiser(tiny.NETWORK.build(), EDM()), batch, draws(2)).per_sample.shape == (2,)
    with refuses("one size", "stem", "mid.0"):
        LayerSyncConfig(early="stem", late="mid.0").add(DenoisingLoss(), materials(tiny.NETWORK))
    with refuses("order", "blocks.2", "blocks.1"):
        LayerSyncConfig(early="blocks.2", late="blocks.1").add(DenoisingLoss(), materials(DIT))
    with refuses("blocks.9", "blocks.2"):
        LayerSyncConfig(early="blocks.9").add(DenoisingLoss(), materials(DIT))
    with refuses("weight", -1.0):
        LayerSyncConfig(weight=-1.0)


# ---- Self-Flow ----


def self_flow(**changes: object) -> SelfFlowLoss:
    config = replace(SelfFlowConfig(), **changes)  # pyright: ignore[reportArgumentType]
    loss = config.build(materials(DIT))
    assert isinstance(loss, SelfFlowLoss)
    return loss


def test_some_tokens_have_the_second_level() -> None:
    loss = TwoLevels(DenoisingLoss(), (2, 2), 0.25)
    first, second = loss.levels(draws(64), LAW)
    sigma = loss.sigma(draws(64), LAW, (8, 8))
    assert sigma.shape == (64, 1, 8, 8)
    tokens = sigma[:, 0, ::2, ::2].flatten(1)
    assert torch.equal((tokens == second[:, None]).sum(1), torch.full((64,), 4))
    assert bool(((tokens == first[:, None]) | (tokens == second[:, None])).all())
    assert torch.equal(first, DenoisingLoss().levels(draws(64), LAW))
    correlation = torch.corrcoef(torch.stack([LAW.cdf(first), LAW.cdf(second)]))[0, 1]
    assert abs(float(correlation)) < 0.35
    assert len({tuple(row.tolist()) for row in tokens == first[:, None]}) > 30


def test_the_target_is_of_the_average_and_the_cleaner_view() -> None:
    loss, batch = self_flow(), batch_of(3, (8, 8))
    assert (loss.early.name, loss.late.name) == ("blocks.0", "blocks.1")
    network = alive(DIT)
    average = NetDenoiser(network, EDM())
    loss = replace(loss, average=lambda: average)
    assert isinstance(loss.loss, TwoLevels)
    sigma = torch.minimum(*loss.loss.levels(draws(3), batch.noise))
    noise = draws(3).normal("noise", (3, 8, 8))
    tape = Tape(wants=("blocks.1",))
    average(batch.images + sigma.view(-1, 1, 1, 1) * noise, sigma, batch.cond, tape=tape)
    target = loss.target(batch, draws(3))
    assert torch.equal(target.flatten(2).mT, tape.activations["blocks.1"])
    assert not target.requires_grad
    student = NetDenoiser(alive(DIT), EDM())
    out, mixed = (each(student, batch, draws(3)) for each in (loss, loss.loss))
    tape = Tape(wants=("blocks.0",))
    loss.loss(student.recording(tape), batch, draws(3))
    p = loss.projector.layers(tape.activations["blocks.0"])
    expected = -cosines(p, target.flatten(2).mT)
    term = (out.per_sample - mixed.per_sample) / 0.5
    torch.testing.assert_close(term, expected, atol=2e-5, rtol=1e-4)
    out.per_sample.sum().backward()
    assert all(p.grad is None for p in network.parameters())
    assert all(p.grad is not None for p in loss.projector.parameters())


def test_neutral_values_are_denoising() -> None:
    plain = SelfFlowConfig(weight=0.0, share=0.0).build(materials(DIT))
    assert plain == DenoisingLoss(EDM().default_weighting())
    assert isinstance(SelfFlowConfig(weight=0.0).build(materials(DIT)), TwoLevels)
    assert SelfFlowConfig(weight=0.0).passes == 0 and SelfFlowConfig().passes == 1
    assert self_flow(share=0.0).loss == DenoisingLoss(EDM().default_weighting())
    for changes in ({"share": 0.7}, {"weight": -1.0}, {"hidden": -1}):
        with refuses(*changes):
            replace(SelfFlowConfig(), **changes)  # pyright: ignore[reportArgumentType]


def test_a_run_without_a_tape() -> None:
    """In a loop of one's own, where nothing records."""
    out = self_flow()(NetDenoiser(alive(DIT), EDM()), batch_of(2, (4, 8)), draws(2))
    assert out.per_sample.shape == (2,)
    module = LossModule(NetDenoiser(alive(DIT), EDM()), self_flow())
    assert torch.isfinite(module(batch_of(2, (4, 8)), draws(2)).per_sample).all()


# ---- Runs ----


def config(images: Path, method: str, weight: float = 0.3) -> TrainConfig:
    plain = tiny.config(images, network=DIT)
    if method == "layersync":
        return replace(plain, additions=(LayerSyncConfig(weight=weight),))
    return replace(plain, objective=SelfFlowConfig(weight=weight))


@pytest.mark.parametrize("method", ["layersync", "self-flow"])
def test_an_interrupted_run_is_the_same_run(method: str, images: Path, tmp_path: Path) -> None:
    straight = check_resumed(config(images, method), tmp_path)
    if method == "layersync":
        neutral = tiny.run(config(images, method, 0.0), tmp_path / "neutral")
        plain = tiny.run(tiny.config(images, network=DIT), tmp_path / "plain")
        assert tiny.weights(neutral) == tiny.weights(plain) != tiny.weights(straight)


@pytest.mark.parametrize("method", ["layersync", "self-flow"])
def test_micro_batches_are_the_same_training(method: str, images: Path, tmp_path: Path) -> None:
    check_micro_batches(config(images, method), tmp_path)


def test_what_cannot_be_trained(tmp_path: Path, capsys: Capture) -> None:
    data = tiny.write_images(tmp_path / "images")
    told = fails(capsys, "train", data, "--objective", "self-flow", "--out", tmp_path / "run")
    assert "--network dit" in told and "unet" in told
    few = ("--objective", "consistency", "--additions", "layersync")
    told = fails(capsys, "train", data, *few, "--out", tmp_path / "run")
    assert "layersync" in told and "few-step" in told
