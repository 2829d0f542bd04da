"""Models of crops alone: whole images at once, which they never saw, against windows of their size.

    python benchmarks/crops_only.py RUN --window 8

Held-out loss of whole images, with the same noise for all. Results go to
benchmarks/results/crops-only.json.
"""

import argparse
import json
from pathlib import Path

import torch

from patchdiffusion import load
from patchdiffusion.accel.tiles import Tiles
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.metrics.heldout import held_out_losses, standard_error, summarize
from patchdiffusion.system.files import write_json

FILE = Path(__file__).parent / "results" / "crops-only.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--window", type=int, default=8)
    options = parser.parse_args()
    model = load(options.run, device="cpu").model
    config, denoiser = model.config, model.denoiser
    data = json.loads((options.run / "config.json").read_text())["data"]
    pack = prepare_data(DataConfig(path=data["path"], resolution=data["resolution"]))
    ways: dict[str, Denoiser] = {"at once": denoiser}
    for overlap in (0.0, 0.25, 0.5, 0.75):
        tiles = Tiles(window=(options.window,), overlap=overlap, shift=False)
        ways[f"windows, overlap {overlap:g}"] = tiles.tiled(denoiser, config.canvas)
    facts = {"images": config.images, "window": options.window, "canvas": config.canvas}
    for name, way in ways.items():
        table = held_out_losses(
            way,
            pack.images,
            (),
            pack.heldout,
            space=config.space,
            law=config.noise,
            weighting=config.precond.default_weighting(),
            sizes=(config.canvas,),
            device=torch.device("cpu"),
        )
        loss = summarize(table)
        error = standard_error(table[config.canvas][1])
        facts[name] = {"loss": loss.total, "standard_error": error, "bands": loss.bands}
        print(f"{name:<24}{loss.total:.4f} +- {error:.4f}  {loss.bands}", flush=True)
    write_json(FILE, facts)


if __name__ == "__main__":
    main()
