"""Errors and counted operations of accelerators on trained models.

    python benchmarks/caches.py runs/unet runs/dit runs/lego --count 16 --steps 18

Samples the same seeds without an accelerator and with each, by the same solver and steps. The error
is the root mean square distance to the images without one, relative to the deviation of their
pixels; operations are counted, not timed. Fewer steps of the solver are there for comparison.
Writes benchmarks/results/DATE-caches.json, or --out, and draws it: --picture. Without models it
draws what is in that file.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from patchdiffusion import Pipeline, SamplerConfig, load
from patchdiffusion.accel import Accelerator
from patchdiffusion.accel.base import Spent
from patchdiffusion.accel.deepcache import DeepCache
from patchdiffusion.accel.encoder import FasterDiffusion
from patchdiffusion.accel.regions import Regions
from patchdiffusion.accel.residual import Residual
from patchdiffusion.nets.count import MacCounter
from patchdiffusion.solvers import Euler
from patchdiffusion.system.files import read_json, write_json
from patchdiffusion.system.progress import progress_bar
from patchdiffusion.system.serialize import encode

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULT = Path(__file__).parent / "results" / f"{time.strftime('%Y-%m-%d')}-caches.json"
SHARES = (0.67, 0.5, 0.33)


def accelerators() -> Iterator[tuple[str, str, Accelerator]]:
    """Curve, point on it, accelerator."""
    for every in (2, 3, 5):
        yield "deepcache", f"every {every}", DeepCache(every=every)
    for first in (0, 1, 2, 3):
        yield "deepcache, every 3", f"first {first}", DeepCache(every=3, first=first)
    yield "deepcache, centered", "every 5", DeepCache(every=5, center=9.0)
    for share in SHARES:
        yield "faster-diffusion", f"{share:.0%}", FasterDiffusion(share=share)
        for keys in ("change", "even"):
            accelerator = FasterDiffusion(share=share, keys=keys)
            yield f"faster-diffusion, {keys}", f"{share:.0%}", accelerator
    for threshold in (0.05, 0.1, 0.2, 0.4):
        yield "residual", f"{threshold}", Residual(threshold=threshold)
        yield "residual, taylor 1", f"{threshold}", Residual(threshold=threshold, taylor=1)
    for ratio in (0.75, 0.5, 0.25):
        yield "regions", f"{ratio:.0%}", Regions(ratio=ratio)
    yield "regions, half", "high", Regions(prefer="high")
    yield "regions, half", "no starvation", Regions(starvation=0.0)
    yield "regions, half", "high, no starvation", Regions(prefer="high", starvation=0.0)
    yield "regions, half", "no memory", Regions(attend=False)
    yield "regions, half", "no resets", Regions(resets=())


class Measuring:
    """A model, and its images without an accelerator."""

    def __init__(self, path: Path, options: argparse.Namespace):
        self.pipeline: Pipeline = load(path, device="cpu")
        self.options = options
        self.plain = SamplerConfig(solver=Euler(), steps=options.steps)
        self.exact, self.macs = self.sampled(self.plain)

    def sampled(self, config: SamplerConfig) -> tuple[np.ndarray, float]:
        """Images [N, ...] as floats, and multiply-accumulates of one of them."""
        counted: list[Spent] = []
        arguments = {"seed": self.options.seed, "config": config}
        images = self.pipeline.sample(self.options.count, spent=counted.append, **arguments)
        macs = sum(spent.macs for spent in counted) / self.options.count
        if not counted:
            with MacCounter() as counter:
                self.pipeline.sample(1, **arguments)
            macs = counter.macs
        return images.astype(np.float64), macs

    def point(self, curve: str, name: str, config: SamplerConfig) -> dict[str, Any]:
        """Error and share of the operations."""
        if curve.startswith(
            "faster-diffusion"
        ):  # finds its steps once, which is not part of sampling
            self.pipeline.sample(1, seed=self.options.seed, config=config)
        images, macs = self.sampled(config)
        error = float(np.sqrt(np.mean((images - self.exact) ** 2)) / self.exact.std())
        return {
            "curve": curve,
            "point": name,
            "error": error,
            "operations": macs / self.macs,
            "accelerator": encode(config.accelerator),
        }


def measured(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    model = Measuring(path, options)
    points, refused = [], {}
    every = list(accelerators())
    fewer = [round(options.steps * share) for share in SHARES]
    with progress_bar(len(every) + len(fewer), path.name) as bar:
        for steps in fewer:
            points.append(model.point("fewer steps", str(steps), replace(model.plain, steps=steps)))
            bar.update()
        for curve, name, accelerator in every:
            config = replace(model.plain, accelerator=accelerator)
            try:
                points.append(model.point(curve, name, config))
            except ValueError as error:
                refused[f"{curve}, {name}"] = str(error)
            bar.update()
    return {
        "network": encode(model.pipeline.model.config.network),
        "weights": model.pipeline.model.digest,
        "gmac": model.macs / 1e9,
        "points": points,
        "refused": refused,
    }


def draw(result: dict[str, Any], file: Path) -> None:
    """Error against operations, a panel for each model."""
    models = result["models"]
    curves = ("fewer steps", "deepcache", "faster-diffusion", "residual", "regions")
    figure, axes = plt.subplots(1, len(models), figsize=(4.2 * len(models), 3.6), squeeze=False)
    for axis, (name, model) in zip(axes[0], models.items(), strict=True):
        for number, curve in enumerate(curves):
            chosen = [p for p in model["points"] if p["curve"] == curve]
            chosen.sort(key=lambda p: p["operations"])
            if chosen:
                x, y = [p["operations"] for p in chosen], [p["error"] for p in chosen]
                style = "k--" if curve == "fewer steps" else f"C{number}o-"
                axis.plot(x, y, style, label=curve, markersize=4)
        axis.set_title(name)
        axis.set_xlabel("share of the operations")
        axis.set_yscale("log")
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("error to the images without")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="*", help="folders of runs or models")
    parser.add_argument("--count", type=int, default=16, help="images")
    parser.add_argument("--steps", type=int, default=18, help="steps of euler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--picture", type=Path, help="file of a picture")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.models:
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "solver": "euler",
            **{name: getattr(options, name) for name in ("count", "steps", "seed")},
            "models": {path.name: measured(path, options) for path in options.models},
        }
        write_json(options.out, result)
    else:
        result = read_json(options.out)
    for name, model in result["models"].items():
        print(f"{name}: {model['gmac']:.3g} GMAC an image")
        for p in model["points"]:
            label = f"{p['curve']}: {p['point']}"
            print(f"  {label:<42}{p['operations']:8.1%}  error {p['error']:.4f}")
        for label, why in model["refused"].items():
            print(f"  {label}: {why}")
    if options.picture:
        draw(result, options.picture)


if __name__ == "__main__":
    main()
