"""The sampling driver: seeds, batches, regions, precision and progress around a solver."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.cond import Call, Cond
from patchdiffusion.denoiser import Denoiser, PatchDenoiser, Wrapper, ask
from patchdiffusion.flowmap import FlowMap, PatchMap
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.patches import Size
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.solvers import Noise, run
from patchdiffusion.solvers.jumps import jump


def noise_field(seeds: Tensor, channels: int, corner: tuple[int, ...], size: Size) -> Tensor:
    """Standard normal noise that belongs to a seed and a place: float32 [B, channels, *size].

    The value at a pixel depends on its position on the unbounded canvas only, so that regions of
    one image agree where they overlap.
    """
    key = rng.keys(0, "initial noise", 0, seeds)  # [B], and an axis more at each turn
    for axis, (start, length) in enumerate(zip(corner, size, strict=True)):
        place = torch.arange(length, device=seeds.device) + start
        match len(size) - 1 - axis:
            case 0:
                key = rng.keys(0, "column", 0, place) + key[..., None]
            case 1:
                key = rng.keys(0, "row", 0, place) ^ key[..., None]
            case outer:
                key = rng.subkeys(key[..., None] + place, f"axis {outer}")
    values = rng.normal(key.flatten(), (channels,))  # [B * pixels, C]
    return values.reshape(len(seeds), *size, channels).movedim(-1, 1)


def sample(
    model: Denoiser | FlowMap,
    *,
    seeds: Sequence[int],
    channels: int,
    canvas: Size,
    labels: Tensor | None = None,
    config: SamplerConfig | None = None,
    guide: Denoiser | None = None,
    size: Size | None = None,
    corner: tuple[int, ...] | None = None,
    batch: int = 64,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    law: NoiseLaw | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Sample one image per seed: float32 [N, C, *size] in about [-1, 1], on the CPU.

    An image depends on its seed and label, not on the batch it is computed in. `size` defaults to
    the canvas; `corner` (top, left of images) places a region of another size, by default in the
    middle.
    With a `guide`, a worse denoiser, the weight `config.guidance` is that of `AutoGuidance`.
    The solver runs in `dtype`, at noise levels that `law` draws if it is given; a flow map takes
    `config.count` jumps. `progress` is called with the number of images done at a time.
    """
    config = (config or SamplerConfig()).of_kind(isinstance(model, FlowMap))
    if guide is not None and isinstance(model, FlowMap):
        raise ValueError("a guide is for solvers of denoisers, and this is sampled by a flow map")
    size = size or canvas
    middle = tuple((side - length) // 2 for side, length in zip(canvas, size, strict=True))
    corner = middle if corner is None else corner
    if isinstance(model, FlowMap):
        solve = functools.partial(_jump, PatchMap(model, canvas, corner), config)
    else:
        denoiser = PatchDenoiser(config.guided(model, guide), canvas, corner)
        solve = functools.partial(_solve, denoiser, config, config.sigmas(law))
    done = [torch.empty(0, channels, *size)]
    for start in range(0, len(seeds), batch):
        part = torch.tensor(list(seeds[start : start + batch]), dtype=torch.int64, device=device)
        cond = Cond(labels=None if labels is None else labels[start : start + batch].to(device))
        noise = functools.partial(_fresh_noise, part, (channels, *size), dtype)
        x = noise_field(part, channels, corner, size).to(dtype)
        with torch.no_grad():
            x = solve(part, x, cond, noise)
        done.append(x.to("cpu", torch.float32))
        if progress:
            progress(len(part))
    return torch.cat(done)


def _solve(
    denoiser: Denoiser,
    config: SamplerConfig,
    sigmas: Tensor,
    seeds: Tensor,
    noisy: Tensor,
    cond: Cond,
    noise: Noise,
) -> Tensor:
    seeded, solver = _Seeded(denoiser, seeds), config.bound_solver()
    x = noisy * sigmas[0].item()
    return run(solver(seeded, x, sigmas, cond=cond, noise=noise)).x


def _jump(
    flow_map: FlowMap,
    config: SamplerConfig,
    seeds: Tensor,
    noisy: Tensor,
    cond: Cond,
    noise: Noise,
) -> Tensor:
    times = flow_map.times(config.count)
    z = noisy * flow_map.path.s(times[0]).item()
    return run(jump(flow_map, z, times, cond=cond, noise=noise, gamma=config.gamma)).x


class _Seeded(Wrapper):
    """Completes the `Position` of a solver with the seeds of the batch."""

    def __init__(self, denoiser: Denoiser, seeds: Tensor):
        super().__init__(denoiser)
        self.seeds = seeds

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        if call.position is not None:
            call = replace(call, position=replace(call.position, seeds=self.seeds))
        return ask(self.inner[0], x, sigma, cond, call)


def _fresh_noise(seeds: Tensor, shape: tuple[int, ...], dtype: torch.dtype, index: int) -> Tensor:
    return rng.normal(rng.keys(0, "churn", index, seeds), shape).to(dtype)
