"""Faster Diffusion: encoders in key steps, decoders in all, alone and many at once."""

from pathlib import Path

import pytest
import torch
from accelerated import SIGMAS, calls_of, denoiser, middle, noisy, solved, wrapped
from commands import Capture, refuses, works
from torch.nn.attention import SDPBackend, sdpa_kernel

from patchdiffusion import Cond, rng
from patchdiffusion.accel import keysteps
from patchdiffusion.accel.base import spending
from patchdiffusion.accel.encoder import FasterDiffusion, Propagated
from patchdiffusion.accel.keysteps import PUBLISHED, by_change, even, followed, needed
from patchdiffusion.cond import Position
from patchdiffusion.denoiser import Denoiser, Wrapper
from patchdiffusion.guidance.auto import AutoGuidance
from patchdiffusion.guidance.cfg import CFG, Unconditional
from patchdiffusion.nets.count import MacCounter
from patchdiffusion.solvers import Churn, DPMpp2M, Euler, Heun, Method, UniPC

SOLVERS = (Euler(), Heun(), Heun(churn=Churn(amount=8)), DPMpp2M(), UniPC())


def propagated(net: Denoiser, **fields: object) -> Propagated:
    model = wrapped(net, FasterDiffusion(**fields))  # pyright: ignore[reportArgumentType]
    assert isinstance(model, Propagated)
    return model


# ---- Key steps ----


def test_even_and_published_steps() -> None:
    assert even(10, 4) == {0, 2, 5, 7} and even(3, 3) == {0, 1, 2}
    assert {name: len(steps) for name, (_, _, steps) in PUBLISHED.items()} == {
        "ddim-50": 9, "dpm-20": 7, "dit-250": 113,
    }  # fmt: skip


def test_steps_by_change_share_the_change_evenly() -> None:
    assert by_change([0, 1, 1, 1, 1, 1], 5) == {0, 1, 2, 3, 4}
    assert by_change([0, 0, 0, 9, 0, 0], 3) == {0, 3}
    assert by_change([0, 4, 0, 0, 1, 1], 2) == {0, 1}
    assert by_change([0.0] * 4, 2) == even(4, 2)


def test_measured_steps_are_a_function_of_the_network() -> None:
    net, shape, sigmas = denoiser(), (1, 8, 12), tuple(SIGMAS.tolist())

    def changes() -> list[float]:
        return followed(net, 4, sigmas, shape, frozenset(range(6))).changes

    found = changes()
    assert len(found) == 6 and found[0] == 0 and min(found[1:]) > 0
    assert needed(net, 4, sigmas, shape, 3, "change").keys == by_change(found, 3)
    with torch.no_grad():
        for p in net.network.parameters():
            p.add_(0.3)
    assert needed(net, 4, sigmas, shape, 3, "change").keys == by_change(changes(), 3)


