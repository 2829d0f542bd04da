"""Runs on latents: trained, resumed, sampled, moved and measured like those on pixels."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from codecs_linear import known, save_codec
from commands import Capture, fails, names, refuses, works
from PIL import Image
from sameruns import check_resumed

from patchdiffusion import TrainConfig, load, recipes, train
from patchdiffusion.accel.tiles import Tiles
from patchdiffusion.data import latents
from patchdiffusion.data.latents import AUTOENCODER
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.encoders.autoencoder import load_autoencoder
from patchdiffusion.metrics.evaluate import Evaluation
from patchdiffusion.metrics.options import EvaluationConfig
from patchdiffusion.model import load_model
from patchdiffusion.recipes import Facts
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.sizes import PatchLaw

__all__ = ["known"]  # a fixture
TINY = "--network.base 4 --network.mult 1 2 --network.blocks 1 --network.attention"
SHORT = (
    "--clock steps --images 2 --batch 4 --preview.samples 1 --preview.grid 2 "
    "--preview.sample-steps 2 --preview.held-out 2 --preview.status 1000000"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    tiny.write_images(folder / "photos", count=40, side=16)
    save_codec(folder / "codec")
    save_codec(folder / "other", seed=1)
    return folder


def config(folder: Path, **data: object) -> TrainConfig:
    plain = tiny.config(folder / "photos")
    data = {"autoencoder": str(folder / "codec"), **data}
    return replace(
        plain,
        data=replace(plain.data, **data),  # pyright: ignore[reportArgumentType]
        network=replace(plain.network, channels=12),
    )


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A run, in the folder of the tests."""
    return tiny.run(config(folder), folder / "run")


# ---- Training ----


@pytest.mark.parametrize("data", [{}, {"flip": True, "variants": 2}], ids=["plain", "versions"])
def test_resumed_to_the_bit(folder: Path, tmp_path: Path, data: dict[str, object]):
    check_resumed(config(folder, **data), tmp_path)


def test_a_run_is_that_of_its_latents_wherever_they_are(
    folder: Path, tmp_path: Path, trained: Path
):
    """A pack of latents trains as it is; the autoencoder may be moved."""
    pack = prepare_data(config(folder).data)
    plain = config(folder)
    as_pack = replace(plain, data=DataConfig(path=str(pack.path)))
    run = tiny.run(as_pack, tmp_path / "pack")
    assert tiny.weights(run) == tiny.weights(trained)
    shutil.copytree(folder / "codec", tmp_path / "codec")
    moved = replace(plain, data=replace(plain.data, autoencoder=str(tmp_path / "codec")))
    assert prepare_data(moved.data).path == pack.path
    with refuses(pack.path, load_autoencoder(folder / "other").digest, "--autoencoder"):
        prepare_data(replace(as_pack.data, autoencoder=str(folder / "other")))


def test_latents_are_used_as_they_are(folder: Path):
    path = str(prepare_data(config(folder).data).path)
    assert prepare_data(DataConfig(path=path, resolution=16, channels=3)).path == Path(path)
    for name, value in (
        ("resolution", 8),
        ("variants", 3),
        ("range", (0.0, 1.0)),
        ("labels", "off"),
    ):
        with refuses(path, f"--data.{name}"):
            prepare_data(replace(DataConfig(path=path), **{name: value}))  # pyright: ignore
    with refuses("data.variants", 2, "--autoencoder"):
        prepare_data(DataConfig(path=str(folder / "photos"), variants=2))


def test_the_canvas_is_that_of_the_latents(folder: Path, tmp_path: Path, trained: Path):
    training = tiny.training(config(folder), tmp_path / "run")
    assert training.canvas == (8, 8) and training.pack.channels == 12
    batch, _ = training.stepper.feed.batch(
        training.plan.groups[-1], step=0, position=0, first=0, chunk=range(4)
    )
    assert batch.images.shape == (4, 12, 4, 4)
    with Image.open(next((trained / "samples").glob("*.png"))) as picture:
        assert picture.height > 8 and picture.mode == "RGB"


