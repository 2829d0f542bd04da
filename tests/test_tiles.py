"""Canvases in windows of the size of training, and the seams that fixed windows leave."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import tiny
import torch
from commands import Capture, fails, names, refuses, works
from oracles import Oracle
from torch import Tensor

from patchdiffusion import Cond, SamplerConfig, sample
from patchdiffusion.accel.tiles import TiledDenoiser, Tiles
from patchdiffusion.accel.windows import Coordinates, shifted_starts, starts, window_coordinates
from patchdiffusion.analytic import GaussianField
from patchdiffusion.cond import Call, Position
from patchdiffusion.data.decode import decoded
from patchdiffusion.denoiser import Denoiser, PatchDenoiser
from patchdiffusion.guidance.cfg import ClassifierFree
from patchdiffusion.metrics.seams import seam_ratio
from patchdiffusion.paths import per_sample
from patchdiffusion.plans import Stratified
from patchdiffusion.solvers import Heun
from patchdiffusion.system.dist import Team
from patchdiffusion.system.place import Place

CANVAS = (4, 6)


def at(index: int, *seeds: int) -> Call:
    return Call(Position(run=0, index=index, stage=0, sigmas=(1.0, 0.0), seeds=torch.tensor(seeds)))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


# ---- Where windows lie ----


@pytest.mark.parametrize(("side", "stride"), [(6, 6), (12, 6), (13, 6), (20, 3), (20, 1), (7, 5)])
def test_windows_cover_every_axis(side: int, stride: int) -> None:
    fixed = starts(side, 6, stride)
    shifted = shifted_starts(side, 6, stride, torch.arange(stride))
    for row in (fixed, *shifted):
        covered = {pixel for start in row.tolist() for pixel in range(start, start + 6)}
        assert covered >= set(range(side))
    assert fixed[0] >= 0 and fixed[-1] == side - 6 and (fixed.diff() <= stride).all()
    if side > 6:
        assert [offset in row for offset, row in enumerate(shifted.tolist())] == [True] * stride
    assert starts(12, 6, 6).tolist() == [0, 6]


def test_shifts_depend_on_step_and_seed_alone() -> None:
    tiled = TiledDenoiser(Oracle(lambda x, s, c: x), CANVAS)
    cpu = torch.device("cpu")
    both = tiled.places((12, 18), 2, at(3, 5, 9), cpu)
    assert both.shape == (2, 16, 2)
    assert torch.equal(both[1:], tiled.places((12, 18), 1, at(3, 9), cpu))
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, tiled.places((12, 18), 2, at(4, 5, 9), cpu))
    one = tiled.places((4, 18), 1, at(3, 5), cpu)
    assert one.shape == (1, 4, 2) and one[0, :, 0].tolist() == [0] * 4
    assert torch.equal(
        tiled.places((12, 18), 1, Call(), cpu)[0, :4, 1], torch.tensor([0, 6, 12, 0])
    )


def test_every_offset_is_as_likely() -> None:
    tiled = TiledDenoiser(Oracle(lambda x, s, c: x), (6,))
    corner = tiled.places((30,), 6000, at(1, *range(6000)), torch.device("cpu"))
    counts = torch.bincount(corner[:, 1, 0], minlength=6)
    assert counts.shape == (6,) and (counts - 1000).abs().max() < 5 * math.sqrt(1000)


# ---- What they are told ----


def test_coordinates_of_windows() -> None:
    corner = torch.tensor([[0], [3], [8]])
    kinds: tuple[Coordinates, ...] = ("window", "pitch", "clamp", "periodic", "whole")
    rows = {k: window_coordinates(k, corner, (5,), (5,), (13,))[:, 0] for k in kinds}
    own = torch.linspace(-1, 1, 5)
    assert torch.equal(rows["window"], own.expand(3, -1))
    torch.testing.assert_close(rows["pitch"], own + corner / 2)
    torch.testing.assert_close(rows["clamp"], (own + corner / 2).clamp(-1, 1))
    torch.testing.assert_close(rows["periodic"][1], own[[3, 4, 0, 1, 2]])
    torch.testing.assert_close(rows["whole"], (torch.arange(5) + corner) / 6 - 1)


@pytest.mark.parametrize("kind", ["window", "pitch", "clamp", "periodic", "whole"])
def test_the_canvas_of_training_is_denoised_as_it_is(kind: Coordinates) -> None:
    """With any coordinates, at its cost, bit for bit."""
    oracle = Oracle(lambda x, s, c: x / (1 + per_sample(s, x)) + placed(c))
    tiled = TiledDenoiser(oracle, CANVAS, kind=kind, overlap=0.5)
    x = drawn(3, 2, *CANVAS)
    expected = PatchDenoiser(oracle, CANVAS)(x, 0.3)
    assert torch.equal(tiled(x, 0.3, position=at(1, 1, 2, 3).position), expected)
    assert oracle.batches == [3, 3]


def placed(cond: Cond) -> Tensor:
    assert cond.pos is not None
    return cond.pos.to(torch.float64)


@pytest.mark.parametrize(
    ("overlap", "shift"), [(0.0, False), (0.0, True), (0.5, True), (0.7, False)]
)
def test_a_denoiser_of_pixels_has_no_windows(overlap: float, shift: bool) -> None:
    """Whatever depends on each pixel and its position alone comes out as from the whole."""
    oracle = Oracle(lambda x, s, c: x / (1 + per_sample(s, x)) + placed(c))
    x, sigma = drawn(3, 2, 9, 20), torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    tiled = TiledDenoiser(oracle, CANVAS, kind="pitch", overlap=overlap, shift=shift)
    got = tiled(x, sigma, position=at(2, 4, 5, 6).position)
    torch.testing.assert_close(got, PatchDenoiser(oracle, CANVAS)(x, sigma))


def test_windows_smaller_than_the_images_of_training() -> None:
    """They are told their place on the canvas of training; a field is denoised in blocks."""
    oracle = Oracle(lambda x, s, c: x / (1 + per_sample(s, x)) + placed(c))
    x, position = drawn(2, 2, 9, 20), at(2, 4, 5).position
    for overlap in (0.0, 0.5):
        canvas = Tiles(window=CANVAS, overlap=overlap)
        tiled = canvas.tiled(oracle, (9, 20))
        assert tiled.kind == "pitch" and canvas.place((9, 20))[0] == (9, 20)
        expected = PatchDenoiser(oracle, (9, 20))(x, 0.3)
        torch.testing.assert_close(tiled(x, 0.3, position=position), expected)
    field = GaussianField((8, 12))
    blocks = Tiles(window=(4, 6), shift=False).tiled(field.crop((4, 6)), (8, 12))
    x = drawn(2, 1, 8, 12)
    rows = [[field.crop((4, 6))(b, 0.3) for b in row.split(6, 3)] for row in x.split(4, 2)]
    expected = torch.cat([torch.cat(row, 3) for row in rows], 2)
    torch.testing.assert_close(blocks(x, 0.3), expected)
    assert Tiles(window=(4,), wraps="x").tiled(field, (8, 12)).kind == "periodic"
    assert Tiles(window=(8, 12)).tiled(field, (8, 12)).kind == "window"
    with refuses("8x14", "8x12"):
        Tiles(window=(8, 14)).place((8, 12))
    with refuses("4x6", "4x5"):
        Tiles(size=(4, 5), window=(4, 6)).place((8, 12))
    with refuses("window", "0"):
        Tiles(window=(0,))


def test_windows_that_are_moved_inside_leave_no_fixed_border() -> None:
    """Pixels change their window at the shifted borders alone."""
    tiled = TiledDenoiser(Oracle(lambda x, s, c: x), (6,))
    for seed in range(8):
        place = tiled.places((15,), 1, at(0, seed), torch.device("cpu"))[0, :, 0]

        def numbered(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
            return torch.arange(len(x), dtype=x.dtype).reshape(-1, 1, 1).expand_as(x)

        tiled = TiledDenoiser(Oracle(numbered), (6,))
        got = tiled(drawn(1, 1, 15), 1.0, position=at(0, seed).position)[0, 0]
        expected = [int((place <= pixel).sum()) - 1 for pixel in range(15)]
        assert got.tolist() == expected


def test_conditions_follow_their_images() -> None:
    def best(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        assert cond.labels is not None and cond.image is not None
        return x * per_sample(cond.labels.double(), x) + cond.image + per_sample(sigma, x)

    x = drawn(2, 1, 8, 15)
    cond = Cond(labels=torch.tensor([3, 7]), image=drawn(2, 1, 8, 15))
    sigma = torch.tensor([0.5, 4.0], dtype=torch.float64)
    tiled = TiledDenoiser(Oracle(best), CANVAS)
    got = tiled(x, sigma, cond, position=at(0, 1, 2).position)
    torch.testing.assert_close(got, best(x, sigma, cond))
    levels = sigma.reshape(2, 1, 1, 1) * drawn(2, 1, 8, 15).abs()

    def mapped(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return x + sigma

    tiled = TiledDenoiser(mapped, CANVAS)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(tiled(x, levels), x + levels)


def test_one_evaluation_has_all_windows() -> None:
    oracle = Oracle(lambda x, s, c: x)
    tiled = TiledDenoiser(oracle, CANVAS)
    tiled(drawn(2, 1, 8, 18), 1.0, position=at(0, 7, 8).position)
    tiled(drawn(2, 1, 8, 18), 1.0)
    assert oracle.batches == [2 * 3 * 4, 2 * 2 * 3]
    position = oracle.steps[0]
    assert position is not None and position.slot == ("tiles 0",) and position.seeds is not None
    assert position.seeds.tolist() == [7, 8] * 12


def test_many_windows_are_evaluated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def best(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        assert cond.labels is not None and cond.pos is not None
        return x * per_sample(cond.labels.double() + sigma, x) + cond.pos[:, :1]

    x, cond = drawn(2, 1, 8, 15), Cond(labels=torch.tensor([3, 7]))
    sigma, position = torch.tensor([0.5, 4.0], dtype=torch.float64), at(0, 1, 2).position
    expected = TiledDenoiser(Oracle(best), CANVAS)(x, sigma, cond, position=position)
    for at_once, largest in ((5, 5), (1, 2)):  # never fewer than the images of the batch
        monkeypatch.setattr("patchdiffusion.accel.tiles.AT_ONCE", at_once)
        oracle = Oracle(best)
        found = TiledDenoiser(oracle, CANVAS)(x, sigma, cond, position=position)
        assert torch.equal(found, expected) and max(oracle.batches) == largest
        steps = [step for step in oracle.steps if step is not None]
        seeds = [step.seeds.tolist() for step in steps if step.seeds is not None]
        assert [seed for row in seeds for seed in row] == [1, 2] * (sum(oracle.batches) // 2)
        assert len({step.slot for step in steps}) == len(oracle.batches)


def test_windows_count_by_the_distance_to_their_borders() -> None:
    """Of windows of 6 pixels every 4, two share pixels 4 and 5: at .5 and 1.5 from their ends."""
    numbers = iter((torch.zeros(1, 1, 6), torch.ones(1, 1, 6)))

    def numbered(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return torch.cat([next(numbers) for _ in range(len(x))]).to(x)

    tiled = TiledDenoiser(Oracle(numbered), (6,), overlap=1 / 3, shift=False)
    assert tiled(drawn(1, 1, 10), 1.0)[0, 0].tolist() == pytest.approx(
        [0] * 4 + [0.1, 0.9] + [1] * 4
    )


def test_samples_depend_on_their_seed_alone() -> None:
    config = SamplerConfig(canvas=Tiles(size=(8, 20)), solver=Heun(), steps=4)
    model = tiny.pipeline(classes=0)
    images = model.sample(3, config=config, seed=5)
    assert images.shape == (3, 8, 20, 3)
    assert (model.sample(1, config=config, seed=6) == images[1:2]).all()
    guided = SamplerConfig(canvas=Tiles(size=(8, 20)), guidance=ClassifierFree(weight=2), steps=2)
    assert tiny.pipeline().sample(2, config=guided).shape == (2, 8, 20, 3)


# ---- Seams ----


class Windowed(Oracle):
    """Noise is denoised to a mean of its own in every image it is given: seams between windows."""

    def __init__(self) -> None:
        super().__init__(lambda x, s, c: x.mean((1, 2, 3), keepdim=True) + 0.02 * torch.tanh(x))


def wide(model: Denoiser, canvas: Tiles) -> Tensor:
    config = SamplerConfig(canvas=canvas, steps=24)
    return sample(model, seeds=range(4), channels=1, canvas=CANVAS, config=config)


def test_shifts_and_overlaps_remove_seams() -> None:
    borders = range(6, 60, 6)
    fixed = seam_ratio(wide(Windowed(), Tiles(size=(4, 60), shift=False)), borders)
    shifted = seam_ratio(wide(Windowed(), Tiles(size=(4, 60))), borders)
    averaged = seam_ratio(wide(Windowed(), Tiles(size=(4, 60), shift=False, overlap=0.5)), borders)
    assert fixed > 5 and shifted < 1.3 and averaged < 1.6


def test_the_seam_ratio_by_hand() -> None:
    steps = torch.tensor([1.0, 1.0, 3.0, 1.0, 1.0])
    image = torch.cat([torch.zeros(1), steps.cumsum(0)]).expand(2, 1, 4, -1)
    assert seam_ratio(image, [3]) == 3.0
    assert seam_ratio(image.mT, [3], axis=-2) == 3.0
    assert seam_ratio(-image, [1, 3]) == 2.0
    for borders in ([], range(1, 6), [6], [0]):
        with refuses("border"):
            seam_ratio(image, borders)


# ---- The command line ----


def test_a_wide_picture(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    flags = ["sample", finished, "--canvas", "tiles", "--count", 1, "--steps", 2]
    works(capsys, *flags, "--canvas.size", 16, 40, "--out", tmp_path / "a")
    works(
        capsys, *flags, "--canvas.size", "24", "--canvas.no-shift", "--canvas.overlap", 0.25,
        "--canvas.coordinates", "whole", "--out", tmp_path / "b",
    )  # fmt: skip
    files = (next((tmp_path / name).glob("seed-*.png")) for name in "ab")
    shapes = [decoded(file.read_bytes(), file.name).image.shape for file in files]
    assert shapes == [(16, 40, 3), (24, 24, 3)]
    assert names(fails(capsys, *flags, "--canvas.size", 8, 40), "16x16", "8x40", "region")
    assert names(fails(capsys, *flags, "--canvas.size", 1, 2, 3), 2, "1, 2, 3")
    assert names(fails(capsys, *flags, "--canvas.overlap", 1), "overlap", "1.0")
    assert names(fails(capsys, *flags, "--canvas.size", 0, 5), "size", "0, 5")
    with refuses("overlap", 1.5):
        TiledDenoiser(Oracle(lambda x, s, c: x), CANVAS, overlap=1.5)
    with refuses("4x6", "3x6"):
        TiledDenoiser(Oracle(lambda x, s, c: x), CANVAS)(drawn(1, 1, 3, 6), 1.0)


def test_a_model_of_crops_alone(images: Path, tmp_path: Path, capsys: Capture) -> None:
    """Never shown a whole image, it samples, edits and restores whole ones in windows."""
    law = Stratified(fractions=(0.5,), probs=(1.0,))
    run = tiny.run(replace(tiny.config(images), patches=law), tmp_path / "run")
    windows = ["--canvas", "tiles", "--canvas.window", 8, "--canvas.overlap", 0.25, "--steps", 2]
    works(capsys, "sample", run, *windows, "--count", 2, "--out", tmp_path / "out")
    (file, _) = sorted((tmp_path / "out").glob("seed-*.png"))
    assert decoded(file.read_bytes(), file.name).image.shape == (16, 16, 3)
    settings = ["--features.extractor", "none", "--held-out", 0, "--samples", 2]
    out = works(capsys, "evaluate", run, *settings, *windows)
    assert "windows of 8x8 every 6x6" in out
    works(capsys, "edit", "local", run, file, *windows, "--out", tmp_path / "edited")
    works(capsys, "restore", run, file, "--simulate", *windows, "--out", tmp_path / "restored")
    for folder in ("edited", "restored"):
        assert any((tmp_path / folder).rglob("*.png"))
    told = fails(capsys, "sample", run, "--canvas", "tiles", "--canvas.window", 24)
    assert names(told, "24x24", "16x16", "canvas.window")


# ---- Images that go on at their opposite border ----


@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_windows_go_around(overlap: float) -> None:
    """No place is special: what is denoised moves with the image, here by a stride."""
    means = Oracle(lambda x, s, c: x.mean((2, 3), keepdim=True).expand_as(x))
    tiled = TiledDenoiser(means, CANVAS, overlap=overlap, shift=False, wrap=(0, 1))
    x, moves = drawn(2, 3, 12, 18), tuple(tiled.strides)
    moved = tiled(x.roll(moves, (2, 3)), 0.3)
    torch.testing.assert_close(moved, tiled(x, 0.3).roll(moves, (2, 3)))
    pixels = TiledDenoiser(Oracle(lambda x, s, c: x), CANVAS, overlap=overlap, wrap=(0, 1))
    torch.testing.assert_close(pixels(x, 0.3, position=at(1, 4, 7).position), x)


def test_the_border_of_a_texture_is_no_seam() -> None:
    ratios: list[float] = []
    each: tuple[Literal["none", "x"], ...] = ("none", "x")
    for wraps in each:
        x = wide(Windowed(), Tiles(size=(4, 24), wraps=wraps)).roll(
            3, 3
        )  # the border lies between columns 2 and 3
        ratios.append(seam_ratio(x, [3]))
    assert ratios[0] > 1.5 and ratios[1] < 1.2


def test_processes_divide_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchdiffusion.accel.tiles.AT_ONCE", 3)
    x = drawn(1, 3, 12, 18)
    sums: dict[int, list[Tensor]] = {}

    class Half(Team):
        def all_reduce(self, value: Tensor) -> Tensor:
            sums.setdefault(self.place.rank, []).append(value.clone())
            return value

    oracle = Oracle(lambda x, s, c: x + x.mean((2, 3), keepdim=True))
    whole = TiledDenoiser(oracle, CANVAS, overlap=0.5, shift=False)(x, 0.3)
    for rank in range(2):
        half = TiledDenoiser(oracle, CANVAS, overlap=0.5, shift=False, team=Half(Place(rank, 2)))
        half(x, 0.3)
    total, norm = (sums[0][i] + sums[1][i] for i in range(2))
    torch.testing.assert_close((total / norm).movedim(-1, 1), whole)
    assert all(part[0].abs().max() > 0 for part in sums.values())


def test_overlaps_of_four_correlation_lengths_lose_nothing() -> None:
    """The error above that of the whole field falls with the overlap, under 1 % of that without."""
    length, sigma, window = 1.0, 0.4, (6, 16)

    def excess(overlap: int) -> float:
        """Of five windows that overlap by just as many pixels."""
        size = (window[0], window[1] + 4 * (window[1] - overlap))
        lags = torch.fft.fftfreq(96).abs() * 96
        covariance = 0.25 * torch.exp(-0.5 * (lags[:, None] ** 2 + lags**2) / length**2)
        field = GaussianField(size, torch.fft.fft2(covariance.double()).real.clamp(min=0))
        pixels = torch.eye(len(field.matrix), dtype=torch.float64).view(-1, 1, *size)
        noisy = field.matrix + sigma**2 * torch.eye(len(field.matrix))
        tiled = TiledDenoiser(field.crop(window), window, overlap=overlap / 16, shift=False)
        difference = (tiled(pixels, sigma) - field(pixels, sigma)).flatten(1).mT
        return float((difference @ noisy @ difference.mT).diagonal().mean())

    apart, *fused = (excess(overlap) for overlap in (0, 2, 4))
    assert apart > fused[0] > fused[1] and fused[0] < 0.06 * apart and fused[1] < 0.01 * apart
