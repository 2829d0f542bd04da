"""The cache that looks at the change of the first blocks, for each image by itself."""

from pathlib import Path

import pytest
import torch
from accelerated import NETS, calls_of, denoiser, middle, noisy, solved, wrapped
from commands import Capture, refuses, works

from patchdiffusion import Cond
from patchdiffusion.accel.base import Spent, spending
from patchdiffusion.accel.cache import Cached, Memory, Moment
from patchdiffusion.accel.residual import ByChange, Residual
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.guidance.auto import AutoGuidance
from patchdiffusion.guidance.cfg import CFG, Unconditional
from patchdiffusion.nets.cuts import Cut
from patchdiffusion.solvers import Churn, DPMpp2M, Euler, Heun, Method, UniPC

ALWAYS = 1e9  # a threshold that nothing reaches


def residual(net: Denoiser, **fields: object) -> Cached:
    model = wrapped(net, Residual(**fields))  # pyright: ignore[reportArgumentType]
    assert isinstance(model, Cached)
    return model


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("solver", [Euler(), Heun(churn=Churn(amount=8)), DPMpp2M(), UniPC()])
def test_a_threshold_of_zero_is_the_network_bit_for_bit(name: str, solver: Method) -> None:
    net = denoiser(name)
    assert torch.equal(solved(residual(net, threshold=0.0), solver), solved(net, solver))
    assert torch.equal(solved(residual(net, threshold=ALWAYS, most=0), solver), solved(net, solver))


def test_caps_count_what_is_left_out() -> None:
    net = denoiser()
    calls = calls_of(middle(net))
    for solver, fields, expected in (
        (Euler(), {"most_in_row": -1}, 2),
        (Euler(), {"most_in_row": -1, "warmup": 0}, 1),
        (Euler(), {"most_in_row": 1, "warmup": 0}, 3),
        (Euler(), {"most_in_row": 2, "warmup": 1}, 2),
        (Euler(), {"most": 3, "most_in_row": -1, "warmup": 0}, 3),
        (Heun(), {"most_in_row": -1, "warmup": 1}, 2),
        (Euler(), {"warmup": 99}, 6),
    ):
        model = residual(net, threshold=ALWAYS, **fields)
        calls()
        solved(model, solver)
        assert calls() == expected, (solver, fields)


def schedule_of(changes: list[list[float]], schedule: ByChange) -> list[list[bool]]:
    """Decisions for samples whose signal has these values, step by step."""
    memory, decisions = Memory(), []
    for index, row in enumerate(changes):
        signal = torch.tensor(row)[:, None]
        now = Moment(index, 0, len(changes), float(index))
        full = torch.ones(len(row), dtype=torch.bool)
        if index:
            decided = schedule.full(memory, now, signal)
            full = decided if isinstance(decided, torch.Tensor) else full & decided
        memory.signal = signal if index == 0 else torch.where(full[:, None], signal, memory.signal)  # type: ignore
        schedule.done(memory, now, full)
        memory.before = signal
        decisions.append(full.tolist())
    return decisions


def test_changes_are_since_the_last_full_evaluation() -> None:
    values = [[1.0, 1.0], [1.04, 1.0], [1.08, 1.0], [1.12, 1.2], [1.16, 1.2]]
    found = schedule_of(values, ByChange(0.1))
    assert [a for a, _ in found] == [True, False, False, True, False]
    assert [b for _, b in found] == [True, False, False, True, False]
    # To and fro is no change since then, but one from step to step.
    waves = [[1.0], [1.06], [1.0], [1.06], [1.0]]
    assert [a for (a,) in schedule_of(waves, ByChange(0.1))] == [True, False, False, False, False]
    summed = schedule_of(waves, ByChange(0.1, accumulate=True))
    assert [a for (a,) in summed] == [True, False, True, False, True]


