"""Counters, clocks and ways to run."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from patchdiffusion.plans import Clock, Stochastic
from patchdiffusion.system.files import read_json
from patchdiffusion.train import loop
from patchdiffusion.train.config import RunConfig
from patchdiffusion.train.log import duration, quantity
from patchdiffusion.train.loop import train
from patchdiffusion.train.optimizers import AdamW
from patchdiffusion.train.schedules import Trapezoid
from patchdiffusion.train.settings import EMAConfig
from patchdiffusion.train.status import measured_peak


def status(folder: Path) -> str:
    return read_json(folder / "run.json")["status"]


# ---- Clocks ----


@pytest.mark.parametrize("clock", ["equivalents", "crops", "steps"])
def test_counters_rates_and_averages_have_closed_forms(
    clock: Clock, images: Path, tmp_path: Path
) -> None:
    law = Stochastic(fractions=(1.0, 0.5), probs=(0.5, 0.5))
    optim = AdamW(lr=1e-2, schedule=Trapezoid(warmup=0.5, cooldown=0.25))
    ema = EMAConfig(half_life=9.0, ramp_up=0.8)
    config = tiny.config(images, clock=clock, images=60, optim=optim, ema=ema, patches=law)
    training = tiny.training(config, tmp_path / "run")
    names = ["stem.image.weight", "out_conv.weight"]
    steps = 6

    def look() -> list[torch.Tensor]:
        return [training.network.get_parameter(n).detach().double().clone() for n in names]

    passed = [look()]
    shown, rates, sizes = [0.0], [], []
    for k in range(steps):
        sizes.append(training.plan.draw(seed=config.seed, step=k)[0].size)
        loop.one_step(training)
        rates.append(training.stepper.update.lr)
        shown.append(training.now)
        passed.append(look())
    assert set(sizes) == {(16, 16), (8, 8)}
    # Batches of 4 whole images, or of 8 crops of a quarter of the area.
    crops = [4 if size == (16, 16) else 8 for size in sizes]
    areas = [4.0 if size == (16, 16) else 2.0 for size in sizes]
    advance = {"equivalents": areas, "crops": crops, "steps": [1] * steps}[clock]
    assert shown == [sum(advance[:k]) for k in range(steps + 1)]
    state = training.state
    assert (state.step, state.crops, state.equivalents) == (steps, sum(crops), sum(areas))
    assert state.flops == sum(training.flops[s] * c for s, c in zip(sizes, crops, strict=True))
    for k, rate in enumerate(rates):
        assert rate == pytest.approx(1e-2 * min(shown[k] / 60 / 0.5, 1.0), rel=1e-12)
    # The average is a sum over all weights passed, whose shares are products of decays.
    decays = [0.5 ** ((b - a) / min(9.0, 0.8 * b)) for a, b in itertools.pairwise(shown)]
    for i, name in enumerate(names):
        expected = torch.zeros_like(passed[0][i])
        remaining = 1.0
        for k in range(steps, 0, -1):
            expected += remaining * (1 - decays[k - 1]) * passed[k][i]
            remaining *= decays[k - 1]
        expected += remaining * passed[0][i]
        got = training.ema.network().get_parameter(name).double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(passed[0][i], passed[-1][i])


def test_a_run_uses_every_image_once_an_epoch(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = tiny.training(tiny.config(images, steps=20), tmp_path / "run")
    feed, seen = training.stepper.feed, []
    original = feed.which

    def which(position: np.ndarray) -> torch.Tensor:
        seen.append(original(position))
        return seen[-1]

    monkeypatch.setattr(feed, "which", which)
    while len(seen) < 2 or sum(map(len, seen)) < len(training.pack.train):
        loop.one_step(training)
    epoch = torch.cat(seen)[: len(training.pack.train)]
    assert torch.equal(epoch.sort().values, training.pack.train)


def test_marks_are_evenly_spaced() -> None:
    times = [k for k in range(1, 1001) if loop.due(10, k - 1, k, 1000)]
    assert times == list(range(100, 1001, 100))
    assert loop.due(10, 0.0, 350.0, 1000.0)
    assert not loop.due(10, 110.0, 190.0, 1000.0)


def test_expected_number_of_steps(images: Path, tmp_path: Path) -> None:
    for clock, images_seen in (("equivalents", 30.0), ("crops", 60.0), ("steps", 10.0)):
        config = tiny.config(images, clock=clock, images=images_seen)
        assert tiny.training(config, tmp_path / "run").total_steps == 10, clock


# ---- Small things ----


def test_bf16_runs(images: Path, tmp_path: Path) -> None:
    folder = tiny.run(tiny.config(images, steps=2, precision="bf16"), tmp_path / "run")
    assert status(folder) == "finished"
    assert tiny.history(folder)[0][4] != tiny.history(folder)[1][4]


def test_micro_batches_change_only_the_rounding(
    images: Path, finished: Path, tmp_path: Path
) -> None:
    folder = tiny.run(tiny.config(images, micro_batch=1), tmp_path / "run")
    got, expected = ([float(str(line[4])) for line in tiny.history(f)] for f in (folder, finished))
    assert got == pytest.approx(expected, rel=1e-3)


def test_a_dry_run_writes_nothing(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.run(tiny.config(images), tmp_path / "run", dry_run=True)
    assert not folder.exists()
    assert "GB of disk" in capsys.readouterr().out


def test_the_default_folder(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(tiny.config(images, steps=1, name="mine")) == Path("runs/mine")
    assert status(tmp_path / "runs" / "mine") == "finished"
    assert train(tiny.config(images, name="x"), RunConfig(dry_run=True)) == Path("runs/x")


def test_the_yardstick() -> None:
    assert measured_peak(torch.device("cpu"), "fp32", side=64) > 1e6


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7440, "2h04m"), (273600, "3d04h"),
     (float("inf"), "?"), (-5, "0s")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(512, "512"), (9870, "9.87k"), (12.3e6, "12.3M"), (0.5, "0.5"), (0, "0")]
)
def test_quantities(value: float, text: str) -> None:
    assert quantity(value) == text
