"""The sampling driver: seeds, batches, regions, precision and progress around a solver."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.bar import progress_bar
from patchdiffusion.cond import Cond, Step, Tape
from patchdiffusion.denoiser import Denoiser, PatchDenoiser
from patchdiffusion.guidance.cfg import CFG
from patchdiffusion.model import Model, Weights, load_model, pick_device
from patchdiffusion.noise import karras, log_uniform
from patchdiffusion.objectives import FewStep, denoises
from patchdiffusion.objectives.flowmap import FlowMap, PatchMap, jump
from patchdiffusion.patches import Size
from patchdiffusion.picture import to_uint8
from patchdiffusion.solvers import SOLVERS, Churn, Noise, Solver, heun, run


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How to get from noise to an image."""

    solver: Literal["auto", "heun", "euler", "map"] = "auto"
    """heun takes two evaluations a step, euler one; map is that of few-step models; auto is heun,
    or map for them."""
    steps: int = 18
    """Number of steps."""
    sigma_min: float = 0.002
    """Smallest noise level before 0."""
    sigma_max: float = 80.0
    """Noise level to begin with."""
    grid: Literal["karras", "log_uniform"] = "karras"
    """How the levels are spaced."""
    rho: float = 7.0
    """Exponent of the karras spacing."""
    churn: Churn = field(default_factory=Churn)
    guidance: float = 1.0
    """Classifier-free guidance weight; 1 is none."""
    gamma: float | None = None
    """Share of the noise that map draws anew after each jump but the last; None is what suits."""

    def __post_init__(self) -> None:
        self.sigmas()  # raises on impossible values
        if not 0 <= self.guidance < float("inf"):
            raise ValueError(f"guidance must be >= 0 and finite, not {self.guidance}")
        if self.churn.amount and self.solver not in ("auto", "heun"):
            raise ValueError(f"churn works with the heun solver only, not with {self.solver}")
        if self.gamma is not None and not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], not {self.gamma}")
        if self.gamma is not None and self.solver not in ("auto", "map"):
            raise ValueError(f"gamma works with the map solver only, not with {self.solver}")

    def fitting(self, objective: FewStep | None) -> "SamplerConfig":
        """The same with the solver for a model trained for this.

        Raises `ValueError` for a solver or an option that such a model does not have.
        """
        few = objective is not None
        chosen = replace(self, solver="map" if few else "heun") if self.solver == "auto" else self
        if chosen.solver == "map" and not few:
            raise ValueError("the solver map is for few-step models; use heun or euler")
        if chosen.solver != "map" and not denoises(objective):
            raise ValueError(
                f"a consistency model denoises in one jump and not step by step: use --solver map, "
                f"not {chosen.solver}"
            )
        if chosen.solver == "map" and self.guidance != 1:
            raise ValueError(
                f"a few-step model cannot be guided by {self.guidance} when it is sampled; "
                "MeanFlow is when it is trained: --objective.guidance"
            )
        return chosen

    def sigmas(self) -> Tensor:
        """The noise levels: float64 [steps + 1]."""
        if self.grid == "karras":
            return karras(self.steps, self.sigma_min, self.sigma_max, self.rho)
        return log_uniform(self.steps, self.sigma_min, self.sigma_max)

    def bound_solver(self) -> Solver:
        """The solver with its options."""
        if self.churn.amount:
            return functools.partial(heun, churn=self.churn)
        return SOLVERS["heun" if self.solver == "auto" else self.solver]


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
    size: Size | None = None,
    corner: tuple[int, int] | None = None,
    batch: int = 64,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Sample one image per seed: float32 [N, C, *size] in about [-1, 1], on the CPU.

    An image depends on its seed and label, not on the batch it is computed in. `size` defaults to
    the canvas; `corner` (top, left) places a region of another size, by default in the middle.
    The solver runs in `dtype`. `progress` is called with the number of images done at a time.
    A flow map takes `config.steps` jumps.
    """
    config = config or SamplerConfig()
    size = size or canvas
    corner = corner or ((canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2)
    done = [torch.empty(0, channels, *size)]
    for start in range(0, len(seeds), batch):
        part = torch.tensor(list(seeds[start : start + batch]), dtype=torch.int64, device=device)
        cond = Cond(labels=None if labels is None else labels[start : start + batch].to(device))
        noise = functools.partial(_churn_noise, part, (channels, *size), dtype)
        x = noise_field(part, channels, corner, size).to(dtype)
        with torch.no_grad():
            if isinstance(model, FlowMap):
                x = _jump(PatchMap(model, canvas, corner), x, cond, noise, config)
            else:
                denoiser = model if config.guidance == 1 else CFG(model, config.guidance)
                stamped = _Stamped(PatchDenoiser(denoiser, canvas, corner), next(_RUNS), part)
                x = _solve(stamped, x, cond, noise, config)
        done.append(x.to("cpu", torch.float32))
        if progress:
            progress(len(part))
    return torch.cat(done)


def _solve(
    denoiser: Denoiser, noisy: Tensor, cond: Cond, noise: Noise, config: SamplerConfig
) -> Tensor:
    sigmas, solver = config.sigmas(), config.bound_solver()
    x = noisy * sigmas[0].item()
    return run(solver(denoiser, x, sigmas, cond=cond, noise=noise)).x


def _jump(
    flow_map: FlowMap, noisy: Tensor, cond: Cond, noise: Noise, config: SamplerConfig
) -> Tensor:
    times = flow_map.times(config.steps)
    z = noisy * flow_map.path.s(times[0]).item()
    return run(jump(flow_map, z, times, cond=cond, noise=noise, gamma=config.gamma)).x


_RUNS = itertools.count()  # numbers trajectories, so that no cache mixes two of them


@dataclass(frozen=True)
class _Stamped:
    """Completes the `Step` of a solver with the number of the trajectory and its seeds."""

    denoiser: Denoiser
    run: int
    seeds: Tensor

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


def _churn_noise(seeds: Tensor, shape: tuple[int, ...], dtype: torch.dtype, index: int) -> Tensor:
    return rng.normal(rng.keys(0, "churn", index, seeds), shape).to(dtype)


# ---- With a trained model ----


@dataclass(frozen=True)
class Pipeline:
    """A loaded model with its sampler: `load("runs/photos").sample(16)`."""

    model: Model
    precision: Literal["fp32", "bf16"] = "fp32"

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
        with progress_bar(count, "image", disable=not progress) as bar, self.autocast():
            images = sample(
                flow_map or self.model.denoiser,
                seeds=range(seed, seed + count),
                channels=self.model.config.network.channels,
                canvas=self.model.config.canvas,
                labels=labels,
                config=config,
                size=size,
                corner=corner,
                batch=batch,
                device=self.model.device,
                progress=bar.update,
            )
        return to_uint8(images)

    def sampler(self, config: SamplerConfig) -> SamplerConfig:
        """The same with the solver that this model takes; `ValueError` if it takes none such."""
        return config.fitting(self.model.config.objective)

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
) -> Pipeline:
    """Load a run or model folder, ready to sample; see `load_model` for errors."""
    return Pipeline(load_model(path, weights=weights, device=pick_device(device)), precision)
