"""Canvases in windows: what overlaps leave of the error of windows, and what a canvas costs.

    python benchmarks/canvas.py error
    python benchmarks/canvas.py cost RUN

`error`: denoisers of a Gaussian field and of its windows are exact, so the mean squared difference
of the fused windows from the denoiser of the whole field is, too. It is given relative to that of
windows side by side, with three weights of a pixel: its distance to the border of the window, the
square (which `accel.tiles` takes) and the cube. `cost`: seconds and memory of one evaluation of a
model in windows, each size in a process of its own. Results are written to
benchmarks/results/canvas.json.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchdiffusion import load
from patchdiffusion.accel.tiles import TiledDenoiser
from patchdiffusion.analytic import GaussianField
from patchdiffusion.system.files import write_json

OUT = Path(__file__).parent / "results" / "canvas.json"
WINDOW = (6, 16)
SIDES = (256, 512, 1024, 2048, 4096)


class Weighted(TiledDenoiser):
    """Windows whose weights are a power of the distance to their border."""

    power = 2.0

    def _weight(self, moved: Tensor, dtype: torch.dtype) -> Tensor:
        return super()._weight(moved, dtype) ** (self.power / 2)


def excess(length: float, overlap: int, power: float) -> float:
    """Mean squared difference of fused windows from the denoiser of the whole field.

    Five windows that overlap by just as many pixels; the field has the correlation
    exp(-d^2 / (2 length^2)) and standard deviation .5, the noise .4.
    """
    size, sigma = (WINDOW[0], WINDOW[1] + 4 * (WINDOW[1] - overlap)), 0.4
    lags = torch.fft.fftfreq(128).abs() * 128
    covariance = 0.25 * torch.exp(-0.5 * (lags[:, None] ** 2 + lags**2) / length**2)
    field = GaussianField(size, torch.fft.fft2(covariance.double()).real.clamp(min=0))
    pixels = torch.eye(len(field.matrix), dtype=torch.float64).view(-1, 1, *size)
    noisy = field.matrix + sigma**2 * torch.eye(len(field.matrix))
    tiled = Weighted(field.crop(WINDOW), WINDOW, overlap=overlap / WINDOW[1], shift=False)
    tiled.power = power
    difference = (tiled(pixels, sigma) - field(pixels, sigma)).flatten(1).mT
    return float((difference @ noisy @ difference.mT).diagonal().mean())


def errors() -> list[dict[str, Any]]:
    """Remaining error by correlation length, overlap and weight."""
    rows = []
    for length in (1.0, 1.5, 2.0):
        apart = excess(length, 0, 2)
        for overlap in (2, 3, 4, 6, 8):
            left = [excess(length, overlap, power) / apart for power in (1, 2, 3)]
            rows.append({"length": length, "overlap": overlap, "left": left})
    return rows


def cost(run: Path, side: int) -> dict[str, float]:
    """Seconds and peak memory of one evaluation of a square image."""
    model = load(run, device="cpu").model
    tiled = TiledDenoiser(model.denoiser, model.config.canvas, overlap=0.125)
    x = torch.zeros(1, model.config.network.channels, side, side)
    with torch.no_grad():
        tiled(x[..., :64, :64].contiguous(), 1.0)  # first-time work
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = time.process_time()
        tiled(x, 1.0)
    seconds = time.process_time() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "side": side,
        "cpu_seconds": seconds,
        "image_mb": x.nbytes / 2**20,
        "more_mb": (peak - before) / 2**10,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("error", "cost", "one"))
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--side", type=int, help="of `one`, which measures in this process")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES)
    options = parser.parse_args()
    if options.what == "one":
        print(json.dumps(cost(options.run, options.side)))
        return
    facts = json.loads(OUT.read_text()) if OUT.exists() else {}
    if options.what == "error":
        facts["error"] = errors()
        for row in facts["error"]:
            left = " ".join(f"{value:.4f}" for value in row["left"])
            print(f"length {row['length']}, overlap {row['overlap']}: {left}")
    else:
        facts["cost"] = []
        for side in options.sides:
            command = [sys.executable, __file__, "one", str(options.run), "--side", str(side)]
            row = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            facts["cost"].append(row)
            print(row, flush=True)
    write_json(OUT, facts)


if __name__ == "__main__":
    main()
