"""Gates by noise level: channel masks (DTR) and experts of block inputs (Switch-DiT)."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import refuses
from little import drawn
from sameruns import check_micro_batches, check_resumed
from torch import Tensor

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.nets.adm import ADMConfig
from patchdiffusion.nets.assignment import assign
from patchdiffusion.nets.base import NetworkConfig
from patchdiffusion.nets.channelmask import ChannelMasks, windows
from patchdiffusion.nets.count import MacCounter, count
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.edm2 import EDM2Config
from patchdiffusion.nets.layers import Block
from patchdiffusion.nets.switch import (
    ExpertMaps,
    SwitchGates,
    SwitchGating,
    Usage,
    jensen_shannon,
    load_loss,
    matched,
    prior_loss,
)
from patchdiffusion.nets.unet import UNetConfig
from patchdiffusion.noise import DDPMSteps, LogNormal
from patchdiffusion.parameterisation import EDM
from patchdiffusion.system.device import compile_units
from patchdiffusion.train import loop

DIT = DiTConfig(width=16, depth=3, heads=2, patch=(4, 4), num_classes=3, registers=1)
UNET = UNetConfig(base=8, mult=(1, 2), blocks=1, attention=(1,), num_classes=3)
ADM = ADMConfig(base=8, mult=(1, 2), attention=(1,), head_width=8, num_classes=3)
NETS = pytest.mark.parametrize("config", [DIT, UNET, ADM], ids=["dit", "unet", "adm"])


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Cond]:
    labels, u = torch.arange(batch) % 3, torch.linspace(0.05, 0.98, batch)
    return drawn(batch, 3, 8, 8), torch.linspace(-1, 1, batch), Cond(labels=labels, percentile=u)


def pair(config: NetworkConfig, rule: object) -> tuple[Any, Any]:
    """A network with random weights, and the same with a rule."""
    plain, routed = config.build(), replace(config, task_routing=rule).build()  # pyright: ignore
    tiny.randomize(plain)
    missing, unexpected = routed.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and set(missing) <= set(routed.neutral())
    return plain, routed


# ---- Masks ----


def test_masks_are_those_of_the_formula() -> None:
    rule, channels = ChannelMasks(), 384
    masks = rule.masks(torch.arange(1000), channels)
    starts = [round((t / 999) ** 4 * (384 - 307)) for t in range(1000)]
    expected = np.zeros((1000, 384), dtype=bool)
    for t, start in enumerate(starts):
        expected[t, start : start + math.floor(0.8 * 384)] = True
    assert torch.equal(masks, torch.from_numpy(expected))
    assert (starts[0], starts[500], starts[900], starts[999]) == (0, 5, 51, 77)
    assert (masks.sum(1) == 307).all() and int(masks.all(0).sum()) == 230


def test_near_levels_share_channels_and_high_noise_less() -> None:
    masks = ChannelMasks(beta=0.6).masks(torch.arange(1000), 64).float()
    overlap = masks @ masks.T / 38
    assert torch.equal(overlap.diagonal(), torch.ones(1000))
    assert (overlap[0].diff() <= 0).all() and overlap[0, -1] < 0.5
    assert overlap[0, 200] > overlap[700, 900]


def test_random_masks_are_of_equal_size_and_independent() -> None:
    rule = ChannelMasks(kind="random", beta=0.5)
    masks = rule.masks(torch.arange(400), 64)
    assert (masks.sum(1) == 32).all()
    overlap = (masks[:-1] & masks[1:]).sum(1).double()
    assert 15 < overlap.mean() < 17 and overlap.std() > 1
    assert not torch.equal(masks, replace(rule, seed=1).masks(torch.arange(400), 64))


def test_soft_masks_are_continuous_and_meet_the_hard_ones() -> None:
    soft, hard = ChannelMasks(soft=True, tasks=11), ChannelMasks(tasks=11)
    at = torch.linspace(0, 1, 11)
    assert torch.allclose(soft.factors(at, 20), hard.factors(at, 20), atol=1e-6)
    fine = soft.factors(torch.linspace(0, 1, 2001), 20)
    assert fine.diff(dim=0).abs().max() < 0.01 < hard.factors(at, 20).diff(dim=0).abs().max()
    assert torch.allclose(fine.sum(1), torch.full((2001,), 16.0))


@NETS
def test_all_channels_are_the_network_itself(config: NetworkConfig) -> None:
    plain, routed = pair(config, ChannelMasks(beta=1))
    x, noise, cond = inputs()
    assert torch.equal(plain(x, noise, cond), routed(x, noise, cond))
    back = config.build()
    back.load_state_dict(routed.state_dict())  # no parameters, no buffers
    assert torch.equal(back(x, noise, cond), plain(x, noise, cond))
    assert count(routed, 8) == count(plain, 8)
    narrow = pair(config, ChannelMasks(beta=0.5))[1]
    assert not torch.allclose(narrow(x, noise, cond), plain(x, noise, cond), atol=1e-3)


def test_a_block_sees_a_part_and_passes_all() -> None:
    """z + F(m z): each block of a transformer, written with its own parts."""
    plain, routed = pair(DIT, ChannelMasks(beta=0.5))
    x, noise, cond = inputs()
    mask = ChannelMasks(beta=0.5).factors(cond.percentile, 16)[:, None]  # pyright: ignore
    tokens = plain.start(x, noise, cond)  # pyright: ignore[reportCallIssue]
    h = torch.cat([tokens.registers, tokens.h], dim=1)
    for block in plain.blocks:  # pyright: ignore
        h = block(mask * h, tokens.emb).h + (1 - mask) * h
    expected = plain.finish(tokens._replace(h=h[:, 1:]))  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(routed(x, noise, cond), expected)


def test_the_skip_of_a_convolutional_block_sees_all_channels() -> None:
    block = Block(6, 4, 8, attention=None)
    tiny.randomize(block)
    x, emb = drawn(2, 6, 5, 5), drawn(2, 8)
    mask = (torch.arange(6) < 4).float()[:, None, None]
    assert block.skip is not None
    out = block(mask * x, emb, None, (0, 0), x)
    beside = block.skip(x) - block.skip(mask * x)
    torch.testing.assert_close(out, block(mask * x, emb) + beside * 0.5**0.5)


# ---- Noise levels ----


def test_masks_follow_the_law_also_in_respaced_sampling() -> None:
    """Step t of a table has its own mask, whatever other steps a sampler takes."""
    law = DDPMSteps(steps=1000)
    steps = torch.tensor([3, 500, 977])
    sigma = law.icdf((steps + 0.5) / 1000)
    mask = ChannelMasks(tasks=1000, alpha=1)
    ours = mask.factors(law.cdf(sigma), 4000)
    assert (ours.argmax(1) - mask.masks(steps, 4000).float().argmax(1)).abs().max() <= 1
    network = replace(DIT, task_routing=ChannelMasks(beta=0.5)).build()
    tiny.randomize(network)
    x, _, cond = inputs()
    net = NetDenoiser(network, EDM(), LogNormal())
    other = NetDenoiser(network, EDM(), LogNormal(mean=3.0))
    assert not torch.allclose(net(x, 1.0, cond), other(x, 1.0, cond), atol=1e-3)
    with refuses("percentile is missing", "noise law"):
        NetDenoiser(network, EDM())(x, 1.0, Cond(labels=cond.labels))


def test_an_encoder_is_reused_at_other_levels() -> None:
    """Faster Diffusion with an encoder at every step is the network itself."""
    network = replace(DIT, task_routing=SwitchGating()).build()
    tiny.randomize(network)
    x, noise, cond = inputs(2)
    encoding = network.encoded(x, noise, cond, 2)
    levels = torch.cat([noise, noise + 0.5])
    both = replace(cond.cat(cond), percentile=torch.tensor([0.1, 0.9, 0.2, 0.7]))
    expected = network(x.repeat(2, 1, 1, 1)[:2], noise, cond)
    out = encoding.decode(levels, replace(both, percentile=cond.percentile.repeat(2)))  # pyright: ignore
    torch.testing.assert_close(out[:2], expected)
    assert not torch.allclose(encoding.decode(levels, both)[:2], expected, atol=1e-4)


# ---- Switch-DiT ----


def test_experts_at_zero_are_the_network_itself() -> None:
    plain, routed = pair(DIT, SwitchGating())
    x, noise, cond = inputs()
    assert torch.equal(plain(x, noise, cond), routed(x, noise, cond))


def gates(**fields: int) -> SwitchGates:
    built = SwitchGating(**fields).build([16, 16, 16])  # pyright: ignore[reportArgumentType]
    tiny.randomize(built, scale=0.5)
    return built


def test_the_gate_is_a_sum_of_few_experts() -> None:
    found, h, u = gates(count=4, top=2), drawn(3, 5, 16), torch.tensor([0.1, 0.5, 0.9])
    usage = found.usage(u)
    torch.testing.assert_close(usage.probabilities.sum(-1), torch.ones(3, 3))
    maps = found.maps[1]
    assert isinstance(maps, ExpertMaps)
    for i in range(3):
        p, expected = usage.probabilities[i, 1], torch.ones(5, 16)
        for j in p.argsort(descending=True)[:2].tolist():
            expected = expected + p[j] * (h[i] @ maps.weight[j] + maps.bias[j])
        torch.testing.assert_close(found(1, h, found.begin(u))[i], expected)


def test_the_order_of_experts_does_not_matter() -> None:
    first, order = gates(count=4, top=2), torch.tensor([2, 0, 3, 1])
    second = SwitchGating(count=4, top=2).build([16, 16, 16])
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for maps in second.maps:
            assert isinstance(maps, ExpertMaps)
            maps.weight.copy_(maps.weight[order])
            maps.bias.copy_(maps.bias[order])
        for values in (second.gate.weight, second.gate.bias):
            values.copy_(values.unflatten(0, (3, 4))[:, order].flatten(0, 1))
    h, u = drawn(2, 5, 16), torch.tensor([0.3, 0.8])
    torch.testing.assert_close(
        first(2, h, first.begin(u)), second(2, h, second.begin(u)), rtol=1e-5, atol=1e-5
    )


def test_all_equal_experts_are_one_linear_map() -> None:
    found, h = gates(count=3, top=3), drawn(2, 5, 16)
    maps = found.maps[0]
    assert isinstance(maps, ExpertMaps)
    with torch.no_grad():
        maps.weight.copy_(maps.weight[:1].expand_as(maps.weight))
        maps.bias.copy_(maps.bias[:1].expand_as(maps.bias))
    expected = 1 + h @ maps.weight[0] + maps.bias[0]
    torch.testing.assert_close(found(0, h, found.begin(torch.rand(2))), expected)


def test_the_gate_depends_on_the_noise_level_alone() -> None:
    """Neither label nor image, nor the position of the sample in the batch."""
    found = gates()
    one, two = found.begin(torch.tensor([0.25])), found.begin(torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(one[0], two[1])
    assert not torch.allclose(two[0], two[1])


def test_the_prior_is_least_for_sliding_windows() -> None:
    """The divergence is that of a loop in numpy, 0 for the windows in any order, at most ln 2."""
    depth, top, tasks = 2, 2, 40
    prior = windows(torch.arange(tasks), tasks, 4.0, 6, 4).double()
    assert torch.equal(matched(prior > 0, prior > 0).sort().values, torch.arange(6))
    usage = Usage(*(gates(count=3, top=2).usage(torch.linspace(0, 1, tasks))))
    usage = Usage(usage.probabilities[:, :2], usage.weights[:, :2])
    levels = torch.tensor([0, 13, 39])
    p = usage.probabilities.flatten(1).detach().double().numpy() / depth
    chosen = usage.weights.flatten(1).detach().numpy() > 0
    cost = [[(chosen[:, a] != prior[:, b].numpy()).sum() for b in range(6)] for a in range(6)]
    best = min(sum(cost[a][c[a]] for a in range(6)) for c in itertools.permutations(range(6)))
    order = matched(torch.from_numpy(chosen), prior > 0)
    assert sum(cost[a][int(order[a])] for a in range(6)) == best
    q, total = prior[:, order].numpy() / (top * depth), 0.0
    for t in levels.tolist():
        mean = (p[t] + q[t]) / 2
        total += sum(
            0.5 * (x * np.log(np.maximum(x, 1e-6) / np.maximum(mean, 1e-6))).sum()
            for x in (p[t], q[t])
        )
    loss = prior_loss(usage, levels, top=top, alpha=4.0)
    assert loss.item() == pytest.approx(total / 3, abs=1e-6)
    a, b = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 0.5, 0.5]])
    assert float(jensen_shannon(a, b)) == pytest.approx(math.log(2), abs=1e-4)
    assert float(jensen_shannon(b, b)) == 0


def test_windows_have_no_prior_loss() -> None:
    tasks = 50
    p = windows(torch.arange(tasks), tasks, 4.0, 6, 4).float()[:, torch.randperm(6)] / 2
    same = p.unflatten(1, (2, 3))
    assert float(prior_loss(Usage(same, same), torch.arange(tasks), top=2, alpha=4.0)) < 1e-6


def test_equal_use_has_load_one() -> None:
    p = torch.eye(3).repeat(4, 1)[:, None]  # each of 3 experts at a third of the levels
    assert float(load_loss(Usage(p, p))) == pytest.approx(1)
    one = torch.eye(3)[:1].repeat(4, 1)[:, None]
    assert float(load_loss(Usage(one, one))) == pytest.approx(3)


def test_assignment() -> None:
    generator = np.random.default_rng(0)
    for n, ties in itertools.product((1, 2, 4, 6), (False, True)):
        cost = generator.integers(0, 4, (n, n)) if ties else generator.normal(size=(n, n))
        columns = assign(cost)
        assert sorted(columns) == list(range(n))
        best = min(
            sum(cost[i, c] for i, c in enumerate(o)) for o in itertools.permutations(range(n))
        )
        assert cost[np.arange(n), columns].sum() == pytest.approx(best)
    with refuses("square"):
        assign(np.zeros((2, 3)))


def test_assignment_agrees_with_scipy() -> None:
    scipy = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    cost = np.random.default_rng(1).integers(0, 300, (60, 60))
    rows, columns = scipy.linear_sum_assignment(cost)
    assert cost[np.arange(60), assign(cost)].sum() == cost[rows, columns].sum()


# ---- In runs ----


def test_losses_are_on_the_tape_in_training_alone() -> None:
    network = replace(DIT, task_routing=SwitchGating(load=0.1, tasks=20)).build()
    x, noise, cond = inputs()
    for context, names in ((torch.no_grad(), set()), (torch.enable_grad(), {"prior", "load"})):
        tape = Tape()
        with context:
            network(x, noise, cond, tape=tape)
        assert set(tape.losses) == names
    tape.losses["prior"].backward()
    assert network.gates.gate.weight.grad.abs().sum() > 0  # pyright: ignore


def test_operations_are_counted() -> None:
    network = replace(DIT, task_routing=SwitchGating()).build()
    x, noise, cond = inputs(1)
    with torch.no_grad(), MacCounter() as counter:
        network(x, noise, cond)
    size = count(network, 8)
    assert counter.macs == pytest.approx(size.macs, rel=0.02)
    assert size.idle == 3 * (16 * 16 + 16) and size.active == size.params - size.idle


@pytest.mark.parametrize(
    "rule", [ChannelMasks(beta=0.5), SwitchGating(tasks=20, load=0.1)], ids=["dtr", "switch"]
)
def test_resumed_it_is_the_same_run(rule: object, images: Path, tmp_path: Path) -> None:
    network = DiTConfig(width=16, depth=2, heads=2, num_classes=2, task_routing=rule)  # pyright: ignore
    config = tiny.config(images, network=network, precision="bf16")
    check_resumed(config, tmp_path)
    check_micro_batches(replace(config, precision="fp32"), tmp_path / "passes")


def test_a_plain_run_is_a_start(images: Path, tmp_path: Path) -> None:
    network = DiTConfig(width=16, depth=2, heads=2, num_classes=2)
    tiny.run(tiny.config(images, steps=1, network=network), tmp_path / "plain")
    routed = replace(network, task_routing=SwitchGating(tasks=20))
    config = tiny.config(images, steps=1, network=routed)
    tiny.run(config, tmp_path / "run", start_from=tmp_path / "plain")


def test_the_prior_falls_in_training(images: Path, tmp_path: Path) -> None:
    network = DiTConfig(width=16, depth=2, heads=2, task_routing=SwitchGating(tasks=50))
    training = tiny.training(tiny.config(images, network=network, steps=25), tmp_path)
    grid = torch.linspace(0, 1, 50)

    def prior() -> float:
        built: Any = training.network.gates
        return prior_loss(built.usage(grid), torch.arange(50), top=2, alpha=4.0).item()

    before = prior()
    for _ in range(25):
        loop.one_step(training)
    assert prior() < before / 2


@pytest.mark.slow
@pytest.mark.parametrize("rule", [ChannelMasks(), SwitchGating()], ids=["dtr", "switch"])
def test_compiled_blocks_are_the_same(rule: object) -> None:
    network = replace(DIT, task_routing=rule).build()  # pyright: ignore[reportArgumentType]
    tiny.randomize(network)
    x, noise, cond = inputs()
    with torch.no_grad():
        expected = network(x, noise, cond)
        compile_units(network.units(), backend="aot_eager")
        torch.testing.assert_close(network(x, noise, cond), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be() -> None:
    with refuses("alpha must lie in (0, 100]", "-1"):
        ChannelMasks(alpha=-1)
    with refuses("beta must lie in (0, 1]", "1.5"):
        ChannelMasks(beta=1.5)
    with refuses("top must lie in [1, 3]", "number of experts", "4"):
        SwitchGating(top=4)
    with refuses("task_routing must be none for edm2", "dtr"):
        EDM2Config(task_routing=ChannelMasks())
    with refuses("task_routing must be none or dtr for unet", "switch"):
        UNetConfig(task_routing=SwitchGating())
