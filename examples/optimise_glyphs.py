"""Guide glyphs by a reward, ink or symmetry, and measure them independently of it.

patchdiffusion train glyphs --out runs/glyphs
python examples/optimise_glyphs.py runs/glyphs --reward symmetry

Rows of the picture are strengths of the guidance. The measure is the distance to the nearest image
of training, next to that of held-out images of similar reward, and how many have as much reward.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from patchdiffusion import Cond, SamplerConfig, load, sample
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source
from patchdiffusion.guidance.reward import GradientGuidance, Tilt
from patchdiffusion.system.png import enlarge, grid, save_png, to_uint8


def ink(x: Tensor) -> Tensor:
    """Fraction of the canvas that is white."""
    return (x.mean(dim=(1, 2, 3)) + 1) / 2


def symmetry(x: Tensor) -> Tensor:
    """0 for a symmetric image, negative otherwise: minus the squared error of its mirror image."""
    return -(x - x.flip(-1)).square().mean(dim=(1, 2, 3))


REWARDS = {"ink": (ink, (0, 10, 30, 100, 300)), "symmetry": (symmetry, (0, 2, 6, 20, 60))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="folder of a run on the built-in glyphs")
    parser.add_argument("--reward", choices=REWARDS, default="symmetry")
    parser.add_argument("--count", type=int, default=16, help="images of each strength")
    parser.add_argument("--steps", type=int, default=18, help="sampling steps")
    parser.add_argument("--out", default="optimise_glyphs.png", help="picture of samples")
    options = parser.parse_args()

    pipeline = load(options.run)
    canvas, denoiser = pipeline.model.config.canvas, pipeline.model.denoiser
    pack = prepare(open_source("glyphs"), resolution=(canvas[0], canvas[1]))
    real = pack.images.movedim(-1, 1).float() / 127.5 - 1
    train, held_out = real[pack.train], real[pack.heldout]

    def distance(x: Tensor) -> Tensor:
        nearest = torch.cdist(x.flatten(1), train.flatten(1)).amin(1)
        return nearest / train[0].numel() ** 0.5

    reward, strengths = REWARDS[options.reward]
    rewards_held_out, distances_held_out = reward(held_out), distance(held_out)
    print(f"strength  {options.reward:>8}  distance  held out: like that  have as much")
    rows = []
    for strength in strengths:
        images = sample(
            GradientGuidance(denoiser, Tilt(reward), strength),
            seeds=range(options.count),
            channels=1,
            canvas=canvas,
            cond=Cond(labels=pipeline.labels(options.count)),
            config=SamplerConfig(steps=options.steps),
        )
        mean = float(reward(images).mean())
        peers = (rewards_held_out - mean).abs().topk(20, largest=False).indices
        judged = float(distance(images).mean()), float(distances_held_out[peers].mean())
        share = float((rewards_held_out >= mean).float().mean())
        print(f"{strength:8}  {mean:8.3f}  {judged[0]:8.3f}  {judged[1]:19.3f}  {share:12.1%}")
        rows.append(images)
    save_png(Path(options.out), enlarge(grid(to_uint8(torch.cat(rows)), options.count), 1024))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
