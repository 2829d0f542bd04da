"""Latent diffusion: what a step costs, and samples beside a pixel model of equal operations.

    python benchmarks/latents.py cost
    python benchmarks/latents.py run --data emoji-128.zip --autoencoder RUN --work WORK
    python benchmarks/latents.py measure --data emoji-128.zip --autoencoder RUN --work WORK \\
        --features features.safetensors

`cost` counts operations of training on crops, with latents encoded once or in each step, and CPU
clocks of the small network. `run` trains a model of latents and one of pixels with equal operations
by the default recipe; the same command goes on after a kill. `measure` needs the file of
`small_features.py`. Results go to benchmarks/results/latents-cost.json and latents-emoji.json, the
picture to docs/latents-emoji.png. For docs/latents.md.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_features import extractor
from torch import Tensor, nn

from patchdiffusion import load
from patchdiffusion.cond import Cond
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.encoders.autoencoder import load_autoencoder
from patchdiffusion.encoders.features import Extractor
from patchdiffusion.metrics.compare import Gathered, compare
from patchdiffusion.metrics.evaluate import Evaluation
from patchdiffusion.metrics.options import EvaluationConfig
from patchdiffusion.metrics.reference import Featurizer, Reference
from patchdiffusion.nets import Network
from patchdiffusion.nets.autoencoder import AutoencoderNetwork, KLConfig
from patchdiffusion.nets.count import count, macs_of, training_flops
from patchdiffusion.nets.unet import tiny
from patchdiffusion.plans import PatchPlan
from patchdiffusion.recipes import Facts, folder
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.solvers import DPMpp2M
from patchdiffusion.system import families
from patchdiffusion.system.dist import Team
from patchdiffusion.system.files import read_json, write_json
from patchdiffusion.system.parts import Parts
from patchdiffusion.system.png import grid, save_png
from patchdiffusion.train.report import read_log

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "latents-emoji.png"
SAMPLER = SamplerConfig(solver=DPMpp2M(), steps=10)
SHOWN = 10
F4 = KLConfig(latent_channels=4, base=16, mult=(1, 2, 4), blocks=1, mid_attention=False)
F8 = KLConfig(latent_channels=4, base=128, mult=(1, 2, 4, 4), blocks=2, groups=32)
"""Encoder of Stable Diffusion."""


class Encoder(nn.Module):
    """An autoencoder that only encodes, to be counted."""

    def __init__(self, network: AutoencoderNetwork[Any]):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.moments(x)[0]


def encoder_macs(config: KLConfig, side: int) -> int:
    """Multiply-accumulates of encoding one image."""
    with torch.device("meta"):
        network = Encoder(config.build())
    return macs_of(network, torch.empty(1, config.channels, side, side, device="meta"))


# ---- Cost of a step ----


def per_crop(plan: PatchPlan, each: Callable[[int], float]) -> float:
    """Mean cost of a crop, where each counts as an image, as published; `each` by its side."""
    kinds = plan.kinds("crops")
    total = sum(p * sum(g.count * each(g.size[0]) for g in groups) for p, groups in kinds)
    return total / sum(p * sum(g.count for g in groups) for p, groups in kinds)


def counted(network: Any, side: int, encoder: float, divisor: int) -> dict[str, float]:
    """Operations per counted image, relative to whole latents that were encoded before.

    An encoding is a forward pass of a whole image for each crop, as in the official code.
    """

    def training(size: int) -> float:
        return training_flops(network, size)

    half = PatchPlan.paper((side, side), 256, p=0.5, latent=True, divisor=divisor)
    whole = training(side)
    cached = per_crop(half, training)
    return {
        "training GFLOP of whole latents": whole / 1e9,
        "encoding GFLOP": 2 * encoder / 1e9,
        "cached, p = .5": cached / whole,
        "encoded in each step, p = 1": (whole + 2 * encoder) / whole,
        "encoded in each step, p = .5": (cached + 2 * encoder) / whole,
        "saving, cached": whole / cached,
        "saving, encoded in each step": (whole + 2 * encoder) / (cached + 2 * encoder),
        "cached p = .5 against encoded p = 1": (whole + 2 * encoder) / cached,
    }


def clocks(network: nn.Module, autoencoder: nn.Module, rounds: int = 5) -> dict[str, float]:
    """CPU clocks of forward and backward passes of 16 latents, of 32 halves, and of encoding."""

    def seconds(work: Callable[[], object]) -> float:
        work()
        times = []
        for _ in range(rounds):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        return statistics.median(times)

    def step(side: int, number: int) -> Callable[[], object]:
        x, noise = torch.zeros(number, 4, side, side), torch.zeros(number)
        return lambda: network(x, noise, Cond()).square().mean().backward()

    image = torch.zeros(16, 3, 128, 128)

    def encode() -> object:
        with torch.no_grad():
            return autoencoder(image)

    whole, half, encoding = seconds(step(32, 16)), seconds(step(16, 32)), seconds(encode)
    cached = (whole + half) / 48  # of both kinds of step, per crop
    return {
        "cached, p = .5": 16 * cached / whole,
        "encoded in each step, p = 1": (whole + encoding) / whole,
        "encoded in each step, p = .5": (16 * cached + encoding) / whole,
        "saving, cached": whole / (16 * cached),
        "saving, encoded in each step": (whole + encoding) / (16 * cached + encoding),
    }


def cost() -> None:
    """Count, and time the small network."""
    with torch.device("meta"):
        adm = families.create(Network, "adm-64", "network")
        published = replace(adm, channels=4, num_classes=1000, attention=(0, 1, 2)).build()
    small = tiny(32, channels=4).build()
    result = {
        "published: ADM of 192 channels, latents 32 x 32 of 256 x 256 pixels by the encoder of "
        "Stable Diffusion": counted(published, 32, encoder_macs(F8, 256), 8),
        "small: U-Net of the recipe for a CPU, latents 32 x 32 of 128 x 128 pixels by an "
        "autoencoder of factor 4": counted(small, 32, encoder_macs(F4, 128), 4),
        "small, CPU clocks": clocks(small, Encoder(F4.build())),
    }
    write_json(RESULTS / "latents-cost.json", result)
    for name, values in result.items():
        print(name, *(f"  {k}: {v:.3f}" for k, v in values.items()), sep="\n")


# ---- A model of latents beside one of pixels ----


def data_of(options: argparse.Namespace, kind: str) -> DataConfig:
    """The images, or their latents."""
    plain = DataConfig(path=str(options.data))
    return replace(plain, autoencoder=str(options.autoencoder)) if kind == "latents" else plain


def run(options: argparse.Namespace) -> None:
    """Train both, as the recipe does, for as many images as the operations allow."""
    for kind in ("pixels", "latents"):
        pack = prepare_data(data_of(options, kind))
        chosen = folder(Facts.of(pack, str(options.data), "cpu"))
        each = training_flops(chosen.network.build(), tuple(pack.images.shape[1:3]))
        command = [sys.executable, "-m", "patchdiffusion", "train", str(options.data)]
        command += ["--out", str(options.work / kind), "--device", "cpu", "--threads", "1"]
        command += ["--images", str(round(options.operations / each)), "--preview.samples", "2"]
        command += [
            "--preview.grid",
            "16",
            "--preview.sample-steps",
            "10",
            "--preview.status",
            "60",
        ]
        if kind == "latents":
            command += ["--autoencoder", str(options.autoencoder)]
        subprocess.run(command, check=True)


def operations(run: Path) -> float:
    """Operations of training that a run has counted."""
    return [r["flops"] for r in read_log(run) if r["kind"] == "status"][-1]


def measure(options: argparse.Namespace) -> None:
    """Compare samples with real images, kept batch by batch, and make the picture at the end."""
    extract, file = extractor(options.features), RESULTS / "latents-emoji.json"
    settings = EvaluationConfig(samples=options.samples, sampler=SAMPLER, batch=16, held_out=200)
    for kind in options.only:
        pipeline = load(options.work / kind, device="cpu")
        own, kept = prepare_data(data_of(options, kind)), Parts(options.work / "kept" / kind)
        result = read_json(file) if file.is_file() else {}
        measured = Evaluation(own, settings, extract, kept=kept).of_model(pipeline)
        names = ("kernel_distance", "kernel_distance_std", "frechet_distance", "copy_rate")
        network = pipeline.model.network
        result[kind] = {
            "training operations": operations(options.work / kind),
            "equivalents": pipeline.model.config.images,
            "parameters": sum(p.numel() for p in network.parameters()),
            "GMAC per evaluation": count(network, pipeline.model.config.canvas).macs / 1e9,
            "held-out loss in its own space": measured["held_out"]["loss"],
            **{name: measured[name] for name in names if name in measured},
        }
        result["settings"] = {"samples": options.samples, "sampler": "dpmpp-2m, 10 evaluations"}
        write_json(file, result)
        np.save(options.work / f"{kind}.npy", pipeline.sample(SHOWN, config=SAMPLER, batch=SHOWN))
    picture(options, extract, file)


def picture(options: argparse.Namespace, extract: Extractor, file: Path) -> None:
    """Held-out images, their reconstructions, and samples of both models; measure the former."""
    autoencoder = load_autoencoder(options.autoencoder)
    pack = prepare_data(data_of(options, "pixels"))
    real = pack.pictures[pack.heldout]
    decoded = reconstructions(autoencoder, real)
    error = (decoded.float() - real.float()).square().mean((1, 2, 3))
    reference = Reference(pack, Featurizer(extract, 0), 10**6, 64, Team(), bool).gathered()
    images = Gathered.together([Gathered.of(extract(part) for part in decoded.split(64))])
    encoding = macs_of(Encoder(autoencoder.network), torch.empty(1, 3, 128, 128, device="meta"))
    result = read_json(file)
    result["autoencoder"] = {
        "digest": autoencoder.digest,
        "training operations": operations(options.autoencoder),
        "PSNR of held-out images": (10 * (255**2 / error).log10()).mean().item(),
        "kernel_distance of reconstructions": compare(reference, images)["kernel_distance"],
        "encoding of the data, operations": 2.0 * len(pack) * encoding,
    }
    write_json(file, result)
    rows = [x[torch.arange(SHOWN) * len(x) // SHOWN].numpy() for x in (real, decoded)]
    made = [options.work / f"{kind}.npy" for kind in ("latents", "pixels")]
    rows += [np.load(samples) for samples in made if samples.is_file()]
    save_png(PICTURE, grid(np.concatenate(rows), columns=SHOWN))
    print(result)


def reconstructions(autoencoder: Any, images: Tensor) -> Tensor:
    """Images that were encoded and decoded: uint8 [N, H, W, C]."""
    parts = []
    for part in images.split(32):
        mean, _ = autoencoder.moments(part.movedim(-1, 1).float() / 127.5 - 1)
        x = autoencoder.decode(mean)
        parts.append((x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("cost", "run", "measure"))
    parser.add_argument("--data", type=Path, help="images")
    parser.add_argument("--autoencoder", type=Path, help="run of the autoencoder")
    parser.add_argument("--work", type=Path, help="folder of the runs")
    parser.add_argument("--features", type=Path, help="file of small_features.py")
    parser.add_argument("--operations", type=float, default=2e13, help="of each training")
    parser.add_argument("--samples", type=int, default=96, help="samples that are measured")
    parser.add_argument(
        "--only", nargs="*", default=["latents", "pixels"], help="models to measure"
    )
    options = parser.parse_args()
    cost() if options.what == "cost" else {"run": run, "measure": measure}[options.what](options)


if __name__ == "__main__":
    main()
