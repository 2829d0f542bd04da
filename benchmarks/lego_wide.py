"""Wide pictures of a network of LEGO bricks that was trained on squares: for docs/lego.md.

    python benchmarks/lego_wide.py

Trains a small stack of bricks on squares of 16 x 16 of an endless labyrinth, then samples images of
32 x 64 with each way of laying windows, and one of 64 x 2048. A seam is a border of tiles at which
neighbors differ more than elsewhere. A few CPU-minutes; after a kill the same command resumes.
Results go to benchmarks/results/lego-wide.json, pictures to docs/lego-seams.png and lego-wide.png.
"""

import argparse
import json
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from lego_toy import EDM, LAW, SIDE, Variant, train
from torch import Tensor

from patchdiffusion import Pipeline, load, rng
from patchdiffusion.accel.tiles import Tiles
from patchdiffusion.metrics.seams import seam_ratio
from patchdiffusion.model import ModelConfig, save_model
from patchdiffusion.nets.lego import LegoConfig
from patchdiffusion.sampling.canvas import CanvasRegion
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.system.files import write_json
from patchdiffusion.system.png import enlarge, grid, save_png

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "lego-wide.json"
BRICKS = LegoConfig(channels=1, width=64, heads=4, regions=(4, SIDE), patches=(2, 2), depths=(1, 3))
FIELD = 1024
SIZE = (32, 64)
WAYS = {
    "fixed": CanvasRegion(size=SIZE, corner=(0, 0)),
    "fixed, each a whole image": Tiles(size=SIZE, shift=False),
    "averaged": Tiles(size=SIZE, shift=False, overlap=0.5),
    "shifted": Tiles(size=SIZE),
    "shifted and averaged": Tiles(size=SIZE, overlap=0.5),
    "shifted, pitch": Tiles(size=SIZE, coordinates="pitch"),
    "shifted, clamp": Tiles(size=SIZE, coordinates="clamp"),
    "shifted, periodic": Tiles(size=SIZE, coordinates="periodic"),
    "shifted, whole": Tiles(size=SIZE, coordinates="whole"),
}
"""Places of windows, and their coordinates."""
SHOWN = ("fixed", "fixed, each a whole image", "averaged", "shifted")


@cache
def labyrinth() -> Tensor:
    """Noise of one wavelength, 12 pixels, as ridges: [FIELD, FIELD] in [-1, 1]."""
    white = rng.normal(rng.keys(0, "labyrinth", 0, torch.arange(1)), (FIELD, FIELD))[0]
    frequency = torch.fft.fftfreq(FIELD)
    radius = (frequency[:, None].square() + frequency[None].square()).sqrt() * 12
    band = torch.exp(-0.5 * ((radius - 1) / 0.15).square())
    waves = torch.fft.ifft2(torch.fft.fft2(white) * band).real
    return torch.tanh(1.2 * waves / waves.std())


def squares(key: Tensor) -> Tensor:
    """Squares of the labyrinth: [B, 1, 16, 16]."""
    top, left = (rng.integers(rng.subkeys(key, axis), FIELD - SIDE) for axis in ("top", "left"))
    field, pixel = labyrinth(), torch.arange(SIDE)
    return field[(top[:, None] + pixel)[:, :, None], (left[:, None] + pixel)[:, None]][:, None]


def ratios(images: np.ndarray) -> list[float]:
    """Seam ratio of borders every 16 columns, by the column of the first one: [16]."""
    x = torch.from_numpy(images).movedim(-1, 1).double()
    return [seam_ratio(x, range(first or SIDE, x.shape[-1], SIDE)) for first in range(SIDE)]


def model(work: Path, steps: int) -> Pipeline:
    """The trained stack, as a model folder."""
    folder = work / "model"
    if not folder.exists():
        denoiser = train(Variant(BRICKS), squares, work / "labyrinth.pt", steps)
        state = denoiser.network.state_dict()
        config = ModelConfig(
            network=BRICKS, precond=EDM(), noise=LAW, canvas=(SIDE, SIDE), data="labyrinth"
        )
        save_model(folder, config, state, state)
    return load(folder, device="cpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000, help="steps of training")
    parser.add_argument("--count", type=int, default=16, help="images of each way")
    parser.add_argument("--work", type=Path, default=Path("runs/lego-wide"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=RESULT, help="file of the results")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    pipeline = model(options.work, options.steps)
    facts = json.loads(options.out.read_text()) if options.out.exists() else {}
    found, strips = facts.setdefault("seam_ratios", {}), []
    for name, canvas in WAYS.items():
        if name in found and name not in SHOWN:
            continue
        config = SamplerConfig(canvas=canvas)
        images = pipeline.sample(options.count, config=config, batch=options.count, progress=True)
        if name in SHOWN:
            strips.append(np.concatenate(list(images[:4]), axis=1))
        found[name] = ratios(images)
        print(f"{name:<26} {found[name][0]:.2f} at tiles, at most {max(found[name]):.2f}")
        facts |= {"date": time.strftime("%Y-%m-%d"), "steps": options.steps, "size": SIZE}
        write_json(options.out, facts)
    real = squares(rng.keys(0, "real", 0, torch.arange(512)))
    print(f"labyrinth: differences of neighbors {float(real.diff(dim=-1).abs().mean()):.3f}")
    save_png(options.pictures / "lego-seams.png", enlarge(grid(np.stack(strips), 1, 4), 768))
    if not (options.work / "wide.npy").exists():
        config = SamplerConfig(canvas=Tiles(size=(64, 2048)), steps=12)
        np.save(options.work / "wide.npy", pipeline.sample(1, config=config, progress=True))
    wide = np.load(options.work / "wide.npy")
    facts["wide"] = {"size": [64, 2048], "seam_ratios": ratios(wide)}
    print(f"64 x 2048: {ratios(wide)[0]:.2f} at tiles, at most {max(ratios(wide)):.2f}")
    write_json(options.out, facts)
    save_png(options.pictures / "lego-wide.png", wide[0])


if __name__ == "__main__":
    main()
