"""EDM2: magnitudes stay what they are, in operations, activations and weights."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import refuses
from torch import Tensor

from patchdiffusion import auto
from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets.edm2 import EDM2Config, MPUNet
from patchdiffusion.nets.layers import Conv
from patchdiffusion.nets.magnitude import (
    MPAttention,
    MPFourier,
    MPWeight,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
)
from patchdiffusion.noise import LogNormal
from patchdiffusion.objectives import DenoisingConfig
from patchdiffusion.parameterisation import V
from patchdiffusion.train.optimizers import AdamW
from patchdiffusion.train.schedules import InverseSqrt

LITTLE = EDM2Config(base=8, mult=(1, 2), blocks=1, attention=(1,), head_width=8, num_classes=2)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def rms(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


def initialized(module: torch.nn.Module) -> torch.nn.Module:
    for part in module.modules():
        if isinstance(part, MPWeight | MPFourier):
            part.draw(lambda name: torch.Generator().manual_seed(7))
    return module


# ---- Operations ----


@pytest.mark.parametrize("t", [0.3, 0.5])
def test_operations_keep_magnitudes(t: float) -> None:
    a, b = torch.randn(8, 48, 16, 16), torch.randn(8, 16, 16, 16)
    outputs = {
        "silu": mp_silu(a),
        "sum": mp_sum(a, torch.randn(a.shape), t),
        "cat": mp_cat(a, b, t),
        "conv": initialized(MPWeight(48, 64, 3))(a)[..., 1:-1, 1:-1],
        "linear": initialized(MPWeight(48, 256))(torch.randn(4096, 48)),
        "fourier": initialized(MPFourier(512))(torch.randn(512)),
        "normalized": normalize(a * 3, 1),
    }
    found = {name: rms(out) for name, out in outputs.items()}
    assert all(0.97 < value < 1.03 for value in found.values()), found


@pytest.mark.parametrize("t", [0.3, 0.5])
def test_shares_of_a_concatenation(t: float) -> None:
    """Both parts contribute (1 - t)^2 and t^2 to what follows, whatever their widths."""
    out = mp_cat(torch.ones(1, 6, 1, 1), torch.ones(1, 2, 1, 1), t)
    energies = [float(part.square().sum()) for part in out.split([6, 2], dim=1)]
    assert energies[0] / energies[1] == pytest.approx(((1 - t) / t) ** 2)
    assert sum(energies) == pytest.approx(8)


def test_normalize_is_the_formula() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    expected = x / (1e-4 + x.square().mean(1, keepdim=True).sqrt())
    torch.testing.assert_close(normalize(x, 1), expected)
    assert normalize(x.bfloat16(), 1).dtype == torch.bfloat16


def test_the_size_of_weights_does_not_matter() -> None:
    x, conv = torch.randn(2, 4, 5, 5), initialized(MPWeight(4, 6, 3))
    assert isinstance(conv, MPWeight)
    before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(torch.rand(6, 1, 1, 1) + 0.5)
    torch.testing.assert_close(conv(x), before, rtol=1e-3, atol=1e-3)


def test_attention_is_of_directions() -> None:
    """Longer queries, keys and values are no other ones."""
    attention = MPAttention(16, 2)
    x = torch.randn(2, 16, 3, 3)
    initialized(attention)
    torch.testing.assert_close(attention(x), attention(5 * x), rtol=1e-3, atol=1e-3)


# ---- The network ----


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("edm2-xxs", 31.3), ("edm2-xs", 124.7), ("edm2-s", 280.2), ("edm2-m", 497.8)],
)
def test_published_number_of_parameters(preset: str, millions: float) -> None:
    fields = EDM2Config.presets[preset]
    with torch.device("meta"):
        network = EDM2Config(**fields, channels=4, num_classes=1000, coordinates=False).build()
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


def test_activations_have_magnitude_1_at_the_start() -> None:
    config = EDM2Config(base=64, mult=(1, 2, 2), blocks=2, num_classes=5)
    network = config.build()
    tape = Tape(wants=network.taps)
    with torch.no_grad():
        cond = Cond(labels=torch.tensor([0, 3, 4, -1]))
        emb = network.embedding(torch.randn(4), cond)
        network(torch.randn(4, 3, 32, 32), torch.randn(4), cond, tape=tape)
    found = {name: rms(h) for name, h in tape.activations.items()}
    assert all(0.6 < value < 1.4 for value in found.values()), found
    assert 0.6 < rms(emb) < 1.4


def test_the_output_is_zero_at_the_start() -> None:
    assert not LITTLE.build()(torch.randn(2, 3, 8, 8), torch.randn(2), Cond()).any()


def trained(steps: int, applied: float = 1.0) -> MPUNet:
    """A network after some updates at a large learning rate."""
    network = LITTLE.build()
    update = tiny.update(network, AdamW(lr=0.05, betas=(0.9, 0.99)))
    x, noise = torch.randn(4, 3, 8, 8), torch.randn(4)
    one = torch.ones(())
    for _ in range(steps):
        update.zero_grad()
        out = network(x, noise, Cond(labels=torch.tensor([0, 1, 0, 1])))
        (out - x).square().mean().backward()
        update(update.norm(), one, 1 - applied * one, 0.05)
        with torch.no_grad():
            network.after_step(applied * one)
    return network


def magnitudes(network: MPUNet) -> list[float]:
    """Largest distance from 1 of the RMS of the filters of each weight."""
    return [
        float((m.weight.detach().square().flatten(1).mean(1).sqrt() - 1).abs().max())
        for m in network.modules()
        if isinstance(m, MPWeight)
    ]


def test_every_filter_has_magnitude_1_after_training() -> None:
    network, start = trained(12), LITTLE.build()
    assert max(magnitudes(network)) < 1e-3 and max(magnitudes(start)) < 1e-3
    moved = [
        name
        for name, value in start.named_parameters()
        if not torch.equal(value, network.get_parameter(name))
    ]
    assert len(moved) == len(list(start.parameters()))
    coordinates = network.get_submodule("stem.coordinates")
    assert isinstance(coordinates, Conv)
    assert 0 < float(coordinates.weight.detach().square().flatten(1).mean(1).max()) <= 1.0001


def test_coordinates_do_not_outgrow_the_image() -> None:
    network = LITTLE.build()
    weight = network.get_parameter("stem.coordinates.weight")
    with torch.no_grad():
        weight[0], weight[1:] = 3.0, 0.25
    network.after_step(torch.ones(()))
    assert torch.equal(weight[0], torch.ones_like(weight[0]))
    assert torch.equal(weight[1:], torch.full_like(weight[1:], 0.25))


def test_a_skipped_update_changes_nothing() -> None:
    network = LITTLE.build()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.after_step(torch.zeros(()))
    assert all(torch.equal(v, before[n]) for n, v in network.state_dict().items())
    network.after_step(torch.ones(()))
    assert max(magnitudes(network)) < 2e-3  # a filter of two inputs may be short


# ---- What suits it ----


def test_it_brings_its_settings(images: Path) -> None:
    plain = tiny.config(images)
    config = replace(EDM2Config(**EDM2Config.presets["edm2-m"])).prefers(plain)
    assert config.network.base == 256 and config.network.dropout == 0.1
    assert (config.optim.lr, config.optim.betas) == (0.009, (0.9, 0.99))
    assert config.optim.schedule == InverseSqrt()
    assert config.noise == LogNormal(mean=-0.8, std=1.6)
    assert config.objective == DenoisingConfig(log_variance=128)
    other = LITTLE.prefers(V().prefers(plain))
    assert other.noise == V().default_noise()
    assert replace(config, network=plain.network, optim=plain.optim, noise=plain.noise) == replace(
        plain, objective=config.objective
    )


def test_presets_are_words_in_python_too(images: Path) -> None:
    config = auto(images, network="edm2-s", optim={"eps": 1e-6})
    assert isinstance(config.network, EDM2Config) and config.network.base == 192
    assert (config.optim.lr, config.optim.eps) == (0.010, 1e-6)


def test_learning_rates_follow_the_published_ones(images: Path) -> None:
    """A width that is not published has the rate of a law through those that are."""
    plain, found = tiny.config(images), {}
    for base in (64, 128, 256, 448):
        found[base] = EDM2Config(base=base).prefers(plain).optim.lr * math.sqrt(base)
        assert found[base] == pytest.approx(0.136, rel=0.06)
    assert EDM2Config(base=96, head_width=32).prefers(plain).optim.lr == 0.0139


def test_refused() -> None:
    with refuses("head_width", "16", 64, "--network.head-width 16"):
        EDM2Config(base=8, mult=(1, 2), attention=(1,))
    with refuses("attention", 3):
        EDM2Config(attention=(3,))