def test_mirrored_latents_are_asked_for(folder: Path, tmp_path: Path):
    plain = prepare_data(config(folder).data)
    with refuses("data.flip", "--data.no-flip"):
        tiny.training(
            replace(config(folder), data=DataConfig(path=str(plain.path), flip=True)), tmp_path
        )
    assert prepare_data(config(folder, flip=True).data).space.mirrors
    assert not Facts.of(plain, "").mirrors


def test_augmentation_is_for_pixels(folder: Path, tmp_path: Path):
    plain = config(folder)
    plain = replace(
        plain,
        data=replace(plain.data, augment=replace(plain.data.augment, p=0.5)),
        network=replace(plain.network, augment_dim=9),
    )
    with refuses("data.augment", "latents"):
        tiny.training(plain, tmp_path)


def test_the_recipe_for_latents():
    """The paper's two sides, and no network of pixels."""
    for device in ("cpu", "cuda"):
        facts = Facts(canvas=(128, 128), channels=4, count=50_000, latents=True, device=device)
        chosen = recipes.folder(facts)
        assert isinstance(chosen.patches, PatchLaw)
        assert chosen.patches.fractions == (1.0, 0.5) and chosen.patches.probs == (0.5, 0.5)
        assert chosen.network.channels == 4 and chosen.precond.sigma_data == 0.5  # pyright: ignore
        assert type(chosen.network) is type(
            recipes.folder(replace(facts, latents=False, count=9)).network
        )


# ---- Sampling and measuring ----


def test_samples_are_pixels(trained: Path, folder: Path):
    pipeline = load(trained, device="cpu")
    images = pipeline.sample(3, steps=2)
    assert images.dtype == np.uint8 and images.shape == (3, 16, 16, 3)
    assert np.array_equal(pipeline.sample(1, seed=2, steps=2)[0], images[2])
    large = pipeline.sample(1, config=SamplerConfig(steps=2, canvas=Tiles(size=(12, 16))))
    assert large.shape == (1, 24, 32, 3)


def test_a_model_is_moved_alone(trained: Path, tmp_path: Path):
    shutil.copytree(trained / "model", tmp_path / "alone")
    alone, there = load(tmp_path / "alone", device="cpu"), load(trained, device="cpu")
    assert np.array_equal(alone.sample(2, steps=2), there.sample(2, steps=2))


def test_a_model_whose_autoencoder_is_gone_or_another_one(
    trained: Path, folder: Path, tmp_path: Path
):
    digest = load_autoencoder(folder / "codec").digest
    model = tmp_path / "model"
    shutil.copytree(trained / "model", model)
    shutil.rmtree(model / AUTOENCODER)
    places = latents._PLACES.pop(digest)  # as on another machine
    try:
        with refuses(model / AUTOENCODER, digest):
            load_model(model)
        latents._PLACES.pop(digest)
        shutil.copytree(folder / "other", model / AUTOENCODER)
        with refuses(model / AUTOENCODER, digest, load_autoencoder(folder / "other").digest):
            load_model(model)
    finally:
        latents._PLACES[digest] = places


def test_evaluation_compares_pixels(trained: Path, folder: Path):
    class Means:
        name, facts = "means", {}

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            assert images.dtype == torch.uint8 and images.shape[1:] == (16, 16, 3)
            return torch.cat([images.float().mean((1, 2)), images.float().std((1, 2))], 1)

    pipeline, pack = load(trained, device="cpu"), prepare_data(config(folder).data)
    settings = EvaluationConfig(samples=8, held_out=2, sampler=SamplerConfig(steps=2), nearest=2)
    result = Evaluation(pack, settings, Means()).of_model(pipeline)  # pyright: ignore
    assert {"held_out", "frechet_distance", "copy_rate"} <= result.keys(), result.keys()
    pixels = prepare_data(replace(config(folder).data, autoencoder=None))
    other = Evaluation(pixels, settings, Means()).of_model(pipeline)  # pyright: ignore
    assert "loss" not in other and "latents" in other["left_out"]["held-out loss"]
    assert other["frechet_distance"] == pytest.approx(result["frechet_distance"])


