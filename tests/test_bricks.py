"""Bricks that are left out: schedules, calls that are really saved, and measurements."""

import math

import pytest
import tiny
import torch
from commands import refuses
from stacks import Stack, StackConfig

from patchdiffusion import Cond, SamplerConfig, sample
from patchdiffusion.accel.brickplan import BrickSchedule, described, subsets, without
from patchdiffusion.accel.bricks import Bricks, SkipBricks
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.denoiser import Denoiser, NetDenoiser, PatchDenoiser, discontinuities
from patchdiffusion.guidance.base import Surroundings
from patchdiffusion.guidance.cfg import CFG, ClassifierFree
from patchdiffusion.guidance.threshold import Dynamic
from patchdiffusion.parameterisation import EDM
from patchdiffusion.sampling.companions import Companions
from patchdiffusion.solvers import Euler, Heun, heun, solve
from patchdiffusion.solvers.schedules import karras

SIGMAS = karras(6, 0.02, 20.0)
LABELS = torch.tensor([0, 1])
ALL, EARLY = (1, 2, 3), (1, 2)


def denoiser(bricks: int = 3) -> NetDenoiser:
    network = StackConfig(bricks=bricks, channels=1, num_classes=2).build()
    tiny.randomize(network)
    return NetDenoiser(network, EDM())


def calls(net: NetDenoiser) -> list[int]:
    """Evaluations of each brick since the last question."""
    assert isinstance(net.network, Stack)
    counted, net.network.calls = net.network.calls, [0] * net.network.num_bricks
    return counted


def noisy(count: int = 2) -> torch.Tensor:
    return 20 * torch.randn(count, 1, 6, 8, generator=torch.Generator().manual_seed(1))


def sampled(model: Denoiser, config: SamplerConfig) -> torch.Tensor:
    cond = Cond(labels=LABELS)
    return sample(model, seeds=[0, 1], channels=1, canvas=(6, 8), cond=cond, config=config)


# ---- Schedules ----


def test_a_schedule_holds_up_to_its_edges() -> None:
    schedule = BrickSchedule((0.1, 2.0), ((1,), ALL, EARLY))
    levels = [0.01, 0.1, 0.11, 2.0, 2.1, 1e9]
    assert [schedule.at(sigma) for sigma in levels] == [(1,), (1,), ALL, ALL, EARLY, EARLY]
    pieces = schedule.pieces(torch.tensor(levels, dtype=torch.float64))
    assert [schedule.bricks[i] for i in pieces.tolist()] == [schedule.at(s) for s in levels]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, math.inf, BrickSchedule((), (EARLY,))),
        (0.0, 0.5, BrickSchedule((0.5,), (EARLY, ALL))),
        (0.5, math.inf, BrickSchedule((0.5,), (ALL, EARLY))),
        (0.1, 0.5, BrickSchedule((0.1, 0.5), (ALL, EARLY, ALL))),
        (0.5, 0.5, BrickSchedule((), (ALL,))),
    ],
)
def test_a_subset_within_an_interval(low: float, high: float, expected: BrickSchedule) -> None:
    assert BrickSchedule.within(low, high, EARLY, ALL) == expected


def test_edges_at_which_nothing_changes_are_none() -> None:
    joined = BrickSchedule.joined([1.0, 2.0, 3.0], [ALL, EARLY, EARLY, ALL])
    assert joined == BrickSchedule((1.0, 3.0), (ALL, EARLY, ALL))
    with refuses(2, "increasing"):
        BrickSchedule((2.0, 1.0), (ALL, EARLY, ALL))


def test_subsets_are_exits_and_all_but_one() -> None:
    assert subsets(3) == (ALL, (1, 2), (1,), (1, 3))
    assert subsets(3, needs_first=False) == (ALL, (1, 2), (1,), (2, 3), (1, 3))
    assert subsets(1) == ((1,),)
    assert subsets(2, needs_first=False) == ((1, 2), (1,), (2,))
    said = [described(subset, 3) for subset in subsets(3)]
    assert said == ["all", "without 3", "only 1", "without 2"]
    with refuses("brick 4", "1, 2, 3"):
        without(ALL, (4,))
    with refuses("all of 1, 2, 3"):
        without(ALL, ALL)


# ---- What is really evaluated ----


def test_all_bricks_are_the_network_bit_for_bit() -> None:
    net, x = denoiser(), noisy()
    cond = Cond(labels=LABELS)
    for sigma in (0.5, torch.tensor([0.5, 3.0])):
        skipping = SkipBricks(net, BrickSchedule((1.0,), (ALL, ALL)))
        assert torch.equal(skipping(x, sigma, cond), net(x, sigma, cond))


def test_without_the_last_it_is_the_output_of_the_one_before() -> None:
    net, x = denoiser(), noisy()
    network = net.network
    assert isinstance(network, Stack)
    shorter = NetDenoiser(StackConfig(bricks=2, channels=1, num_classes=2).build(), net.precond)
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("convs.2")}
    shorter.network.load_state_dict(state)
    calls(net)
    got = SkipBricks(net, BrickSchedule((), (EARLY,)))(x, 0.7, Cond(labels=LABELS))
    assert torch.equal(got, shorter(x, 0.7, Cond(labels=LABELS)))
    assert calls(net) == [1, 1, 0]


