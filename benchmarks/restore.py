"""Restoration of held-out images: samples under a model against restorations without one.

    python benchmarks/restore.py RUN PACK

PSNR of one sample, of the mean of several, of an interpolation or the measurement itself, and of
total variation with the best of four weights, for each operator. Goes on after a kill; results are
written to benchmarks/results/restore.json after each operator, and a picture to
docs/restore.png.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.apps.restore import posterior_sample
from patchdiffusion.data.pack import Pack
from patchdiffusion.guidance.inverse import psnr
from patchdiffusion.guidance.operators import Blur, Downsample, Mask, Operator, Tomography
from patchdiffusion.sampling.pictures import to_network
from patchdiffusion.sampling.pipeline import load
from patchdiffusion.system.files import write_json
from patchdiffusion.system.png import enlarge, grid, save_png

ROOT = Path(__file__).parent
NOISE = 0.02
WEIGHTS = (0.002, 0.01, 0.05, 0.2)
"""Weights of total variation."""


def operators(side: int) -> dict[str, Operator]:
    """The measurements that are compared."""
    known = torch.rand(side, side, generator=torch.Generator().manual_seed(0)) < 0.5
    return {
        "means of 2 x 2": Downsample(factor=2),
        "means of 4 x 4": Downsample(factor=4),
        "blur, std 1.5": Blur(std=1.5),
        "half of the pixels": Mask(known),
        "20 angles": Tomography(angles=20),
    }


def total_variation(operator: Operator, y: Tensor, weight: float, start: Tensor) -> Tensor:
    """argmin |A x - y|^2 / 2 + weight TV(x), by Adam: [B, C, H, W]."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        rows, columns = x.diff(dim=2)[..., :-1], x.diff(dim=3)[..., :-1, :]
        variation = (rows.square() + columns.square() + 1e-6).sqrt().sum()
        loss = (operator(x) - y).square().sum() / 2 + weight * variation
        loss.backward()
        optimizer.step()
    return x.detach().clamp(-1, 1)


def measure(
    run: Path, operator: Operator, clean: Tensor, samples: int
) -> tuple[dict[str, Any], list[Tensor]]:
    """PSNR of each restoration, and pictures: measured, simple, one sample, mean of samples."""
    pipeline = load(run, device="cpu")
    y = operator(clean)
    y = y + NOISE * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    guess = operator.guess(y).clamp(-1, 1)
    smooth = {w: total_variation(operator, y, w, guess) for w in WEIGHTS}
    best = max(WEIGHTS, key=lambda w: psnr(smooth[w], clean).mean())
    facts: dict[str, Any] = {
        "without a model": psnr(guess, clean).mean().item(),
        "total variation": psnr(smooth[best], clean).mean().item(),
    }
    shown = [guess, smooth[best]]
    for way in ("independent", "fit"):
        each = []
        begin = time.process_time()
        for one in y:
            each.append(
                posterior_sample(
                    pipeline.model.denoiser,
                    operator,
                    one[None],
                    seeds=range(samples),
                    canvas=pipeline.model.config.canvas,
                    way=way,
                    noise=NOISE,
                    law=pipeline.model.config.noise,
                )
            )
        made = torch.stack(each)  # [images, samples, C, H, W]
        facts[way] = {
            "one sample": psnr(made[:, 0], clean).mean().item(),
            f"mean of {samples}": psnr(made.mean(1), clean).mean().item(),
            "cpu_seconds_per_sample": (time.process_time() - begin) / len(y) / samples,
        }
    return facts, [*shown, made[:, 0], made.mean(1)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "restore.json")
    parser.add_argument("--picture", type=Path, default=ROOT.parent / "docs" / "restore.png")
    options = parser.parse_args()
    pack = Pack.open(options.pack)
    index = pack.some_held_out(options.images)
    images = pack.images[index].numpy()
    clean = torch.stack([to_network(image, pack.space) for image in images])
    facts = json.loads(options.out.read_text()) if options.out.exists() else {}
    results = facts.setdefault("operators", {})
    rows = []
    for name, operator in operators(clean.shape[-1]).items():
        if name in results and options.picture.exists():
            continue
        results[name], shown = measure(options.run, operator, clean, options.samples)
        rows.append(torch.cat([clean[:2], *(x[:2] for x in shown)]))
        facts |= {"images": len(images), "samples": options.samples, "noise": NOISE}
        write_json(options.out, facts)
        print(name, json.dumps(results[name]), flush=True)
    if rows:
        values = pack.space.to_values(torch.cat(rows))
        save_png(options.picture, enlarge(grid(np.asarray(values), columns=10), 700))


if __name__ == "__main__":
    main()
