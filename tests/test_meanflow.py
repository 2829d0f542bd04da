"""MeanFlow: its identity on Gaussians, its derivative through the U-Net, its loss by hand."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from commands import refuses
from oracles import Exact, Little, batch, draws, gaussian, normal
from torch import Tensor, nn

from patchdiffusion import SongUNet, UNetConfig
from patchdiffusion.cond import Cond, Tape
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.losses import DenoisingLoss
from patchdiffusion.nets.unet import ncsnpp
from patchdiffusion.noise import LogNormal, LogUniform
from patchdiffusion.objectives.meanflow import (
    MeanFlowConfig,
    MeanFlowLoss,
    MeanFlowMap,
    mean_velocity,
    slope,
)
from patchdiffusion.objectives.tangent import derivative
from patchdiffusion.parameterisation import FlowMatching
from patchdiffusion.patches import coordinates
from patchdiffusion.paths import Flow, convert, per_sample
from patchdiffusion.solvers import euler, run
from patchdiffusion.solvers.jumps import jump
from patchdiffusion.system.device import compile_units
from patchdiffusion.train.config import TrainConfig
from patchdiffusion.train.parallel import LossModule
from patchdiffusion.weighting import FlowWeight

LAW = LogNormal(mean=-0.4, std=1.0)
EXACT = Exact(path=Flow(), first=1.0)


def velocity(z: Tensor, t: Tensor) -> Tensor:
    """E[eps - x0 | z] of the Gaussian."""
    wide = per_sample(t, z)
    x0 = gaussian(tuple(z.shape[1:]))(z / (1 - wide), t / (1 - t))
    return convert(x0, z, wide, Flow(), "x0", "velocity")


class ExactU(nn.Module):
    """The mean velocity of the Gaussian, and at span 0 the velocity itself."""

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        span = torch.zeros_like(noise) if cond.jump is None else cond.jump
        still, t = span == 0, noise.clamp(max=1 - 1e-9)
        gap = torch.where(still, 1.0, span)
        mean = (x - EXACT(x, noise, noise - gap)) / per_sample(gap, x)
        return torch.where(per_sample(still, x), velocity(x, t), mean)


def moments(count: int) -> tuple[Tensor, Tensor]:
    """Pairs of times, t > s."""
    a, b = torch.rand(2, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.maximum(a, b).clamp(max=0.95), torch.minimum(a, b) * 0.9


# ---- Identities ----


def test_the_meanflow_identity() -> None:
    """u = v - (t - s) du/dt along the velocity, with s held fixed."""
    z, (t, s) = normal(200), moments(200)
    u = mean_velocity(ExactU(), z, t, s, Cond())
    found = slope(ExactU(), z, t, s, Cond(), velocity(z, t))
    residual = u - (velocity(z, t) - per_sample(t - s, z) * found)
    assert float(residual.abs().max()) < 1e-13
    wrong = slope(ExactU(), z, t, s, Cond(), velocity(z, t) + 0.1)
    assert float((wrong - found).abs().max()) > 0.01


def test_short_spans_are_the_velocity() -> None:
    z, t = normal(100), moments(100)[0]
    v = velocity(z, t)
    assert torch.equal(mean_velocity(ExactU(), z, t, t, Cond()), v)
    errors = [
        float((mean_velocity(ExactU(), z, t, t - gap, Cond()) - v).abs().max())
        for gap in (1e-3, 1e-4)
    ]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)


def test_the_map_is_exact_in_any_number_of_steps() -> None:
    flow_map, z = MeanFlowMap(network=ExactU()), normal(20)
    for steps in (1, 2, 7):
        end = run(jump(flow_map, z, flow_map.times(steps))).x
        # The network computes in float32.
        torch.testing.assert_close(end, EXACT(z, 1.0, 0.0), rtol=0, atol=1e-5)


def test_it_is_a_denoiser_where_it_goes_nowhere() -> None:
    denoiser = NetDenoiser(ExactU(), FlowMatching(time_scale=1.0))
    x, sigma = 2 * normal(50), torch.logspace(-2, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(denoiser(x, sigma), gaussian()(x, sigma), rtol=0, atol=1e-5)


def test_a_jump_is_a_step_of_euler_with_a_denoiser_that_is_told_how_far() -> None:
    """z_s / (1 - s) = (sigma_s / sigma_t) x + (1 - sigma_s / sigma_t) D(x, sigma_t; t - s)."""
    network, t, s = Little(), 0.8, 0.3
    x, flow_map = normal(4, (1, 3, 3)).float(), MeanFlowMap(network=network)
    told = Cond(jump=torch.full((4,), t - s))
    grid = torch.tensor([t / (1 - t), s / (1 - s)], dtype=torch.float64)
    stepped = run(
        euler(NetDenoiser(network, FlowMatching(time_scale=1.0)), x / (1 - t), grid, cond=told)
    ).x
    torch.testing.assert_close((1 - s) * stepped, flow_map(x, t, s), rtol=1e-4, atol=1e-5)


# ---- The derivative ----

NET = UNetConfig(
    base=8,
    mult=(1, 2),
    blocks=1,
    attention=(1,),
    num_classes=2,
    fourier_features=1,
    jump=True,
    channels=1,
)


def unet(config: UNetConfig = NET) -> SongUNet:
    network = SongUNet(config)
    tiny.randomize(network)
    return network


def on_patches(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Cond]:
    """z, t, s, a direction, and a condition with labels and the coordinates of patches."""
    corner = torch.tensor([[0, 0], [3, 3], [8, 8]])
    pos = coordinates(corner, (8, 8), (16, 16))
    cond = Cond(labels=torch.tensor([0, 1, -1]), pos=pos, seed=torch.arange(3))
    t, s = (torch.tensor(x, dtype=dtype) for x in ([0.9, 0.5, 0.3], [0.1, 0.2, 0.25]))
    z, along = (normal(3, (1, 8, 8), name).to(dtype) for name in ("z", "along"))
    return z, t, s, along, cond


def differences(network: nn.Module, h: float) -> Tensor:
    z, t, s, along, cond = on_patches(next(network.parameters()).dtype)
    with torch.no_grad():
        after = mean_velocity(network, z + h * along, t + h, s, cond)
        return (after - mean_velocity(network, z - h * along, t - h, s, cond)) / (2 * h)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_derivative_is_that_of_finite_differences(dropout: float) -> None:
    network = unet(replace(NET, dropout=dropout)).double()
    z, t, s, along, cond = on_patches(torch.float64)
    found, expected = slope(network, z, t, s, cond, along), differences(network, 1e-5)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-8
    assert not found.requires_grad


def test_so_it_is_in_float32_and_in_any_layout() -> None:
    network = unet()
    z, t, s, along, cond = on_patches(torch.float32)
    found, expected = slope(network, z, t, s, cond, along), differences(network.double(), 1e-5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    last = unet().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(slope(last, z, t, s, cond, along), found, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # too coarse, so it is left
        assert torch.equal(slope(last, z, t, s, cond, along), slope(last, z, t, s, cond, along))
        torch.testing.assert_close(slope(last, z, t, s, cond, along), found, rtol=1e-3, atol=1e-4)


def test_compiled_blocks_are_left_as_they_are() -> None:
    network = unet(replace(NET, attention=()))
    z, t, s, along, cond = on_patches(torch.float32)
    expected = slope(network, z, t, s, cond, along)
    compile_units(network.units()[:1], backend="aot_eager")
    with torch.no_grad():
        mean_velocity(network, z, t, s, cond)
    torch.testing.assert_close(slope(network, z, t, s, cond, along), expected)


def test_samples_that_go_nowhere_need_none() -> None:
    network = unet()
    z, t, s, along, cond = on_patches(torch.float32)
    s = torch.tensor([0.1, 0.5, 0.25])  # the second one is t
    found = slope(network, z, t, s, cond, along)
    every = derivative(lambda z, t: mean_velocity(network, z, t, s, cond), (z, t), (along, 1.0))
    assert not found[1].any() and every[1].any()
    torch.testing.assert_close(found[[0, 2]], every[[0, 2]], rtol=1e-4, atol=1e-4)
    assert not slope(network, z, t, t, cond, along).any()


# ---- The network ----


def test_without_weights_a_span_changes_nothing() -> None:
    base, told = SongUNet(replace(NET, jump=False)), SongUNet(NET)
    z, t, s, _, cond = on_patches(torch.float32)
    tiny.randomize(base)
    told.load_state_dict(base.state_dict(), strict=False)
    with torch.no_grad():
        expected = base(z, t, cond)
        assert torch.equal(mean_velocity(told, z, t, s, cond), expected)
        assert torch.equal(told(z, t, cond), expected)
        given = {name for name, _ in told.named_parameters()} - dict(base.named_parameters()).keys()
        assert given == {"embed.jump.weight"}
        told.get_parameter("embed.jump.weight").add_(0.1)
        assert not torch.equal(mean_velocity(told, z, t, s, cond), expected)
        nowhere = replace(cond, jump=torch.zeros(3))
        assert torch.equal(told(z, t, cond), told(z, t, nowhere))  # None is 0


def test_the_span_gets_a_gradient_from_the_start() -> None:
    network = SongUNet(NET)
    for name, p in network.named_parameters():
        if name != "embed.jump.weight":
            tiny.randomize(nn.ParameterList([p]))
    z, t, s, _, cond = on_patches(torch.float32)
    mean_velocity(network, z, t, s, cond).square().sum().backward()
    grad = network.get_parameter("embed.jump.weight").grad
    assert grad is not None and grad.any()


# ---- Times ----


def test_times_follow_two_draws_of_the_law() -> None:
    config, count = MeanFlowConfig(same=0.0), 20_000
    t, s = MeanFlowLoss(config=config).times(draws(count), LAW)
    assert bool((t >= s).all()) and t.dtype == torch.float32
    logits = torch.cat([t, s]).logit()
    assert float(logits.mean()) == pytest.approx(-0.4, abs=0.03)
    assert float(logits.std()) == pytest.approx(1.0, abs=0.03)
    # Independent: the larger of two is below its median with probability 1/4.
    assert float((t.logit() < -0.4).double().mean()) == pytest.approx(0.25, abs=0.015)


def test_the_second_time_may_have_its_own_law() -> None:
    config = MeanFlowConfig(same=0.0, mean=-4.0, std=0.5)
    t, s = MeanFlowLoss(config=config).times(draws(5000), LogNormal(mean=2.0, std=0.5))
    assert float(t.logit().mean()) == pytest.approx(2.0, abs=0.05)
    assert float(s.logit().mean()) == pytest.approx(-4.0, abs=0.05)
    t, _ = MeanFlowLoss(config=config).times(draws(100), LogUniform(sigma_min=1.0, sigma_max=2.0))
    assert float(t.min()) > 0.499 and float(t.max()) < 0.667  # of a group with its own


def test_which_times_are_one_has_nothing_to_do_with_the_labels() -> None:
    count, loss = (
        20_000,
        MeanFlowLoss(config=MeanFlowConfig(same=0.75, guidance=2.0)),
    )
    t, s = loss.times(draws(count), LAW)
    same = (t == s).double()
    assert float(same.mean()) == pytest.approx(0.75, abs=0.01)
    dropped = draws(count).bernoulli("label dropout", 0.1).double()
    both = torch.corrcoef(torch.stack([same, dropped]))[0, 1]
    assert abs(float(both)) < 3 / math.sqrt(count)


# ---- The loss ----


def test_without_spans_it_is_flow_matching() -> None:
    network, x0 = Little(), normal(16, (1, 3, 3)).float()
    loss = MeanFlowLoss(config=MeanFlowConfig(same=1.0, power=0.0))
    denoiser = NetDenoiser(network, FlowMatching(time_scale=1.0))
    out = loss(denoiser, batch(x0, noise=LAW), draws(16))
    t, s = loss.times(draws(16), LAW)
    assert torch.equal(t, s)
    eps = draws(16).normal("noise", (1, 3, 3))
    z = x0 + per_sample(t, x0) * (eps - x0)
    u = network(z, t, Cond(jump=torch.zeros(16)))
    assert torch.equal(out.per_sample, (u - (eps - x0)).square().flatten(1).mean(1))
    # The same as the denoising loss of the library in other words, at the same noise levels.
    sigma = LAW.icdf(draws(16).stratified("sigma"))
    other = LAW.icdf(draws(16).uniform("span"))
    larger = torch.maximum(sigma, other).float()
    error = DenoisingLoss(FlowWeight())
    object.__setattr__(error, "levels", lambda *_: larger)
    expected = error(denoiser, batch(x0, noise=LAW), draws(16)).per_sample
    torch.testing.assert_close(out.per_sample, expected, rtol=1e-3, atol=1e-5)


def by_hand(
    network: nn.Module, x0: Tensor, t: Tensor, s: Tensor, v: Tensor, along: Tensor, cond: Cond
) -> Tensor:
    """|u - sg(v - (t - s) du/dt)|^2, the derivative by differences in float64."""
    double = Little().double()
    double.load_state_dict(network.state_dict())
    z, h = (x0 + per_sample(t, x0) * v).double(), 1e-6
    t64, s64, d = t.double(), s.double(), along.double()
    with torch.no_grad():
        after = mean_velocity(double, z + h * d, t64 + h, s64, cond)
        rate = (after - mean_velocity(double, z - h * d, t64 - h, s64, cond)) / (2 * h)
        target = v.double() - per_sample(t64 - s64, z) * rate
    u = mean_velocity(network, z.float(), t, s, cond)
    return (u - target.float()).square().flatten(1).mean(1)


@pytest.mark.parametrize("tangent", ["data", "network"])
def test_the_loss_by_hand(tangent: str) -> None:
    network, x0 = Little(), normal(32, (1, 3, 3)).float()
    cond = Cond(labels=torch.arange(32) % 3)
    config = MeanFlowConfig(same=0.5, power=0.75, eps=1e-3, tangent=tangent)  # type: ignore
    out = MeanFlowLoss(config=config)(
        NetDenoiser(network, FlowMatching(time_scale=1.0)), batch(x0, cond, noise=LAW), draws(32)
    )
    t, s = MeanFlowLoss(config=config).times(draws(32), LAW)
    v = draws(32).normal("noise", (1, 3, 3)) - x0
    z = x0 + per_sample(t, x0) * v
    along = v if tangent == "data" else mean_velocity(network, z, t, t, cond).detach()
    square = by_hand(network, x0, t, s, v, along, cond)
    expected = square / (square.detach() + 1e-3) ** 0.75
    torch.testing.assert_close(out.per_sample, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.scalars["velocity error"], square.detach().mean())
    (found,) = torch.autograd.grad(out.per_sample.sum(), [network.mix])
    (wanted,) = torch.autograd.grad(expected.sum(), [network.mix])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_guidance_is_part_of_the_target() -> None:
    """w v + (1 - w - k) u(null) + k u(label), v where there is no label."""
    network, x0 = Little(), normal(24, (1, 3, 3)).float()
    config = MeanFlowConfig(same=0.4, power=0.0, guidance=1.5, mix=0.3)
    loss, cond = (
        MeanFlowLoss(config=config),
        Cond(labels=torch.arange(24) % 3),
    )
    given = LossModule(NetDenoiser(network, FlowMatching(time_scale=1.0)), loss, dropout=0.25)
    out = given(batch(x0, cond, noise=LAW), draws(24))
    t, s = loss.times(draws(24), LAW)
    dropped = draws(24).bernoulli("label dropout", 0.25)
    assert cond.labels is not None and 0 < int(dropped.sum()) < 24
    cond = Cond(labels=torch.where(dropped, -1, cond.labels))
    v = draws(24).normal("noise", (1, 3, 3)) - x0
    z = x0 + per_sample(t, x0) * v
    with torch.no_grad():
        null, own = (mean_velocity(network, z, t, t, c) for c in (cond.without("labels"), cond))
    guided = torch.where(per_sample(dropped, v), v, 1.5 * v - 0.8 * null + 0.3 * own)
    rate = derivative(lambda z, t: mean_velocity(network, z, t, s, cond), (z, t), (guided, 1.0))
    target = guided - per_sample(t - s, z) * rate
    expected = (mean_velocity(network, z, t, s, cond) - target).square().flatten(1).mean(1)
    torch.testing.assert_close(out.per_sample, expected, rtol=1e-4, atol=1e-6)


def test_neutral_guidance_costs_nothing() -> None:
    def calls(**changes: float) -> int:
        network = Little()
        loss = MeanFlowLoss(config=replace(MeanFlowConfig(same=0.5), **changes))  # type: ignore
        given = batch(normal(8, (1, 2, 2)).float(), Cond(labels=torch.zeros(8).long()))
        loss(NetDenoiser(network, FlowMatching(time_scale=1.0)), given, draws(8))
        return len(network.calls)

    assert calls() == 2  # the derivative, and what has a gradient
    assert calls(guidance=2.0) == 3
    assert calls(guidance=2.0, mix=0.5) == calls(mix=0.5) == 4
    assert calls(same=1.0) == 1


def test_only_networks_are_trained() -> None:
    with refuses("NetDenoiser", "GaussianMixture"):
        MeanFlowLoss(config=MeanFlowConfig())(gaussian(), batch(normal(2), noise=LAW), draws(2))


# ---- Refused ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"same": 1.5}, "same"),
        ({"mix": 1.0}, "mix"),
        ({"power": 2.0}, "power"),
        ({"eps": 0.0}, "eps and std > 0"),
        ({"std": math.inf}, "eps and std > 0"),
        ({"guidance": -1.0}, "guidance >= 0 and finite, not -1.0"),
        ({"mean": math.nan}, "mean in"),
    ],
)
def test_impossible_settings(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(MeanFlowConfig(), **changes)  # type: ignore


@pytest.mark.parametrize(
    ("config", "network", "message"),
    [
        (MeanFlowConfig(), UNetConfig(), "set --network.jump"),
        (MeanFlowConfig(), ncsnpp(32, jump=True), "--network.embedding positional"),
        (MeanFlowConfig(guidance=2.0), UNetConfig(jump=True), "need a network with classes"),
    ],
)
def test_networks_that_cannot_be_trained(
    config: MeanFlowConfig, network: UNetConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(network=network, objective=config)
