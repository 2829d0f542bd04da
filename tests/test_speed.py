"""Comparison of samplers: counted operations, errors that vanish, and the line that is advised."""

import json
import math
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tiny
import torch
from commands import Capture, fails, works
from torch import Tensor

from patchdiffusion import SamplerConfig
from patchdiffusion.accel.base import Spent
from patchdiffusion.accel.deepcache import DeepCache
from patchdiffusion.guidance.cfg import ClassifierFree
from patchdiffusion.metrics.speed import (
    Point,
    Speed,
    advised,
    distance,
    draws_noise,
    frontier,
    operations,
    seconds,
    sparing,
)
from patchdiffusion.nets.count import count
from patchdiffusion.objectives.meanflow import MeanFlowConfig
from patchdiffusion.sampling.pipeline import Pipeline
from patchdiffusion.solvers import DDIM, Ancestral, DPMpp2M, Euler, Heun, SDEDPMpp2M, UniPC

CPU = ("--device", "cpu", "--threads", 1)
SHORT = (*CPU, "--count", 2, "--reference-steps", 12, "--repeats", 2)


def count_of(pipeline: Pipeline) -> int:
    return count(pipeline.model.network, pipeline.model.config.canvas).macs


def test_operations_are_those_of_the_evaluations() -> None:
    pipeline = tiny.pipeline()
    one = count_of(pipeline)
    speed = Speed(pipeline=pipeline, count=2, classes=[0])
    for solver, evaluations in ((Heun(), 7), (DPMpp2M(), 4)):
        assert speed.macs(SamplerConfig(solver=solver, steps=4)) == evaluations * one
    guided = SamplerConfig(solver=Euler(), steps=3, guidance=ClassifierFree(weight=2.0))
    assert speed.macs(guided) == 2 * 3 * one


def test_an_accelerator_counts_what_is_counted_here() -> None:
    """Operations of all that was computed, and the sum of the parts that it says it computed."""
    pipeline, spent = tiny.pipeline(), list[Spent]()
    config = SamplerConfig(solver=Euler(), steps=6, accelerator=DeepCache(every=3))
    pipeline.sample(1, classes=[0], config=config, spent=spent.append)
    macs = Speed(pipeline=pipeline, classes=[0]).macs(config)
    assert macs == spent[0].macs < spent[0].plain == 6 * count_of(pipeline)


def test_errors_vanish_with_steps() -> None:
    speed = Speed(
        pipeline=tiny.pipeline(),
        count=3,
        solvers=("heun", "euler"),
        steps=(4, 16),
        reference_steps=32,
    )
    exact, halved = speed.exact()
    coarse, fine, euler, more = (p.error for p in speed.plain_points(exact))
    assert fine < coarse and more < euler
    assert halved <= fine < euler
    assert speed.measure(speed.references[0], exact).error == 0


def test_distances_are_relative_to_the_deviation() -> None:
    exact = np.array([0.0, 4.0])
    assert distance(np.array([0.0, 7.0]), exact) == pytest.approx(3 / math.sqrt(2) / 2)


def test_accelerators_are_tried_with_the_solvers_that_are_best_without() -> None:
    speed = Speed(pipeline=tiny.pipeline(), solvers=("heun", "euler"), steps=(4, 8))
    errors = {(Heun, 4): 0.3, (Heun, 8): 0.1, (Euler, 4): 0.4, (Euler, 8): 0.35}
    plain = [Point(c, float(c.count), 1.0, errors[type(c.solver), c.count]) for c in speed.plain()]
    tried = speed.trials(plain, [DeepCache(every=2), DeepCache(every=3)])
    assert [(type(c.solver), c.count) for c in tried] == [(Heun, 4)] * 2 + [(Heun, 8)] * 2


def test_solvers_with_fresh_noise_follow_no_path() -> None:
    assert [draws_noise(s) for s in (Heun(), DPMpp2M(), UniPC(), Euler())] == [False] * 4
    assert [draws_noise(s) for s in (Ancestral(), SDEDPMpp2M(), DDIM(eta=1.0))] == [True] * 3


def test_what_is_advised_is_beaten_by_nothing() -> None:
    config = SamplerConfig(solver=Heun(), steps=2)
    table = [(1.0, 9.0, 0.5), (2.0, 4.0, 0.2), (3.0, 3.0, 0.2), (4.0, 2.0, 0.3), (9.0, 9.0, 0.1)]
    points = [Point(config, *row) for row in table]
    assert frontier(points, operations) == [points[0], points[1], points[4]]
    assert frontier(points, seconds) == [points[3], points[2], points[4]]
    assert advised(points, 0.25) is points[2] and advised(points, 0.2) is points[2]
    assert advised(points, 0.4) is points[3] and advised(points, 0.05) is None


