"""Quality against the cost of sampling, for several models of the same images.

    python benchmarks/small_features.py --data cifar10-train.zip --out features.safetensors
    python benchmarks/sampling_cost.py measure RUNS... --features features.safetensors
    python benchmarks/sampling_cost.py draw RUNS...

`measure` is `patchdiffusion speed` on each run that has no speed.json with distances yet, after
`patchdiffusion bricks` where there are bricks. Nothing else should run meanwhile. `draw` collects
them in benchmarks/results/sampling-cost.json and docs/sampling-cost.png.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from small_features import extractor
from torch import Tensor

from patchdiffusion import cli
from patchdiffusion.system.files import write_json

OUT = Path(__file__).parent / "results" / "sampling-cost.json"
PICTURE = Path(__file__).parents[1] / "docs" / "sampling-cost.png"
FILE = "PATCHDIFFUSION_FEATURES"
"""Variable of the environment with the file of the features."""


def features() -> Callable[[Tensor], Tensor]:
    """The extractor of `speed`: uint8 [B, 3, H, W] -> [B, D]."""
    extract = extractor(Path(os.environ[FILE]))
    return lambda images: extract(images.movedim(1, -1))


def record_of(run: Path) -> dict[str, Any] | None:
    """The comparison of a run, if it has distances from real images."""
    file = run / "model" / "speed.json"
    found = json.loads(file.read_text()) if file.exists() else {"points": []}
    return found if any(point.get("frechet") for point in found["points"]) else None


def measure(run: Path, samples: int, words: list[str]) -> None:
    """Compare the samplers of a run; raises `RuntimeError` if that fails."""
    if "lego" in run.name and not (run / "model" / "bricks.json").exists():
        cli.main(["bricks", str(run), "--held-out", "256"])
    command = ["speed", str(run), "--samples", str(samples)]
    command += ["--features.extractor", "sampling_cost:features", *words]
    if cli.main(command):
        raise RuntimeError(f"patchdiffusion {' '.join(command)}")


def draw(runs: list[Path]) -> None:
    """One line for each model: the best samplers by Frechet distance."""
    found = {run.name.rsplit("-", 1)[0]: record_of(run) for run in runs}
    results = {name: record["points"] for name, record in found.items() if record}
    write_json(OUT, results)
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, cost, scale, label in (
        (panels[0], "macs", 1e-9, "GMAC for an image"),
        (panels[1], "seconds", 1e3, "milliseconds for an image"),
    ):
        for name, points in results.items():
            rated = sorted((p for p in points if p["frechet"]), key=lambda p: p[cost])
            (line,) = axes.plot(
                [scale * p[cost] for p in rated], [p["frechet"] for p in rated], ".", alpha=0.4
            )
            best = [p for i, p in enumerate(rated) if _is_best(p, rated[:i])]
            axes.plot(
                [scale * p[cost] for p in best],
                [p["frechet"] for p in best],
                color=line.get_color(),
                label=name,
            )
            skipping = [p for p in best if p["accelerator"] != "none"]
            axes.plot(
                [scale * p[cost] for p in skipping],
                [p["frechet"] for p in skipping],
                "x",
                color=line.get_color(),
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("Frechet distance")
    panels[1].legend(fontsize=8, title="x: accelerated", title_fontsize=8)
    figure.savefig(PICTURE, dpi=110)
    for name, points in results.items():
        best = min((p for p in points if p["frechet"]), key=lambda p: p["frechet"])
        print(f"{name:<12}{best['frechet']:8.3g}  KID {best['kernel']:.4g}  {best['solver']} "
              f"{best['steps']} {best['accelerator']}  {best['macs'] / 1e9:.3g} GMAC")  # fmt: skip


def _is_best(point: dict[str, Any], cheaper: list[dict[str, Any]]) -> bool:
    return all(point["frechet"] < other["frechet"] for other in cheaper)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("measure", "draw"))
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--features", type=Path, help="file of small_features.py")
    parser.add_argument("--samples", type=int, default=500)
    options, words = parser.parse_known_args()
    if options.what == "draw":
        draw(options.runs)
        return
    os.environ[FILE] = str(options.features.resolve())
    sys.path.insert(0, str(Path(__file__).parent))
    for run in options.runs:
        if record_of(run) is None:
            measure(run, options.samples, words)


if __name__ == "__main__":
    main()
