"""The sampling driver: seeds, batches, regions, precision and progress around a solver."""

import contextlib
import functools
import itertools
import math
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
from patchdiffusion.denoiser import Denoiser, PatchDenoiser, edges
from patchdiffusion.guidance.auto import AutoGuidance
from patchdiffusion.guidance.cfg import CFG
from patchdiffusion.guidance.extrapolate import Extrapolation
from patchdiffusion.guidance.interval import Interval
from patchdiffusion.guidance.threshold import Clamp, DynamicThreshold
from patchdiffusion.model import Model, Weights, load_model, pick_device
from patchdiffusion.noise import NoiseLaw, flow_uniform, karras, log_uniform, time_uniform
from patchdiffusion.patches import Size
from patchdiffusion.picture import to_uint8
from patchdiffusion.solvers import SOLVERS, Churn, Solver, SolverName, run


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How to get from noise to an image."""

    solver: SolverName = "heun"
    """heun, midpoint, ralston and dpmpp_2s take two evaluations a step, the others one."""
    steps: int = 18
    """Number of steps."""
    sigma_min: float | None = None
    """Smallest noise level before 0; None is 0.002, or the smallest of training if that is more."""
    sigma_max: float | None = None
    """Noise level to begin with; None is 80, or the largest of training if that is less."""
    grid: Literal["karras", "log_uniform", "uniform_t", "quadratic", "flow"] = "karras"
    """How the levels are spaced: by rho, in log SNR, in time or its root (VP), in flow time."""
    rho: float = 7.0
    """Exponent of the karras spacing."""
    shift: float = 1.0
    """Factor on the noise levels of the flow spacing between its ends."""
    eta: float | None = None
    """Amount of fresh noise of a stochastic solver; None is 0 for ddim and 1 for the others."""
    churn: Churn = field(default_factory=Churn)
    guidance: float = 1.0
    """Weight of classifier-free guidance, or of a guide model if there is one; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Guide at levels above the first number, up to the second; None is at all of them."""
    guidance_rescale: float = 0.0
    """Share, 0 to 1, of the contrast that guidance adds which is taken back."""
    guidance_channels: int | None = None
    """Guide so many channels, the first ones; None guides all (DiT models: 3 of 4)."""
    threshold: Literal["clamp"] | float | None = None
    """clamp: estimates into [-1, 1]; a number such as 0.995: that share of each image, and the
    image is scaled to fit (dynamic thresholding)."""

    def __post_init__(self) -> None:
        self.sigmas()  # raises on impossible values
        self._check_guidance()
        if self.rho != 7 and self.grid != "karras":
            raise ValueError(f"rho works with the karras grid only, not with {self.grid}")
        if self.shift != 1 and self.grid != "flow":
            raise ValueError(f"shift works with the flow grid only, not with {self.grid}")
        for option in self._options():
            able = [name for name, solver in SOLVERS.items() if option in solver.options]
            if self.solver not in able:
                raise ValueError(f"{option} works with {', '.join(able)}, not with {self.solver}")
        most = 1.0 if self.solver in ("ddim", "ancestral") else 100.0
        if self.eta is not None and not 0 <= self.eta <= most:
            raise ValueError(f"eta of {self.solver} must be in [0, {most:g}], not {self.eta}")

    def _check_guidance(self) -> None:
        Extrapolation(
            weight=self.guidance, rescale=self.guidance_rescale, channels=self.guidance_channels
        )
        Interval.of(self.guidance_interval)
        if self.guidance == 1 and (
            self.guidance_interval or self.guidance_rescale or self.guidance_channels
        ):
            raise ValueError(
                "guidance_interval, guidance_rescale and guidance_channels shape the guidance, and "
                "guidance is 1, which is none"
            )
        if isinstance(self.threshold, int | float) and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be clamp or in (0, 1], not {self.threshold}")

    def guided(self, denoiser: Denoiser, guide: Denoiser | None = None) -> Denoiser:
        """The denoiser with guidance, by `guide` if there is one, and then the threshold."""
        if guide is not None and self.guidance == 1:
            raise ValueError("a guide has no effect at guidance 1; set another weight")
        if self.guidance != 1:
            made = (
                functools.partial(CFG, denoiser)
                if guide is None
                else functools.partial(AutoGuidance, denoiser, guide)
            )
            denoiser = made(
                self.guidance,
                interval=self.guidance_interval,
                rescale=self.guidance_rescale,
                channels=self.guidance_channels,
            )
        if self.threshold is None:
            return denoiser
        if self.threshold == "clamp":
            return Clamp(denoiser)
        return DynamicThreshold(denoiser, self.threshold)

    def ends(self, law: NoiseLaw | None = None) -> tuple[float, float]:
        """The smallest and the largest noise level, for a model trained on the levels of `law`.

        Raises `ValueError` for levels that it never draws.
        """
        low, high = (0.0, math.inf) if law is None else _support(law)
        for name in ("sigma_min", "sigma_max"):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(
                    f"{name} {value:g} lies outside the noise levels of training, "
                    f"{low:.4g} to {high:.4g}"
                )
        return (
            max(0.002, low) if self.sigma_min is None else self.sigma_min,
            min(80.0, high) if self.sigma_max is None else self.sigma_max,
        )

    def sigmas(self, law: NoiseLaw | None = None) -> Tensor:
        """The noise levels, see `ends`: float64 [steps + 1]."""
        ends = (self.steps, *self.ends(law))
        match self.grid:
            case "karras":
                return karras(*ends, self.rho)
            case "log_uniform":
                return log_uniform(*ends)
            case "uniform_t":
                return time_uniform(*ends)
            case "quadratic":
                return time_uniform(*ends, power=2)
            case "flow":
                return flow_uniform(*ends, self.shift)

    def bound_solver(self) -> Solver:
        """The solver with its options."""
        return functools.partial(SOLVERS[self.solver], **self._options())

    def _options(self) -> dict[str, object]:
        given = {"churn": self.churn if self.churn.amount else None, "eta": self.eta}
        return {name: value for name, value in given.items() if value is not None}


def _support(law: NoiseLaw) -> tuple[float, float]:
    low, high = law.draw(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    return low, high


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
    denoiser: Denoiser,
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
    The solver runs in `dtype`, at noise levels that `law` draws if it is given. `progress` is
    called with the number of images done at a time.
    """
    config = config or SamplerConfig()
    size = size or canvas
    corner = corner or ((canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2)
    denoiser = PatchDenoiser(config.guided(denoiser, guide), canvas, corner)
    sigmas, solver = config.sigmas(law), config.bound_solver()
    done = [torch.empty(0, channels, *size)]
    for start in range(0, len(seeds), batch):
        part = torch.tensor(list(seeds[start : start + batch]), dtype=torch.int64, device=device)
        cond = Cond(labels=None if labels is None else labels[start : start + batch].to(device))
        noise = functools.partial(_fresh_noise, part, (channels, *size), dtype)
        x = noise_field(part, channels, corner, size).to(dtype) * sigmas[0].item()
        with torch.no_grad():
            stamped = _Stamped(denoiser, next(_RUNS), part)
            x = run(solver(stamped, x, sigmas, cond=cond, noise=noise)).x
        done.append(x.to("cpu", torch.float32))
        if progress:
            progress(len(part))
    return torch.cat(done)


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
        with progress_bar(count, "image", disable=not progress) as bar, self.autocast():
            images = sample(
                self.model.denoiser,
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