def test_an_accelerator_that_spares_nothing_is_left_out() -> None:
    plain = Point(SamplerConfig(solver=Heun(), steps=4), 9.0, 1.0, 0.1)
    config = replace(plain.config, accelerator=DeepCache())
    even, less = Point(config, 9.0, 0.9, 0.1), Point(config, 5.0, 0.9, 0.1)
    assert sparing([even, less], [plain]) == [less]


def test_the_command(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    """It writes a table and a chart beside the model, and the line that it gives works."""
    run = shutil.copytree(finished, tmp_path / "my run")
    told = works(
        capsys, "speed", run, *SHORT, "--solvers", "heun", "dpmpp_2m", "--steps", 4, 18,
        "--accelerators", "bricks", "deepcache",
        "--guidance", "cfg", "--guidance.weight", 3,
    )  # fmt: skip
    assert "left out  bricks: " in told and "heun           18" in told
    line = next(x for x in told.splitlines() if x.startswith("patchdiffusion sample "))
    assert "--guidance cfg --guidance.weight 3.0" in line
    words = line.replace(f"'{run}'", "RUN").split()[1:]
    works(capsys, *[run if w == "RUN" else w for w in words], "--count", 1, "--out", tmp_path / "x")
    record = json.loads((run / "model" / "speed.json").read_text())
    assert [(p["solver"], p["steps"]) for p in record["points"]][:2] == [("heun", 4), ("heun", 18)]
    assert {p["accelerator"] for p in record["points"]} >= {"none"}
    picture = (run / "model" / "speed.png").read_bytes()
    assert struct.unpack(">I", picture[16:20])[0] > 500


class Means:
    """An extractor: the mean of each color of uint8 [B, 3, H, W], and of its squares."""

    seen: ClassVar[int] = 0

    def __call__(self, images: Tensor) -> Tensor:
        Means.seen += len(images)
        x = images.flatten(2).float() / 255
        return torch.cat([x.mean(2), x.square().mean(2)], dim=1)


def test_samples_and_models_that_jump(
    finished: Path, images: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    network = replace(tiny.NETWORK, jump=True)
    few = tiny.run(
        tiny.config(images, network=network, objective=MeanFlowConfig(), steps=1), tmp_path / "few"
    )
    Means.seen = 0
    short = (*SHORT, "--solvers", "euler", "--steps", 4, "--beside", few)
    assert "--samples" in fails(capsys, "speed", run, *short)
    told = works(
        capsys, "speed", run, *short, "--samples", 6, "--features.extractor", "test_speed:Means"
    )
    rows = [line for line in told.splitlines() if line.endswith(str(few))]
    kinds = sorted(row.split()[:2] for row in rows)  # in the order of measured times
    assert kinds == [["map", "1"], ["map", "2"], ["map", "4"]]
    assert "best for their time by Frechet distance: " in told
    points = json.loads((run / "model" / "speed.json").read_text())["points"]
    jumps = [p for p in points if p["model"]]
    assert [p["error"] for p in jumps] == [None] * 3
    assert all(p["frechet"] > 0 for p in jumps)
    rated = sum(p["frechet"] is not None for p in points)
    assert Means.seen == 40 + 6 * rated  # the real images once
    assert "many steps" in fails(capsys, "speed", run, *short[:-1], finished, "--samples", 6)


def shapeless() -> Callable[[Tensor], Tensor]:
    """An extractor of one number for a batch, which is none."""
    return lambda images: images.float().mean()


def test_an_extractor_fails_before_anything_is_measured(
    finished: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr(Speed, "exact", lambda self: pytest.fail("samplers were measured first"))
    flags = ("--samples", 6, "--features.extractor", "test_speed:shapeless")
    assert "shapeless" in fails(capsys, "speed", run, *SHORT, *flags)


def test_nothing_is_written_by_a_dry_run(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    assert "about" in works(capsys, "speed", run, *SHORT, "--dry-run")
    assert not (run / "model" / "speed.json").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--solvers", "ancestral"), ("ancestral", "heun")),
        (("--solvers", "hune"), ("hune", "heun")),
        (("--steps", 1), ("steps", "1")),
        (("--within", 0), ("within", "0")),
        (("--count", 0), ("count", "0")),
        (("--accelerators", "magic"), ("accelerators", "magic", "bricks")),
    ],
)
def test_bad_input(
    finished: Path, capsys: Capture, flags: tuple[object, ...], told: tuple[str, ...]
) -> None:
    line = fails(capsys, "speed", finished, *CPU, *flags)
    assert all(part in line for part in told), line
