"""A trained model with its sampler: `load("runs/photos").sample(16)`."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.model import Model, Weights, load_model
from patchdiffusion.objectives import denoises
from patchdiffusion.patches import Size
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.sampling.driver import sample
from patchdiffusion.system.device import pick_device
from patchdiffusion.system.png import to_uint8
from patchdiffusion.system.progress import progress_bar


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
        corner: tuple[int, ...] | None = None,
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
            raise ValueError(f"size must be the positive length of each axis, not {size}")
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
