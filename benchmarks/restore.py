"""Restoration of held-out images: samples under a model against restorations without one.

    python benchmarks/restore.py RUN PACK

PSNR of one sample, of the mean of several, of an interpolation or the measurement itself, and of
total variation with the best of four weights, for each operator; of scikit-image, if it is there,
the Wiener filter for what is blurred and the total variation of that interpolation, each with the
best of its weights. Goes on after a kill; results are written to benchmarks/results/restore.json
after each operator, and a picture to docs/restore.png. `--region 64` restores the middle of larger
images; `--without-model` measures the others alone.
"""

import argparse
import importlib
import importlib.util
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from patchdiffusion import SamplerConfig
from patchdiffusion.apps.restore import posterior_sample
from patchdiffusion.data.pack import Pack
from patchdiffusion.guidance.inverse import psnr
from patchdiffusion.guidance.operators import Blur, Downsample, Mask, Operator, Tomography
from patchdiffusion.sampling.canvas import CanvasRegion
from patchdiffusion.sampling.pictures import to_network
from patchdiffusion.sampling.pipeline import load
from patchdiffusion.sampling.restoring import Way
from patchdiffusion.system.files import write_json
from patchdiffusion.system.png import enlarge, grid, save_png

ROOT = Path(__file__).parent
NOISE = 0.02
WEIGHTS = (0.002, 0.01, 0.05, 0.2)
"""Weights of total variation."""
LIBRARY_WEIGHTS = tuple(10 ** (power / 2) for power in range(-8, 1))
"""Weights of scikit-image: of total variation, and the balance of the Wiener filter."""


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


def gaussian(std: float) -> np.ndarray:
    """The kernel of `Blur`: [n, n]."""
    at = np.arange(-math.ceil(3 * std), math.ceil(3 * std) + 1)
    row = np.exp(-0.5 * (at / std) ** 2)
    return np.outer(row, row) / row.sum() ** 2


def by_library(operator: Operator, guess: Tensor, clean: Tensor) -> dict[str, float | str]:
    """PSNR of scikit-image's restorations from a simple one, each with the best of its weights."""
    if importlib.util.find_spec("skimage") is None:
        return {"scikit-image": "not measured: pip install scikit-image"}
    library: Any = importlib.import_module("skimage.restoration")

    def best(restore: Any) -> float:
        ratios = []
        for weight in LIBRARY_WEIGHTS:
            made = [restore(image.numpy(), weight) for image in guess]
            x = torch.from_numpy(np.stack(made)).clamp(-1, 1)
            ratios.append(psnr(x, clean).mean().item())
        return max(ratios)

    def smooth(image: np.ndarray, weight: float) -> np.ndarray:
        return library.denoise_tv_chambolle(image, weight=weight, channel_axis=0)

    results: dict[str, float | str] = {"scikit-image, total variation": best(smooth)}
    match operator:
        case Blur():
            kernel = gaussian(operator.std)
        case Downsample():
            row = np.ones(operator.factor + 1) / operator.factor
            row[[0, -1]] /= 2  # an even number of pixels has its middle between two
            kernel = np.outer(row, row)
        case _:
            return results

    def deconvolved(image: np.ndarray, weight: float) -> np.ndarray:
        pad = 8  # pixels, as the filter takes the image to go around
        planes = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
        made = np.stack([library.wiener(plane, kernel, weight, clip=False) for plane in planes])
        return made[:, pad:-pad, pad:-pad]

    return results | {"scikit-image, Wiener": best(deconvolved)}


def without_model(
    operator: Operator, clean: Tensor, y: Tensor
) -> tuple[dict[str, Any], list[Tensor]]:
    """PSNR of restorations without a model, and pictures: simple, total variation."""
    guess = operator.guess(y).clamp(-1, 1)
    smooth = {w: total_variation(operator, y, w, guess) for w in WEIGHTS}
    best = max(WEIGHTS, key=lambda w: psnr(smooth[w], clean).mean())
    facts: dict[str, Any] = {
        "without a model": psnr(guess, clean).mean().item(),
        "total variation": psnr(smooth[best], clean).mean().item(),
        **by_library(operator, guess, clean),
    }
    return facts, [guess, smooth[best]]


def sampled(
    run: Path, operator: Operator, clean: Tensor, y: Tensor, samples: int, ways: Sequence[Way]
) -> tuple[dict[str, Any], list[Tensor]]:
    """PSNR of samples by each way, and pictures: one sample of the last way, the mean of all."""
    model, facts = load(run, device="cpu").model, {}
    made = torch.empty(0)
    for way in ways:
        each = []
        begin = time.process_time()
        for one in y:
            each.append(
                posterior_sample(
                    model.denoiser,
                    operator,
                    one[None],
                    seeds=range(samples),
                    canvas=model.config.canvas,
                    way=way,
                    noise=NOISE,
                    config=SamplerConfig(canvas=CanvasRegion(size=tuple(clean.shape[2:]))),
                    law=model.config.noise,
                )
            )
        made = torch.stack(each)  # [images, samples, C, H, W]
        facts[way] = {
            "one sample": psnr(made[:, 0], clean).mean().item(),
            f"mean of {samples}": psnr(made.mean(1), clean).mean().item(),
            "cpu_seconds_per_sample": (time.process_time() - begin) / len(y) / samples,
        }
    return facts, [made[:, 0], made.mean(1)]


def images_of(pack: Pack, count: int, region: int | None) -> Tensor:
    """Held-out images in the units of a network, or their middle: [N, C, H, W]."""
    index = pack.some_held_out(count)
    clean = torch.stack([to_network(image, pack.space) for image in pack.images[index].numpy()])
    if region is None:
        return clean
    top, left = ((side - region) // 2 for side in clean.shape[2:])
    return clean[..., top : top + region, left : left + region]


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
    parser.add_argument("--region", type=int)
    parser.add_argument("--only", nargs="*", default=[], help="operators, of all by default")
    parser.add_argument("--ways", nargs="+", choices=get_args(Way), default=["independent", "fit"])
    parser.add_argument("--without-model", action="store_true")
    options = parser.parse_args()
    pack = Pack.open(options.pack)
    clean = images_of(pack, options.images, options.region)
    facts = json.loads(options.out.read_text()) if options.out.exists() else {}
    results = facts.setdefault("operators", {})
    rows = []
    for name, operator in operators(clean.shape[-1]).items():
        if options.only and name not in options.only:
            continue
        result = results.setdefault(name, {})
        y = operator(clean)
        y = y + NOISE * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        if options.without_model or options.ways[-1] not in result or not options.picture.exists():
            measured, shown = without_model(operator, clean, y)
            result |= measured
            if not options.without_model:
                measured, more = sampled(
                    options.run, operator, clean, y, options.samples, options.ways
                )
                result |= measured
                rows.append(torch.cat([clean[:2], *(x[:2] for x in (*shown, *more))]))
                facts["samples"] = options.samples
            facts |= {"images": len(clean), "noise": NOISE}
            write_json(options.out, facts)
            print(name, json.dumps(result), flush=True)
    if rows:
        values = pack.space.to_values(torch.cat(rows))
        save_png(options.picture, enlarge(grid(np.asarray(values), columns=10), 700))


if __name__ == "__main__":
    main()
