"""Sharpen enlarged images: noise is added and removed again (Boomerang, arXiv 2210.12100).

patchdiffusion train glyphs --out runs/glyphs
python examples/boomerang_enhance.py runs/glyphs glyphs

Held-out images are reduced and enlarged again, which leaves them blurry, and then varied. Columns
of the picture are the image, the enlarged one, and noise levels. Sharpness is the mean step
between pixels, relative to that of the images; the distance is the error of pixels.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from patchdiffusion import SamplerConfig, load
from patchdiffusion.apps.edit import local_sample
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.guidance.operators import Downsample
from patchdiffusion.system.png import enlarge, grid, save_png


def steps(x: Tensor) -> float:
    """Mean absolute step between neighbors of images [N, C, H, W]."""
    return float(x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("data", nargs="?", default="glyphs", help="images, of which some are taken")
    parser.add_argument("--factor", type=int, default=2, help="by how much they are reduced")
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--count", type=int, default=8, help="number of images")
    parser.add_argument("--steps", type=int, default=12, help="sampling steps")
    parser.add_argument("--out", default="boomerang_enhance.png", help="picture")
    options = parser.parse_args()

    pipeline = load(options.run)
    height, width = pipeline.model.config.canvas
    pack = prepare_data(DataConfig(path=options.data, resolution=(height, width)))
    images = pack.images[pack.some_held_out(options.count)]
    clean = pack.space.to_network(images.movedim(-1, 1).float())
    reduce = Downsample(factor=options.factor)
    enlarged = reduce.guess(reduce(clean)).clamp(-1, 1)
    columns = [images.numpy(), pack.space.to_values(enlarged)]
    names = ["as they were", "enlarged"]
    for sigma in options.sigmas:
        config = SamplerConfig(steps=options.steps)
        varied = [
            local_sample(pipeline, image, sigma, seed=number, config=config)[0]
            for number, image in enumerate(columns[1])
        ]
        columns.append(np.stack(varied))
        names.append(f"noise level {sigma:g}")
    print(f"{'':<20}sharpness  distance")
    for name, column in zip(names, columns, strict=True):
        x = pack.space.to_network(torch.from_numpy(column).movedim(-1, 1).float())
        error = float((x - clean).square().mean().sqrt())
        print(f"{name:<20}{steps(x) / steps(clean):9.2f}  {error:8.3f}")
    rows = np.stack(columns, 1).reshape(-1, *columns[0].shape[1:])
    picture = grid(pack.space.to_picture(rows), len(columns))
    save_png(Path(options.out), enlarge(picture, 700))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
