"""The experiment runner: what it describes can be trained, and its figures are what they say."""

import argparse
import importlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from patchdiffusion.cli import train
from patchdiffusion.cli.parse import parse
from patchdiffusion.recipes import Facts, folder
from patchdiffusion.sampling.pipeline import load
from patchdiffusion.train.report import read_log

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
    assert quality.cost_to_reach(points, 1.5, "flops") == points[0]["flops"]  # or less


def test_the_table_compares_with_the_same_seed(quality: ModuleType) -> None:
    def made(scale: float, seed: int) -> dict[str, object]:
        return {"seed": seed, "curve": curve(scale)}

    found = {"whole": [made(1.0, 0), made(3.0, 1)], "half": [made(0.5, 0), made(1.5, 1)]}
    rows = list(quality.table(found, "whole"))
    assert rows[2].startswith("| whole | 2 |") and rows[2].endswith("| 1.00 1.00 |")
    assert rows[3].startswith("| half | 2 |") and rows[3].endswith("| 0.50 0.50 |")


def test_a_result_is_what_the_log_says(quality: ModuleType, finished: Path) -> None:
    run = quality.Run("search", "whole", 3, ("--batch", "4"))
    result = quality.collect(run, finished)
    log = read_log(finished)
    watched = [r for r in log if r["kind"] == "preview" and "held_out" in r]
    status = {r["step"]: r for r in log if r["kind"] == "status"}
    assert [p["loss"] for p in result["curve"]] == [w["held_out"]["loss"] for w in watched]
    for point in result["curve"]:
        for name in ("flops", "crops", "seconds", "equivalents"):
            assert point[name] == status[point["step"]][name], name
    assert result["start"]["precision"] == "fp32" and result["start"]["torch"]
    assert result["start"]["data"] == load(finished, device="cpu").model.config.fingerprint
    assert result["config"]["batch"] == 4 and result["config"]["data"]["path"] == "images"
    assert "/" not in json.dumps(result["config"])


def test_a_run_that_fails_stops_no_other(
    quality: ModuleType, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(run: Any, data: str, folder: Path, threads: int) -> list[str]:
        code = f"import shutil; shutil.copytree({str(finished)!r}, {str(folder)!r})"
        code = "raise SystemExit(3)" if run.plan == "wrong" else code
        return [sys.executable, "-c", code]

    monkeypatch.setattr(quality, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(quality.Run, "command", command)
    monkeypatch.setattr(quality.time, "sleep", lambda seconds: None)
    runs = [quality.Run("search", plan, 0, ()) for plan in ("wrong", "right", "late")]
    given = argparse.Namespace(data="x", work=tmp_path / "w", jobs=1, threads=1, minutes=math.inf)
    with pytest.raises(SystemExit, match=r"failed: wrong, seed 0: see .*wrong-0.txt"):
        quality.run_all(runs, given)
    assert [run.result.exists() for run in runs] == [False, True, True]


@pytest.mark.parametrize("minutes", [math.inf, 90.0])
def test_train_takes_what_a_run_is_begun_with(
    quality: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float
) -> None:
    begun: list[list[str]] = []
    monkeypatch.setattr(quality.subprocess, "Popen", lambda command, **_: begun.append(command))
    given = argparse.Namespace(data="x", work=tmp_path, threads=1, minutes=minutes)
    run = quality.Run("search", "whole", 3, ("--batch", "4"))
    quality._start(run, given, time.monotonic() + 60 * minutes)
    assert begun[0][:6] == [sys.executable, "-u", "-m", "patchdiffusion", "train", "x"]
    plain = train.TrainArguments(training=folder(Facts()))
    made = parse(plain, begun[0][6:], "train")
    assert (made.training.batch, made.training.seed) == (4, 3)
    limit = None if minutes == math.inf else pytest.approx(minutes / 60, rel=0.01)
    assert made.run.max_hours == limit


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_be_trained(quality: ModuleType, name: str) -> None:
    facts, runs = quality.experiment(name)
    assert facts["baseline"] in {run.plan for run in runs}
    assert len({(run.plan, run.seed) for run in runs}) == len(runs)
    for run in runs:
        plain = train.TrainArguments(training=folder(Facts()))
        given = parse(plain, run.flags, "train")
        given.training.plan((64, 64)).draw(seed=0, step=0, progress=0.5)


def test_samples_of_the_runs_that_were_measured(quality: ModuleType) -> None:
    facts = {"frechet_distance": 2.0, "kernel_distance": 0.5, "precision": 0.25, "recall": 0.75}
    less = {**facts, "frechet_distance": 1.0}
    found = {"whole": [{"samples": facts}, {"samples": less}], "half": [{}]}
    _, _, *rows = quality.samples_table(found)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    same = ["0.5000 +- 0.0000", "0.2500 +- 0.0000", "0.7500 +- 0.0000", "-"]
    assert cells == [["whole", "2", "1.5000 +- 0.5000", *same]]


def test_held_out_losses_are_those_of_the_measure_of_the_baseline(
    quality: ModuleType, finished: Path, images: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of the baseline itself they are the losses of its run."""
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "results")
    run = quality.Run("search", "whole", 3, ())
    folder = tmp_path / "work" / "search" / "whole-3"
    shutil.copytree(finished, folder)
    run.result.parent.mkdir(parents=True)
    run.result.write_text(json.dumps(quality.collect(run, folder)))
    options = argparse.Namespace(work=tmp_path / "work", data=str(images), held_out=2)
    quality.held_out_all([run], "whole", options)
    result = json.loads(run.result.read_text())
    assert result["held_out"]["loss"] == pytest.approx(result["curve"][-1]["loss"], rel=1e-6)
    rows = list(quality.held_out_table({"whole": [result]}))
    assert rows[2].startswith(f"| whole | 1 | {result['held_out']['loss']:.4f} |")
    assert rows[0].count("|") == rows[1].count("|") == rows[2].count("|")
