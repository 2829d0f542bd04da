"""Classifiers of noisy images: the network, its loss, and what it means."""

from dataclasses import replace

import pytest
import tiny
import torch

from patchdiffusion import Cond
from patchdiffusion.classifier import NoisyClassifier
from patchdiffusion.nets.base import NetworkConfig
from patchdiffusion.nets.heads import ClassifierHead
from patchdiffusion.nets.transformer import TransformerConfig
from patchdiffusion.parameterisation import EDM

TRUNKS = {
    "unet": replace(tiny.NETWORK, num_classes=0),
    "transformer": TransformerConfig(width=16, depth=2, heads=2),
}


@pytest.mark.parametrize("trunk", TRUNKS.values(), ids=TRUNKS)
def test_logits_of_crops_of_any_size(trunk: NetworkConfig) -> None:
    """Each sample by itself, by its place and not by its label."""
    network = ClassifierHead(classes=5).build(trunk, seed=1)
    classifier, sigma = NoisyClassifier(network, EDM()), torch.tensor([0.1, 1.0, 9.0])
    for size in ((8, 8), (4, 6)):
        x = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
        pos = torch.zeros(3, 2, *size)
        cond = Cond(pos=pos, labels=torch.tensor([0, 1, 2]))
        assert classifier(x, sigma, cond).abs().max() < 2  # nearly uniform at first
        tiny.randomise(network)
        logits = classifier(x, sigma, cond)
        assert logits.shape == (3, 5)
        assert torch.equal(logits, classifier(x, sigma, Cond(pos=pos)))
        assert not torch.equal(logits, classifier(x, sigma, Cond(pos=pos + 0.5)))
        alone = classifier(x[1:2], 1.0, cond.take(slice(1, 2)))
        torch.testing.assert_close(alone, logits[1:2])
        network.init(1)


@pytest.mark.parametrize("trunk", TRUNKS.values(), ids=TRUNKS)
def test_a_classifier_has_the_parameters_that_it_uses(trunk: NetworkConfig) -> None:
    network = ClassifierHead(classes=5).build(trunk, seed=1)
    roles = network.roles()
    assert set(roles) == {name for name, _ in network.named_parameters()}
    assert {roles[f"{name}.weight"] for name in ("attention", "head")} == {"head"}
    network(torch.ones(1, 3, 8, 8), torch.zeros(1), Cond()).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert network.units() and all(unit.training for unit in network.units())


def test_what_cannot_be_a_classifier_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--network\.num-classes 0"):
        ClassifierHead(classes=2).build(tiny.NETWORK)
    with pytest.raises(ValueError, match=r"^classes must be at least 2, not 1"):
        ClassifierHead(classes=1)
