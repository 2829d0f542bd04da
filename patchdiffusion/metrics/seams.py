"""Seams of images that were made in windows: steps between pixels, across borders and elsewhere."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchdiffusion.accel.tiles import TiledDenoiser, Tiles
from patchdiffusion.cond import Call, Position
from patchdiffusion.patches import Size, size_name
from patchdiffusion.sampling.canvas import AutoCanvas
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.sampling.pipeline import Pipeline
from patchdiffusion.solvers import Jumps


def seam_ratio(images: Tensor, borders: Collection[int], axis: int = -1) -> float:
    """Mean absolute difference of neighbors across the borders, relative to that inside of tiles.

    images [N, C, *S]; a border b lies between pixels b - 1 and b of a spatial axis. 1 is no seam.
    Raises `ValueError` for a border outside of the image, and if there are none, or only borders.
    """
    side = images.shape[axis]
    if wrong := [b for b in borders if not 0 < b < side]:
        raise ValueError(f"a border must lie in [1, {side - 1}], not at {wrong[0]}")
    steps = images.to(torch.float64).diff(dim=axis).abs().movedim(axis, 0).flatten(1).mean(1)
    at_border = torch.zeros(side - 1, dtype=torch.bool)
    at_border[[b - 1 for b in borders]] = True
    if at_border.all() or not at_border.any():
        raise ValueError(f"{side} pixels need at least one border and one step inside, not both")
    at_border = at_border.to(images.device)
    return float(steps[at_border].mean() / steps[~at_border].mean())


@dataclass(frozen=True)
class Seams:
    """Seam ratios of samples at the borders of the windows that they were made in.

    Windows that lie elsewhere in every step have borders in every step, and of those the ratio that
    is farthest from 1 counts.
    """

    tiled: TiledDenoiser
    size: Size
    """Size that is sampled."""
    scale: tuple[int, ...]
    """Pixels of an image along each axis for one that is sampled; more than 1 for latents."""
    sigmas: tuple[float, ...]
    """Noise level of each step."""

    @property
    def levels(self) -> tuple[float, ...]:
        """Noise level of each step whose windows lie elsewhere than those before."""
        return self.sigmas if self.tiled.shift else self.sigmas[:1]

    def steps_of(self, images: Tensor) -> Tensor:
        """Mean absolute step to each pixel from that before: [B, *S, C] -> float64 [B, sum(S)].

        Those of one axis after those of another; the first of an axis comes from its last pixel.
        """
        values = images.to(torch.float64)
        rows = []
        for axis in range(1, values.ndim - 1):
            step = (values - values.roll(1, axis)).abs()
            rows.append(step.movedim(axis, 1).flatten(2).mean(2))
        return torch.cat(rows, 1)

    def measured(self, steps: Tensor, seeds: Tensor) -> dict[str, Any]:
        """Ratios from the steps of images [N, sum(S)] with these seeds int64 [N].

        `seam_ratio` is the mean over the axes that have borders, `seam_ratio_std` its standard
        error over images, of the step that is farthest from 1; `ends` are the ratios of the steps
        from the last to the first pixel of axes that wrap. Empty if all steps are across borders.
        """
        rows = steps.split([side * k for side, k in zip(self.size, self.scale, strict=True)], 1)
        found: list[tuple[float, float, float, dict[str, float]]] = []
        for index, sigma in enumerate(self.levels):
            place = self._places(index, seeds)
            axes, errors = {}, torch.zeros(len(seeds), dtype=torch.float64)
            for axis, row in enumerate(rows):
                borders = self._borders(place[..., axis], axis)
                if borders.any() and not (borders | ~self._inner(axis)).all():
                    ratio, error = _ratio(row, borders, self._inner(axis))
                    axes[_name(axis, len(rows))] = ratio
                    errors = errors + error
            if not axes:
                return {}
            mean = sum(axes.values()) / len(axes)
            error = float(errors.std() / len(axes) / len(seeds) ** 0.5) if len(seeds) > 1 else 0.0
            found.append((mean, error, sigma, axes))
        mean, error, sigma, axes = max(found, key=lambda one: abs(one[0] - 1))
        ends = {}
        for axis, row in enumerate(rows):
            if axis in self.tiled.wrap:
                at = torch.zeros_like(row, dtype=torch.bool)
                at[:, 0] = True
                ends[_name(axis, len(rows))] = _ratio(row, at, ~torch.zeros_like(at))[0]
        details: dict[str, Any] = {"axes": axes}
        if self.tiled.shift:
            details |= {"sigma": sigma, "steps": len(found)}
        if ends:
            details["ends"] = ends
        return {"seam_ratio": mean, "seam_ratio_std": error, "seams": details}

    def card(self) -> dict[str, Any]:
        """Settings that the ratios depend on, beside the sampler."""
        tiled = self.tiled
        return {
            "windows": size_name(tiled.window),
            "apart": size_name(tiled.strides),
            "moving": tiled.shift,
            "coordinates": tiled.kind,
            "ratio": "mean absolute step between pixels, at borders by elsewhere",
        }

    def _places(self, index: int, seeds: Tensor) -> Tensor:
        position = Position(run=0, index=index, stage=0, sigmas=self.sigmas, seeds=seeds)
        return self.tiled.places(self.size, len(seeds), Call(position), seeds.device)

    def _borders(self, place: Tensor, axis: int) -> Tensor:
        """Steps across borders of windows with these first pixels [N, T]: bool [N, side]."""
        side, window, scale = self.size[axis], self.tiled.window[axis], self.scale[axis]
        if side == window and axis not in self.tiled.wrap:
            return torch.zeros(len(place), side * scale, dtype=torch.bool)
        borders = torch.cat([place, place + window], 1)
        if axis in self.tiled.wrap:
            borders = borders % side
        borders = borders.where((borders > 0) & (borders < side), torch.zeros_like(borders))
        at = torch.zeros(len(place), side * scale, dtype=torch.bool)
        at.scatter_(1, borders * scale, torch.ones_like(borders, dtype=torch.bool))
        return at & self._inner(axis)

    def _inner(self, axis: int) -> Tensor:
        """Steps between pixels of an axis, without that around its ends unless it wraps."""
        inner = torch.ones(1, self.size[axis] * self.scale[axis], dtype=torch.bool)
        inner[:, 0] = axis in self.tiled.wrap
        return inner


def seams_of(pipeline: Pipeline, config: SamplerConfig) -> Seams | None:
    """The seams of samples of a model; None if they are not made in several windows."""
    model, sampler = pipeline.model.config, pipeline.sampler(config)
    canvas = sampler.canvas
    canvas = canvas.chosen(model.canvas) if isinstance(canvas, AutoCanvas) else canvas
    if not isinstance(canvas, Tiles) or isinstance(sampler.solver, Jumps):
        return None
    tiled = canvas.tiled(pipeline.model.denoiser, model.canvas)
    size, _ = canvas.place(model.canvas)
    if size == tiled.window and not tiled.wrap:
        return None
    pixels = model.space.shape_of(size, model.network.channels)[:-1]
    scale = tuple(a // b for a, b in zip(pixels, size, strict=True))
    sigmas = sampler.sigmas(model.noise).tolist()
    return Seams(tiled, size, scale, tuple(sigmas[:-1]))


def _ratio(steps: Tensor, at: Tensor, inner: Tensor) -> tuple[float, Tensor]:
    """Ratio of the means of steps [N, side] at borders and elsewhere, and its error of each image.

    The errors [N] have the mean 0, and the ratio that of their mean, to first order.
    """
    away = inner & ~at
    counts = at.sum() / len(at), away.sum() / len(at)
    across, inside = (
        (steps * where).sum(1) / n for where, n in zip((at, away), counts, strict=True)
    )
    ratio = float(across.mean() / inside.mean())
    return ratio, (across - ratio * inside) / inside.mean()


def _name(axis: int, axes: int) -> str:
    """Name of an axis: x is the last one of images, y that before."""
    return "yx"[axis] if axes == 2 else f"axis {axis}"
