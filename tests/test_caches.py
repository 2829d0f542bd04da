"""Caches of a network: exact where they are neutral, counted, begun anew, and under guidance."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerated import (
    CANVAS,
    LABELS,
    NETS,
    SIGMAS,
    calls_of,
    denoiser,
    middle,
    noisy,
    solved,
    wrapped,
)
from commands import Capture, fails, refuses, works
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from patchdiffusion import Cond, SamplerConfig, sample
from patchdiffusion.accel import Accelerator, tiles
from patchdiffusion.accel.base import MOST_RUNS, Spent, spending
from patchdiffusion.accel.cache import Cached, FixedSteps, extrapolation
from patchdiffusion.accel.deepcache import DeepCache, centered, uniform
from patchdiffusion.accel.encoder import FasterDiffusion
from patchdiffusion.accel.regions import Regions
from patchdiffusion.accel.residual import Residual
from patchdiffusion.accel.tiles import TiledDenoiser, Tiles
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.cond import Position
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.guidance.auto import AutoGuidance
from patchdiffusion.guidance.cfg import CFG, Unconditional
from patchdiffusion.guidance.reward import GradientGuidance, Tilt
from patchdiffusion.nets.count import count
from patchdiffusion.nets.cuts import Cuttable
from patchdiffusion.solvers import Churn, DPMpp2M, Euler, Heun, Method, UniPC, solve


def cached(net: Denoiser, **fields: object) -> Cached:
    """DeepCache, by default in every third of the steps of `SIGMAS`."""
    model = wrapped(net, DeepCache(**fields))  # pyright: ignore[reportArgumentType]
    assert isinstance(model, Cached)
    return model


# ---- Schedules ----


@pytest.mark.parametrize(("steps", "every"), [(50, 5), (7, 3), (3, 5), (4, 1)])
def test_uniform_steps(steps: int, every: int) -> None:
    found = uniform(steps, every)
    assert 0 in found and len(found) == -(-steps // every) and max(found) < steps


def test_steps_around_a_center() -> None:
    found = sorted(centered(50, 5, 15, 1.4))
    assert found == [0, 5, 10, 13, 15, 19, 24, 29, 35, 42]
    published = sorted(centered(50, 5, 15, 1.4, published=True))
    assert published == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]
    many = sorted(centered(100, 5, 40, 1.6))
    gaps = sorted((abs(a + b - 80), b - a) for a, b in itertools.pairwise(many))
    near, far = (sum(gap for _, gap in part) / 4 for part in (gaps[:4], gaps[-4:]))
    assert many[0] == 0 and near < far


def test_extrapolation_is_that_of_a_polynomial() -> None:
    nan = float("nan")
    times = torch.tensor([[3.0, 3.0, 3.0], [1.0, 3.0, nan], [0.0, 1.0, nan]])
    values = times.square()
    weights = extrapolation(times, 5.0)
    found = (weights * values.nan_to_num()).sum(0)
    assert found.tolist() == [25.0, 9 + (9 - 1) / 2 * 2, 9.0]


# ---- What is computed ----


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("solver", [Euler(), Heun(churn=Churn(amount=8)), DPMpp2M(), UniPC()])
def test_without_reuse_it_is_the_network_bit_for_bit(name: str, solver: Method) -> None:
    net = denoiser(name)
    assert torch.equal(solved(cached(net, every=1), solver), solved(net, solver))


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_reuse_at_the_same_place_is_the_network(name: str) -> None:
    """A schedule that is full at stage 0 alone, asked twice about one point."""
    net = denoiser(name)
    network = net.network
    assert isinstance(network, Cuttable)
    cond, x = Cond(labels=LABELS), noisy()
    model = Cached(net, FixedSteps(frozenset({0}), "predictor"), network.cut())
    calls = []
    for stage in (0, 1):
        where = Position(run=-1, index=0, stage=stage, sigmas=tuple(SIGMAS.tolist()))
        calls.append(model(x, 0.7, cond, position=where))
    assert torch.equal(calls[0], net(x, 0.7, cond))
    torch.testing.assert_close(calls[1], calls[0], atol=1e-6, rtol=1e-5)
    spent = spending(model)
    assert spent is not None and (spent.evaluations, spent.full) == (4, 2)


def test_skipped_blocks_are_not_called() -> None:
    net = denoiser()
    calls = calls_of(middle(net))
    for solver, fields, expected in (
        (Euler(), {"every": 1}, 6),
        (Euler(), {"every": 3}, 2),
        (Euler(), {"every": 9}, 1),
        (Heun(), {"every": 3}, 4),
        (Heun(), {"every": 3, "refresh": "predictor"}, 2),
        (DPMpp2M(), {"steps": (1, 2)}, 3),
        (Euler(), {"center": 3.0, "power": 1.2, "every": 2}, 3),
    ):
        model = cached(net, **fields)
        calls()
        solved(model, solver)
        assert calls() == expected, (solver, fields)


def test_the_error_grows_with_the_interval_and_zeros_are_worse() -> None:
    net = denoiser()
    exact = solved(net)
    errors = [float((solved(cached(net, every=n)) - exact).square().mean()) for n in (1, 2, 6)]
    assert errors[0] == 0 < errors[1] < errors[2]


# ---- State ----


def test_every_trajectory_begins_anew() -> None:
    net = denoiser()
    model = cached(net)
    for x in (noisy(2), noisy(3, seed=2), noisy(2, seed=3)):
        assert torch.equal(solved(model, x=x), solved(cached(net), x=x))
    assert not model.memories._runs


def test_interleaved_trajectories_do_not_mix() -> None:
    net, model = denoiser(), cached(denoiser())
    a, b = noisy(2), noisy(2, seed=2)
    cond = Cond(labels=LABELS)
    with torch.no_grad():
        runs = [Euler()(model, x, SIGMAS, cond=cond) for x in (a, b)]
        pairs = list(zip(*runs, strict=True))
    for x, state in zip((a, b), pairs[-1], strict=True):
        assert torch.equal(state.x, solve(Euler(), cached(net), x, SIGMAS, cond=cond))
    with torch.no_grad():
        for _ in range(MOST_RUNS + 3):
            next(iter(Euler()(model, a, SIGMAS, cond=cond)))
    assert len(model.memories._runs) == MOST_RUNS


def test_a_pause_outside_of_a_guidance_interval_is_noticed() -> None:
    """Steps 2, 3 and 4 are guided; both slots begin in full, and step 5 knows of full step 4."""
    net = denoiser()
    calls, levels = calls_of(middle(net)), SIGMAS.tolist()
    guided = CFG(cached(net, every=4), 2.0, interval=(levels[5] * 1.01, levels[1] * 0.99))
    solved(guided)
    assert calls() == 4  # in the steps 0, 2, 4 and 5


# ---- Together with others ----


def test_guidance_in_one_batch_and_in_two_passes_are_equal() -> None:
    net = denoiser()
    together = solved(CFG(cached(net), 3.0))
    model = cached(net)
    apart = solved(AutoGuidance(model, Unconditional(model), 3.0))
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
    assert not torch.equal(together, solved(CFG(net, 3.0)))


@pytest.mark.parametrize("name", NETS)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    net = denoiser(name)
    config = SamplerConfig(accelerator=DeepCache(), steps=6, sigma_max=20.0)

    def sampled(batch: int) -> Tensor:
        labels = torch.tensor([0, 1, 0])
        return sample(
            net, seeds=[0, 1, 2], channels=1, canvas=CANVAS, cond=Cond(labels=labels),
            config=config, batch=batch,
        )  # fmt: skip

    torch.testing.assert_close(sampled(1), sampled(3), atol=1e-4, rtol=1e-4)


def test_windows_that_move_are_refused_and_others_are_cached() -> None:
    net = denoiser()
    wide = Tiles(size=(8, 24), shift=False, overlap=0.5)
    config = SamplerConfig(accelerator=DeepCache(every=1), canvas=wide, steps=4, sigma_max=20.0)

    def sampled(config: SamplerConfig) -> Tensor:
        cond = Cond(labels=LABELS)
        return sample(net, seeds=[0, 1], channels=1, canvas=CANVAS, cond=cond, config=config)

    plain = replace(config, accelerator=SamplerConfig().accelerator)
    assert torch.equal(sampled(config), sampled(plain))
    some = sampled(replace(config, accelerator=DeepCache(every=2)))
    assert some.isfinite().all() and not torch.equal(some, sampled(plain))
    with refuses("--canvas tiles --canvas.no-shift", "--accelerator none"):
        sampled(replace(config, canvas=Tiles(size=(8, 24))))


@pytest.mark.parametrize(
    ("name", "neutral", "part"),
    [
        ("unet", DeepCache(every=1), DeepCache(every=2)),
        ("unet", FasterDiffusion(share=1.0), FasterDiffusion(steps=(0, 2))),
        ("dit", Residual(threshold=0.0), Residual(threshold=0.5, warmup=1)),
        ("dit", Regions(ratio=1.0), Regions(start=1, resets=())),
        ("lego", DeepCache(every=1), DeepCache(every=3)),
    ],
)
def test_fixed_windows_have_caches_of_their_own(
    name: str, neutral: Accelerator, part: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Side by side they are images of their own, also if they are evaluated one after the other."""
    monkeypatch.setattr(tiles, "AT_ONCE", 1)
    net, cond = denoiser(name), Cond(labels=LABELS)
    halves = noisy(2), noisy(2, seed=2)

    def windows(model: Denoiser) -> Tensor:
        tiled = TiledDenoiser(model, CANVAS, shift=False)
        return solve(Euler(), tiled, torch.cat(halves, -1), SIGMAS, cond=cond)

    assert torch.equal(windows(wrapped(net, neutral)), windows(net))
    alone = [solved(wrapped(net, part), x=x, cond=cond) for x in halves]
    found = windows(wrapped(net, part))
    torch.testing.assert_close(found, torch.cat(alone, -1), atol=1e-5, rtol=1e-5)
    assert not torch.equal(found, windows(net))


