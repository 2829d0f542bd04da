"""The sampling driver: seeds, batches, regions, precision and progress around a solver."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.bar import progress_bar
from patchdiffusion.cond import Cond, Step, Tape
from patchdiffusion.denoiser import Denoiser, PatchDenoiser, edges
from patchdiffusion.model import Model, Weights, load_model, pick_device
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.objectives import denoises
from patchdiffusion.objectives.flowmap import FlowMap, PatchMap, jump
from patchdiffusion.patches import Size
from patchdiffusion.picture import to_uint8
from patchdiffusion.sampler import SamplerConfig
from patchdiffusion.solvers import Noise, run


def noise_field(seeds: Tensor, channels: int, corner: tuple[int, int], size: Size) -> Tensor:
    """Standard normal noise that belongs to a seed and a place: float32 [B, channels, *size].

    The value at a pixel depends on its position on the unbounded canvas only, so that regions of
    one image agree where they overlap.
    """
    key = rng.keys(0, "initial noise", 0, seeds)
    rows = torch.arange(size[0], device=seeds.device) + corner[0]
    cols = torch.arange(size[1], device=seeds.device) + corner[1]
    row_keys = rng.keys(0, "row", 0, rows)[None, :] ^ key[:, None]  # [B, h]
    pixel_keys = rng.keys(0, "column", 0, cols)[None, None, :] + row_keys[:, :, None]  # [B, h, w]
    values = rng.normal(pixel_keys.flatten(), (channels,))  # [B h w, C]
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
    corner: tuple[int, int] | None = None,
    batch: int = 64,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    law: NoiseLaw | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Sample one image per seed: float32 [N, C, *size] in about [-1, 1], on the CPU.

    An image depends on its seed and label, not on the batch it is computed in. `size` defaults to
    the canvas; `corner` (top, left) places a region of another size, by default in the middle.
    With a `guide`, a worse denoiser, the weight `config.guidance` is that of `AutoGuidance`.
    The solver runs in `dtype`, at noise levels that `law` draws if it is given; a flow map takes
    `config.count` jumps. `progress` is called with the number of images done at a time.
    """
    config = (config or SamplerConfig()).of_kind(isinstance(model, FlowMap))
    if guide is not None and isinstance(model, FlowMap):
        raise ValueError("a guide is for solvers of denoisers, and this is sampled by a flow map")
    size = size or canvas
    corner = corner or ((canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2)
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
    stamped, solver = _Stamped(denoiser, next(_RUNS), seeds), config.bound_solver()
    x = noisy * sigmas[0].item()
    return run(solver(stamped, x, sigmas, cond=cond, noise=noise)).x


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


_RUNS = itertools.count()  # numbers trajectories, so that no cache mixes two of them


@dataclass(frozen=True)
class _Stamped:
    """Completes the `Step` of a solver with the number of the trajectory and its seeds."""

    denoiser: Denoiser
    run: int
    seeds: Tensor

    @property
    def edges(self) -> tuple[float, ...]:
        return edges(self.denoiser)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        step: Step | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        if step is not None:
            step = replace(step, run=self.run, seeds=self.seeds)
        return self.denoiser(x, sigma, cond, step=step, tape=tape)


def _fresh_noise(seeds: Tensor, shape: tuple[int, ...], dtype: torch.dtype, index: int) -> Tensor:
    return rng.normal(rng.keys(0, "churn", index, seeds), shape).to(dtype)


# ---- With a trained model ----


@dataclass(frozen=True)
class Pipeline:
    """A loaded model with its sampler: `load("runs/photos").sample(16)`."""

    model: Model
    precision: Literal["fp32", "bf16"] = "fp32"
    guide: Model | None = None
    """A smaller or earlier model that autoguidance leads away from."""

    def __post_init__(self) -> None:
        if self.guide is not None:
            found, wanted = _interface(self.guide), _interface(self.model)
            for name in wanted:
                if found[name] != wanted[name]:
                    raise ValueError(
                        f"the guide has {name} {found[name]} and the model {wanted[name]}; "
                        "they must be alike"
                    )
            if not denoises(self.guide.config.objective):
                raise ValueError("a consistency model is no denoiser and cannot be a guide")

    def sample(
        self,
        count: int = 16,
        *,
        seed: int = 0,
        classes: Sequence[str | int] | None = None,
        config: SamplerConfig | None = None,
        size: Size | None = None,
        corner: tuple[int, int] | None = None,
        batch: int = 64,
        progress: bool = False,
    ) -> np.ndarray:
        """Images of seeds seed ... seed + count - 1: uint8 [count, H, W, C].

        `classes` are names or numbers, taken in turn; None takes all classes in turn where the
        model has any. Raises `ValueError` for a class or size that the model does not have.
        """
        if count < 1 or batch < 1:
            raise ValueError(f"count and batch must be at least 1, not {count} and {batch}")
        if not -(2**63) <= seed <= 2**63 - count:
            raise ValueError(f"seeds must be 64-bit integers, not {seed} to {seed + count - 1}")
        if size is not None and min(size) < 1:
            raise ValueError(f"a size needs positive height and width, not {size}")
        labels = self.labels(count, classes)
        config = self.sampler(config or SamplerConfig())
        flow_map = self.model.flow_map if config.solver == "map" else None
        self._check_levels(config)
        with progress_bar(count, "image", disable=not progress) as bar, self.autocast():
            images = sample(
                flow_map or self.model.denoiser,
                seeds=range(seed, seed + count),
                channels=self.model.config.network.channels,
                canvas=self.model.config.canvas,
                labels=labels,
                config=config,
                guide=None if self.guide is None else self.guide.denoiser,
                size=size,
                corner=corner,
                batch=batch,
                device=self.model.device,
                law=self.model.config.noise,
                progress=bar.update,
            )
        return to_uint8(images)

    def _check_levels(self, config: SamplerConfig) -> None:
        """Raise `ValueError` for levels that the guide has not been trained on."""
        if self.guide is None or config.solver == "map":
            return
        law = self.guide.config.noise
        low, high = config.ends(self.model.config.noise)
        try:
            replace(config, sigma_min=low, sigma_max=high).sigmas(law)
        except ValueError as error:
            raise ValueError(f"the guide cannot follow: {error}") from error

    def sampler(self, config: SamplerConfig) -> SamplerConfig:
        """The same with what this model takes for auto; `ValueError` for what it does not take."""
        return config.fitting(self.model.config.objective, self.model.config.precond)

    def autocast(self) -> torch.autocast:
        """A context in which the network has the precision of this pipeline."""
        low = self.precision == "bf16"
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=low)

    def labels(self, count: int, classes: Sequence[str | int] | None = None) -> Tensor | None:
        """Label of each image, `classes` in turn: int64 [count], or None without classes."""
        names = self.model.config.classes
        total = self.model.config.network.num_classes
        if not total:
            if classes:
                raise ValueError("this model was trained without classes; leave classes out")
            return None
        chosen = [_label(c, names, total) for c in classes] if classes else list(range(total))
        return torch.tensor([chosen[i % len(chosen)] for i in range(count)])


