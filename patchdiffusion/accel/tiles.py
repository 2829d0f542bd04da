"""Canvases larger than that of training: windows of its size, evaluated side by side.

A network whose attention or position reaches over the whole canvas, such as a LEGO network with
bricks of whole images (Zheng et al., ICLR 2024, arXiv 2310.06389), sees windows it was trained for.
Windows that lie elsewhere in every step, or that overlap and are averaged (arXiv 2302.08113), leave
no seams. Shapes: B images, T windows of each, n axes.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.accel.windows import Coordinates, shifted_starts, starts, window_coordinates
from patchdiffusion.cond import Call, Cond
from patchdiffusion.denoiser import Denoiser, Wrapper, ask
from patchdiffusion.guidance.base import Surroundings
from patchdiffusion.patches import Size, pixel_indices, size_name
from patchdiffusion.system.dist import Team
from patchdiffusion.system.place import place

AT_ONCE = 64
"""Windows that are evaluated together, unless a batch has more images."""


class TiledDenoiser(Wrapper):
    """A denoiser of images in windows of the size of training, or smaller ones.

    Pixels in several windows get the mean of their estimates, weighted towards the middle of a
    window if these overlap by plan. With `shift` the windows lie elsewhere in every step of a
    solver, as a function of the step and of the seed of each image. Along the axes in `wrap`
    windows go on at the opposite border. An image of the size of a window is denoised as it is,
    unless it wraps. Raises `ValueError` for a smaller one.

    Memory beside the image and two copies of it is that of `AT_ONCE` windows. The processes of a
    team divide the windows; all of them get the image.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        canvas: Size,
        *,
        window: Size | None = None,
        overlap: float = 0.0,
        shift: bool = True,
        kind: Coordinates = "window",
        wrap: Collection[int] = (),
        team: Team | None = None,
    ):
        """`window` None is the canvas; `overlap` in [0, 1) is the share of one in the next."""
        if not 0 <= overlap < 1:
            raise ValueError(f"the overlap of windows must lie in [0, 1), not {overlap}")
        super().__init__(denoiser)
        if shift and any(part.keeps for part in self.walk() if isinstance(part, Wrapper)):
            raise ValueError(
                "windows that lie elsewhere in every step cannot reuse features of earlier ones, "
                "as the accelerator does: use --canvas tiles --canvas.no-shift "
                "--canvas.overlap .5, or --accelerator none"
            )
        self.canvas = canvas
        self.window = window or canvas
        self.strides = tuple(max(1, round(side * (1 - overlap))) for side in self.window)
        self.overlap = overlap
        self.shift = shift
        self.kind: Coordinates = kind
        self.wrap = frozenset(wrap)
        self.team = team or Team()

    def places(self, size: Size, count: int, call: Call, device: torch.device) -> Tensor:
        """First pixels of the windows of `count` images, maybe beyond them: int64 [B, T, n]."""
        position = call.position if self.shift else None
        seeds = None if position is None else position.seeds
        seeds = torch.zeros(count, dtype=torch.int64) if seeds is None else seeds
        key = None if position is None else rng.keys(0, "tiles", position.index, seeds.to(device))
        axes = []
        for axis, (side, window, stride) in enumerate(
            zip(size, self.window, self.strides, strict=True)
        ):
            offset = None if key is None else rng.integers(rng.subkeys(key, f"axis {axis}"), stride)
            if axis in self.wrap:
                around = torch.arange(tiles := math.ceil(side / stride), device=device)
                first = (around * side // tiles).expand(count, -1)
                axes.append(first if offset is None else first + offset[:, None])
            elif offset is None:
                axes.append(starts(side, window, stride).to(device).expand(count, -1))
            else:
                axes.append(shifted_starts(side, window, stride, offset))
        grid = axes[0][..., None]  # [B, T, 1]
        for starts_of_axis in axes[1:]:
            t, u = grid.shape[1], starts_of_axis.shape[1]
            one = grid.repeat_interleave(u, dim=1)
            grid = torch.cat([one, starts_of_axis.repeat(1, t)[..., None]], dim=2)
        return grid

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        size, count = tuple(x.shape[2:]), len(x)
        _check_size(size, self.window)
        place = self.places(size, count, call, x.device)
        corner = self._inside(place, size)
        flat, moved = (
            t.transpose(0, 1).flatten(0, 1) for t in (corner, corner - place)
        )  # [T B, n]
        parts = torch.arange(len(flat), device=x.device).split(max(count, AT_ONCE))
        call = call if len(parts) == 1 else call.untaped()
        total = torch.zeros_like(x).movedim(1, -1)  # [B, *S, C]
        norm = torch.zeros_like(total[..., :1])
        for number, part in enumerate(parts):
            if number % self.team.size != self.team.place.rank:
                continue
            windows = Windows(part % count, flat[part], self.window, size)
            denoised = ask(
                self.inner[0],
                windows.cut(x),
                _levels(sigma, windows),
                self._condition(cond or Cond(), windows),
                _of_windows(call, windows.image, number),
            )
            if corner.shape[1] == 1 and not self.wrap:
                return denoised  # one window, and no weights that round
            self._add(denoised, windows, moved[part], total, norm)
        total, norm = self.team.all_reduce(total), self.team.all_reduce(norm)
        return (total / norm).movedim(-1, 1)

    def _inside(self, place: Tensor, size: Size) -> Tensor:
        """First pixels of windows that are moved to lie inside the image, or go around it."""
        axes = [
            place[..., axis] if axis in self.wrap else place[..., axis].clamp(0, side - window)
            for axis, (side, window) in enumerate(zip(size, self.window, strict=True))
        ]
        return torch.stack(axes, -1)

    def _condition(self, cond: Cond, windows: "Windows") -> Cond:
        """The condition of each window; a map of the size of the image is cut as it is."""
        pos = window_coordinates(self.kind, windows.corner, self.window, self.canvas, windows.size)
        maps = {name: getattr(cond, name) for name in ("image", "control")}
        whole = {
            name: windows.cut(x)
            for name, x in maps.items()
            if x is not None and tuple(x.shape[2:]) == windows.size
        }
        others = replace(cond, pos=None, **dict.fromkeys(whole)).take(windows.image)
        return replace(others, pos=pos.to(windows.corner.device), **whole)

    def _add(
        self, denoised: Tensor, windows: "Windows", moved: Tensor, total: Tensor, norm: Tensor
    ) -> None:
        """Add weighted windows to their sums, one of each image at a time.

        A window that was moved inside counts where it would lie without that only: else its border
        would be at the same pixels in every step.
        """
        weight = self._weight(moved, total.dtype)[..., None]
        parts = weight * denoised.movedim(1, -1).to(total.dtype)
        each = torch.arange(len(parts), device=total.device).split(len(total))
        for some in each:  # windows of different images do not meet
            index = windows.at(some)
            total[index] += parts[some]
            norm[index] += weight[some]

    def _weight(self, moved: Tensor, dtype: torch.dtype) -> Tensor:
        """Weight of each pixel of windows that were moved inside by [B, n]: [B, *window].

        1 where a window lies without that, or with overlap the product over axes of the square of
        the distance to its border; else 0. Estimates near a border are worst: on a Gaussian field
        the square leaves a half to a fifth of the error of the distance itself, the cube no less.
        """
        weight = torch.ones(len(moved), *(1 for _ in self.window), dtype=dtype, device=moved.device)
        for pixel, side in zip(pixel_indices(moved, self.window), self.window, strict=True):
            inside = torch.minimum(pixel + 0.5, side - pixel - 0.5).clamp(min=0).to(dtype)
            weight = weight * (inside.square() if self.overlap else (inside > 0).to(dtype))
        return weight


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of the images of a batch."""

    image: Tensor
    """int64 [P], number of the image."""
    corner: Tensor
    """int64 [P, n], first pixel; windows beyond the border go on at the opposite one."""
    window: Size
    size: Size
    """Size of the images."""

    def at(self, some: Tensor) -> tuple[Tensor, ...]:
        """Indices of the pixels of some windows in images [B, *S, C]."""
        axes = pixel_indices(self.corner[some], self.window)
        image = self.image[some].view(-1, *(1 for _ in self.window))
        return (image, *(axis % side for axis, side in zip(axes, self.size, strict=True)))

    def cut(self, x: Tensor) -> Tensor:
        """The windows of images or maps: [B, C, *S] -> [P, C, *window]."""
        every = torch.arange(len(self.image), device=self.image.device)
        return x.movedim(1, -1)[self.at(every)].movedim(-1, 1)


def _levels(sigma: Tensor | float, windows: Windows) -> Tensor | float:
    """Noise levels of windows."""
    if not isinstance(sigma, Tensor) or sigma.ndim == 0:
        return sigma
    return windows.cut(sigma) if sigma.ndim > 1 else sigma[windows.image]


def _of_windows(call: Call, image: Tensor, number: int) -> Call:
    """The call of windows of these images, with a slot of its own so that no cache mixes them."""
    position = call.within(f"tiles {number}").position
    if position is not None and position.seeds is not None:
        position = replace(position, seeds=position.seeds[image.to(position.seeds.device)])
    return replace(call, position=position)


def _check_size(size: Size, canvas: Size) -> None:
    if len(size) != len(canvas) or any(a < b for a, b in zip(size, canvas, strict=True)):
        raise ValueError(
            f"windows of {size_name(canvas)} need an image at least as large, not "
            f"{size_name(size)}; use --canvas region for parts of the canvas"
        )


# ---- As a part of a sampler ----


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """A canvas of any size, in windows of that of training (LEGO, arXiv 2310.06389)."""

    word: ClassVar[str] = "tiles"

    size: tuple[int, ...] | None = None
    """Height and width, or one number for a square; None is the size of training."""
    window: tuple[int, ...] | None = None
    """Height and width of windows, or one number for a square; None is the size of training. That
    of the crops for a model that never saw a whole image."""
    shift: bool = True
    """Place the windows elsewhere in every step, by the seed, so that their borders leave no
    seams."""
    overlap: float = 0.0
    """Share of a window that the next one covers, in [0, 1); estimates are averaged there."""
    wraps: Literal["none", "x", "y", "xy"] = "none"
    """Axes along which the image goes on at its opposite border: x for panoramas, xy for textures
    that tile."""
    split: bool = False
    """Divide the windows of each image among the processes of torchrun, not the images."""
    coordinates: Literal["auto", "window", "pitch", "clamp", "periodic", "whole"] = "auto"
    """window: each window is a whole image; pitch: coordinates go on as in training; clamp: the
    same, but end at the border; periodic: they repeat; whole: they are stretched over the image.
    auto: window, or for windows smaller than the images of training pitch, if these wrap periodic.
    """

    def __post_init__(self) -> None:
        for name in ("size", "window"):
            value = getattr(self, name)
            if value is not None and (not value or min(value) < 1):
                raise ValueError(f"a {name} needs positive height and width, not {value}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap must lie in [0, 1), not {self.overlap}")
        if self.wraps != "none" and self.coordinates in ("pitch", "clamp", "whole"):
            raise ValueError(
                f"coordinates {self.coordinates} end at the borders, where windows that wrap go "
                "on; allowed are window and periodic"
            )

    def place(self, canvas: Size) -> tuple[Size, tuple[int, ...]]:
        """Size of the samples, and the position of their first pixel on the canvas.

        Raises `ValueError` for a size below that of a window, and a window above that of training.
        """
        size, window = (_sides(side, canvas) for side in (self.size, self.window))
        if any(a > b for a, b in zip(window, canvas, strict=True)):
            raise ValueError(
                f"windows of {size_name(window)} are larger than the images of training, "
                f"{size_name(canvas)}; canvas.window must be at most that"
            )
        _check_size(size, window)
        return size, (0,) * len(canvas)

    def tiled(self, denoiser: Denoiser, canvas: Size) -> TiledDenoiser:
        """The denoiser in windows, for a canvas of training."""
        window, kind = _sides(self.window, canvas), self.coordinates
        if kind == "auto":
            parts = "pitch" if self.wraps == "none" else "periodic"
            kind = "window" if window == canvas else parts
        return TiledDenoiser(
            denoiser,
            canvas,
            window=window,
            overlap=self.overlap,
            shift=self.shift,
            kind=kind,
            wrap=[len(canvas) - 1 - i for i, c in enumerate("xy") if c in self.wraps],
            team=Team(place()) if self.split else None,
        )

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        return self.tiled(denoiser, around.canvas)


def _sides(given: tuple[int, ...] | None, canvas: Size) -> Size:
    """Length of each axis: those of training, one for all, or each."""
    size = given or canvas
    if len(size) == 1:
        size *= len(canvas)
    if len(size) != len(canvas):
        raise ValueError(f"the size of a canvas needs {len(canvas)} numbers, not {size}")
    return size
