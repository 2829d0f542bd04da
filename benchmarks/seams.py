"""Seams of images that are larger than those of training, by the overlap of their windows.

    python benchmarks/seams.py exact
    python benchmarks/seams.py models RUN... --samples 24

exact: a Gaussian field with the correlation exp(-d^2 / 2 l^2), whose best denoisers of five windows
of 16 pixels are known. Heun's method is linear in the noise then, so that expected steps between
pixels are exact; the places of windows that move are those of eight seeds.

models: samples of models at twice the side of training, by what `evaluate --size` measures.

Results go to benchmarks/results/seams.json, and what is there is not measured again.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchdiffusion import SamplerConfig, sample
from patchdiffusion.accel.tiles import Tiles
from patchdiffusion.analytic import GaussianField
from patchdiffusion.data.pack import Pack
from patchdiffusion.metrics.evaluate import Evaluation
from patchdiffusion.metrics.options import EvaluationConfig
from patchdiffusion.metrics.seams import Seams
from patchdiffusion.patches import Size
from patchdiffusion.sampling.driver import Start
from patchdiffusion.sampling.pipeline import load
from patchdiffusion.system.files import write_json

FILE = Path(__file__).parent / "results" / "seams.json"
WINDOW = (2, 16)
OVERLAPS = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
SEEDS = 8


def field(size: Size, length: float) -> GaussianField:
    """The field on a canvas, cut from a torus that is longer and has no ends."""
    lags = torch.fft.fftfreq(128).abs() * 128
    covariance = 0.25 * torch.exp(-0.5 * (lags[:, None] ** 2 + lags**2) / length**2)
    return GaussianField(size, torch.fft.fft2(covariance.double()).real.clamp(min=0))


def expected_steps(whole: GaussianField, config: SamplerConfig, seed: int) -> Tensor:
    """Expected absolute steps of samples with the windows of a seed: float64 [1, sum(S)]."""
    count = math.prod(whole.canvas)
    start = Start(80.0 * torch.eye(count).view(count, 1, *whole.canvas), 80.0, fresh=False)
    made = sample(
        whole.crop(WINDOW),
        seeds=[seed] * count,
        channels=1,
        canvas=WINDOW,
        config=config,
        start=start,
        batch=count,
        dtype=torch.float64,
    )  # one image for each pixel of the noise
    columns = made.double()[:, 0]  # [noise, *S]
    rows = []
    for axis in (1, 2):
        step = columns - columns.roll(1, axis)
        deviation = step.square().sum(0).sqrt() * math.sqrt(2 / math.pi)
        rows.append(deviation.mean(2 - axis))
    return torch.cat(rows)[None]


def exact() -> dict[str, Any]:
    """Ratios by correlation length and overlap, of windows that stay and that move."""
    table: dict[str, Any] = {}
    for length in (1.0, 2.0, 4.0):
        for overlap in OVERLAPS:
            size = (WINDOW[0], 16 + 4 * round(16 * (1 - overlap)))
            whole = field(size, length)
            for moving in (False, True):
                canvas = Tiles(size=size, overlap=overlap, shift=moving, coordinates="window")
                config = SamplerConfig(canvas=canvas)
                tiled = canvas.tiled(whole.crop(WINDOW), WINDOW)
                sigmas = tuple(config.sigmas().tolist()[:-1])
                seams = Seams(tiled, size, (1, 1), sigmas)
                seeds = range(SEEDS if moving else 1)
                steps = torch.cat([expected_steps(whole, config, seed) for seed in seeds])
                ratio = seams.measured(steps, torch.tensor(list(seeds)))["seam_ratio"]
                name = f"l {length:g}, overlap {overlap:g}, {'moving' if moving else 'fixed'}"
                table[name] = ratio
                print(f"{name:<40}{ratio:.4f}", flush=True)
    return table


def of_model(run: Path, overlap: float, moving: bool, samples: int, steps: int) -> dict[str, Any]:
    """Seams of samples of a run at twice the side of training, with their error."""
    pipeline = load(run, device="cpu")
    canvas = tuple(2 * side for side in pipeline.model.config.canvas)
    tiles = Tiles(size=canvas, overlap=overlap, shift=moving)
    data = json.loads((run / "config.json").read_text())["data"]["path"]
    config = EvaluationConfig(
        samples=samples, held_out=0, sampler=SamplerConfig(canvas=tiles, steps=steps)
    )
    result = Evaluation(Pack.open(Path(data)), config, None).of_model(pipeline)
    names = ("seam_ratio", "seam_ratio_std", "seams")
    return {name: result[name] for name in names} | {"model": result["card"]["model"]["digest"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("exact", "models"))
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--steps", type=int, default=18)
    options = parser.parse_args()
    facts = json.loads(FILE.read_text()) if FILE.exists() else {}
    if options.what == "exact" and "exact" not in facts:
        facts["exact"] = exact()
        write_json(FILE, facts)
    for run in options.runs:
        done = facts.setdefault("models", {}).setdefault(run.name, {})
        done |= {"samples": options.samples, "steps": options.steps}
        for overlap, moving in ((0.0, False), *((overlap, True) for overlap in OVERLAPS[:4])):
            name = f"overlap {overlap:g}, {'moving' if moving else 'fixed'}"
            if name not in done:
                done[name] = of_model(run, overlap, moving, options.samples, options.steps)
                write_json(FILE, facts)
                print(run.name, name, json.dumps(done[name]), flush=True)


if __name__ == "__main__":
    main()
