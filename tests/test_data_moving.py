"""Clips: the built-in ones, and a run on clips from data to samples."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from commands import Capture, fails, works
from PIL import Image

from patchdiffusion import load
from patchdiffusion.data.moving import MovingGlyphs, bounced
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.prepare import prepare, prepare_data
from patchdiffusion.data.source import open_source
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.train.config import TrainConfig
from patchdiffusion.train.report import read_log

NETWORK = DiTConfig(patch=(2, 4, 4), width=16, depth=1, heads=2, channels=1)


@pytest.fixture(scope="session")
def moving() -> MovingGlyphs:
    return MovingGlyphs(120)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 clips [4, 8, 8, 1] in a file."""
    t, i, j = np.mgrid[0:4, 0:8, 0:8]
    array = np.stack([(n * t + (n + 3) * i + 5 * i * j) % 256 for n in range(40)])
    file = tmp_path_factory.mktemp("clips") / "clips.npy"
    np.save(file, array[..., None].astype(np.uint8))
    return file


def config(clips: Path, **changes: object) -> TrainConfig:
    plain = tiny.config(clips, network=NETWORK, images=12)
    return replace(plain, **changes)  # pyright: ignore[reportArgumentType]


# ---- Moving glyphs ----


def test_places_bounce_between_walls() -> None:
    assert [bounced(p, 3) for p in range(-4, 9)] == [2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2]


def test_clips_are_a_function_of_seed_and_number(moving: MovingGlyphs) -> None:
    again, longer, other = MovingGlyphs(120), MovingGlyphs(200), MovingGlyphs(120, seed=1)
    some = [moving[i].image for i in range(120)]
    assert all((longer[i].image == some[i]).all() for i in range(120))
    assert len({clip.tobytes() for clip in some}) == 120
    assert not any((other[i].image == some[i]).all() for i in range(120))
    assert moving.stamp == again.stamp
    assert len({moving.stamp, longer.stamp, other.stamp}) == 3


def test_characters_move_at_constant_speed_and_stay_inside(moving: MovingGlyphs) -> None:
    """All ink is in every frame; a first frame shifted to where the ink lies is the frame."""
    single = 0
    for i in range(len(moving)):
        example = moving[i]
        assert example.image.shape == (8, 24, 24, 1) and example.image.dtype == np.uint8
        assert example.group is not None and example.label is not None
        ink = example.image.reshape(8, -1).sum(1, dtype=np.int64)
        if len(set(ink.tolist())) > 1:
            continue  # two characters that overlap for a while
        frames = example.image[..., 0]
        corners = [np.argwhere(frame).min(0) for frame in frames]
        shifts = [tuple(c - corners[0]) for c in corners]
        moved = [np.roll(frames[0], shift, (0, 1)) for shift in shifts]
        if all((a == b).all() for a, b in zip(moved, frames, strict=True)):
            single += 1
            steps = np.abs(np.diff(corners, axis=0))
            assert steps.max() <= 2 and steps.any()
    assert 40 < single < 80  # every second clip has one character


def test_held_out_clips_begin_with_characters_of_their_own(tmp_path: Path) -> None:
    pack = prepare(MovingGlyphs(400), tmp_path / "pack", progress=False)
    assert pack.images.shape == (400, 8, 24, 24, 1) and pack.space.word == "pixels"
    assert (pack.images[7].numpy() == MovingGlyphs(400)[7].image).all()
    groups = [group for _, group in pack.keys]
    held = {groups[i] for i in pack.heldout.tolist()}
    assert held and not held & {groups[i] for i in pack.train.tolist()}


def test_the_built_in_clips_have_a_name() -> None:
    source = open_source("moving-glyphs")
    assert (source.name, len(source)) == ("moving-glyphs", 8000)
    with pytest.raises(ValueError, match=r"count .* not 0"):
        MovingGlyphs(0)


# ---- A run on clips ----


def test_a_run_on_clips_resumes_and_samples(clips: Path, tmp_path: Path, capsys: Capture) -> None:
    """Crops are of space and time, and the last bit does not know of the interruption."""
    pack = prepare_data(DataConfig(path=str(clips)))
    assert pack.images.shape == (40, 4, 8, 8, 1)
    straight = tiny.run(config(clips), tmp_path / "straight")
    stopped = tiny.run(config(clips), tmp_path / "stopped", max_hours=1e-9)
    assert len(tiny.history(stopped)) == 1 < len(tiny.history(straight))
    tiny.run(config(clips), stopped)
    assert tiny.history(stopped) == tiny.history(straight)
    assert tiny.weights(stopped) == tiny.weights(straight)
    *_, status = (r for r in read_log(straight) if r["kind"] == "status")
    assert set(status["sizes"]) == {"4x8x8", "4x4x4"}  # the divisor of the network is 4
    *_, watched = (r for r in read_log(straight) if r["kind"] == "preview")
    assert set(watched["held_out"]["sizes"]) == set(status["sizes"])
    with Image.open(next((straight / "samples").glob("*.png"))) as grid:
        ratio = (4 * 8 + 3) / (2 * 8 + 2)  # two strips of four frames
        assert grid.width / grid.height == pytest.approx(ratio)
    images = load(straight).sample(3, seed=5)
    out = tmp_path / "out"
    works(capsys, "sample", straight, "--count", 3, "--seed", 5, "--out", out)
    assert (np.load(out / "samples.npy") == images).all()
    with Image.open(out / "seed-00000006.png") as clip:
        assert clip.info["seed"] == "6" and clip.size == (8, 8)
        assert (np.asarray(clip) == images[1, 0, ..., 0]).all()
        clip.seek(getattr(clip, "n_frames", 1) - 1)
        assert (np.asarray(clip) == images[1, -1, ..., 0]).all()
    told = works(capsys, "evaluate", straight, "--samples", 4, "--features.extractor", "none")
    assert "held-out loss" in told
    told = works(capsys, "evaluate", straight, "--samples", 4)  # the rest is still measured
    assert "held-out loss" in told and "copies" in told and "two axes" in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--network unet", "2 axes"),
        ("--data.augment.p 0.5 --network.augment-dim 9", "data.augment"),
        ("--preview.distance 10", "preview.distance"),
    ],
)  # fmt: skip
def test_what_is_for_images_only_is_refused(
    flags: str, message: str, clips: Path, tmp_path: Path, capsys: Capture
) -> None:
    told = fails(capsys, "train", clips, "--out", tmp_path / "run", *flags.split())
    assert message in told and not (tmp_path / "run").exists()
