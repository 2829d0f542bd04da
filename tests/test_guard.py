"""Steps are judged by those before them."""

import math

import pytest
import torch
from torch import Tensor

from patchdiffusion.plans import Group
from patchdiffusion.system.serialize import decode, encode
from patchdiffusion.train.guard import (
    BURST_WINDOW,
    MIN_STEPS,
    WINDOW,
    Guard,
    GuardState,
    Judgement,
    Order,
)
from patchdiffusion.train.settings import GuardConfig

CPU = torch.device("cpu")
ONE = torch.tensor(1.0)
GROUPS = (Group((8, 8), 2, 1.0),)


def scalar(value: float) -> Tensor:
    return torch.tensor(value)


class Run:
    """A guard and the number of the step it has come to."""

    def __init__(self, **config: float) -> None:
        self.guard = Guard(GuardConfig(**config), CPU)  # pyright: ignore[reportArgumentType]
        self.step = 0

    def take(
        self, loss: float, norm: float, kind: str = "a", *, clip: float = 1e9, scale: float = 1.0
    ) -> Judgement:
        verdict = self.guard.judge(kind, scalar(loss), scalar(norm), clip=clip, scale=scalar(scale))
        self.guard.send(self.step, (self.step, 2 * self.step), GROUPS, verdict.report)
        self.guard.observe()
        self.step += 1
        return verdict

    def usual(self, steps: int, kind: str = "a") -> None:
        for k in range(steps):
            self.take(1.0 + 0.1 * math.sin(k), 2.0 + 0.1 * math.cos(k), kind)


def spiked(verdict: Judgement) -> bool:
    return bool(verdict.report[1])


def test_a_usual_step_may_be_made() -> None:
    run = Run()
    run.usual(200)
    verdict = run.take(1.1, 2.1, clip=7.0)
    assert (float(verdict.bad), float(verdict.max_norm), spiked(verdict)) == (0.0, 7.0, False)
    assert run.guard.order == Order.GO_ON and not run.guard.events


@pytest.mark.parametrize(("loss", "norm"), [(1.0, 30.0), (30.0, 2.0), (30.0, 30.0)])
def test_a_spike_is_scaled_down_to_the_median(loss: float, norm: float) -> None:
    run = Run()
    run.usual(50)
    verdict = run.take(loss, norm)
    assert spiked(verdict) and not verdict.bad
    norms = sorted(2.0 + 0.1 * math.cos(k) for k in range(50))
    assert float(verdict.max_norm) == pytest.approx(norms[24], rel=1e-6)
    (event,) = run.guard.take_events()
    assert (event.what, event.step, event.cursor, event.groups) == ("spike", 50, (50, 100), GROUPS)
    assert run.guard.take_events() == []
    assert not spiked(run.take(1.0, 2.0))


def test_the_median_is_never_above_the_clip() -> None:
    run = Run()
    run.usual(50)
    assert float(run.take(1.0, 30.0, clip=0.5).max_norm) == 0.5


def test_nothing_is_a_spike_at_first() -> None:
    run = Run()
    for k in range(MIN_STEPS):
        assert not spiked(run.take(1.0, 10.0**k))
    assert spiked(run.take(1.0, 1e30))


def test_kinds_of_steps_are_judged_apart() -> None:
    run = Run()
    for _ in range(40):  # crops have gradients of another size than whole images
        assert not spiked(run.take(1.0, 0.1, "small"))
        assert not spiked(run.take(1.0, 100.0, "large"))
    assert spiked(run.take(1.0, 2.0, "small"))
    assert not spiked(run.take(1.0, 2.0, "large"))


def test_a_slow_rise_is_no_spike() -> None:
    run = Run()
    for k in range(2000):
        assert not spiked(run.take(1.0, 1.005**k))


def test_a_steep_rise_at_the_start_is_no_spike() -> None:
    """Such as that of EDM2, whose output starts at zero: its gradient grows with its gain."""
    run = Run()
    for k in range(60):
        assert not spiked(run.take(1.0, 1.25**k))
    assert spiked(run.take(1.0, 1.25**60 * 20))
    assert spiked(run.take(20.0, 1.25**60))


def test_only_the_last_steps_count() -> None:
    run = Run()
    for _ in range(WINDOW):
        run.take(1.0, 1000.0)
    for _ in range(WINDOW):
        run.take(1.0, 1.0)
    assert spiked(run.take(1.0, 11.0))


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_what_is_not_finite_is_bad_and_forgotten(loss: float, norm: float) -> None:
    run = Run()
    run.usual(50)
    before = {kind: past.clone() for kind, past in run.guard.past.items()}
    assert float(run.take(loss, norm).bad) == 1.0
    assert run.guard.events[0].what == "skipped"
    assert torch.equal(run.guard.past["a"].nan_to_num(), before["a"].nan_to_num())


def test_a_step_lost_to_the_loss_scale_is_not_counted() -> None:
    run = Run(max_skips=2)
    for _ in range(9):
        verdict = run.take(1.0, math.inf, scale=1024.0)
        assert float(verdict.bad) == 1.0
    assert run.guard.order == Order.GO_ON and not run.guard.events
    run.take(1.0, math.inf)
    run.take(1.0, math.inf)
    assert run.guard.order == Order.STOP_SKIPS


def test_skips_in_a_row_stop_the_run() -> None:
    run = Run(max_skips=3)
    for loss in (math.nan, math.nan, 1.0, math.nan, math.nan):
        run.take(loss, 1.0)
    assert run.guard.order == Order.GO_ON
    run.take(math.nan, 1.0)
    assert run.guard.order == Order.STOP_SKIPS


def test_a_burst_goes_back_once() -> None:
    run = Run(burst=3)
    run.usual(50)
    for _ in range(2):
        run.take(1.0, 1e6)
    assert run.guard.order == Order.GO_ON
    run.take(1.0, 1e6)
    assert run.guard.order == Order.GO_BACK
    assert run.guard.spikes[0] == 50
    second = Run(burst=3, rollbacks=1)
    second.guard.rollbacks = 1
    second.usual(50)
    for _ in range(3):
        second.take(1.0, 1e6)
    assert second.guard.order == Order.STOP_SPIKES


def test_rare_spikes_are_no_burst() -> None:
    run = Run(burst=3)
    run.usual(50)
    for _ in range(6):
        run.take(1.0, 1e6)
        run.usual(BURST_WINDOW // 2)
    assert run.guard.order == Order.GO_ON


def test_a_long_burst_does_not_become_usual_at_once() -> None:
    run = Run(burst=999)
    run.usual(WINDOW)
    assert all(spiked(run.take(1.0, 1e6)) for _ in range(WINDOW // 2 - 1))


def test_a_guard_goes_on_where_it_was() -> None:
    run, other = Run(), Run()
    run.usual(40)
    run.take(math.nan, 1.0)
    run.take(1.0, 1e6)
    other.usual(3, "b")
    other.guard.load(decode(GuardState, encode(run.guard.state())))
    other.step = run.step
    for loss, norm in ((1.0, 2.0), (1.0, 25.0), (math.nan, 2.0), (5.0, 2.1)):
        a, b = run.take(loss, norm), other.take(loss, norm)
        assert torch.equal(a.report.nan_to_num(), b.report.nan_to_num())
        assert torch.equal(a.max_norm, b.max_norm)
    assert run.guard.state() == other.guard.state()
    assert list(other.guard.past) == ["a"]
