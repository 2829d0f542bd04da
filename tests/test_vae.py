"""The recipe `vae`: the loss of DiffuseVAE, and an autoencoder that a refiner takes."""

from pathlib import Path

import tiny
import torch
from commands import Capture, fails, works

from patchdiffusion import TrainConfig, load_model
from patchdiffusion.conditioners.reconstruction import opened
from patchdiffusion.nets.vae import VAE, VAEConfig
from patchdiffusion.plans import Group
from patchdiffusion.recipes import Facts, vae
from patchdiffusion.system.files import read_json
from patchdiffusion.system.serialize import decode

SMALL = "--network.base 4 --network.mult 1 2 --network.latent-channels 3 --batch 4 --images 16 "
SMALL += "--preview.samples 1 --preview.grid 4 --preview.held-out 2"


def test_the_loss_is_that_of_each_image(images: Path, tmp_path: Path) -> None:
    """Squared error of images in [0, 1] and the divergence, sums over the image, times 4 / CHW."""
    facts = Facts(path=str(images), canvas=(16, 16))
    config = vae(facts)
    training = tiny.training(config, tmp_path / "run")
    assert isinstance(training.network, VAE)
    feed, module = training.stepper.feed, training.stepper.module
    for count in (1, 5):
        batch, draws = feed.batch(
            Group((16, 16), count, 1.0), step=0, position=0, first=0, chunk=range(count)
        )
        with torch.no_grad():
            loss = module(batch, draws).per_sample
            mean, std = training.network.moments(batch.images)
            z = mean + std * draws.normal("latents", tuple(mean.shape[1:]))
            x, y = ((v + 1) / 2 for v in (batch.images, training.network.decode(z)))
        error = (x - y).square().flatten(1).sum(1)
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).flatten(1).sum(1)
        torch.testing.assert_close(loss, 4 * (error + kl) / x[0].numel(), rtol=1e-4, atol=1e-6)


def test_sizes_of_the_recipe() -> None:
    assert vae(Facts()).network == VAEConfig(latent_channels=32, side=32)
    gpu = vae(Facts(device="cuda", canvas=(64, 48))).network
    assert isinstance(gpu, VAEConfig) and (gpu.latent_channels, gpu.side) == (512, 64)


def test_from_images_to_samples(images: Path, tmp_path: Path, capsys: Capture) -> None:
    run, refiner = tmp_path / "vae", tmp_path / "refiner"
    works(capsys, "train", "vae", images, "--out", run, *SMALL.split())
    config = decode(TrainConfig, read_json(run / "config.json"))
    assert config.network == VAEConfig(base=4, mult=(1, 2), latent_channels=3, side=16)
    assert opened(str(run), "cpu").digest == load_model(run).digest
    small = "--network.base 4 --network.mult 1 2 --network.attention --batch 4 --images 8 "
    small += "--preview.samples 1 --preview.grid 4 --preview.sample-steps 1 --preview.held-out 2"
    flags = (*small.split(), "--conditioners", "reconstruction")
    flags = (*flags, "--conditioners.reconstruction.model", run)
    works(capsys, "train", images, "--out", refiner, *flags)
    works(capsys, "sample", refiner, "--count", 2, "--steps", 1)
    told = fails(capsys, "sample", run)
    assert "autoencoder" in told
