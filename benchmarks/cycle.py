"""Changes of images by the noise that they share (CycleDiffusion), and other ways to change them.

    python benchmarks/cycle.py mixture          # exact denoisers: a table
    python benchmarks/cycle.py picture RUN      # a class-conditional model of glyphs

The mixture has content, six modes in four dimensions, times style, -1 in A and +1 in B. Results go
to benchmarks/results/cycle.json and docs/cycle.png. For docs/editing.md.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchdiffusion import load
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.apps.cycle import change, decode_noise, encode_noise
from patchdiffusion.apps.edit import local_sample
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.guidance.cfg import ClassifierFree
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.solvers import DDIM, Heun, euler, solve
from patchdiffusion.solvers.schedules import karras
from patchdiffusion.system.files import read_json, write_json
from patchdiffusion.system.png import enlarge, grid, save_png

ROOT = Path(__file__).parents[1]
FILE, PICTURE = ROOT / "benchmarks" / "results" / "cycle.json", ROOT / "docs" / "cycle.png"
COUNT, STEPS, SPREAD = 1000, 60, 0.1
CONTENT = 4
"""Dimensions of the content, the first ones."""


def domain(style: float) -> GaussianMixture:
    """The images of a domain: [B, 8, 1, 1]."""
    content = 2 * torch.randn(6, CONTENT, generator=torch.Generator().manual_seed(1)).double()
    means = torch.cat([content, torch.full((6, 4), style).double()], dim=1)
    return GaussianMixture(
        means[..., None, None], SPREAD**2 * torch.eye(8).double().expand(6, 8, 8)
    )


def noise(image: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(image.shape, generator=generator, dtype=image.dtype)


def ring(radius: float, shift: float) -> GaussianMixture:
    """Eight modes on a circle: [B, 2, 1, 1]."""
    turns = torch.arange(8).double() * math.pi / 4
    means = radius * torch.stack([turns.cos(), turns.sin()], dim=1) + shift
    return GaussianMixture(
        means[..., None, None], SPREAD**2 * torch.eye(2).double().expand(8, 2, 2)
    )


def ways(a: GaussianMixture, b: GaussianMixture, level: float) -> dict[str, Tensor]:
    """Images of A as each way makes images of B of them, from a noise level."""
    image = a.sample(torch.arange(COUNT))[0]
    sigmas = karras(STEPS, sigma_max=level)
    out = {"images of A": image}
    for eta in (1.0, 0.1):
        code = encode_noise(a, image, sigmas, lambda step: noise(image, 7 + step), eta=eta)
        out[f"same noise, eta {eta:g}"] = decode_noise(b, code)
    start = image + level * noise(image, 1)
    out["noise and denoise"] = solve(
        DDIM(eta=1.0), b, start, sigmas, noise=lambda i: noise(image, i)
    )
    upward = torch.cat([sigmas[:-1].flip(0), torch.zeros(1).double()])
    x = image
    for low, high in zip(upward[:-2].tolist(), upward[1:-1].tolist(), strict=True):
        x = x + (high - low) * (x - a(x, low)) / low
    out["probability flow there and back"] = solve(euler, b, x, sigmas)
    return out


def mixture() -> None:
    """Print and write what each way keeps."""
    b = domain(1.0)
    results: dict[str, Any] = {}
    for level in (80.0, 2.0, 0.5):
        made = ways(domain(-1.0), b, level)
        image = made.pop("images of A")
        mode = b.posterior(image, 1e-3).argmax(1)
        for name, x in made.items():
            styled = torch.cat([x[:, :CONTENT], torch.ones_like(x[:, CONTENT:])], dim=1)
            kept = b.posterior(styled, 1e-3).argmax(1) == mode
            results[f"{level:g} {name}"] = row = {
                "content kept": kept.double().mean().item(),
                "drift of content": (x - image)[:, :CONTENT].square().mean().sqrt().item(),
                "style": x[:, CONTENT:].mean().item(),
                "deviation of style": x[:, CONTENT:].std().item(),
            }
            print(f"{level:>4g} {name:<32}", *(f"{value:8.3f}" for value in row.values()))
    a, b = ring(1.0, 0.0), ring(2.0, 1.0)
    made = ways(a, b, 80.0)
    mode = a.posterior(made.pop("images of A"), 1e-3).argmax(1)
    for name, x in made.items():
        kept = (b.posterior(x, 1e-3).argmax(1) == mode).double().mean().item()
        results[f"rings, 80 {name}"] = {"modes kept": kept}
        print(f"ring {name:<32}{kept:9.3f}")
    write_json(
        FILE, {"images": COUNT, "steps": STEPS, "deviation of a mode": SPREAD, "rows": results}
    )


def picture(run: Path) -> None:
    """Held-out images, changed to other classes in three ways."""
    data = read_json(run / "config.json")["data"]
    pack = prepare_data(DataConfig(path=data["path"], resolution=data["resolution"]))
    pipeline = load(run, device="cpu")
    config = SamplerConfig(steps=40, guidance=ClassifierFree(weight=2.0))
    rows: list[list[np.ndarray]] = [[], [], [], []]
    assert pack.labels is not None
    for index in pack.heldout[:10].tolist():
        image = np.asarray(pack.images[index])
        before = int(pack.labels[index])
        after = (before + 3) % pipeline.model.config.num_classes
        given: dict[str, Any] = {"before": before, "after": after, "config": config}
        rows[0].append(image)
        rows[1].append(change(pipeline, image, **given)[0])
        rows[2].append(change(pipeline, image, sigma=2.0, **given)[0])
        fewer = SamplerConfig(solver=Heun(), steps=18, guidance=config.guidance)
        rows[3].append(local_sample(pipeline, image, 2.0, classes=[after], config=fewer)[0])
    save_png(PICTURE, enlarge(grid(np.stack([x for row in rows for x in row]), columns=10), 700))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("mixture", "picture"))
    parser.add_argument("run", type=Path, nargs="?")
    options = parser.parse_args()
    if options.what == "mixture":
        mixture()
    elif options.run is None:
        parser.error("picture needs RUN")
    else:
        picture(options.run)


if __name__ == "__main__":
    main()
