"""Seams of samples at the borders of their windows: by hand, on a Gaussian field, of models."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
import torch
from commands import Capture, works
from oracles import Oracle
from torch import Tensor

from patchdiffusion import SamplerConfig, sample
from patchdiffusion.accel.tiles import TiledDenoiser, Tiles
from patchdiffusion.analytic import GaussianField
from patchdiffusion.metrics.seams import Seams, seam_ratio, seams_of
from patchdiffusion.sampling.driver import Start
from patchdiffusion.system.dist import Team
from patchdiffusion.system.place import Place

WINDOW = (2, 8)


def seams(size: tuple[int, ...], scale: tuple[int, ...] = (1, 1), **settings: Any) -> Seams:
    """Seams of windows of a denoiser that leaves images as they are."""
    tiled = TiledDenoiser(Oracle(lambda x, s, c: x), WINDOW, **settings)
    return Seams(tiled, size, scale, (3.0, 2.0, 1.0))


def measured(seams: Seams, images: Tensor) -> dict[str, Any]:
    return seams.measured(seams.steps_of(images), torch.arange(len(images)))


# ---- By hand ----


def test_windows_that_stay() -> None:
    """The mean over axes of the ratios at borders, with an error by the images."""
    images = torch.randint(0, 256, (5, 4, 24, 3), generator=torch.Generator().manual_seed(1))
    images = images.to(torch.uint8)
    result = measured(seams((4, 24), shift=False), images)
    x = images.movedim(-1, 1).double()
    rows, columns = seam_ratio(x, [2], axis=2), seam_ratio(x, [8, 16])
    assert result["seams"] == {"axes": {"y": pytest.approx(rows), "x": pytest.approx(columns)}}
    assert result["seam_ratio"] == pytest.approx((rows + columns) / 2)
    assert result["seam_ratio_std"] > 0
    same = measured(seams((4, 24), shift=False), images[:1].repeat(5, 1, 1, 1))
    assert same["seam_ratio_std"] == pytest.approx(0)


def test_the_step_that_is_farthest_counts() -> None:
    """Windows lie elsewhere in each step: here images have a seam at those of the second alone."""
    moving = seams((2, 24), shift=True)
    seeds = torch.arange(6)
    place = moving._places(1, seeds)[..., 1]
    at = moving._borders(place, 1)
    images = (1.0 + 2.0 * at.double()).cumsum(1)[:, None, :, None].expand(-1, 2, -1, 1)
    result = measured(moving, images)
    assert result["seam_ratio"] == pytest.approx(3.0)
    assert result["seams"]["sigma"] == 2.0 and result["seams"]["steps"] == 3
    assert list(result["seams"]["axes"]) == ["x"]


def test_ends_of_axes_that_wrap() -> None:
    ramp = torch.arange(24.0).expand(3, 2, -1)[..., None]
    around = seams((2, 24), wrap=(1,))
    assert measured(around, ramp)["seams"]["ends"] == {"x": pytest.approx(23.0)}
    assert "ends" not in measured(seams((2, 24)), ramp)["seams"]


def test_latents_have_larger_pixels() -> None:
    """Borders of windows of latents lie at multiples of the side of their pixels."""
    step = torch.ones(1, 72).cumsum(1)
    step[:, 24:] += 4.0
    step[:, 48:] += 4.0
    result = measured(
        seams((2, 24), (3, 3), shift=False), step[:, None, :, None].expand(1, 6, -1, 1)
    )
    assert result["seam_ratio"] == 5.0


def test_borders_everywhere_are_none() -> None:
    assert measured(seams((2, 24), overlap=0.9), torch.rand(2, 2, 24, 1)) == {}


# ---- Exactly, on a Gaussian field ----


def field(width: int) -> GaussianField:
    """Correlation length 1."""
    lags = torch.fft.fftfreq(64).abs() * 64
    covariance = 0.25 * torch.exp(-0.5 * (lags[:, None] ** 2 + lags**2))
    return GaussianField((2, width), torch.fft.fft2(covariance.double()).real.clamp(min=0))


def expected(model: GaussianField, config: SamplerConfig, width: int) -> dict[str, Any]:
    """Ratios of a sampler that is linear: images of unit noise give the deviation of each step."""
    canvas = config.canvas
    assert isinstance(canvas, Tiles)
    count = 2 * width
    start = Start(80.0 * torch.eye(count).view(count, 1, 2, width), 80.0, fresh=False)
    made = sample(
        model, seeds=[3] * count, channels=1, canvas=model.canvas, config=config, start=start,
        dtype=torch.float64, batch=count,
    ).double()[:, 0]  # fmt: skip
    rows = [(made - made.roll(1, axis)).square().sum(0).sqrt().mean(2 - axis) for axis in (1, 2)]
    sigmas = tuple(config.sigmas().tolist()[:-1])
    one = Seams(canvas.tiled(model, model.canvas), (2, width), (1, 1), sigmas)
    return one.measured(torch.cat(rows)[None] * math.sqrt(2 / math.pi), torch.tensor([3]))


def test_of_samples_as_expected() -> None:
    """Windows side by side leave a seam, as large in samples as in their law; the whole none."""
    config = SamplerConfig(canvas=Tiles(size=(2, 24), shift=False), steps=10)
    exact = expected(field(8), config, 24)["seam_ratio"]
    assert 1.4 < exact < 1.8
    images = sample(field(8), seeds=range(400), channels=1, canvas=WINDOW, config=config)
    result = measured(seams((2, 24), shift=False), images.movedim(1, -1))
    assert abs(result["seam_ratio"] - exact) < 4 * result["seam_ratio_std"] < 0.1 * exact
    whole = sample(field(24), seeds=range(400), channels=1, canvas=(2, 24), config=SamplerConfig())
    result = measured(seams((2, 24), shift=False), whole.movedim(1, -1))
    assert abs(result["seam_ratio"] - 1) < 4 * result["seam_ratio_std"]


@pytest.mark.parametrize("shift", [False, True])
def test_an_eighth_leaves_no_seam(shift: bool) -> None:
    """Of windows of 16 pixels every 14, in the law of samples."""
    canvas = Tiles(size=(2, 44), shift=shift, overlap=1 / 8)
    found = expected(field(16), SamplerConfig(canvas=canvas, steps=10), 44)
    assert abs(found["seam_ratio"] - 1) < 0.05


# ---- Of models ----


def test_of_which_samples() -> None:
    pipeline, canvas = tiny.pipeline(classes=0), tiny.CANVAS
    size = tuple(2 * side for side in canvas)
    assert seams_of(pipeline, SamplerConfig()) is None
    assert seams_of(pipeline, SamplerConfig(canvas=Tiles(size=canvas))) is None
    found = seams_of(pipeline, SamplerConfig().but(size=size))
    assert found is not None and found.tiled.overlap == 0.25 and found.size == size
    wraps: Literal["x"] = "x"
    assert seams_of(pipeline, SamplerConfig(canvas=Tiles(wraps=wraps))) is not None
    assert seams_of(pipeline, SamplerConfig(canvas=Tiles(window=(4, 4)))) is not None


def test_evaluate(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    """Without features, in any batches; the card says which windows were meant."""
    flags = ["evaluate", finished, "--features.extractor", "none", "--held-out", 0, "--steps", 2]
    flags += ["--size", "16x40", "--samples", 5]
    results = []
    for batch in (5, 2):
        file = tmp_path / f"{batch}.json"
        out = works(capsys, *flags, "--save", file, "--batch", batch)
        assert "seam ratio" in out and "windows of 16x16 every 12x12" in out
        results.append(json.loads(file.read_text()))
    assert results[0]["seam_ratio"] == pytest.approx(results[1]["seam_ratio"])
    assert results[0]["left_out"] == {} and list(results[0]["seams"]["axes"]) == ["x"]
    card = results[0]["card"]
    assert card["samples"] == 5 and card["sampler"]["canvas"]["size"] == [16, 40]
    assert card["seams"]["windows"] == "16x16" and card["seams"]["moving"] is True
    out = works(capsys, *flags, "--wrap", "x", "--save", tmp_path / "around.json")
    assert "every 12x12" in out and "ends of x" in out


def test_processes_measure_their_samples(finished: Path) -> None:
    """Steps are gathered in the order of the seeds."""
    half = seams((2, 24))
    images = torch.rand(4, 2, 24, 1)
    steps = half.steps_of(images)
    assert torch.equal(torch.cat([half.steps_of(images[:2]), half.steps_of(images[2:])]), steps)
    assert [list(Team(Place(rank, 2)).shard(4)) for rank in range(2)] == [[0, 1], [2, 3]]
