"""Evaluation of autoencoders, and weights that travel to diffusers and back."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import Capture, fails, works

from patchdiffusion import TrainConfig
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.encoders.autoencoder import load_autoencoder
from patchdiffusion.encoders.discriminator import NoAdversary
from patchdiffusion.interop.autoencoders import export_autoencoder
from patchdiffusion.metrics.autoencode import evaluated
from patchdiffusion.metrics.frechet import Moments, frechet_distance
from patchdiffusion.metrics.reconstruct import psnr
from patchdiffusion.nets.quantize import VQConfig
from patchdiffusion.plans import Stratified
from patchdiffusion.system.files import read_json
from patchdiffusion.train.autoencoding import AutoencoderTask

QUANTIZED = VQConfig(base=4, mult=(1, 2), groups=2, codes=16)


def config(path: Path) -> TrainConfig:
    task = AutoencoderTask(adversary=NoAdversary())
    changes = {"network": QUANTIZED, "task": task, "patches": Stratified.whole()}
    return tiny.config(path, images=4.0, **changes)


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.run(config(images), tmp_path_factory.mktemp("autoencoder") / "run")


def test_measures_of_a_run(run: Path, images: Path, tmp_path: Path, capsys: Capture) -> None:
    """Of its held-out images, or of others; features are those of `toys`."""
    card = tmp_path / "card.json"
    own = ("--features.extractor", "toys:ToyFeatures")
    out = works(capsys, "evaluate", run, *own, "--data", images, "--save", card)
    assert "PSNR" in out and "codes used" in out and "rFID" in out
    found = read_json(card)
    loaded, pack = load_autoencoder(run), prepare_data(DataConfig(path=str(images)))
    assert found["images"] == len(pack) == 40
    x = pack.images.movedim(-1, 1).float() / 127.5 - 1
    mean, _ = loaded.moments(x)
    y = loaded.decode(mean).clamp(-1, 1)
    assert found["psnr"] == pytest.approx(float(psnr(x, y).mean()), abs=1e-4)
    codes = loaded.network.codes_of(mean)
    assert found["codes_used"] == pytest.approx(len(codes.unique()) / 16)
    per_channel = mean.movedim(1, 0).flatten(1).double()
    assert found["latents"]["mean"] == pytest.approx(per_channel.mean(1).tolist(), abs=1e-5)
    assert found["latents"]["posterior_std"] == [0.0] * 4
    bytes_of = ((torch.cat([x, y]) * 127.5 + 127.5).round().clamp(0, 255)).flatten(2)
    a, b = (torch.cat([part.mean(2), part.std(2)], dim=1) for part in bytes_of.split(40))
    expected = frechet_distance(Moments.of(a), Moments.of(b))
    assert found["rfid"] == pytest.approx(expected, rel=1e-3)
    assert found["card"]["model"]["digest"] == loaded.digest
    out = works(capsys, "evaluate", run, "--features.extractor", "none")
    assert "2 images" in out and (run / "evaluations" / "0001.json").exists()


def test_without_images_there_is_nothing_to_measure(run: Path, images: Path) -> None:
    pack = prepare_data(DataConfig(path=str(images)))
    with pytest.raises(ValueError, match="no image to reconstruct"):
        evaluated(load_autoencoder(run), pack, torch.zeros(0, dtype=torch.int64))


def test_weights_travel_to_diffusers_and_back(run: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder = export_autoencoder(run, tmp_path / "out", scale=0.5)
    other, ours = diffusers.VQModel.from_pretrained(folder), load_autoencoder(run)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        z = other.encode(x).latents
        torch.testing.assert_close(ours.moments(x)[0], z, atol=1e-5, rtol=1e-5)
        decoded = other.decode(z).sample
    torch.testing.assert_close(ours.decode(z), decoded, atol=1e-5, rtol=1e-5)
    again = load_autoencoder(folder)
    assert again.notes == {"scaling_factor": 0.5}
    assert torch.equal(again.decode(z), ours.decode(z))
    with pytest.raises(ValueError, match="always has convolutions"):
        diffusers_less = replace(QUANTIZED, quant_conv=False).build()
        export_autoencoder(replace(ours, network=diffusers_less), tmp_path / "x")


def test_evaluate_of_other_data(run: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "does not exist" in fails(capsys, "evaluate", run, "--data", tmp_path / "none")
