"""Latents on two processes."""

from pathlib import Path

import harness
from harness import drive, near_run

from patchdiffusion.model import ModelConfig, save_model
from patchdiffusion.nets.autoencoder import KLConfig
from patchdiffusion.nets.heads import AutoencoderHead
from patchdiffusion.noise import LogNormal
from patchdiffusion.parameterisation import EDM


def test_latents_on_two_processes(images: Path, tmp_path: Path) -> None:
    """The same draws of latents for any number of processes, which encode the images once."""
    shape = KLConfig(base=4, mult=(1, 1), groups=2, mid_attention=False)
    state = shape.build().state_dict()
    model = ModelConfig(
        network=shape, head=AutoencoderHead(), precond=EDM(), noise=LogNormal(), canvas=(16, 16)
    )
    save_model(tmp_path / "autoencoder", model, state, state)
    latents = {"data.autoencoder": str(tmp_path / "autoencoder"), "network.channels": 4}
    one, two = tmp_path / "one", tmp_path / "two"
    assert harness.here(images, one, config=latents | {"data.variants": 2}).code == 0
    ended = drive(images, two, size=2, config=latents | {"data.variants": 2, "micro_batch": 1})
    assert [e.code for e in ended] == [0, 0], ended
    near_run(one, two)
