"""The contrast of two views of an image: its value, its gradient, and its neutral weight."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import refuses
from sameruns import check_resumed

from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.tapmaps import halfway, tap_maps
from patchdiffusion.objectives import MeanFlowConfig
from patchdiffusion.objectives.base import Stages
from patchdiffusion.objectives.selfdistill import SelfDistillationConfig, SelfDistilled
from patchdiffusion.train import loop
from patchdiffusion.train.setup import Training

DISTILL = SelfDistillationConfig(weight=0.5, features=8)
DIT = DiTConfig(width=16, depth=3, heads=2, patch=(4, 4), num_classes=2)


def built(training: Training) -> SelfDistilled:
    assert isinstance(training.objective, Stages)
    found = training.objective.stages[-1]
    assert isinstance(found, SelfDistilled)
    return found


@pytest.mark.parametrize("network", [tiny.NETWORK, DIT])
def test_the_term_is_the_cross_entropy_of_the_pass(
    network: DiTConfig, images: Path, tmp_path: Path
) -> None:
    """By hand, with features that the objective itself has computed."""
    training = tiny.training(tiny.config(images, network=network, additions=(DISTILL,)), tmp_path)
    tiny.randomize(training.network)
    loss, feed = built(training), training.stepper.feed
    first, group = training.plan.draw(seed=3, step=0)  # of which the second are crops
    batch, draws = feed.batch(
        group, step=0, position=0, first=first.count, chunk=range(group.count)
    )
    denoiser = training.config.task.model(training.network, training.config)
    assert isinstance(denoiser, NetDenoiser)
    out = loss(denoiser, batch, draws)
    plain = loss.objective(denoiser, batch, draws)
    assert torch.equal(out.per_sample, plain.per_sample)
    views = (batch, loss.view(batch, "self-distill"))
    assert torch.equal(views[1].index, batch.index) and not torch.equal(views[1].box, batch.box)
    q, k = ([loss.features(d, v, draws, i) for i, v in enumerate(views)]
            for d in (denoiser, loss.average()))  # fmt: skip
    expected = 0.0
    for one, other in ((q[0], k[1]), (q[1], k[0])):
        logits = one @ other.mT / 0.2
        entropy = (logits.logsumexp(1) - logits.diagonal()).mean().detach()
        expected += float(entropy) * 2 * 0.2 / 2
    assert float(out.scalars["self-distill"]) == pytest.approx(expected, rel=1e-5)
    assert out.batch_loss is not None
    assert float(out.batch_loss.detach()) == pytest.approx(0.5 * expected, rel=1e-5)
    out.batch_loss.backward()
    grads = {n: p.grad for n, p in training.network.named_parameters() if p.grad is not None}
    behind = "blocks.2" if isinstance(network, DiTConfig) else "dec"
    assert any(grad.any() for grad in grads.values())
    assert not any(grad.any() for name, grad in grads.items() if name.startswith(behind))
    assert all(p.grad is not None for p in loss.head.parameters())


def test_the_pooled_activation_is_that_in_the_middle() -> None:
    for network, name in ((DIT, "blocks.1"), (tiny.NETWORK, "mid.0")):
        maps = tap_maps(network.build, (16, 16))
        assert halfway(network.build().taps, maps) == name


def test_weight_0_is_the_run_without_it(images: Path, tmp_path: Path) -> None:
    config = tiny.config(images)
    none = replace(config, additions=(replace(DISTILL, weight=0.0),))
    runs = [tiny.run(c, tmp_path / str(i)) for i, c in enumerate((config, none))]
    assert tiny.weights(runs[0]) == tiny.weights(runs[1])
    assert config.task.passes(none) == 0 and config.task.passes(
        replace(config, additions=(DISTILL,))
    ) == 8  # fmt: skip


def test_a_run_is_resumed_to_the_bit_and_learns_to_recognize(images: Path, tmp_path: Path) -> None:
    config = tiny.config(images, network=DIT, additions=(DISTILL,))
    check_resumed(config, tmp_path)
    training = tiny.training(replace(config, images=300.0), tmp_path / "longer")
    values = []
    for _ in range(40):
        loop.one_step(training)
        values.append(training.meter.read()["self-distill"])
    assert sum(values[-5:]) < 0.9 * sum(values[:5])


def test_what_does_not_fit_is_refused(images: Path, tmp_path: Path) -> None:
    for changes, parts in (
        ({"weight": -1.0}, ("weight", -1.0)),
        ({"temperature": 0.0}, ("temperature", 0.0)),
        ({"sigma": 0.0}, ("sigma", 0.0)),
        ({"features": 1}, ("features", 1)),
    ):
        with refuses(*parts):
            replace(DISTILL, **changes)
    with refuses("tap", "blocks.9"):
        config = tiny.config(images, network=DIT, additions=(replace(DISTILL, tap="blocks.9"),))
        tiny.training(config, tmp_path)
    assert MeanFlowConfig.denoises  # whose network is a denoiser, too
