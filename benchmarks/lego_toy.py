"""What each LEGO brick is worth, on shapes of 16 x 16: the table and picture of docs/lego.md.

    python benchmarks/lego_toy.py

Trains small stacks of three bricks: from regions to the image (pg), the reverse (pr), and pg with a
loss of the last brick alone (pg-last). Then the denoising loss of every brick is measured on the
same 512 images and noise. Two to four CPU-minutes each; after a kill the same command resumes.
Results go to benchmarks/results/lego-toy.json, the picture to docs/lego-bricks.png.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.losses import squared_error
from patchdiffusion.nets.lego import Lego, LegoConfig
from patchdiffusion.noise import LogNormal
from patchdiffusion.parameterisation import EDM
from patchdiffusion.paths import per_sample
from patchdiffusion.system.files import write_atomic, write_json
from patchdiffusion.system.progress import progress_bar
from patchdiffusion.weighting import EDMWeight

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "lego-toy.json"
PICTURE = ROOT / "docs" / "lego-bricks.png"
SIDE, BATCH, STEPS, HELD_OUT = 16, 32, 1450, 512
SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
LAW, WEIGHT = LogNormal(), EDMWeight()


@dataclass(frozen=True)
class Variant:
    """A stack, and the bricks that are trained."""

    network: LegoConfig
    joint: bool = True
    """True if the loss is the mean over all bricks, False if it is that of the last one."""


GROWS = LegoConfig(
    channels=1, width=64, heads=4, regions=(4, 8, 16), patches=(2, 4, 4), depths=(2, 2, 3)
)
SHRINKS = LegoConfig(
    channels=1, width=64, heads=4, regions=(16, 8, 4), patches=(4, 4, 2), depths=(3, 2, 2)
)
VARIANTS = {
    "pg": Variant(GROWS),
    "pr": Variant(SHRINKS),
    "pg-last": Variant(GROWS, joint=False),
}


def shapes(key: Tensor) -> Tensor:
    """Discs, squares and crosses of any place, size and gray on any darker gray: [B, 1, 16, 16]."""
    u = rng.uniform(key, 6, torch.float32)
    kind, size = (3 * u[:, 0]).floor(), 2.5 + 3 * u[:, 1]
    center = 4 + 7 * u[:, 2:4]
    pixel = torch.arange(SIDE) + 0.0
    dy = (pixel[None, :, None] - center[:, 0, None, None]).abs()
    dx = (pixel[None, None, :] - center[:, 1, None, None]).abs()
    square = torch.maximum(dx, dy)
    disc = (dx.square() + dy.square()).sqrt()
    cross = torch.minimum(
        torch.maximum(dx, 3 * dy - size[:, None, None]),
        torch.maximum(dy, 3 * dx - size[:, None, None]),
    )
    distance = torch.stack([disc, square, cross])[kind.long(), torch.arange(len(key))]
    inside = (size[:, None, None] - distance + 0.5).clamp(0, 1)  # an edge of one pixel
    dark, light = -1 + 0.8 * u[:, 4], 0.2 + 0.8 * u[:, 5]
    image = dark[:, None, None] + (light - dark)[:, None, None] * inside
    return image[:, None]


def estimates(denoiser: NetDenoiser, noisy: Tensor, sigma: Tensor | float) -> list[Tensor]:
    """The denoised image by each brick."""
    assert isinstance(denoiser.network, Lego)
    inner, noise, cond, scales = denoiser.scaled(noisy, sigma, Cond())
    return [scales.denoised(noisy, f) for f in denoiser.network.run(inner, noise, cond)]


def train(
    variant: Variant, images: Callable[[Tensor], Tensor], file: Path, steps: int
) -> NetDenoiser:
    """Train on images of keys, or go on from a file; the denoiser with averaged weights."""
    denoiser = NetDenoiser(variant.network.build(), EDM())
    averaged = NetDenoiser(variant.network.build(), EDM())
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=2e-3, betas=(0.9, 0.99))
    parts = (denoiser, averaged, optimizer)
    first = 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        first = saved["step"]
        for part, state in zip(parts, saved["parts"], strict=True):
            part.load_state_dict(state)
    with progress_bar(steps, "step", name=file.stem) as bar:
        bar.update(first)
        for step in range(first, steps):
            rate = min(1, (step + 1) / 100) * min(1, (steps - step) / (0.4 * steps))
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * rate
            index = torch.arange(BATCH)
            draws = rng.Draws(0, step, index, index, BATCH)
            x = images(draws.keys("shapes"))
            sigma = LAW.icdf(draws.stratified("sigma")).float()
            noisy = x + per_sample(sigma, x) * draws.normal("noise", (1, SIDE, SIDE))
            found = estimates(denoiser, noisy, sigma)
            found = found if variant.joint else found[-1:]
            loss = torch.stack([WEIGHT(sigma) * squared_error(d, x) for d in found]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay = min(0.99, (1 + step) / (10 + step))
            with torch.no_grad():
                pairs = zip(averaged.parameters(), denoiser.parameters(), strict=True)
                for target, weight in pairs:
                    target.lerp_(weight, 1 - decay)
            bar.update()
            if (step + 1) % 50 == 0 or step + 1 == steps:
                state = {"step": step + 1, "parts": [part.state_dict() for part in parts]}
                write_atomic(file, lambda path, state=state: torch.save(state, path))
    return averaged.eval()


@torch.no_grad()
def measure(denoiser: NetDenoiser) -> list[list[float]]:
    """Normalized loss of each brick at each noise level: [K][levels]."""
    index = torch.arange(HELD_OUT)
    draws = rng.Draws(1, 0, index, index, HELD_OUT)
    x, noise = shapes(draws.keys("shapes")), draws.normal("noise", (1, SIDE, SIDE))
    rows = []
    for sigma in SIGMAS:
        found = estimates(denoiser, x + sigma * noise, sigma)
        weight = float(WEIGHT(torch.tensor([sigma])))
        rows.append([weight * float(squared_error(d, x).mean()) for d in found])
    return [list(column) for column in zip(*rows, strict=True)]


def penalties(losses: list[list[float]]) -> list[float]:
    """Relative increase of the loss without the last brick, at each noise level."""
    return [early / full - 1 for early, full in zip(losses[-2], losses[-1], strict=True)]


def picture(results: dict[str, Any], file: Path) -> None:
    """Draw the penalties, and the claims about them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    labels = {"pg": "regions grow (PG)", "pr": "regions shrink (PR)"}
    for name, label in labels.items():
        values = [100 * p for p in results[name]["penalty"]]
        axes.plot(SIGMAS, values, marker="o", markersize=4, label=label)
    axes.axhspan(-2, 3, color="gray", alpha=0.2, label="cheap to leave out")
    axes.set_xscale("log")
    axes.set_xlabel("noise level sigma")
    axes.set_ylabel("loss without the last brick, +%")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    write_atomic(file, lambda path: figure.savefig(path, format="png", dpi=120))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--work", type=Path, default=Path("runs/lego-toy"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=RESULT, help="file of the results")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    facts = json.loads(options.out.read_text()) if options.out.exists() else {}
    results = facts.setdefault("variants", {})
    for name, variant in VARIANTS.items():
        if results.get(name, {}).get("steps") != options.steps:
            losses = measure(train(variant, shapes, options.work / f"{name}.pt", options.steps))
            results[name] = {
                "steps": options.steps,
                "macs": list(variant.network.build().macs_of_bricks(SIDE)),
                "losses": losses,
                "penalty": penalties(losses),
            }
            facts |= {"date": time.strftime("%Y-%m-%d"), "sigmas": SIGMAS, "images": HELD_OUT}
            facts["engine"] = {"torch": torch.__version__, "threads": 1, "precision": "fp32"}
            write_json(options.out, facts)
    for name in VARIANTS:
        said = "  ".join(
            f"{s:g}: {p:+.1%}" for s, p in zip(SIGMAS, results[name]["penalty"], strict=True)
        )
        print(f"{name:<8} {said}")
    picture(results, options.picture)


if __name__ == "__main__":
    main()
