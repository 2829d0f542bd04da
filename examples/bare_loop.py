"""Patch Diffusion in a training loop of your own: the lines marked with -> are all there is to it.

python examples/bare_loop.py --steps 300
"""

import argparse
from pathlib import Path

import torch

from patchdiffusion import EDM, Cond, NetDenoiser, PatchPlan, heun, karras, random_crop, rng
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source
from patchdiffusion.nets.unet import SongUNet, tiny
from patchdiffusion.system.png import enlarge, grid, save_png, to_uint8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--batch", type=int, default=16, help="whole images per step")
    parser.add_argument("--out", default="bare_loop.png", help="picture of samples")
    options = parser.parse_args()

    pack = prepare(open_source("glyphs"))
    images = pack.images.movedim(-1, 1)  # uint8 [N, C, H, W]
    size = (images.shape[2], images.shape[3])

    network = SongUNet(tiny(32, channels=images.shape[1]))
    denoiser = NetDenoiser(network, EDM(sigma_data=0.5))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)

    plan = PatchPlan(size, options.batch, divisor=network.config.divisor)  # ->
    for step in range(options.steps):
        loss = torch.zeros(())
        for group in plan.draw(seed=0, step=step, progress=step / options.steps):  # ->
            chosen = torch.randint(len(pack.train), (group.count,), generator=generator)
            x = images[pack.train[chosen]].float() / 127.5 - 1
            keys = rng.keys(0, str(group.size), step, torch.arange(group.count))
            x, pos = random_crop(x, group.size, key=keys)  # ->

            sigma = (torch.randn(group.count, generator=generator) * 1.2 - 1.2).exp()
            noise = torch.randn(x.shape, generator=generator) * sigma[:, None, None, None]
            weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
            denoised = denoiser(x + noise, sigma, Cond(pos=pos))  # ->
            error = (denoised - x).square().mean(dim=(1, 2, 3))
            loss = loss + group.weight * (weight * error).mean()  # ->
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    # Sampling is ordinary: the whole canvas at once, with any sampler.
    x = torch.randn(16, images.shape[1], *size, generator=generator) * 80.0
    with torch.no_grad():
        for state in heun(denoiser, x, karras(12)):
            x = state.x
    save_png(Path(options.out), enlarge(grid(to_uint8(x))))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
