"""DiffuseVAE against a plain denoiser at equal operations and few evaluations: docs/diffusevae.md.

    python benchmarks/diffusevae.py glyphs
    python benchmarks/diffusevae.py cifar --data PACK

Trains a variational autoencoder, denoisers that refine its reconstructions by both formulations,
and one without a condition for as many operations as autoencoder and refiner together. Samples of
5 and 10 evaluations are compared with real images: by Frechet and kernel distance of features
of random convolutions, which need no downloads, and by the sliced distance of pixels. After a kill
the same command goes on. Results go to benchmarks/results/diffusevae-NAME.json, pictures of
glyphs to docs.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchdiffusion import Pipeline, SamplerConfig, cli, load, rng
from patchdiffusion.cond import Cond
from patchdiffusion.conditioners.priors import Mixture
from patchdiffusion.conditioners.reconstruction import (
    Reconstruction,
    decoded,
    encoded,
    moments,
    opened,
)
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.metrics.frechet import Moments, frechet_distance
from patchdiffusion.metrics.kernel import kernel_distance
from patchdiffusion.metrics.sliced import sliced_distance
from patchdiffusion.nets.count import count
from patchdiffusion.solvers import DDIM
from patchdiffusion.system.files import read_json, write_json
from patchdiffusion.system.png import grid, save_png
from patchdiffusion.train.report import read_log

ROOT = Path(__file__).parents[1]
EVALUATIONS = (5, 10)
WHOLE = "--patches stratified --patches.fractions 1 --patches.probs 1"
FEW = "--preview.samples 1 --preview.grid 16 --preview.sample-steps 5 --preview.held-out 64"


@dataclass(frozen=True)
class Setting:
    """Data, sizes and lengths of a comparison."""

    network: str
    vae: str
    images: int
    vae_images: int
    common: str
    refiners: tuple[str, ...] = ("refiner", "refiner-2")
    """Formulations 1 and 2."""


SETTINGS = {
    "glyphs": Setting(
        network="--network.base 16 --network.mult 1 2 2 --network.num-classes 0",
        vae="--network.base 16 --network.mult 1 2 4 4 --network.latent-channels 16 --task.kl 1.2",
        images=8_000,
        vae_images=20_000,
        common="--batch 32 --ema.half-life 2000",
    ),
    "cifar": Setting(
        network="--network.base 16 --network.mult 1 2 2 --network.num-classes 0",
        vae="--network.base 16 --network.mult 1 2 4 4 --network.latent-channels 64 --task.kl 1.2",
        images=5_000,
        vae_images=20_000,
        common="--batch 32 --ema.half-life 2000",
        refiners=("refiner",),
    ),
}


def train(words: str) -> None:
    """Run or resume a training; raises `RuntimeError` if it fails."""
    if cli.main(["train", *words.split()]):
        raise RuntimeError(f"patchdiffusion train {words}")


def operations(run: Path) -> float:
    """Floating-point operations of the training of a run."""
    return float([r["flops"] for r in read_log(run) if r["kind"] == "status"][-1])


def train_all(setting: Setting, data: str, runs: Path) -> dict[str, float]:
    """Train what is missing; the operations of each run, with those of the autoencoder in it."""
    common, vae = f"{WHOLE} {FEW} {setting.common}", runs / "vae"
    train(
        f"vae {data} --out {vae} {setting.vae} {setting.common} {FEW} --images {setting.vae_images}"
    )
    refines = f"--conditioners reconstruction --conditioners.reconstruction.model {vae}"
    for name in setting.refiners:
        more = "--network.image-shift" if name == "refiner-2" else ""
        words = f"{data} --out {runs / name} {setting.network} {common} --images {setting.images}"
        train(f"{words} {refines} {more}")
    network = opened(str(vae / "model"), "cpu").network
    side = network.factor
    each = 2 * count(network, (side, side)).macs  # one pass forward for each image
    total = operations(runs / "refiner") + operations(vae) + each * setting.images
    length = round(setting.images * total / operations(runs / "refiner"))
    train(f"{data} --out {runs / 'plain'} {setting.network} {common} --images {length}")
    return {
        "autoencoder": operations(vae),
        "refiner": operations(runs / "refiner") + each * setting.images,
        "plain": operations(runs / "plain"),
        "plain images": length,
    }


# ---- Measures ----


@torch.no_grad()
def features(images: Tensor) -> Tensor:
    """Means and deviations of random convolutions at three scales: uint8 [B, *S, C] -> [B, D]."""
    x = images.movedim(-1, 1).float() / 127.5 - 1
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
    generator, parts = torch.Generator().manual_seed(0), []
    for scale in range(3):
        h = F.avg_pool2d(x, 2**scale) if scale else x
        for cin, cout in ((3, 48), (48, 32)):
            weight = torch.randn(cout, cin, 3, 3, generator=generator) * (2 / (9 * cin)) ** 0.5
            h = F.relu(F.conv2d(h, weight, padding=1))
        parts += [h.mean((2, 3)), h.std((2, 3))]
    return torch.cat(parts, dim=1)


def laplacian(images: Tensor) -> float:
    """Mean square of the Laplacian of images uint8 [B, *S, C], in [-1, 1]: their sharpness."""
    x = images.movedim(-1, 1).float() / 127.5 - 1
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(x.shape[1], 1, 3, 3)
    return float(F.conv2d(x, kernel, groups=x.shape[1]).square().mean())


def distances(images: Tensor, real: Tensor) -> dict[str, float]:
    """Distances of images from real ones, both uint8 [N, *S, C]."""
    a, b = features(images), features(real)
    pixels = [x.flatten(1).float() / 127.5 - 1 for x in (images, real)]
    return {
        "frechet": frechet_distance(Moments.of(a), Moments.of(b)),
        "kernel": kernel_distance(a, b)[0],
        "sliced": sliced_distance(*pixels)[0] / (3 * pixels[0].shape[1]),
        "laplacian": laplacian(images),
    }


def drawn(pipeline: Pipeline, samples: int, steps: int, **settings: Any) -> Tensor:
    """Samples of a number of evaluations: uint8 [N, *S, C]."""
    config = SamplerConfig(solver=DDIM(), steps=steps)
    return torch.from_numpy(pipeline.sample(samples, config=config, batch=128, **settings))


def with_mixture(pipeline: Pipeline, pack: Pack, components: int) -> tuple[Reconstruction, Any]:
    """The conditioner of a refiner with a mixture as prior, and the fitted mixture."""
    (conditioner,) = pipeline.model.config.conditioners
    assert isinstance(conditioner, Reconstruction)
    order = pack.train[torch.from_numpy(rng.permutation(0, "encoded", 0, len(pack.train)))]
    chunks = (
        pack.space.to_network(pack.images[part].movedim(-1, 1).float())
        for part in order[:20_000].split(256)
    )
    autoencoder = opened(conditioner.model, "cpu")
    mixture = Mixture(components=components)
    return replace(conditioner, prior=mixture), mixture.fit(encoded(autoencoder, chunks, 20_000))


def some(pack: Pack, index: Tensor, count: int) -> Tensor:
    """Random images of a pack, in random order, as it may be sorted: uint8 [N, *S, C]."""
    order = torch.from_numpy(rng.permutation(0, "measured", 0, len(index)))
    return pack.images[index[order[:count]]].contiguous()


def measure(
    runs: Path, pack: Pack, result: Path, samples: int, refiners: tuple[str, ...]
) -> dict[str, Any]:
    """Measure what is missing in the result."""
    facts: dict[str, Any] = read_json(result) if result.is_file() else {}
    real = some(pack, pack.train, 4 * samples)
    held = some(pack, pack.heldout, samples)

    def once(name: str, work: Any) -> None:
        if name not in facts:
            facts[name] = work()
            write_json(result, facts)

    once("real", lambda: distances(held, real))
    refiner = load(runs / "refiner")
    (conditioner,) = refiner.model.config.conditioners
    assert isinstance(conditioner, Reconstruction)
    pictures = pictures_of(refiner, samples)
    once("autoencoder", lambda: distances(pictures, real))
    for steps in EVALUATIONS:
        for name in ("plain", *refiners):
            pipeline = load(runs / name)
            once(
                f"{name} {steps}", lambda p=pipeline, s=steps: distances(drawn(p, samples, s), real)
            )

    def by_mixture(steps: int) -> dict[str, float]:
        changed, fitted = with_mixture(refiner, pack, 10)
        z = changed.prior.draw(
            torch.arange(samples), opened(conditioner.model, "cpu").latent_channels, fitted
        )
        image = decoded(opened(conditioner.model, "cpu"), z, refiner.model.config.canvas)
        return distances(drawn(refiner, samples, steps, cond=Cond(image=image)), real)

    for steps in EVALUATIONS:
        once(f"mixture {steps}", lambda s=steps: by_mixture(s))
    once("control", lambda: control(refiner, min(samples, 256)))
    once("own reconstruction", lambda: own_reconstruction(conditioner.model, held, pack))
    return facts


def pictures_of(pipeline: Pipeline, samples: int) -> Tensor:
    """Blurry images that a refiner starts from: uint8 [N, *S, C]."""
    image = pipeline.filled(Cond(), samples, 0).image
    assert image is not None
    return torch.from_numpy(pipeline.model.config.space.to_values(image))


def correlation(a: Tensor, b: Tensor) -> float:
    """Mean correlation of the pixels of pairs of images [N, ...]."""
    centered = [x.flatten(1).float() for x in (a, b)]
    centered = [x - x.mean(1, keepdim=True) for x in centered]
    norms = [x.norm(dim=1) for x in centered]
    return float(
        ((centered[0] * centered[1]).sum(1) / (norms[0] * norms[1]).clamp(min=1e-6)).mean()
    )


@torch.no_grad()
def own_reconstruction(model: str, images: Tensor, pack: Pack) -> dict[str, float]:
    """Correlation of held-out images with their own reconstructions: what a refiner can reach."""
    x = pack.space.to_network(images.movedim(-1, 1).float())
    autoencoder = opened(model, "cpu")
    mean, _ = moments(autoencoder, x)
    return {"correlation": correlation(x, decoded(autoencoder, mean, tuple(x.shape[2:])))}


def control(pipeline: Pipeline, samples: int) -> dict[str, float]:
    """How far the picture decides the sample: correlations with shared noise, and differences."""
    pictures = pictures_of(pipeline, samples)
    config = SamplerConfig(solver=DDIM(), steps=10, noise_seed=0)
    shared = torch.from_numpy(pipeline.sample(samples, config=config)).float().flatten(1)
    same = pipeline.filled(Cond(), 1, 0).image
    assert same is not None
    fixed = Cond(image=same.expand(samples, *same.shape[1:]))
    one = drawn(pipeline, samples, 10, cond=fixed).float().flatten(1)
    return {
        "correlation with the picture, shared noise": correlation(pictures, shared),
        "deviation of a pixel, shared noise": float(shared.std(0).mean()),
        "deviation of a pixel, one picture": float(one.std(0).mean()),
    }


def picture(runs: Path, file: Path) -> None:
    """Blurry images, refined ones of 10 evaluations, and those of the plain denoiser."""
    refiner = load(runs / "refiner")
    rows = [pictures_of(refiner, 12), drawn(refiner, 12, 10), drawn(load(runs / "plain"), 12, 10)]
    images = np.concatenate([x.numpy() for x in rows])
    images = images.repeat(2, axis=1).repeat(2, axis=2)
    save_png(file, grid(images, columns=12))
    words = ["--axes", "--rows", "4", "--steps", "10", "--solver", "ddim"]
    walked = file.with_name(f"{file.stem}-walk.png")
    cli.main(["walk", str(runs / "refiner"), *words, "--out", str(walked)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=[*SETTINGS], help="setting")
    parser.add_argument("--data", default="glyphs", help="images, or a pack")
    parser.add_argument("--runs", type=Path, default=Path("runs/diffusevae"), help="folder")
    parser.add_argument("--samples", type=int, default=300, help="images to measure")
    options = parser.parse_args()
    setting, runs = SETTINGS[options.name], options.runs / options.name
    costs = train_all(setting, options.data, runs)
    config = read_json(runs / "plain" / "config.json")["data"]
    pack = prepare_data(
        DataConfig(
            path=config["path"], resolution=config["resolution"], channels=config["channels"]
        )
    )
    result = ROOT / "benchmarks" / "results" / f"diffusevae-{options.name}.json"
    facts = measure(runs, pack, result, options.samples, setting.refiners)
    facts["operations"] = costs
    write_json(result, facts)
    if options.name == "glyphs":
        picture(runs, ROOT / "docs" / "diffusevae-glyphs.png")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
