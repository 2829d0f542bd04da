"""Patch Diffusion with a network from diffusers: `UNet2DModel`, pretrained or new.

pip install 'patchdiffusion[hub]'
python examples/diffusers_loop.py --steps 200
"""

import argparse
from pathlib import Path

import torch
from diffusers.models import UNet2DModel
from torch import Tensor, nn

from patchdiffusion import (
    EDM,
    Cond,
    NetDenoiser,
    PatchDenoiser,
    PatchPlan,
    Tape,
    heun,
    karras,
    random_crop,
    rng,
)
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source
from patchdiffusion.losses import denoising_error
from patchdiffusion.nets.adapters import CoordinateStem
from patchdiffusion.picture import enlarge, grid, save_png, to_uint8


class Adapter(nn.Module):
    """Speaks our network contract: (x, noise, cond) -> output. Coordinates start at zero weight."""

    def __init__(self, unet: UNet2DModel):
        super().__init__()
        unet.conv_in = CoordinateStem(unet.conv_in)
        self.unet = unet

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        return self.unet(torch.cat([x, cond.pos], dim=1), noise).sample


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    parser.add_argument("--out", default="diffusers_loop.png", help="picture of samples")
    options = parser.parse_args()

    pack = prepare(open_source("glyphs"))
    images = pack.images.movedim(-1, 1)
    levels = {"block_out_channels": (32, 64, 64), "layers_per_block": 1, "norm_num_groups": 8}
    blocks = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    unet = UNet2DModel(sample_size=32, in_channels=1, out_channels=1, **levels, **blocks)
    denoiser = NetDenoiser(Adapter(unet), EDM())
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3)
    plan = PatchPlan((32, 32), batch=16, divisor=4)
    for step in range(options.steps):
        loss = torch.zeros(())
        for group in plan.draw(seed=0, step=step, progress=step / options.steps):
            keys = rng.keys(0, str(group.size), step, torch.arange(group.count))
            chosen = pack.train[rng.integers(rng.subkeys(keys, "image"), len(pack.train))]
            x, pos = random_crop(images[chosen].float() / 127.5 - 1, group.size, key=keys)
            sigma = (rng.normal(rng.subkeys(keys, "sigma"), ()) * 1.2 - 1.2).exp()
            noise = rng.normal(rng.subkeys(keys, "noise"), tuple(x.shape[1:]))
            error = denoising_error(denoiser, x, noise, sigma, Cond(pos=pos))
            loss = loss + group.weight * (error * (sigma**2 + 0.25) / (sigma * 0.5) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    # PatchDenoiser gives the network the coordinates of the whole canvas.
    whole = PatchDenoiser(denoiser, canvas=(32, 32))
    keys = rng.keys(0, "sample", 0, torch.arange(16))
    x = rng.normal(keys, (1, 32, 32)) * 80.0
    with torch.no_grad():
        for state in heun(whole, x, karras(12)):
            x = state.x
    save_png(Path(options.out), enlarge(grid(to_uint8(x))))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
