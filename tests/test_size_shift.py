"""The shift of noise levels by the size of images, in training and sampling."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import Capture, refuses, works

from patchdiffusion import SamplerConfig, load, load_model, sample
from patchdiffusion.cond import Cond
from patchdiffusion.noise import LogitNormal, LogNormal, for_size, size_shift
from patchdiffusion.sampling.canvas import CanvasRegion
from patchdiffusion.solvers import Euler
from patchdiffusion.solvers.schedules import FlowSpaced, Karras

U = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)


def test_the_law_is_scaled_exactly() -> None:
    """Twice the sides are four times the values, and twice every noise level."""
    law = LogitNormal(mean=-0.3, std=0.8, shift="size")
    small, large = for_size(law, 3 * 32 * 32), for_size(law, 3 * 64 * 64)
    torch.testing.assert_close(large.icdf(U) / small.icdf(U), torch.full_like(U, 2.0))
    plain = for_size(law, 4 * 32 * 32)  # latents of 32 x 32 x 4 are the unit
    assert plain == replace(law, shift=1.0)
    torch.testing.assert_close(small.icdf(U) / plain.icdf(U), torch.full_like(U, 0.75**0.5))


def test_levels_between_the_ends_are_scaled_exactly() -> None:
    k = size_shift(3 * 64 * 64)
    levels = for_size(FlowSpaced(shift="size"), 3 * 64 * 64).sigmas(12, 0.002, 80.0)
    plain = FlowSpaced().sigmas(12, 0.002 / k, 80.0 / k)
    torch.testing.assert_close(levels, k * plain)
    assert levels[[0, -2]].tolist() == [80.0, 0.002]


@pytest.mark.parametrize("part", [LogNormal(), LogitNormal(shift=3.0), Karras(), FlowSpaced()])
def test_other_parts_are_left_alone(part: object) -> None:
    assert for_size(part, 17) is part


def test_a_size_that_is_not_known_is_refused() -> None:
    for part in (LogitNormal(shift="size"), FlowSpaced(shift="size")):
        with refuses("shift", "size"):
            part.icdf(U) if isinstance(part, LogitNormal) else part.sigmas(3, 0.1, 1.0)
    with refuses("shift", "area"):
        LogitNormal(shift="area")  # pyright: ignore[reportArgumentType]


def test_samples_take_the_shift_of_their_own_size() -> None:
    """The first level of two steps after the start, as a denoiser is asked for it."""
    asked: list[float] = []

    def denoiser(x: torch.Tensor, sigma: torch.Tensor | float, cond: Cond | None = None):
        asked.append(float(torch.as_tensor(sigma).max()))
        return torch.zeros_like(x)

    for size in (8, 16):
        config = SamplerConfig(
            solver=Euler(),
            steps=3,
            schedule=FlowSpaced(shift="size"),
            canvas=CanvasRegion(size=(size,)),
        )
        sample(denoiser, seeds=[0], channels=2, canvas=(8, 8), config=config)
    k = [size_shift(2 * size**2) for size in (8, 16)]
    grids = [FlowSpaced(shift=value).sigmas(3, 0.002, 80.0)[:-1] for value in k]
    assert asked == pytest.approx(torch.cat(grids).tolist())
    assert k[1] == 2 * k[0]


def test_a_run_holds_numbers(images: Path, tmp_path: Path, capsys: Capture) -> None:
    """The word is a number in all files of a run, and the same command resumes it."""
    run = tmp_path / "run"
    small = "--network.base 4 --network.mult 1 --network.blocks 1 --batch 2 --preview.grid 1"
    flags = f"{small} --noise logit-normal --noise.shift size --images 4 --device cpu"
    told = works(capsys, "train", images, *flags.split(), "--out", run, "--max-hours", "1e-9")
    model = load_model(run).config
    shift = size_shift(model.network.channels * model.canvas[0] * model.canvas[1])
    assert model.noise == LogitNormal(shift=shift)
    assert f"logit-normal (shift {shift:g})" in told
    assert json.loads((run / "config.json").read_text())["noise"]["shift"] == shift
    works(capsys, "train", images, *flags.split(), "--out", run)
    assert len(tiny.history(run)) > 1
    sampler = load(run).sampler(SamplerConfig(schedule=FlowSpaced(shift="size")))
    assert sampler.schedule == FlowSpaced(shift=shift)
    flow = "--schedule flow --schedule.shift size --steps 2 --count 1 --no-singles"
    works(capsys, "sample", run, *flow.split(), "--out", tmp_path / "out")