def test_gradients_are_refused() -> None:
    def reward(x: Tensor) -> Tensor:
        return x.flatten(1).sum(1)

    with refuses("gradient", "--accelerator none"):
        solved(GradientGuidance(cached(denoiser()), Tilt(reward)))


# ---- Counted operations ----


@pytest.mark.parametrize("name", NETS)
def test_counted_operations_are_those_that_were_done(name: str) -> None:
    net = denoiser(name)
    model = cached(net)
    # The fast attention of CPUs is not counted by PyTorch.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        solved(CFG(model, 2.0), Heun())
    spent = spending(CFG(model, 2.0))
    assert spent is not None
    assert spent.macs == counter.get_total_flops() // 2
    one = count(net.network, CANVAS, Cond(labels=LABELS[:1].to("meta"))).macs  # pyright: ignore
    assert spent.plain == 4 * 11 * one and spent.evaluations == 44
    assert spent.full == 4 * 4 and 0 < spent.share < 1
    assert spending(net) is None


def test_operations_by_cut_are_monotone() -> None:
    shares = []
    for first in range(4):
        model = cached(denoiser(), every=6, first=first)
        solved(model)
        spent = spending(model)
        assert spent is not None
        shares.append(spent.share)
    assert shares == sorted(set(shares)) and shares[-1] < 1


