"""Pictures of docs/canvas.md: a panorama, a texture, in-painting, out-painting, local samples.

    python benchmarks/canvas_pictures.py RUN PACK

RUN is a small model of square images, and PACK has held-out ones. Pictures that are there are not
made again.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from patchdiffusion import SamplerConfig, load
from patchdiffusion.accel.tiles import Tiles
from patchdiffusion.apps.edit import inpaint, local_sample, outpaint, sigma_of
from patchdiffusion.data.pack import Pack
from patchdiffusion.sampling.pipeline import Pipeline
from patchdiffusion.system.png import enlarge, grid, save_png

DOCS = Path(__file__).parent.parent / "docs"
STEPS = 18
STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)


def panorama(pipeline: Pipeline, images: np.ndarray) -> np.ndarray:
    """Six images wide, one above itself moved by half, so that its ends lie in the middle."""
    side = images.shape[1]
    canvas = Tiles(size=(side, 6 * side), overlap=0.25, wraps="x")
    wide = pipeline.sample(2, seed=5, config=SamplerConfig(canvas=canvas, steps=STEPS))
    rows = [wide[0], np.roll(wide[0], 3 * side, 1), wide[1], np.roll(wide[1], 3 * side, 1)]
    return grid(pipeline.model.config.space.to_picture(np.stack(rows)), 1)


def texture(pipeline: Pipeline, images: np.ndarray) -> np.ndarray:
    """Squares of twice the side, each laid two by three."""
    side = 2 * images.shape[1]
    canvas = Tiles(size=(side, side), overlap=0.25, wraps="xy")
    made = pipeline.sample(2, seed=0, config=SamplerConfig(canvas=canvas, steps=STEPS))
    rows = np.concatenate([np.tile(image, (2, 2, 1)) for image in made], 1)
    return pipeline.model.config.space.to_picture(rows[None])[0]


def holes(pipeline: Pipeline, images: np.ndarray) -> np.ndarray:
    """Image, image with a gray hole, three ways to fill it by resampling, in a row."""
    side = images.shape[1]
    known = np.ones((side, side), bool)
    known[side // 4 : side * 3 // 4, side // 4 : side * 3 // 4] = False
    config = SamplerConfig(steps=STEPS)
    rows = []
    for image in images[:5]:
        made = inpaint(pipeline, image, known, count=3, config=config)
        hole = np.where(known[..., None], image, 128).astype(image.dtype)
        rows.append(np.stack([image, hole, *made]))
    return grid(pipeline.model.config.space.to_picture(np.concatenate(rows)), 5)


def around(pipeline: Pipeline, images: np.ndarray) -> np.ndarray:
    """Images in the middle of twice their width, and what surrounds them, twice."""
    side, config = images.shape[1], SamplerConfig(steps=STEPS)
    rows = []
    for image in images[5:8]:
        made = outpaint(pipeline, image, (side, 2 * side), count=2, config=config)
        blank = np.full_like(made[0], 128)
        blank[:, side // 2 : side // 2 + side] = image
        rows.append(np.stack([blank, *made]))
    return grid(pipeline.model.config.space.to_picture(np.concatenate(rows)), 3)


def near(pipeline: Pipeline, images: np.ndarray) -> np.ndarray:
    """Image and samples near it, by strength, in a row."""
    config = SamplerConfig(steps=STEPS)
    rows = []
    for number, image in enumerate(images[:5]):
        made = [
            local_sample(pipeline, image, sigma_of(strength), seed=number, config=config)[0]
            for strength in STRENGTHS
        ]
        rows.append(np.stack([image, *made]))
    return grid(pipeline.model.config.space.to_picture(np.concatenate(rows)), 1 + len(STRENGTHS))


PICTURES: dict[str, Callable[[Pipeline, np.ndarray], np.ndarray]] = {
    "panorama": panorama,
    "texture": texture,
    "inpaint": holes,
    "outpaint": around,
    "local": near,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args()
    pipeline, pack = load(options.run, device="cpu"), Pack.open(options.pack)
    images = pack.images[pack.some_held_out(8)].numpy()
    for name, make in PICTURES.items():
        file = options.out / f"canvas-{name}.png"
        if not file.exists():
            save_png(file, enlarge(make(pipeline, images), 768))
            print(f"wrote {file}", flush=True)


if __name__ == "__main__":
    main()
