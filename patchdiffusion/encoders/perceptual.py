"""Perceptual distances of images, by fixed features; differentiable in both images.

Shapes: B batch, C channels, H and W sides.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.denoiser import Denoiser, NetDenoiser
from patchdiffusion.encoders.lpips import LPIPSNetwork, load_lpips
from patchdiffusion.nets.count import macs_of
from patchdiffusion.system.checks import positive
from patchdiffusion.system.files import expanded, sha256

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two batches of images [B, C, H, W] in the units of networks -> float32 [B]."""


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig(ABC):
    """Base of perceptual distances."""

    weight: float = 1.0
    """Weight relative to the error of the pixels."""

    def __post_init__(self) -> None:
        positive(self, "weight")

    @property
    def teachers(self) -> tuple[Path, ...]:
        """Runs or models whose features it compares."""
        return ()

    @property
    def digests(self) -> tuple[str, ...]:
        """Digests of the files that it reads."""
        return ()

    @property
    def told(self) -> str:
        """Name of the distance for people."""
        return ""

    def located(self) -> Self:
        """A copy with absolute paths."""
        return self

    def check(self, channels: int) -> None:
        """Raise `ValueError` for images with so many channels, or if a file is missing."""
        return None

    def macs(self, x: Tensor) -> float:
        """Approximate multiply-accumulates for the images x, which are on meta."""
        return 0.0

    @abstractmethod
    def build(self, teachers: Sequence[Denoiser], device: torch.device) -> Distance | None:
        """Build the distance; None for none."""


@dataclass(frozen=True, kw_only=True)
class NoPerceptual(PerceptualConfig):
    """No perceptual distance: the error of the pixels alone, which blurs."""

    word: ClassVar[str] = "none"

    def build(self, teachers: Sequence[Denoiser], device: torch.device) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Edges(PerceptualConfig):
    """Absolute error of Laplacian-filtered images at several scales; this is not LPIPS."""

    word: ClassVar[str] = "edges"
    scales: int = 3
    """Number of scales, each with half the resolution of the one before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.scales <= 8:
            raise ValueError(f"scales must lie in [1, 8], not {self.scales}")

    @property
    def told(self) -> str:
        return f"edges at {self.scales} scales, which is not LPIPS"

    def build(self, teachers: Sequence[Denoiser], device: torch.device) -> Distance:
        return lambda x, y: edge_distance(x, y, self.scales)


def edge_distance(x: Tensor, y: Tensor, scales: int) -> Tensor:
    """Mean absolute difference of Laplacian-filtered images, summed over scales: float32 [B]."""
    difference = x.float() - y.float()
    total = difference.new_zeros(len(difference))
    for scale in range(scales):
        if scale and min(difference.shape[2:]) < 2:
            break
        difference = F.avg_pool2d(difference, 2) if scale else difference
        total = total + laplacian(difference).abs().flatten(1).mean(1)
    return total


def laplacian(x: Tensor) -> Tensor:
    """Difference of each pixel from the mean of its four neighbors: [B, C, H, W] -> like x."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    up, down = padded[..., :-2, 1:-1], padded[..., 2:, 1:-1]
    left, right = padded[..., 1:-1, :-2], padded[..., 1:-1, 2:]
    return x - (up + down + left + right) / 4


@dataclass(frozen=True, kw_only=True)
class LPIPS(PerceptualConfig):
    """LPIPS, weighted distance of features of VGG16 (arXiv 1801.03924), from files of weights."""

    word: ClassVar[str] = "lpips"
    vgg: str = ""
    """File of the weights of VGG16, as of torchvision, .pth or .safetensors."""
    linear: str = ""
    """File of the weights of its features, as of the package lpips (vgg.pth)."""

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(sha256(expanded(path))[:16] for path in (self.vgg, self.linear))

    @property
    def told(self) -> str:
        return "LPIPS, VGG16 " + " and linear ".join(self.digests)

    def located(self) -> Self:
        paths = {
            name: str(expanded(path).resolve())
            for name, path in (("vgg", self.vgg), ("linear", self.linear))
            if path
        }
        return replace(self, **paths)

    def check(self, channels: int) -> None:
        if channels not in (1, 3, 4):
            raise ValueError(
                f"LPIPS is of gray, color and alpha, and the images have {channels} channels; "
                "use --task.perceptual edges"
            )
        for name, what in (("vgg", "VGG16"), ("linear", "its features")):
            path = getattr(self, name)
            if not path or not expanded(path).is_file():
                wrong = f"{path} does not exist" if path else "no file is given"
                raise ValueError(
                    f"the weights of {what} are missing, {wrong}; give --task.perceptual.{name} "
                    "FILE, or use --task.perceptual edges"
                )

    def macs(self, x: Tensor) -> float:
        return float(macs_of(LPIPSNetwork(), x, x))

    def build(self, teachers: Sequence[Denoiser], device: torch.device) -> "LPIPSNetwork":
        return load_lpips(expanded(self.vgg), expanded(self.linear)).to(device)


@dataclass(frozen=True, kw_only=True)
class ModelFeatures(PerceptualConfig):
    """Squared distance of the features of one of our own trained denoisers, normalized."""

    word: ClassVar[str] = "model"
    model: str = ""
    """Run or model of the denoiser."""
    sigma: float = 0.1
    """Noise level that it is told; the images have none."""
    taps: tuple[str, ...] = ()
    """Names of activations of its network; empty for all that are maps of features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "sigma")

    @property
    def teachers(self) -> tuple[Path, ...]:
        return (Path(self.model),) if self.model else ()

    @property
    def told(self) -> str:
        return f"features of {self.model}"

    def located(self) -> Self:
        return replace(self, model=str(expanded(self.model).resolve())) if self.model else self

    def check(self, channels: int) -> None:
        if not self.model:
            raise ValueError(
                "the model of the perceptual distance is missing: give --task.perceptual.model RUN"
            )

    def build(self, teachers: Sequence[Denoiser], device: torch.device) -> Distance:
        (denoiser,) = teachers
        assert isinstance(denoiser, NetDenoiser)
        names = tuple(getattr(denoiser.network, "taps", ()))
        if unknown := sorted(set(self.taps) - set(names)):
            raise ValueError(
                f"{self.model} has no activation {unknown[0]!r}; allowed: {', '.join(names)}"
            )
        if not names:
            raise ValueError(f"the network of {self.model} offers no activations to compare")

        def activations(x: Tensor) -> Mapping[str, Tensor]:
            tape = Tape(wants=self.taps or names)
            denoiser(x, self.sigma, Cond(), tape=tape)
            return tape.activations

        def distance(x: Tensor, y: Tensor) -> Tensor:
            pairs = zip(activations(x).values(), activations(y).values(), strict=True)
            return torch.stack([normalized_distance(a, b) for a, b in pairs]).mean(0)

        return distance


def normalized_distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared distance of features with unit mean square, a mean: two [B, ...] -> float32 [B].

    The features of both are divided by the root mean square of those of b.
    """
    a, b = a.float().flatten(1), b.float().flatten(1)
    scale = b.detach().square().mean(1).clamp(min=1e-12)
    return (a - b).square().mean(1) / scale


Perceptual = Edges | LPIPS | ModelFeatures | NoPerceptual
"""Perceptual distances of `--task.perceptual`."""
