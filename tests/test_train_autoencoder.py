"""Runs that train autoencoders: resumed, shown, loaded, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import Capture, fails, works
from PIL import Image
from sameruns import check_micro_batches, check_resumed

from patchdiffusion import TrainConfig, load_model
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.encoders.autoencoder import load_autoencoder
from patchdiffusion.encoders.discriminator import PatchGAN
from patchdiffusion.encoders.perceptual import ModelFeatures
from patchdiffusion.metrics.reconstruct import psnr
from patchdiffusion.nets.autoencoder import KLConfig
from patchdiffusion.nets.quantize import VQConfig
from patchdiffusion.plans import Stratified
from patchdiffusion.train.autoencoding import AutoencoderTask
from patchdiffusion.train.report import read_log

SMALL = KLConfig(base=4, mult=(1, 2), groups=2)
QUANTIZED = VQConfig(base=4, mult=(1, 2), groups=2, codes=16)
GAN = PatchGAN(width=8, layers=2, start=0.5, warmup=0.25)
TASK = AutoencoderTask(adversary=GAN)


def config(path: Path, network: Any = SMALL, task: AutoencoderTask = TASK) -> TrainConfig:
    plain = tiny.config(path, network=network, task=task, patches=Stratified.whole(), images=16.0)
    return replace(plain, preview=replace(plain.preview, grid=4, held_out=3))


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.run(config(images), tmp_path_factory.mktemp("autoencoder") / "run")


@pytest.mark.parametrize(
    ("network", "task"),
    [
        (SMALL, replace(TASK, learn_log_variance=True)),
        (replace(QUANTIZED, update="average", decay=0.5), TASK),
    ],
    ids=["kl", "vq"],
)
def test_resumed_to_the_bit(network: Any, task: Any, images: Path, tmp_path: Path) -> None:
    """With its discriminator, log-variance or averages of a codebook."""
    check_resumed(config(images, network, task), tmp_path)


def test_micro_batches(images: Path, tmp_path: Path) -> None:
    plain = AutoencoderTask(adversary=replace(GAN, start=0.99, warmup=0.99))
    check_micro_batches(config(images, QUANTIZED, plain), tmp_path)


def test_what_a_run_shows(run: Path, images: Path, capsys: Capture) -> None:
    records = read_log(run)
    preview = [r for r in records if r["kind"] == "preview"][-1]
    status = [r for r in records if r["kind"] == "status"]
    assert {"l1", "perceptual", "kl"} <= status[0]["scalars"].keys()
    assert "discriminator" not in status[0]["scalars"]
    assert "adversarial weight" in status[-1]["scalars"]
    loaded = load_autoencoder(run)
    pack = prepare_data(DataConfig(path=str(images)))
    x = pack.images[pack.some_held_out(3)].movedim(-1, 1).float() / 127.5 - 1
    y = loaded.decode(loaded.moments(x)[0]).clamp(-1, 1)
    assert preview["psnr"] == pytest.approx(float(psnr(x, y).mean()), abs=1e-4)
    with Image.open(run / "samples" / preview["picture"]) as picture:
        assert picture.mode == "RGB"
        assert picture.info["pairs"] == "image, reconstruction"
    works(capsys, "report", run)
    assert "psnr" in (run / "report.html").read_text()


def test_it_is_loaded_as_an_autoencoder(run: Path, capsys: Capture) -> None:
    model = load_model(run)
    assert model.config.head.kind == "autoencoder" and model.config.num_classes == 0
    assert model.autoencoder.factor == 2
    assert "a denoiser is needed" in fails(capsys, "sample", run)
    out = works(capsys, "info", run)
    assert "autoencoder" in out


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_and_sizes(channels: int, tmp_path: Path) -> None:
    """Sizes that are no multiple of the factor are padded and cut."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(24):
        values = tiny.picture(i, 18)[:, :, :1] if channels == 1 else np.dstack(
            [tiny.picture(i, 18), tiny.picture(i + 1, 18)[:, :, :1]]
        )  # fmt: skip
        Image.fromarray(values.squeeze()[:17, :18]).save(folder / f"{i}.png")
    network = replace(SMALL, mult=(1, 1, 2), channels=channels)
    plain = config(folder, network)
    data = replace(plain.data, channels=channels, resolution=(17, 18))
    out = tiny.run(replace(plain, data=data), tmp_path / "run")
    x = torch.rand(1, channels, 17, 18)
    loaded = load_autoencoder(out)
    assert loaded.decode(loaded.moments(x)[0], (17, 18)).shape == x.shape


def test_values_of_sensors(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(40, 7, (24, 16, 16, 2)).astype("f4")
    np.save(tmp_path / "values.npy", values)
    plain = config(tmp_path / "values.npy", replace(SMALL, channels=2))
    preview = replace(plain.preview, distance=0)
    out = tiny.run(replace(plain, preview=preview), tmp_path / "run")
    (record,) = [r for r in read_log(out) if r["kind"] == "preview"]
    assert 0 < record["psnr"] < 60


def test_features_of_a_model(images: Path, tmp_path: Path) -> None:
    """A frozen denoiser of our own as perceptual distance."""
    teacher = tiny.run(tiny.config(images), tmp_path / "teacher")
    task = replace(TASK, perceptual=ModelFeatures(model=str(teacher)))
    out = tiny.run(config(images, SMALL, task), tmp_path / "run")
    assert all(r["scalars"]["perceptual"] > 0 for r in read_log(out) if r["kind"] == "status")
    wrong = replace(TASK, perceptual=ModelFeatures(model=str(teacher), taps=("nothing",)))
    with pytest.raises(ValueError, match="has no activation 'nothing'"):
        tiny.training(config(images, SMALL, wrong), tmp_path / "wrong")


def test_what_is_refused(images: Path, tmp_path: Path, capsys: Capture) -> None:
    few = ("--images", 8, "--batch", 4, "--device", "cpu")
    for flags, says in (
        (("--network", "unet"), "the network is unet, of the kind denoiser"),
        (("--network.channels", 1), "network.channels is 1, and the images have 3"),
        (("--task.adversary.layers", 4), "needs crops of at least 48 pixels"),
        (("--task.perceptual", "lpips"), "the weights of VGG16 are missing"),
        (("--task.perceptual", "model"), "the model of the perceptual distance is missing"),
        (("--objective", "consistency"), "an autoencoder has its own"),
        (("--task.kl", -1), "kl must be >= 0"),
        (("--shard",), "--shard"),
        (("--network.groups", 7), "groups must divide"),
    ):
        told = fails(capsys, "train", "autoencoder", images, "--out", tmp_path / "x", *few, *flags)
        assert says in told, told
    told = fails(capsys, "train", images, "--out", tmp_path / "x", *few, "--network", "kl")
    assert "the network is kl, of the kind autoencoder" in told
    wrong = ("classifier", images, "--network", "vq")
    told = fails(capsys, "train", *wrong, "--out", tmp_path / "x", *few)
    assert "of the kind autoencoder" in told
    assert not (tmp_path / "x").exists()


def test_the_recipe(images: Path, tmp_path: Path, capsys: Capture) -> None:
    flags = ("--images", 8, "--batch", 4, "--network.base", 8, "--preview.samples", 1)
    command = ("train", "autoencoder", images, *flags, "--device", "cpu")
    for word in ("kl", "vq"):
        works(capsys, *command, "--kind", word, "--out", tmp_path / word)
        assert load_model(tmp_path / word).autoencoder.factor == 4
