"""Vary images: noise is added and removed again (Boomerang, arXiv 2210.12100).

patchdiffusion train glyphs --out runs/glyphs
python examples/boomerang_variations.py runs/glyphs glyphs

Rows of the picture are held-out images, and columns the image and strengths of the noise. The
distance is that to the image, next to that of images of the data to each other.
"""

import argparse
from pathlib import Path

import numpy as np

from patchdiffusion import SamplerConfig, load
from patchdiffusion.apps.edit import local_sample, sigma_of
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.system.png import enlarge, grid, save_png

STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean squared difference of pixels; white - black is 2."""
    return float(np.sqrt(np.square((a.astype(float) - b) / 127.5).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("data", nargs="?", default="glyphs", help="images, of which some are taken")
    parser.add_argument("--count", type=int, default=8, help="number of images")
    parser.add_argument("--steps", type=int, default=12, help="sampling steps")
    parser.add_argument("--out", default="boomerang_variations.png", help="picture")
    options = parser.parse_args()

    pipeline = load(options.run)
    height, width = pipeline.model.config.canvas
    pack = prepare_data(DataConfig(path=options.data, resolution=(height, width)))
    images = pack.images[pack.some_held_out(2 * options.count)].numpy()
    originals, others = images[: options.count], images[options.count :]
    columns = [originals]
    print("strength  noise level  distance")
    for strength in STRENGTHS:
        sigma = sigma_of(strength)
        config = SamplerConfig(steps=options.steps)
        varied = [
            local_sample(pipeline, image, sigma, seed=number, config=config)[0]
            for number, image in enumerate(originals)
        ]
        columns.append(np.stack(varied))
        print(f"{strength:8}  {sigma:11.3f}  {distance(columns[-1], originals):8.3f}")
    print(f"another image          {distance(others, originals[: len(others)]):8.3f}")
    rows = np.stack(columns, 1).reshape(-1, *images.shape[1:])
    picture = grid(pack.space.to_picture(rows), len(columns))
    save_png(Path(options.out), enlarge(picture, 700))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
