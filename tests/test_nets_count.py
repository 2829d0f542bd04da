"""Configurations of the U-Nets: parameters and cost as published and as documented."""

import math
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from commands import refuses

from patchdiffusion.nets.count import count, training_flops
from patchdiffusion.nets.unet import SongUNet, UNetConfig, base, ddpmpp, ncsnpp, small, tiny


def on_meta(config: UNetConfig) -> SongUNet:
    """A network without memory."""
    with torch.device("meta"):
        return SongUNet(config)


@pytest.mark.parametrize(
    ("config", "params"),
    [
        (ddpmpp(32, num_classes=10, augment_dim=9, coordinates=False), 55_735_299),
        (ddpmpp(32, augment_dim=9, coordinates=False), 55_733_891),
        (ncsnpp(32, num_classes=10, augment_dim=9, coordinates=False), 56_400_643),
        (ncsnpp(32, augment_dim=9, coordinates=False), 56_397_827),
        (ddpmpp(64, augment_dim=9, coordinates=False), 61_805_571),
        (ncsnpp(64, augment_dim=9, coordinates=False), 62_761_091),
    ],
)
def test_parameters_as_published(config: UNetConfig, params: int) -> None:
    network = on_meta(config)
    assert sum(p.numel() for p in network.parameters()) == params


@pytest.mark.parametrize(
    ("resolution", "params", "macs"),
    [(64, 61.8, {64: 41.9, 32: 10.4, 16: 2.61}), (32, 55.7, {32: 21.2, 16: 5.27, 8: 1.32})],
)
def test_cost_as_published(resolution: int, params: float, macs: dict[int, float]) -> None:
    network = on_meta(ddpmpp(resolution))
    for size, expected in macs.items():
        found = count(network, size)
        assert found.macs / 1e9 == pytest.approx(expected, rel=0.005)
        assert found.params / 1e6 == pytest.approx(params, abs=0.05)


@pytest.mark.parametrize("named", [tiny, small, base])
def test_sizes_cost_what_they_say(named: Callable[[int], UNetConfig]) -> None:
    for resolution in (32, 64):
        found = count(on_meta(named(resolution)), resolution)
        said = f"{found.params / 1e6:.1f}M[a-z ]*, {found.macs / 1e9:.1f} GMAC at {resolution}"
        assert re.search(said, named.__doc__ or "")


def test_count_follows_shape_and_leaves_the_network_alone() -> None:
    network = SongUNet(UNetConfig(base=8, mult=(1, 2), blocks=1, attention=(1,)))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    assert count(network, (8, 16)).macs < 2.1 * count(network, 8).macs
    assert training_flops(network, 8) == 6 * count(network, 8).macs
    network.requires_grad_(False)  # a frozen network has no gradients of weights
    assert training_flops(network, 8) == 4 * count(network, 8).macs
    network.requires_grad_(True)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert str(count(network, 8)).endswith("GMAC")


@pytest.mark.parametrize("resolution", [8, 16, 28, 48, 100, 256])
def test_every_resolution_has_a_setting(resolution: int) -> None:
    for named in (ddpmpp, ncsnpp, tiny, small, base):
        config = named(resolution, num_classes=7)
        assert config.num_classes == 7
        assert config.divisor == 2 ** (config.levels - 1)
    assert ddpmpp(32).mult == (2, 2, 2)
    assert (ddpmpp(64).mult, ddpmpp(64).attention) == ((1, 2, 2, 2), (2,))
    with refuses("resolution", 8, 4):
        tiny(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 0}, "channels"),
        ({"blocks": 0}, "blocks"),
        ({"num_classes": -1}, "num_classes"),
        ({"base": 10}, "base"),
        ({"mult": ()}, "mult"),
        ({"mult": (1, 0)}, "mult"),
        ({"attention": (2,)}, r"attention.*\(2,\)"),
        ({"embedding": "x"}, "embedding.*'x'"),
        ({"encoder": "x"}, "encoder"),
        ({"filter": (1, 2, 1)}, "filter"),
        ({"dropout": 1.0}, "dropout.*1.0"),
        ({"dropout": math.nan}, "dropout"),
    ],
)
def test_impossible_settings_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(UNetConfig(mult=(1, 2), attention=(1,)), **change)
