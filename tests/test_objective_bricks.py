"""The loss of all bricks: its terms, the last one alone, shares of regions, and runs."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import Capture, fails, refuses, works
from little import drawn
from oracles import batch, draws
from sameruns import check_micro_batches, check_resumed
from torch import Tensor

from patchdiffusion import TrainConfig
from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.losses import DenoisingLoss, LossOut
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.lego import Lego, LegoConfig
from patchdiffusion.objectives.base import Materials
from patchdiffusion.objectives.bricks import BricksConfig, BricksLoss, chosen_regions
from patchdiffusion.objectives.denoising import DenoisingConfig
from patchdiffusion.parameterisation import EDM
from patchdiffusion.straight import FlowMatching
from patchdiffusion.train.report import read_log, write_report

NETWORK = LegoConfig(
    regions=(4, 8), patches=(2, 4), depths=(1, 1), width=16, heads=2, num_classes=2
)
PRECOND = EDM()


def alive(config: LegoConfig = NETWORK) -> Lego:
    network = config.build()
    with torch.no_grad():
        for index, p in enumerate(network.parameters()):
            p.copy_(drawn(*p.shape, seed=index) / max(p[0].numel(), 4) ** 0.5)
    return network


def pair(
    config: BricksConfig | DenoisingConfig, network: Lego, precond: EDM | FlowMatching = PRECOND
) -> tuple[LossOut, list[Tensor | None]]:
    """Losses of a batch, and their gradients."""
    network.zero_grad()
    materials = Materials(
        network=network, average=lambda: NetDenoiser(network, precond), precond=precond
    )
    loss = config.build(materials)
    out = loss(NetDenoiser(network, precond), batch(drawn(4, 3, 8, 12)), draws(4))
    out.per_sample.sum().backward()
    return out, [None if p.grad is None else p.grad.clone() for p in network.parameters()]


@pytest.mark.parametrize("precond", [EDM(), FlowMatching()])
def test_the_loss_is_the_mean_of_those_of_all_bricks(precond: EDM | FlowMatching) -> None:
    network = alive()
    out, _ = pair(BricksConfig(), network, precond)
    images, some = batch(drawn(4, 3, 8, 12)), draws(4)
    weighting = precond.default_weighting()
    sigma = DenoisingLoss().levels(some, images.noise)
    noise = some.normal("noise", (3, 8, 12))
    noisy = images.images + sigma[:, None, None, None] * noise
    net = NetDenoiser(network, precond)
    terms = []
    with torch.no_grad():
        for k in range(2):

            def part(x: Tensor, noise: Tensor, cond: Cond, k: int = k, **_: object) -> Tensor:
                return network.run(x, noise, cond)[k]

            found = net.denoise_with(part, noisy, sigma)
            terms.append(weighting(sigma) * (found - images.images).square().flatten(1).mean(1))
    torch.testing.assert_close(out.per_sample, (terms[0] + terms[1]) / 2)
    last, _ = pair(BricksConfig(joint=False), network, precond)
    assert out.estimate is not None and last.estimate is not None
    torch.testing.assert_close(out.estimate.weight, weighting(sigma) / 2)  # its share in the mean
    torch.testing.assert_close(last.estimate.weight, weighting(sigma))
    for k, term in enumerate(terms, 1):
        torch.testing.assert_close(out.scalars[f"brick {k}"], term.mean())


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def test_the_last_brick_alone_is_denoising_bit_for_bit() -> None:
    network = alive()
    last, gradients = pair(BricksConfig(joint=False), network)
    plain, others = pair(DenoisingConfig(), network)
    assert torch.equal(last.per_sample, plain.per_sample)
    assert all(same(a, b) for a, b in zip(gradients, others, strict=True))
    assert set(last.scalars) == {"brick 1", "brick 2"}
    joint, more = pair(BricksConfig(), network)
    assert torch.equal(joint.scalars["brick 2"], last.scalars["brick 2"])
    assert all(g is not None and g.any() for g in more)
    one = alive(replace(NETWORK, regions=(4,), patches=(2,), depths=(1,)))
    a, b = pair(BricksConfig(), one), pair(DenoisingConfig(), one)
    assert torch.equal(a[0].per_sample, b[0].per_sample)
    assert all(same(x, y) for x, y in zip(a[1], b[1], strict=True))


def test_a_share_of_the_regions_counts() -> None:
    key = draws(200).keys("x")
    mask = chosen_regions(key, (8, 12), (4, 4), 0.5)
    assert mask.shape == (200, 1, 8, 12)
    assert bool((mask.flatten(1).sum(1) == 48).all())
    blocks = mask.unflatten(3, (3, 4)).unflatten(2, (2, 4))
    assert torch.equal(blocks.any(3).any(-1), blocks.all(3).all(-1))  # whole regions
    assert (mask.float().mean(0) - 0.5).abs().max() < 0.15
    assert bool(chosen_regions(key, (7, 9), (4, 4), 1e-6).flatten(1).any(1).all())
    network = alive()
    whole, _ = pair(BricksConfig(), network)
    same, _ = pair(BricksConfig(regions=(1.0, 1.0)), network)
    some, _ = pair(BricksConfig(regions=(0.5, 1.0)), network)
    assert torch.equal(whole.per_sample, same.per_sample)
    assert torch.equal(whole.scalars["brick 2"], some.scalars["brick 2"])
    assert not torch.equal(whole.scalars["brick 1"], some.scalars["brick 1"])


def test_regions_are_drawn_for_each_brick_among_the_pixels_that_count() -> None:
    network = alive(replace(NETWORK, regions=(4, 4), patches=(2, 2)))
    counted = torch.zeros(4, 1, 8, 12, dtype=torch.bool)
    counted[..., :4, :4] = True
    given = replace(batch(drawn(4, 3, 8, 12)), counted=counted)
    net = NetDenoiser(network, PRECOND)
    materials = Materials(network=network, average=lambda: net, precond=PRECOND)
    loss = BricksConfig(regions=(0.5, 0.5)).build(materials)
    assert isinstance(loss, BricksLoss)
    first, second = (loss._counted(k, counted, draws(4), (8, 12), (4, 4)) for k in (0, 1))
    assert first is not None and second is not None and not torch.equal(first, second)
    masks = torch.stack([first, second])
    assert not (masks & ~counted).any()
    assert (masks.flatten(2).sum(2) == 0).any()  # of some images, none counts
    assert loss(net, given, draws(4)).per_sample.isfinite().all()


def test_impossible_objectives_are_named() -> None:
    with refuses("regions", 1.5):
        BricksConfig(regions=(1.5,))
    with refuses("--network lego"):
        TrainConfig(network=DiTConfig(), objective=BricksConfig())
    with refuses("objective.regions", 2, 1):
        TrainConfig(network=NETWORK, objective=BricksConfig(regions=(0.5,)))


# ---- Runs ----


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_images(tmp_path_factory.mktemp("data") / "images")


OBJECTIVE = BricksConfig(log_variance=8, regions=(0.5, 1.0))


def config(images: Path, **changes: object) -> TrainConfig:
    network = replace(NETWORK, regions=(4, 0), brick_dropout=0.3)
    return tiny.config(images, **{"network": network, "objective": OBJECTIVE, **changes})


def test_a_run_reports_every_brick(images: Path, tmp_path: Path) -> None:
    folder = tiny.run(
        config(images, preview=replace(tiny.config(images).preview, status=1)), tmp_path
    )
    records = read_log(folder)
    status = [r for r in records if r["kind"] == "status"]
    assert {"brick 1", "brick 2"} <= set(status[-1]["scalars"])
    (preview,) = [r for r in records if r["kind"] == "preview"]
    assert list(preview["held_out"]["exits"]) == ["brick 1"]
    assert preview["held_out"]["exits"]["brick 1"] > 0
    assert "held-out loss after brick 1" in write_report(folder).read_text()


def test_micro_batches_are_the_same_training(images: Path, tmp_path: Path) -> None:
    check_micro_batches(config(images), tmp_path)


def test_an_interrupted_run_is_the_same_run(images: Path, tmp_path: Path) -> None:
    check_resumed(config(images), tmp_path)


@pytest.mark.parametrize(
    "words", [[], ["--network", "lego-u"], ["--network.body", "unet"], ["--task", "classifier"]]
)
def test_the_network_brings_its_objective(words: list[str], images: Path, capsys: Capture) -> None:
    shown = works(capsys, "train", images, "--network", "lego", *words, "--print-config")
    assert '"BricksConfig"' in shown


def test_denoising_by_the_last_brick_can_be_chosen(images: Path, capsys: Capture) -> None:
    shown = works(
        capsys, "train", images, "--network", "lego", "--objective", "denoising", "--print-config"
    )
    assert '"DenoisingConfig"' in shown
    told = fails(capsys, "train", images, "--objective", "bricks", "--network", "unet")
    assert "--network lego" in told
