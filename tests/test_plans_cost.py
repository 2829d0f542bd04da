"""What plans cost, by enumeration and by simulation."""

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from patchdiffusion import rng
from patchdiffusion.plans import (
    Clock,
    ConstantPixels,
    PatchPlan,
    Progressive,
    Stochastic,
    Stratified,
    equivalents,
)

RATIOS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


@pytest.mark.parametrize("attention", [0.0, 0.3, 1.0])
def test_unsynced_cost_by_enumeration(attention: float) -> None:
    law = Stochastic.paper(0.25)
    plan = PatchPlan((64, 64), 8, law)
    costs = [
        (k.prob, k.multiplier * (k.area * (1 - attention) + k.area**2 * attention))
        for k in law.sizes((64, 64))
    ]
    slowest = sum(
        math.prod(p for p, _ in ranks) * max(c for _, c in ranks)
        for ranks in itertools.product(costs, repeat=4)
    )
    assert plan.cost(world=4, synced=False, attention=attention).step == pytest.approx(slowest)
    alone = plan.cost(world=1, synced=False, attention=attention)
    assert alone.step == pytest.approx(plan.cost(attention=attention).step)


@pytest.mark.parametrize("p", RATIOS)
def test_cost_by_simulation(p: float) -> None:
    law = Stochastic.paper(p)
    plan, sizes = PatchPlan((64, 64), 8, law), law.sizes((64, 64))
    u = rng.uniform(rng.keys(0, "size", 0, torch.arange(100000)), 16)
    edges = torch.tensor([k.prob for k in sizes], dtype=torch.float64).cumsum(0)[:-1]
    chosen = torch.searchsorted(edges, u, right=True)
    multiplier = torch.tensor([k.multiplier for k in sizes])[chosen]
    cost = torch.tensor([k.multiplier * k.area for k in sizes])[chosen]
    crops = float(multiplier.double().mean())
    assert plan.cost().crops == pytest.approx(crops, rel=0.01)
    assert plan.cost().step == pytest.approx(float(cost.double().mean()), rel=0.01)
    for world in (2, 8, 16):
        slowest = float(cost[:, :world].amax(1).double().mean())
        assert plan.cost(world=world, synced=False).step == pytest.approx(slowest, rel=0.01)
        unsynced = plan.cost(world=world, synced=False).crop
        assert unsynced == pytest.approx(slowest / crops, rel=0.01)


def test_progressive_cost_by_simulation() -> None:
    """Of a run with a clock of full-image equivalents."""
    plan = PatchPlan((64, 64), 8, Progressive())
    done, steps, crops, total = 0.0, 0, 0, 20_000.0
    while done < total:
        groups = plan.draw(seed=0, step=steps, progress=done / total)
        done += equivalents(groups, plan.canvas)
        crops += sum(g.count for g in groups)
        steps += 1
    assert plan.cost().step == pytest.approx(done / steps / 8, rel=1e-3)
    assert plan.cost().crops == pytest.approx(crops / steps / 8, rel=1e-3)


@pytest.mark.parametrize("clock", ["equivalents", "crops", "steps"])
@pytest.mark.parametrize(("side", "batch", "divisor"), [(64, 8, 1), (28, 1, 4)])
def test_kinds_of_steps_by_simulation(clock: Clock, side: int, batch: int, divisor: int) -> None:
    """Also where sides and counts are rounded."""
    for law in (Progressive(), Stochastic(), ConstantPixels(), Stratified()):
        plan = PatchPlan((side, side), batch, law, divisor)
        done, area, steps, found, total = 0.0, 0.0, 0, Counter(), 2500.0 * batch
        while done < total:
            groups = plan.draw(seed=0, step=steps, progress=done / total)
            area += equivalents(groups, plan.canvas)
            done += {
                "equivalents": equivalents(groups, plan.canvas),
                "crops": sum(g.count for g in groups),
                "steps": 1,
            }[clock]
            found[groups] += 1
            steps += 1
        kinds = plan.kinds(clock)
        assert {groups for _, groups in kinds} == set(found)
        for share, groups in kinds:
            assert share == pytest.approx(found[groups] / steps, abs=0.02)
        cost = plan.cost(clock=clock)
        assert cost.step == pytest.approx(area / steps / batch, rel=0.02)


def test_latent_cost() -> None:
    plan = PatchPlan.paper((32, 32), 8, latent=True)
    assert (plan.cost().step, plan.cost().crops, plan.cost().crop) == pytest.approx(
        (0.75, 1.5, 0.5)
    )
    assert plan.cost(world=8, synced=False).crop == pytest.approx(0.665, abs=5e-4)


def cost_table() -> str:
    """The rows of docs/cost-model.md; run this file as a script to print them."""
    laws = {f"{p:g}": Stochastic.paper(p) for p in RATIOS}
    rows = []
    for name, law in {**laws, "0.5, constant pixels": ConstantPixels()}.items():
        plan = PatchPlan((64, 64), 512, law)
        one, eight, sixteen = plan.cost(), *(plan.cost(world=w, synced=False) for w in (8, 16))
        rows.append(
            f"| {name} | {one.crops:.2f} | {one.step:.3f} | {one.crop:.3f} "
            f"| {eight.crop:.3f} | {sixteen.crop:.3f} |\n"
        )
    return "".join(rows)


def test_the_page_has_todays_numbers() -> None:
    page = Path(__file__).parents[1] / "docs" / "cost-model.md"
    assert cost_table() in page.read_text()


if __name__ == "__main__":
    print(cost_table(), end="")
