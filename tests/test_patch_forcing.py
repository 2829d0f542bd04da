"""Patch Forcing: the law of the noise levels of tokens, its loss, and runs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import Capture, fails, refuses
from oracles import batch, draws
from sameruns import check_micro_batches, check_resumed
from torch import Tensor

from patchdiffusion import TrainConfig, rng
from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.losses import DenoisingLoss
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.noise import LogitNormal
from patchdiffusion.objectives.base import Materials
from patchdiffusion.objectives.patchforcing import (
    PatchForcingConfig,
    PatchForcingLoss,
    token_levels,
)
from patchdiffusion.parameterisation import EDM, FlowMatching

LAW = LogitNormal(mean=-0.7, std=1.0)
NETWORK = DiTConfig(width=16, depth=2, heads=2)


def simulated(spread: float, count: int = 400_000) -> np.ndarray:
    """Times of one token, by the rule of the paper in NumPy."""
    g = np.random.default_rng(0)
    most = 1 / (1 + np.exp(-(0.7 + g.standard_normal(count))))
    time = most - np.abs(g.standard_normal(count) * np.minimum(most / 2, spread))
    return np.where(time < 0, most * g.random(count), time)


@pytest.mark.parametrize("spread", [0.6, 0.2])
def test_times_of_tokens_follow_the_rule(spread: float) -> None:
    some = draws(20_000)
    least = DenoisingLoss().levels(some, LAW)
    sigma = token_levels(least, some, (4, 5), spread)
    assert sigma.shape == (20_000, 4, 5)
    assert bool((sigma >= least[:, None, None]).all())
    time = (1 / (1 + sigma.double())).flatten().numpy()
    quantiles = np.linspace(0.02, 0.98, 25)
    expected = np.quantile(simulated(spread), quantiles)
    np.testing.assert_allclose(np.quantile(time, quantiles), expected, atol=0.006)
    # Tokens of an image share t_max, and nothing else.
    most = 1 / (1 + least.double())
    shift = most[:, None] - 1 / (1 + sigma.flatten(1).double())
    shift = (shift / (most / 2).clamp(max=spread)[:, None]).T
    assert float(torch.corrcoef(shift[:2])[0, 1].abs()) < 0.1


def test_levels_are_constant_on_tokens_and_belong_to_their_sample() -> None:
    loss, some = PatchForcingLoss(DenoisingLoss(), (2, 3), 0.6), draws(6)
    sigma = loss.levels(some, LAW, (5, 7))
    assert sigma.shape == (6, 1, 5, 7)
    assert torch.equal(sigma[:, :, ::2, ::3].repeat_interleave(2, 2)[:, :, :5], sigma[..., ::3])
    assert len(sigma[0].unique()) == 9
    part = rng.Draws(0, 0, some.index[2:5], some.rank[2:5], some.count)
    assert torch.equal(loss.levels(part, LAW, (5, 7)), sigma[2:5])


def test_the_loss_weighs_each_token_at_its_own_level() -> None:
    crops = batch(rng.normal(rng.keys(0, "x", 0, torch.arange(3)), (2, 4, 4)), noise=LAW)
    seen: list[Tensor] = []

    def zero(x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        assert isinstance(sigma, Tensor)
        seen.extend([x, sigma])
        return torch.zeros_like(x)

    weighting = FlowMatching().default_weighting()
    loss = PatchForcingLoss(DenoisingLoss(weighting), (2, 2), 0.6)
    found = loss(zero, crops, draws(3)).per_sample
    noisy, sigma = seen
    expected = (1 + 1 / sigma.double()) ** 2 * crops.images.double() ** 2
    torch.testing.assert_close(found.double(), expected.flatten(1).mean(1))
    noise = (noisy - crops.images) / sigma
    torch.testing.assert_close(noise, draws(3).normal("noise", (2, 4, 4)), atol=1e-4, rtol=1e-4)


def test_without_spread_it_is_denoising_bit_for_bit() -> None:
    net = NETWORK.build()
    tiny.randomize(net)
    denoiser = NetDenoiser(net, EDM())
    materials = Materials(network=net, average=lambda: denoiser)
    plain = DenoisingLoss(EDM().default_weighting())
    scalar = PatchForcingConfig(spread=0).build(materials)
    crops = batch(rng.normal(rng.keys(0, "x", 0, torch.arange(3)), (3, 8, 8)), noise=LAW)
    expected = plain(denoiser, crops, draws(3)).per_sample
    assert torch.equal(scalar(denoiser, crops, draws(3)).per_sample, expected)
    spread = PatchForcingConfig(spread=1e-9).build(materials)
    found = spread(denoiser, crops, draws(3)).per_sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(
        PatchForcingConfig().build(materials)(denoiser, crops, draws(3)).per_sample, expected
    )


def forced(images: Path, **changes: object) -> TrainConfig:
    plain = replace(tiny.config(images, network=NETWORK), precond=FlowMatching())
    return replace(PatchForcingConfig().prefers(plain), **changes)


def test_an_interrupted_run_is_the_same_run(images: Path, tmp_path: Path) -> None:
    config = forced(images)
    assert config.noise == LAW
    straight = check_resumed(config, tmp_path)
    plain = tiny.run(replace(config, objective=PatchForcingConfig(spread=0)), tmp_path / "plain")
    assert tiny.history(plain) != tiny.history(straight)


def test_micro_batches_are_the_same_training(images: Path, tmp_path: Path) -> None:
    check_micro_batches(forced(images), tmp_path)


def test_a_network_of_one_level_is_refused(tmp_path: Path, capsys: Capture) -> None:
    with refuses("spread", -1):
        PatchForcingConfig(spread=-1)
    data = tiny.write_images(tmp_path / "images")
    told = fails(capsys, "train", data, "--objective", "patch-forcing", "--out", tmp_path / "run")
    assert "--network dit" in told and "unet" in told
