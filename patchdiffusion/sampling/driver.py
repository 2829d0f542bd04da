"""The sampling driver: seeds, batches, regions, precision and progress around a solver."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.accel.base import Spent, spending
from patchdiffusion.cond import Call, Cond
from patchdiffusion.denoiser import Denoiser, Wrapper, ask
from patchdiffusion.flowmap import FlowMap, PatchMap
from patchdiffusion.guidance.base import Models, Part
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.patches import Size
from patchdiffusion.sampling.companions import Companions
from patchdiffusion.sampling.config import Kind, SamplerConfig
from patchdiffusion.solvers import Jumps, Method, Noise, State, run
from patchdiffusion.solvers.jumps import jump
from patchdiffusion.solvers.schedules import support
from patchdiffusion.system.errors import Stop
from patchdiffusion.system.serialize import differences, few


def noise_field(seeds: Tensor, channels: int, corner: tuple[int, ...], size: Size) -> Tensor:
    """Standard normal noise as a function of seed and position: float32 [B, channels, *size].

    The value at a pixel depends on its position on the unbounded canvas only, so that regions of
    one image agree where they overlap.
    """
    key = rng.keys(0, "initial noise", 0, seeds)  # [B], plus an axis in each iteration
    for axis, (start, length) in enumerate(zip(corner, size, strict=True)):
        position = torch.arange(length, device=seeds.device) + start
        match len(size) - 1 - axis:
            case 0:
                key = rng.keys(0, "column", 0, position) + key[..., None]
            case 1:
                key = rng.keys(0, "row", 0, position) ^ key[..., None]
            case outer:
                key = rng.subkeys(key[..., None] + position, f"axis {outer}")
    values = rng.normal(key.flatten(), (channels,))  # [B * pixels, C]
    return values.reshape(len(seeds), *size, channels).movedim(-1, 1)


@dataclass(frozen=True)
class Start:
    """Images that sampling starts from, instead of pure noise."""

    x: Tensor
    """[N, C, *S], of the size that is sampled."""
    sigma: float
    """Noise level of the start."""
    fresh: bool = True
    """True adds noise of that level, by the seeds; False is for x that is noisy already."""


def sample(
    model: Denoiser | FlowMap,
    *,
    seeds: Sequence[int],
    channels: int,
    canvas: Size,
    cond: Cond | None = None,
    start: Start | None = None,
    config: SamplerConfig | None = None,
    kind: Kind | None = None,
    models: Models | None = None,
    batch: int = 64,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    law: NoiseLaw | None = None,
    known: Part | None = None,
    progress: Callable[[int], object] | None = None,
    watch: Callable[[int], object] | None = None,
    spent: Callable[[Spent], object] | None = None,
) -> Tensor:
    """Sample one image per seed: float32 [N, C, *size] in about [-1, 1], on the CPU.

    An image depends on its seed and its condition [N, ...], not on the batch it is computed in.
    `canvas` is the size the model was trained on, of which `config.canvas` may choose a region;
    `kind` resolves "auto" in the configuration, by default `Kind.of(model)`, and `models` loads
    those that guidance needs. The solver runs in `dtype`, within the noise levels of `law`, if any;
    a flow map takes `config.count` jumps. `known` wraps the denoiser of whole images, for what is
    known of them. `progress` is called with the number of images of each batch, `watch` with the
    number of steps done in it, `spent` at the end with the operations of the network, if an
    accelerator counts them. Raises `ValueError` for settings that do not fit the model, and
    `NotFinite` for images that are not finite.
    """
    config = config or SamplerConfig()
    if start is not None:
        config = _from(start, config, model, len(seeds))
    kind = kind or Kind.of(model)
    config = config.resolved(kind).for_canvas(canvas, channels)
    size, corner = config.canvas.place(canvas)
    if isinstance(model, FlowMap):
        if known is not None:
            raise ValueError("edits and restoration need a denoiser, and a few-step model jumps")
        wrapped, solve = None, functools.partial(_jump, PatchMap(model, canvas, corner), config)
    else:
        sigmas = config.sigmas(law)
        wrapped = config.wrap(model, canvas, sigmas, models or Companions(device), known)
        solve = functools.partial(_solve, wrapped, config, sigmas)
    done = [torch.empty(0, channels, *size)]
    for first in range(0, len(seeds), batch):
        part = slice(first, first + batch)
        part_seeds = torch.tensor(list(seeds[part]), dtype=torch.int64, device=device)
        if config.noise_seed is not None:
            part_seeds = torch.full_like(part_seeds, config.noise_seed)
        warmth = config.temperature
        noise = functools.partial(_fresh_noise, part_seeds, (channels, *size), dtype, warmth)
        part_cond = (cond or Cond()).take(part).to(device)
        part_start = None if start is None else replace(start, x=start.x[part].to(device, dtype))
        with torch.no_grad():
            x = noise_field(part_seeds, channels, corner, size).to(dtype) * warmth
            finite = _FiniteSteps(device)
            states = finite(solve(part_seeds, x, part_start, part_cond, noise))
            x = run(_watched(states, watch)).x
        done.append(x.to("cpu", torch.float32))
        if not bool(done[-1].isfinite().all()):
            raise NotFinite(torch.cat(done), int(finite.count), config, kind, law)
        if progress:
            progress(len(part_seeds))
    counted = None if wrapped is None or spent is None else spending(wrapped)
    if counted is not None and spent is not None:
        spent(counted)
    return torch.cat(done)


class NotFinite(Stop):
    """Raised by `sample` for images that are not finite; has the images, also those before them."""

    def __init__(
        self,
        images: Tensor,
        steps: int,
        config: SamplerConfig,
        kind: Kind,
        law: NoiseLaw | None,
    ):
        """`steps` is the number of steps that were finite, `config` resolved for the kind."""
        self.images = images
        changed = few(differences(SamplerConfig().resolved(kind), config))
        step = min(steps + 1, config.count)
        text = f"the images are not finite from step {step} of {config.count} on"
        if not changed:
            text += ", with the default sampler: look at the weights of the model (--weights raw)"
        else:
            text += f"; the sampler differs from the default in {changed}"
        low, high = (0.0, math.inf) if law is None else support(law)
        if changed and high < math.inf:
            text += f"; noise levels of training are {low:.4g} to {high:.4g}"
        if "guidance" in changed:
            text += ", and weights of guidance are mostly from 0 to 10"
        super().__init__(text, code=21)


class _FiniteSteps:
    """Counts the states before the first that is not finite, without waiting for the device."""

    def __init__(self, device: torch.device | str):
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self._good = torch.ones((), dtype=torch.bool, device=device)

    def __call__(self, states: Iterator[State]) -> Iterator[State]:
        for state in states:
            self._good = self._good & state.x.isfinite().all()
            self.count = self.count + self._good
            yield state


def _watched(states: Iterator[State], watch: Callable[[int], object] | None) -> Iterator[State]:
    for state in states:
        if watch is not None:
            watch(state.step)
        yield state


def _from(
    start: Start, config: SamplerConfig, model: Denoiser | FlowMap, count: int
) -> SamplerConfig:
    """The configuration with the noise level of a start as `sigma_max`."""
    if isinstance(model, FlowMap):
        raise ValueError("a start is for solvers of denoisers, and this model is a flow map")
    if config.sigma_max is not None:
        raise ValueError(
            f"sigma_max is {config.sigma_max:g} and the start is at sigma {start.sigma:g}; "
            "leave sigma_max out"
        )
    if len(start.x) != count:
        raise ValueError(f"{count} seeds need as many images to start from, not {len(start.x)}")
    return replace(config, sigma_max=start.sigma)


def _solve(
    denoiser: Denoiser,
    config: SamplerConfig,
    sigmas: Tensor,
    seeds: Tensor,
    noise: Tensor,
    start: Start | None,
    cond: Cond,
    fresh: Noise,
) -> Iterator[State]:
    seeded, method = _Seeded(denoiser, seeds), config.method
    assert isinstance(method, Method)
    x = noise * sigmas[0].item()
    if start is not None:
        x = start.x + x if start.fresh else start.x
    return method(seeded, x, sigmas, cond=cond, noise=fresh)


def _jump(
    flow_map: FlowMap,
    config: SamplerConfig,
    seeds: Tensor,
    noise: Tensor,
    start: Start | None,
    cond: Cond,
    fresh: Noise,
) -> Iterator[State]:
    method = config.method
    assert isinstance(method, Jumps)
    times = flow_map.times(config.count)
    z = noise * flow_map.path.s(times[0]).item()
    return jump(flow_map, z, times, cond=cond, noise=fresh, gamma=method.gamma)


class _Seeded(Wrapper):
    """Adds the seeds of the batch to the `Position` of a solver."""

    def __init__(self, denoiser: Denoiser, seeds: Tensor):
        super().__init__(denoiser)
        self.seeds = seeds

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        if call.position is not None:
            call = replace(call, position=replace(call.position, seeds=self.seeds))
        return ask(self.inner[0], x, sigma, cond, call)


def _fresh_noise(
    seeds: Tensor, shape: tuple[int, ...], dtype: torch.dtype, factor: float, index: int
) -> Tensor:
    return rng.normal(rng.keys(0, "churn", index, seeds), shape).to(dtype) * factor
