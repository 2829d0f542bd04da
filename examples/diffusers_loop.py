"""Patch Diffusion with a network from diffusers, `UNet2DModel`, new or pretrained.

pip install diffusers
python examples/diffusers_loop.py     # a minute; --steps 1000 for letters
"""

import argparse

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

import patchdiffusion as pd
from patchdiffusion import rng
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source
from patchdiffusion.losses import denoising_error
from patchdiffusion.nets.coordinates import CoordinateStem


class Adapter(nn.Module):
    """Our network contract, (x, noise, cond) -> output, for a `UNet2DModel`."""

    def __init__(self, unet: UNet2DModel):
        super().__init__()
        self.unet = unet
        self.unet.register_module("conv_in", CoordinateStem(unet.conv_in))  # zero weights at first

    def forward(self, x: Tensor, noise: Tensor, cond: pd.Cond) -> Tensor:
        assert cond.pos is not None
        return self.unet(torch.cat([x, cond.pos], dim=1), noise).sample


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100, help="training steps")
    parser.add_argument("--out", default="diffusers_loop.png", help="picture of samples")
    options = parser.parse_args()

    pack = prepare(open_source("glyphs"))
    images = pack.images.movedim(-1, 1)  # uint8 [N, C, H, W]
    down, up = ("DownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")
    unet = UNet2DModel(
        in_channels=1,
        out_channels=1,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=(32, 64),
    )
    denoiser = pd.NetDenoiser(Adapter(unet), pd.EDM())
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3)
    plan = pd.PatchPlan((32, 32), batch=16, divisor=2)
    for step in range(options.steps):
        loss = torch.zeros(())
        for group in plan.draw(seed=0, step=step, progress=step / options.steps):
            keys = rng.keys(0, str(group.size), step, torch.arange(group.count))
            chosen = pack.train[rng.integers(rng.subkeys(keys, "image"), len(pack.train))]
            x, pos = pd.random_crop(images[chosen].float() / 127.5 - 1, group, key=keys)
            sigma = pd.LogNormal().icdf(rng.uniform(rng.subkeys(keys, "sigma"), 1)[:, 0]).float()
            noise = rng.normal(rng.subkeys(keys, "noise"), tuple(x.shape[1:]))
            error = denoising_error(denoiser, x, noise, sigma, pd.Cond(pos=pos))
            loss = loss + group.weight * (error * (sigma**2 + 0.25) / (sigma * 0.5) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    whole = pd.PatchDenoiser(denoiser, canvas=(32, 32))  # gives the network its coordinates
    x = rng.normal(rng.keys(0, "sample", 0, torch.arange(16)), (1, 32, 32)) * 80.0
    with torch.no_grad():
        for state in pd.heun(whole, x, pd.karras(12)):
            x = state.x
    pd.save_png(options.out, pd.enlarge(pd.grid(pd.to_uint8(x))))


if __name__ == "__main__":
    main()
