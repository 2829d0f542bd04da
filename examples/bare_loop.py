"""Patch Diffusion in a training loop of your own: it consists of the lines marked with ->.

python examples/bare_loop.py    # half a minute; letters begin to show with --steps 300
"""

import argparse

import torch

import patchdiffusion as pd
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source
from patchdiffusion.nets.unet import tiny


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80, help="training steps")
    parser.add_argument("--batch", type=int, default=16, help="whole images per step")
    parser.add_argument("--out", default="bare_loop.png", help="picture of samples")
    options = parser.parse_args()

    pack = prepare(open_source("glyphs"))
    images = pack.images.movedim(-1, 1)  # uint8 [N, C, H, W]
    size = (images.shape[2], images.shape[3])

    network = pd.SongUNet(tiny(32, channels=images.shape[1]))
    denoiser = pd.NetDenoiser(network, pd.EDM(sigma_data=0.5))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)

    plan = pd.PatchPlan(size, options.batch, divisor=network.config.divisor)  # ->
    for step in range(options.steps):
        loss = torch.zeros(())
        for group in plan.draw(seed=0, step=step, progress=step / options.steps):  # ->
            chosen = torch.randint(len(pack.train), (group.count,), generator=generator)
            x = images[pack.train[chosen]].float() / 127.5 - 1
            x, pos = pd.random_crop(x, group, generator=generator)  # ->

            sigma = (torch.randn(group.count, generator=generator) * 1.2 - 1.2).exp()
            noise = torch.randn(x.shape, generator=generator) * sigma[:, None, None, None]
            weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
            denoised = denoiser(x + noise, sigma, pd.Cond(pos=pos))  # ->
            error = (denoised - x).square().mean(dim=(1, 2, 3))
            loss = loss + group.weight * (weight * error).mean()  # ->
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    # Sampling is ordinary: the whole canvas at once, with any sampler.
    whole = pd.PatchDenoiser(denoiser, size)  # ->
    x = torch.randn(16, images.shape[1], *size, generator=generator) * 80.0
    with torch.no_grad():
        for state in pd.heun(whole, x, pd.karras(12)):  # ->
            x = state.x
    pd.save_png(options.out, pd.enlarge(pd.grid(pd.to_uint8(x))))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
