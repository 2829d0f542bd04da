"""Forecasts of operations and previews, against sums over the steps of a run."""

import pytest

from patchdiffusion.patches import Size
from patchdiffusion.plans import (
    ConstantPixels,
    PatchPlan,
    Plan,
    Progressive,
    Stochastic,
    equivalents,
)
from patchdiffusion.train.forecast import Forecast

CANVAS = (32, 32)
FLOPS: dict[Size, int] = {(32, 32): 1000, (16, 16): 240, (8, 8): 57}


def forecast(law: Plan, *, length: float = 4000.0, preview: float = 0.0) -> Forecast:
    plan = PatchPlan(CANVAS, 16, law, divisor=4)
    return Forecast(plan, "equivalents", length, FLOPS, preview)


@pytest.mark.parametrize("law", [Progressive(), Stochastic(), ConstantPixels()])
def test_operations_are_those_of_the_steps(law: Plan) -> None:
    found = forecast(law, length=40_000.0)
    seen, step, operations = 0.0, 0, {0.0: 0.0}
    while seen < found.length:
        groups = found.plan.draw(seed=0, step=step, progress=seen / found.length)
        seen, step = seen + equivalents(groups, CANVAS), step + 1
        spent = sum(FLOPS[group.size] * group.count for group in groups)
        operations[seen] = list(operations.values())[-1] + spent
    total = operations[seen]
    assert found.left(0.0) == pytest.approx(total, rel=0.02)
    middle = min(operations, key=lambda images: abs(images - found.length / 2))
    assert found.left(middle) == pytest.approx(total - operations[middle], rel=0.02)
    assert found.left(found.length) == 0


def test_previews_take_a_tenth_at_most() -> None:
    total = forecast(Stochastic()).left(0.0)
    for share, count in ((1e-6, 10), (0.02, 5), (0.04, 2), (0.5, 1)):
        found = forecast(Stochastic(), preview=share * total)
        assert found.previews == count
        assert found.share(count) == pytest.approx(share * count)
    assert forecast(Stochastic()).previews == 10


def test_crops_to_come() -> None:
    found = forecast(Progressive(probs=(0.5, 0.3, 0.2)))
    assert found.next_stage(0.0) == (pytest.approx(800, abs=0.1), "16x16")
    assert found.next_stage(1000.0) == (pytest.approx(2000, abs=0.1), "whole images")
    assert found.next_stage(3000.0) is None
    assert [found.largest(now) for now in (0.0, 1000.0, 3000.0)] == [(8, 8), (16, 16), (32, 32)]
    assert forecast(Stochastic()).largest(0.0) == CANVAS