def _interface(model: Model) -> dict[str, object]:
    """What a model and its guide must have in common."""
    config = model.config
    classes = ", ".join(config.classes) or config.network.num_classes
    return {"canvas": config.canvas, "channels": config.network.channels, "classes": classes}


def _label(wanted: str | int, names: Sequence[str], total: int) -> int:
    if isinstance(wanted, str) and wanted in names:
        return names.index(wanted)
    with contextlib.suppress(ValueError):
        if -1 <= int(wanted) < total:  # -1 is unconditional
            return int(wanted)
    listed = ", ".join(f"{i} {name}" for i, name in enumerate(names))
    raise ValueError(f"unknown class {wanted!r}; this model has {listed or f'0 to {total - 1}'}")


def load(
    path: Path | str,
    *,
    weights: Weights = "averaged",
    device: torch.device | str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    guide: Path | str | None = None,
    guide_weights: Weights = "averaged",
) -> Pipeline:
    """Load a run or model folder, ready to sample; see `load_model` for errors.

    `guide` is that of another model for autoguidance; raises `ValueError` if it does not fit.
    """
    device = pick_device(device)
    model = load_model(path, weights=weights, device=device)
    other = None if guide is None else load_model(guide, weights=guide_weights, device=device)
    return Pipeline(model, precision, other)