def test_samples_of_a_batch_may_differ_in_their_bricks() -> None:
    net, x = denoiser(), noisy(4)
    cond = Cond(labels=torch.tensor([0, 1, 1, 0]))
    sigma = torch.tensor([0.1, 5.0, 0.2, 7.0])
    schedule = BrickSchedule((1.0,), (EARLY, ALL))
    skipping, early = SkipBricks(net, schedule), SkipBricks(net, BrickSchedule((), (EARLY,)))
    calls(net)
    got = skipping(x, sigma, cond)
    assert calls(net) == [2, 2, 1]
    low = torch.tensor([0, 2])
    expected = net(x, sigma, cond)
    expected[low] = early(x[low], sigma[low], cond.take(low))
    torch.testing.assert_close(got, expected)
    same = sigma.clamp(max=1.0)
    assert torch.equal(skipping(x, same, cond), early(x, same, cond))


def test_a_level_that_is_an_edge_is_one_in_any_precision_and_as_a_map() -> None:
    net, x = denoiser(), noisy()
    cond = Cond(labels=LABELS)
    skipping = SkipBricks(net, BrickSchedule((0.1,), (EARLY, ALL)))  # 0.1 is more as float32
    early = SkipBricks(net, BrickSchedule((), (EARLY,)))(x, 0.1, cond)
    exact = torch.full((2,), 0.1, dtype=torch.float64)
    for sigma in (0.1, torch.tensor(0.1), torch.full((2,), 0.1), exact):
        torch.testing.assert_close(skipping(x, sigma, cond), early)
    levels = torch.tensor([0.05, 3.0])
    found = skipping(x, levels[:, None, None, None].expand(-1, 1, 6, 8), cond)
    assert torch.equal(found, skipping(x, levels, cond))


@pytest.mark.parametrize("rule", ["pg", "pr"])
@pytest.mark.parametrize(("share", "skipped"), [(0.0, 0), (0.5, 3), (1.0, 6)])
def test_skipped_bricks_are_not_called(rule: str, share: float, skipped: int) -> None:
    net = denoiser()
    part = Bricks(t_break=share, rule=rule)  # pyright: ignore[reportArgumentType]
    config = SamplerConfig(accelerator=part, solver=Euler(), steps=6, sigma_max=20.0)
    plain = SamplerConfig(solver=Euler(), steps=6, sigma_max=20.0)
    calls(net)
    got = sampled(net, config)
    assert calls(net) == [6, 6, 6 - skipped]
    if not skipped:
        assert torch.equal(got, sampled(net, plain))
    if skipped == 6:
        early = SkipBricks(net, BrickSchedule((), (EARLY,)))
        assert torch.equal(got, sampled(early, plain))


def test_calls_through_guidance_corrections_thresholds_and_regions() -> None:
    """Heun evaluates every level but the first twice; the early steps are the high levels."""
    net = denoiser()
    config = SamplerConfig(
        accelerator=Bricks(t_break=0.5, rule="pr"),
        guidance=ClassifierFree(weight=3.0),
        threshold=Dynamic(),
        solver=Heun(),
        steps=6,
        sigma_max=20.0,
    )
    calls(net)
    got = sampled(net, config)
    # 11 evaluations of both halves in one batch; levels 0, 1, 2 and the correction at 1, 2: five.
    assert calls(net) == [11, 11, 6]
    sigmas = config.sigmas()
    edge = float(sigmas[3]) ** 0.9 * float(sigmas[2]) ** 0.1
    by_hand = SkipBricks(net, BrickSchedule((edge,), (ALL, EARLY)))
    plain = SamplerConfig(threshold=Dynamic(), solver=Heun(), steps=6, sigma_max=20.0)
    assert torch.equal(got, sampled(CFG(by_hand, 3.0), plain))


def test_the_number_of_operations_falls_with_the_share() -> None:
    net, x = denoiser(), noisy()
    counted = []
    for share in (0.0, 1 / 3, 2 / 3, 1.0):
        around = surroundings()
        wrapped = Bricks(t_break=share, rule="pg").wrap(net, around)
        calls(net)
        solve(heun, PatchDenoiser(wrapped, (6, 8)), x, SIGMAS, cond=Cond(labels=LABELS))
        counted.append(calls(net)[2])
    assert counted == [11, 7, 3, 0]


def surroundings() -> Surroundings:
    levels = tuple(SIGMAS.tolist())
    return Surroundings((6, 8), (levels[-2], levels[0]), Companions(), levels)


def test_edges_are_discontinuities() -> None:
    skipping = SkipBricks(denoiser(), BrickSchedule((0.3,), (EARLY, ALL)))
    assert discontinuities(CFG(skipping, 2.0)) == (0.3,)
    whole = Bricks(t_break=0.0, rule="pg")
    net = denoiser()
    assert whole.wrap(net, surroundings()) is net


def test_what_cannot_be_left_out() -> None:
    with refuses("brick 1"):
        SkipBricks(denoiser(3), BrickSchedule((), ((2, 3),)))
    SkipBricks(denoiser(4), BrickSchedule((), ((2, 3),)))
    with refuses("1 to 3", 4):
        SkipBricks(denoiser(3), BrickSchedule((), ((1, 4),)))
    with refuses("GaussianMixture", "lego"):
        SkipBricks(GaussianMixture.toy(), BrickSchedule((), (ALL,)))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"bound": 0.1, "drop": (2,)}, ("bound", "drop")),
        ({"bound": -0.1}, ("bound", -0.1)),
        ({"t_break": 1.5, "rule": "pg"}, ("t_break", 1.5)),
        ({"t_break": 0.5}, ("rule", "pg", "pr")),
        ({"rule": "pg"}, ("t_break",)),
        ({"interval": (0.0, 1.0)}, ("interval", "drop")),
        ({"drop": (2,), "interval": (2.0, 1.0)}, ("interval", 2.0)),
    ],
)
def test_impossible_settings(fields: dict[str, object], named: tuple[object, ...]) -> None:
    with refuses(*named):
        Bricks(**fields)  # pyright: ignore[reportArgumentType]