def test_images_decide_for_themselves() -> None:
    """A mixed batch gives each image what it gets alone."""
    net = denoiser("dit")
    x = noisy(4) * torch.tensor([0.01, 1.0, 1.0, 3.0])[:, None, None, None]
    shares = set()
    for threshold in (0.1, 0.3, 0.6):
        model = residual(net, threshold=threshold, warmup=0)
        together = solved(model, x=x)
        spent = spending(model)
        assert spent is not None
        shares |= {full / count for count, full in spent.steps}
        for i in range(4):
            labels = Cond(labels=torch.tensor([i % 2]))
            alone = residual(net, threshold=threshold, warmup=0)
            one = solved(alone, x=x[i : i + 1], cond=labels)
            torch.testing.assert_close(together[i : i + 1], one, atol=1e-4, rtol=1e-4)
    assert shares - {0.0, 1.0}, "no step was mixed"


def test_a_polynomial_in_time_is_continued() -> None:
    net = denoiser()
    model = Cached(net, ByChange(ALWAYS, warmup=3, order=2), Cut(1))
    memory = Memory()
    for step in range(3):
        kept = (torch.full((2, 1), 1.0 + 2 * step + 3 * step**2),)
        now = Moment(step, 0, 9, float(step))
        model._keep(memory, now, torch.zeros(2, 1), kept, None)
    (found,) = model._extrapolated(memory, Moment(5, 0, 9, 5.0))
    torch.testing.assert_close(found, torch.full((2, 1), 1.0 + 10 + 75))
    # One sample alone is computed at step 3: the other still goes on from steps 0 to 2.
    index = torch.tensor([1])
    model._keep(memory, Moment(3, 0, 9, 3.0), torch.zeros(1, 1), (torch.tensor([[7.0]]),), index)
    (found,) = model._extrapolated(memory, Moment(4, 0, 9, 4.0))
    parabola = 3 * 7.0 - 3 * 17.0 + 6.0  # through 6, 17 and 7 at steps 1, 2, 3
    torch.testing.assert_close(found, torch.tensor([[1.0 + 8 + 48], [parabola]]))


@pytest.mark.parametrize("taylor", [0, 1, 2])
def test_taylor_is_finite_and_begins_anew(taylor: int) -> None:
    net = denoiser("dit")
    model = residual(net, threshold=0.5, taylor=taylor, warmup=1)
    for x in (noisy(2), noisy(3, seed=2), noisy(2)):
        fresh = residual(net, threshold=0.5, taylor=taylor, warmup=1)
        assert torch.equal(solved(model, x=x), solved(fresh, x=x))
    assert not model.memories._runs


def test_guidance_in_one_batch_and_in_two_passes_are_equal() -> None:
    net = denoiser("dit")
    together = solved(CFG(residual(net, threshold=0.4, warmup=0), 3.0))
    model = residual(net, threshold=0.4, warmup=0)
    apart = solved(AutoGuidance(model, Unconditional(model), 3.0))
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_the_summary_names_the_full_steps() -> None:
    spent = Spent(steps=((2, 2), (2, 0), (2, 1))) + Spent(steps=((2, 2), (2, 0)))
    assert spent.steps == ((4, 4), (4, 0), (2, 1))
    assert spent.summary == "full in steps 0 2 (50%) of 3"


def test_what_does_not_fit_is_refused() -> None:
    for fields, named in (
        ({"threshold": -0.1}, ("threshold", -0.1)),
        ({"warmup": -1}, ("warmup", -1)),
        ({"most": -2}, ("most", -2)),
        ({"taylor": 3}, ("taylor", 3)),
    ):
        with refuses(*named):
            Residual(**fields)  # pyright: ignore[reportArgumentType]
    with refuses("first", 1):
        residual(denoiser(), first=0)


def test_on_the_command_line(capsys: Capture, finished: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    flags = ["--count", 2, "--steps", 4, "--accelerator", "residual", "--solver", "euler"]
    told = works(capsys, "sample", finished, *flags, *out, "--accelerator.threshold", 1000)
    assert "4 of 8 evaluations in full, full in steps 0 1 of 4" in told
