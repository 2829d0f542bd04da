"""The sampled region of the canvas: the whole of it, a part, or more than it."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from patchdiffusion.accel.tiles import Tiles
from patchdiffusion.denoiser import Denoiser, PatchDenoiser
from patchdiffusion.guidance.base import Surroundings
from patchdiffusion.nets.picture import resized
from patchdiffusion.patches import Size, size_name
from patchdiffusion.sampling.inpaint import Inpaint

Corner = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class WholeCanvas:
    """The canvas that the model was trained on."""

    word: ClassVar[str] = "whole"

    def place(self, canvas: Size) -> tuple[Size, Corner]:
        """Size of the samples, and the position of their first pixel on the canvas."""
        return canvas, (0,) * len(canvas)

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        return PatchDenoiser(denoiser, around.canvas)


@dataclass(frozen=True, kw_only=True)
class CanvasRegion:
    """A region of the canvas, which may reach beyond it."""

    word: ClassVar[str] = "region"
    size: tuple[int, ...] | None = None
    """Height and width, or one number for a square; None is the size of training."""
    corner: tuple[int, ...] | None = None
    """Top and left of the region on the canvas; None centers it."""

    def __post_init__(self) -> None:
        if self.size is not None and (not self.size or min(self.size) < 1):
            raise ValueError(f"a size needs positive height and width, not {self.size}")

    def place(self, canvas: Size) -> tuple[Size, Corner]:
        """Size of the samples, and the position of their first pixel on the canvas."""
        size = self.size or canvas
        if len(size) == 1:
            size *= len(canvas)
        for name, value in (("size", size), ("corner", self.corner or canvas)):
            if len(value) != len(canvas):
                raise ValueError(f"the {name} of a region needs {len(canvas)} numbers, not {value}")
        middle = tuple((side - length) // 2 for side, length in zip(canvas, size, strict=True))
        return size, middle if self.corner is None else self.corner

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        return PatchDenoiser(denoiser, around.canvas, self.place(around.canvas)[1])


@dataclass(frozen=True, kw_only=True)
class AutoCanvas:
    """Images of any size: windows if they are larger than those of training, else a region."""

    word: ClassVar[str] = "auto"
    size: tuple[int, ...] | None = None
    """Height and width, or one number for a square; None is the size of training."""

    def __post_init__(self) -> None:
        CanvasRegion(size=self.size)

    def chosen(self, canvas: Size) -> "WholeCanvas | CanvasRegion | Tiles":
        """The canvas for a size of training."""
        size = self.size or canvas
        size = size * len(canvas) if len(size) == 1 else size
        if size == canvas:
            return WholeCanvas()
        larger = len(size) == len(canvas) and all(a >= b for a, b in zip(size, canvas, strict=True))
        return Tiles(size=size, overlap=0.25) if larger else CanvasRegion(size=size)

    def place(self, canvas: Size) -> tuple[Size, Corner]:
        """Size of the samples, and the position of their first pixel on the canvas."""
        return self.chosen(canvas).place(canvas)

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        return self.chosen(around.canvas).wrap(denoiser, around)


def picture_on(canvas: "Canvas", image: Tensor, trained: Size) -> Tensor:
    """A picture of the canvas of training for the region that is sampled: [B, C, *S].

    The part that the region covers, with the border repeated beyond it; for tiles the whole,
    enlarged.
    """
    canvas = canvas.chosen(trained) if isinstance(canvas, AutoCanvas) else canvas
    size, corner = canvas.place(trained)
    if isinstance(canvas, Tiles):
        return resized(image, size)
    for axis, (first, length) in enumerate(zip(corner, size, strict=True)):
        index = torch.arange(first, first + length, device=image.device)
        image = image.index_select(2 + axis, index.clamp(0, trained[axis] - 1))
    return image


Canvas = WholeCanvas | AutoCanvas | CanvasRegion | Tiles | Inpaint
"""The regions of `--canvas`; each is a `guidance.base.Part` with `place`."""


def of_size(canvas: Canvas, size: Size) -> Canvas:
    """A canvas for images of this size, with the other settings of the given one.

    Raises `ValueError` for one of another size, and for one that has none.
    """
    if isinstance(canvas, WholeCanvas):
        return AutoCanvas(size=size)
    if isinstance(canvas, Inpaint):
        raise ValueError("--canvas inpaint brings a picture of its own; leave it out")
    if canvas.size not in (None, size):
        raise ValueError(
            f"canvas.size is {size_name(canvas.size)}, and the image is {size_name(size)}; leave "
            "it out"
        )
    return replace(canvas, size=size)
