"""The experiment runner: what it describes can be trained, and its figures are what they say."""

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from patchdiffusion.cli import train
from patchdiffusion.cli.parse import parse

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
EXPERIMENTS = sorted(file.stem for file in (BENCHMARKS / "quality").glob("*.toml"))


@pytest.fixture(scope="module")
def quality() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("quality")


def curve(scale: float) -> list[dict[str, float]]:
    """A loss that falls as the root of the operations."""
    return [{"flops": scale * 4**k, "loss": 2.0**-k} for k in range(6)]


def test_cost_to_reach_a_loss(quality: ModuleType) -> None:
    points = curve(1.0)
    for value in (0.9, 0.5, 0.3, 2.0**-5):
        found = quality.cost_to_reach(points, value, "flops")
        assert found == pytest.approx(value**-2)
    assert quality.cost_to_reach(points, 2.0**-6, "flops") == math.inf


def test_the_table_compares_with_the_same_seed(quality: ModuleType) -> None:
    def made(scale: float, seed: int) -> dict[str, object]:
        return {"seed": seed, "curve": curve(scale)}

    found = {"whole": [made(1.0, 0), made(3.0, 1)], "half": [made(0.5, 0), made(1.5, 1)]}
    rows = list(quality.table(found, "whole"))
    assert rows[2].startswith("| whole | 2 |") and rows[2].endswith("| 1.00 1.00 |")
    assert rows[3].startswith("| half | 2 |") and rows[3].endswith("| 0.50 0.50 |")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_be_trained(quality: ModuleType, name: str) -> None:
    facts, runs = quality.experiment(name)
    assert facts["baseline"] in {run.plan for run in runs}
    assert len({(run.plan, run.seed) for run in runs}) == len(runs)
    for run in runs:
        plain = train.TrainArguments(config=train.generic_config("images"))
        given = parse(train.TrainArguments, run.flags, default=plain, prog="", description="")
        given.config.plan((64, 64)).draw(seed=0, step=0, progress=0.5)


def test_samples_of_the_runs_that_were_measured(quality: ModuleType) -> None:
    facts = {"frechet_distance": 2.0, "kernel_distance": 0.5, "precision": 0.25, "recall": 0.75}
    less = {**facts, "frechet_distance": 1.0}
    found = {"whole": [{"samples": facts}, {"samples": less}], "half": [{}]}
    _, _, *rows = quality.samples_table(found)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    same = ["0.5000 +- 0.0000", "0.2500 +- 0.0000", "0.7500 +- 0.0000", "-"]
    assert cells == [["whole", "2", "1.5000 +- 0.5000", *same]]