def test_commands(folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    photos, codec = folder / "photos", folder / "codec"
    short = [*TINY.split(), *SHORT.split()]
    out = works(capsys, "prepare", photos, "--autoencoder", codec, "--flip", "--out", "pack")
    assert "latents: 8x8 with 12 channels, of 16x16 pixels, mirrored, too" in out
    command = ["train", photos, "--autoencoder", codec, "--name", "run", *short]
    assert "latents: 8x8" in works(capsys, *command)
    stored = json.loads(Path("runs/run/config.json").read_text())["data"]
    assert stored["autoencoder"] == str(codec)
    works(capsys, *command, "--images", "3")  # goes on
    works(capsys, "sample", "runs/run", "--count", "2", "--steps", "2")
    with Image.open("runs/run/generated/0001/seed-00000001.png") as image:
        assert image.size == (16, 16)
    assert f"autoencoder {load_autoencoder(codec).digest}" in works(capsys, "info", "runs/run")
    few = ["--samples", "4", "--steps", "2", "--features.extractor", "none"]
    works(capsys, "evaluate", "runs/run", *few)
    error = fails(capsys, "evaluate", "runs/run", *few, "--data", photos)
    assert names(error, "loss", "latents")
    error = fails(capsys, "evaluate", "runs/run", *few, "--bits.images", "2")
    assert names(error, "latents", "pixels")
    error = fails(
        capsys, "sample", "runs/run", "--canvas", "inpaint", "--canvas.image", "a.png",
        "--canvas.mask", "a.png",
    )  # fmt: skip
    assert "\n" not in error
    error = fails(capsys, "train", photos, "--autoencoder", "nowhere", *short)
    assert names(error, "nowhere")
    error = fails(capsys, "train", photos, "--autoencoder", codec, "--data.channels", "1", *short)
    assert names(error, 1, 3, "channels")
    error = fails(capsys, "train", photos, "--autoencoder", codec, "--data.variants", "0", *short)
    assert names(error, "variants", 0)


def test_conditions_of_whole_images_are_latents(folder: Path, tmp_path: Path):
    """What a conditioner gets are whole latents, mirrored as the batch is."""
    training = tiny.training(config(folder, flip=True), tmp_path / "run")
    group = training.plan.groups[-1]
    feed = training.stepper.feed
    batch, _ = feed.batch(group, step=1, position=0, first=0, chunk=range(4))
    whole = feed.whole(batch)
    stored = training.pack.images[batch.index].movedim(-1, 1).float()
    mean = training.pack.space.to_network(stored, None, batch.flip)
    expected = torch.where(batch.flip.view(-1, 1, 1, 1), mean.flip(-1), mean)
    assert bool(batch.flip.any()) and whole.equal(expected)
    varied = tiny.training(config(folder, variants=2), tmp_path / "varied").stepper.feed
    with refuses("variants", 1):
        varied.whole(batch)


def test_in_python(folder: Path, tmp_path: Path):
    """A keyword is the short flag; the data may be given beside it."""
    settings = {"images": 2, "clock": "steps", "batch": 4, "preview": {"samples": 1, "grid": 2}}
    network = {"base": 4, "mult": (1, 2), "blocks": 1, "attention": ()}
    run = train(
        folder / "photos",
        out=tmp_path / "run",
        autoencoder=folder / "codec",
        data={"labels": "off"},
        network=network,
        **settings,
    )
    assert run.sample(2, steps=2).shape == (2, 16, 16, 3)


def test_decoding_is_float32_whatever_the_network_is(trained: Path):
    space = load_model(trained).config.space
    x = torch.linspace(-1, 1, 12 * 64).reshape(1, 12, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(space.to_values(x), space.to_values(x.double()))
        low = space.to_values(x)
    assert np.array_equal(low, space.to_values(x))
