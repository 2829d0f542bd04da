"""Bricks of LEGO that are left out, and windows: the network against itself."""

import math
from dataclasses import replace

import pytest
import tiny
import torch

from patchdiffusion import SamplerConfig, sample
from patchdiffusion.accel.brickplan import BrickSchedule, subsets
from patchdiffusion.accel.bricks import Bricks, SkipBricks
from patchdiffusion.accel.tiles import TiledDenoiser, Tiles
from patchdiffusion.cond import Position
from patchdiffusion.denoiser import NetDenoiser, PatchDenoiser
from patchdiffusion.nets.count import count
from patchdiffusion.nets.lego import Lego, LegoConfig
from patchdiffusion.parameterisation import EDM

SMALL = LegoConfig(
    channels=1, width=16, heads=2, regions=(4, 8, 0), patches=(2, 4, 4), depths=(1, 1, 1),
    canvas=(8, 8),
)  # fmt: skip


def denoiser(config: LegoConfig = SMALL) -> NetDenoiser:
    network = config.build()
    tiny.randomize(network)
    return NetDenoiser(network.eval(), EDM())


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def test_exits_are_outputs_of_the_whole_stack_and_cost_nothing_above() -> None:
    net, x = denoiser(), drawn(2, 1, 8, 8)
    network = net.network
    assert isinstance(network, Lego)
    inner, noise, cond, scales = net.scaled(x, 0.7, None)
    every = network.run(inner, noise, cond)
    calls = [0, 0, 0]
    for k, brick in enumerate(network.bricks):
        brick.register_forward_hook(lambda *_, k=k: calls.__setitem__(k, calls[k] + 1))
    for k in (1, 2, 3):
        early = SkipBricks(net, BrickSchedule((), (tuple(range(1, k + 1)),)))
        assert torch.equal(early(x, 0.7), scales.denoised(x, every[k - 1]))
    assert calls == [3, 2, 1]
    config = SamplerConfig(accelerator=Bricks(t_break=1.0, rule="pg"), steps=3)
    sample(net, seeds=[0, 1], channels=1, canvas=(8, 8), config=config)
    assert calls == [3 + 5, 2 + 5, 1]


def test_the_first_brick_is_left_out_if_the_others_learned_that() -> None:
    with pytest.raises(ValueError, match="brick 1 cannot"):
        SkipBricks(denoiser(), BrickSchedule((), ((2, 3),)))
    config = replace(SMALL, brick_dropout=0.1)
    net = denoiser(config)
    for subset in subsets(3, needs_first=False):
        got = SkipBricks(net, BrickSchedule((), (subset,)))(drawn(1, 1, 8, 8), 0.5)
        assert got.isfinite().all()


def test_the_operations_of_bricks_are_those_of_the_network() -> None:
    network = SMALL.build()
    assert sum(network.macs_of_bricks((8, 8))) == count(network, (8, 8)).macs


def test_fixed_windows_are_the_regions_of_the_network() -> None:
    """All bricks tile a large canvas; windows of the size of training tile it the same way."""
    net, x = denoiser(), drawn(2, 1, 16, 24)
    whole = PatchDenoiser(net, (8, 8))(x, 0.7)
    windows = TiledDenoiser(net, (8, 8), shift=False, kind="pitch")(x, 0.7)
    torch.testing.assert_close(windows, whole)
    moved = TiledDenoiser(net, (8, 8), kind="pitch")
    assert not torch.allclose(moved(x, 0.7, position=position(1)), whole)


def position(index: int) -> Position:
    seeds = torch.tensor([3, 4])
    return Position(run=0, index=index, stage=0, sigmas=(1.0, 0.0), seeds=seeds)


def test_bricks_are_left_out_of_windows_too() -> None:
    net = denoiser()
    config = SamplerConfig(
        accelerator=Bricks(drop=(3,)), canvas=Tiles(size=(8, 20)), steps=3, sigma_max=5.0
    )
    plain = SamplerConfig(canvas=Tiles(size=(8, 20)), steps=3, sigma_max=5.0)
    early = SkipBricks(net, BrickSchedule((), ((1, 2),)))
    images = [
        sample(model, seeds=[5, 6], channels=1, canvas=(8, 8), config=chosen)
        for model, chosen in ((net, config), (early, plain))
    ]
    assert images[0].shape == (2, 1, 8, 20) and torch.equal(*images)
    assert math.isfinite(float(images[0].sum()))