@pytest.mark.parametrize("better", ["change", "even"])
def test_auto_takes_the_better_of_both_rules(better: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the images at the end of the path, which are those of the sampler."""
    net, shape, sigmas = denoiser("dit"), (1, 8, 12), tuple(SIGMAS.tolist())
    x = followed(net, 3, sigmas, shape, frozenset(range(6))).end
    rules = {"change": frozenset({0, 1, 2}), "even": frozenset({0, 4, 5})}
    errors = {
        name: float((followed(net, 3, sigmas, shape, keys).end - x).square().mean())
        for name, keys in rules.items()
    }
    assert min(errors.values()) > 0 and len(set(errors.values())) == 2
    best, worst = sorted(rules.values(), key=lambda keys: errors[_name(rules, keys)])
    first, second = (best, worst) if better == "change" else (worst, best)
    monkeypatch.setattr(keysteps, "by_change", lambda changes, count: first)
    monkeypatch.setattr(keysteps, "even", lambda steps, count: second)
    search = needed(net, 3, sigmas, shape, 3)
    assert search.keys == best and (search.decoded, search.encoded) == (8 * 18, 8 * 12)
    assert needed(net, 3, sigmas, shape, 3).decoded == 0
    start = rng.normal(rng.keys(0, "key steps", 0, torch.arange(8)), shape).float() * sigmas[0]
    cond = Cond(labels=torch.arange(8) % 2)
    sampled = solved(propagated(net, steps=tuple(best)), x=start, cond=cond)
    end = followed(net, 3, sigmas, shape, best).end
    torch.testing.assert_close(sampled, end, atol=1e-4, rtol=1e-4)


def _name(rules: dict[str, frozenset[int]], keys: frozenset[int]) -> str:
    return next(name for name, other in rules.items() if other == keys)


# ---- What is computed ----


@pytest.mark.parametrize("name", ["unet", "dit"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_with_all_steps_it_is_the_network_bit_for_bit(name: str, solver: Method) -> None:
    net = denoiser(name)
    assert torch.equal(solved(propagated(net, share=1.0), solver), solved(net, solver))


@pytest.mark.parametrize("name", ["unet", "dit"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [(0,), (0, 1, 4), (0, 2, 3)])
def test_decoding_ahead_is_decoding_in_turn(
    name: str, solver: Method, steps: tuple[int, ...]
) -> None:
    net = denoiser(name)
    serial = solved(propagated(net, steps=steps), solver)
    for at_once in (2, 8):
        ahead = propagated(net, steps=steps, parallel=True, at_once=at_once)
        torch.testing.assert_close(solved(ahead, solver), serial, atol=1e-4, rtol=1e-5)
    assert not torch.equal(serial, solved(net, solver))


def test_calls_of_encoder_and_decoder() -> None:
    net = denoiser()
    encoded, decoded = calls_of(middle(net)), calls_of(net.network.out_conv)  # pyright: ignore
    for solver, fields, expected in (
        (Euler(), {}, (2, 6)),
        (Euler(), {"parallel": True}, (2, 2)),
        (Euler(), {"parallel": True, "at_once": 2}, (2, 3)),
        (Heun(), {}, (4, 11)),
        # Step 0 decodes ahead in vain; then it is known that the solver corrects.
        (Heun(), {"parallel": True}, (4, 6)),
        # Churned levels are none of the schedule, but those of corrections are.
        (Heun(churn=Churn(amount=8)), {"parallel": True}, (4, 10)),
    ):
        model = propagated(net, steps=(0, 2), **fields)
        encoded()
        decoded()
        solved(model, solver)
        assert (encoded(), decoded()) == expected, (solver, fields)


def test_auto_is_measured_once_and_counted() -> None:
    net = denoiser()
    encoded, sigmas, shape = calls_of(middle(net)), tuple(SIGMAS.tolist()), (1, 8, 12)
    model = propagated(net, share=0.5)
    first = solved(model)
    rules = by_change(followed(net, 4, sigmas, shape, frozenset(range(6))).changes, 3), even(6, 3)
    assert rules[0] != rules[1] and encoded() == 6 + sum(map(len, rules)) + 3 + 6
    assert torch.equal(solved(propagated(net, share=0.5)), first) and encoded() == 3
    spent = spending(model)
    assert spent is not None and (spent.evaluations, spent.full) == (12, 6)
    with MacCounter() as counter:
        for keys in (frozenset(range(6)), *rules):
            followed(net, 4, sigmas, shape, keys)
    with MacCounter() as again:
        solved(again_model := propagated(net, share=0.5))
    more = spending(again_model)
    # Coordinates of the whole canvas are embedded once for a batch.
    assert more is not None and more.macs == again.macs
    assert spent.macs == pytest.approx(counter.macs + more.macs, rel=0.03)


@pytest.mark.parametrize("name", ["unet", "dit"])
@pytest.mark.parametrize("parallel", [False, True])
def test_counted_operations_are_those_that_were_done(name: str, parallel: bool) -> None:
    net = denoiser(name)
    model = propagated(net, steps=(0, 2), parallel=parallel)
    with sdpa_kernel(SDPBackend.MATH), MacCounter() as counter:
        solved(CFG(model, 2.0))
    spent = spending(model)
    assert spent is not None and spent.macs == counter.macs and 0 < spent.share < 1


def test_guidance_in_one_batch_and_in_two_passes_are_equal() -> None:
    net = denoiser()
    for parallel in (False, True):
        together = solved(CFG(propagated(net, steps=(0, 3), parallel=parallel), 3.0))
        model = propagated(net, steps=(0, 3), parallel=parallel)
        apart = solved(AutoGuidance(model, Unconditional(model), 3.0))
        torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_every_trajectory_begins_anew() -> None:
    net = denoiser()
    model = propagated(net, steps=(0, 4), parallel=True, inject=0.003)
    for x in (noisy(2), noisy(3, seed=2), noisy(2, seed=3)):
        fresh = propagated(net, steps=(0, 4), parallel=True, inject=0.003)
        assert torch.equal(solved(model, x=x), solved(fresh, x=x))
    assert not model.memories._runs and not model.starts._runs


# ---- Injected noise ----


def test_injected_noise_is_that_of_the_start() -> None:
    model = propagated(denoiser(), share=1.0, inject=0.003, inject_below=1.0)
    levels = tuple(SIGMAS.tolist())
    start, x = noisy(), noisy(seed=5)
    outer = CFG(model, 2.0)  # the outermost wrapper is asked
    assert torch.equal(outer.before_step(start, Position(-2, 0, 0, levels)), start)
    for i in range(1, 6):
        found = outer.before_step(x, Position(-2, i, 0, levels))
        amount = 0.003 * 50 / 6 * (1 + levels[i] ** 2) ** 0.5 if levels[i] < 1 else 0.0
        expected = x + amount * start / levels[0]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_no_injection_is_none() -> None:
    net = denoiser()
    plain = solved(propagated(net, steps=(0, 3)))
    none = solved(propagated(net, steps=(0, 3), inject=0.0, inject_below=1e-9))
    some = solved(propagated(net, steps=(0, 3), inject=0.003))
    never = solved(propagated(net, steps=(0, 3), inject=0.003, inject_below=1e-9))
    assert torch.equal(plain, none) and torch.equal(plain, never)
    assert not torch.equal(plain, some)
    assert isinstance(CFG(net, 1.0), Wrapper)
    assert torch.equal(CFG(net, 1.0).before_step(noisy(), Position(-3, 0, 0, (1.0, 0.0))), noisy())


# ---- As a part of a sampler ----


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"share": 0.0}, ("share", 0.0)),
        ({"steps": (0, 2), "share": 0.2}, ("steps", "share")),
        ({"steps": (-2,)}, ("steps", -2)),
        ({"keys": "ddim-50", "share": 0.2}, ("ddim-50", "share")),
        ({"at_once": 0}, ("at_once", 0)),
        ({"inject": -0.1}, ("inject", -0.1)),
        ({"inject_below": 0.0}, ("inject_below", 0.0)),
    ],
)
def test_impossible_settings(fields: dict[str, object], named: tuple[object, ...]) -> None:
    with refuses(*named):
        FasterDiffusion(**fields)  # pyright: ignore[reportArgumentType]


def test_what_does_not_fit_is_refused() -> None:
    with refuses("ddim-50", 50, 6, "auto"):
        propagated(denoiser(), keys="ddim-50")
    with refuses("lego", "unet"):
        propagated(denoiser("lego"))
    with refuses("blocks", 9):
        propagated(denoiser("dit"), blocks=9)
    with refuses("accelerator.steps", 6):
        propagated(denoiser(), steps=(0, 6))


def test_on_the_command_line(capsys: Capture, finished: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    flags = ["--count", 3, "--steps", 4, "--accelerator", "faster-diffusion", "--solver", "euler"]
    told = works(capsys, "sample", finished, *flags, *out, "--accelerator.parallel")
    assert "6 of 12 evaluations" in told