def test_operations_are_summed_and_described() -> None:
    whole = Spent(1e9, 4e9, 10, 2) + Spent(1e9, 1e9, 5, 5)
    assert whole == Spent(2e9, 5e9, 15, 7) and Spent().share == 1
    for part in ("40%", "2 of 5 GMAC", "7 of 15"):
        assert part in str(whole)


# ---- As a part of a sampler ----


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"every": 0}, ("every", 0)),
        ({"every": 2, "steps": (0, 3)}, ("steps", "every")),
        ({"steps": (-1,)}, ("steps", -1)),
        ({"center": -1.0}, ("center", -1.0)),
        ({"power": 1.0}, ("power", 1.0)),
        ({"published": True}, ("published", "center")),
    ],
)
def test_impossible_settings(fields: dict[str, object], named: tuple[object, ...]) -> None:
    with refuses(*named):
        DeepCache(**fields)  # pyright: ignore[reportArgumentType]


def test_what_does_not_fit_is_refused_without_evaluating() -> None:
    with refuses("GaussianMixture", "unet"):
        cached(GaussianMixture.toy())
    with refuses("first", 7):
        cached(denoiser(), first=7)
    with refuses("accelerator.center", 6):
        cached(denoiser(), center=9.0)


def test_on_the_command_line(capsys: Capture, finished: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    flags = ["--count", 3, "--batch", 2, "--steps", 4, "--accelerator", "deepcache"]
    told = works(capsys, "sample", finished, *flags, *out, "--accelerator.every", 2)
    line = next(line for line in told.splitlines() if line.startswith("computed"))
    assert "12 of 21 evaluations" in line, line
    assert "first" in fails(capsys, "sample", finished, *flags, "--accelerator.first", 99)
    told = fails(capsys, "sample", finished, *flags, "--size", 32)
    assert "no-shift" in told
