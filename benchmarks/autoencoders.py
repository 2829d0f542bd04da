"""Autoencoders of glyphs: what discriminator, posterior and revived codes do.

python benchmarks/autoencoders.py RUNS [--only NAME ...]   trains in RUNS, writes results
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from patchdiffusion import recipes
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.encoders.discriminator import NoAdversary, PatchGAN
from patchdiffusion.encoders.perceptual import NoPerceptual
from patchdiffusion.metrics.autoencode import evaluated
from patchdiffusion.model import load_model
from patchdiffusion.nets.autoencoder import KLConfig
from patchdiffusion.nets.quantize import VQConfig
from patchdiffusion.system.png import enlarge, grid
from patchdiffusion.train.autoencoding import AutoencoderTask
from patchdiffusion.train.config import RunConfig, TrainConfig
from patchdiffusion.train.loop import train

ROOT = Path(__file__).parents[1]
SIDE = 32
HELD_OUT = 256
PLAIN = AutoencoderTask(perceptual=NoPerceptual(), adversary=NoAdversary())
GAN = PatchGAN(width=32, layers=2, start=0.3, warmup=0.1)
SMALL: dict[str, Any] = {"channels": 1, "base": 16, "mult": (1, 2, 2), "mid_attention": False}
KL = KLConfig(**SMALL, latent_channels=4)
VQ = VQConfig(**{**SMALL, "base": 8}, latent_channels=4)
VARIANTS: dict[str, tuple[Any, AutoencoderTask]] = {
    "kl": (KL, PLAIN),
    "kl, discriminator": (KL, replace(PLAIN, adversary=GAN)),
    "kl, weight 1e-2": (KL, replace(PLAIN, kl=1e-2)),
    "vq": (VQ, PLAIN),
    "vq, no revival": (replace(VQ, revive=0.0), PLAIN),
}


def configuration(name: str) -> TrainConfig:
    """Run of a variant, on whole glyphs; codebooks need many steps, not many images."""
    network, task = VARIANTS[name]
    images, batch = (4000.0, 16) if isinstance(network, KLConfig) else (1200.0, 2)
    plain = recipes.autoencoder(recipes.Facts(canvas=(SIDE, SIDE), channels=1))
    return replace(
        plain,
        name=name,
        data=replace(plain.data, path="glyphs", resolution=SIDE, channels=1),
        network=network,
        task=task,
        images=images,
        batch=batch,
        preview=replace(plain.preview, samples=1, status=10),
    )


def main() -> None:
    """Train variants one after another, measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = ROOT / "benchmarks" / "results" / "autoencoders.json"
    rows = json.loads(file.read_text())["results"] if file.exists() else {}
    pictures = []
    for name in options.only:
        config = configuration(name)
        run = options.runs / name.replace(", ", "-").replace(" ", "-")
        train(config, RunConfig(out=run, device="cpu", threads=1))
        pack = prepare_data(config.data)
        model = load_model(run)
        result = evaluated(model.autoencoder, pack, pack.some_held_out(HELD_OUT))
        length = {"steps": model.config.step, "batch": config.batch}
        rows[name] = length | {k: v for k, v in result.items() if k != "images"}
        shown = pack.some_held_out(HELD_OUT)[:12]
        x = pack.images[shown].movedim(-1, 1).float() / 127.5 - 1
        with torch.no_grad():
            y = model.autoencoder.decode(model.autoencoder.moments(x)[0])
        pictures += [x] * (not pictures) + [y]
        facts = {
            "script": "benchmarks/autoencoders.py",
            "data": f"built-in glyphs at {SIDE} x {SIDE}, {HELD_OUT} held out",
            "torch": torch.__version__,
            "results": rows,
        }
        file.write_text(json.dumps(facts, indent=1) + "\n")
    values = ((torch.cat(pictures) * 127.5 + 127.5).round().clamp(0, 255)).to(torch.uint8)
    picture = enlarge(grid(values.movedim(1, -1).numpy(), columns=12), 900)
    Image.fromarray(np.ascontiguousarray(picture[..., 0])).save(options.runs / "pictures.png")


if __name__ == "__main__":
    main()
