"""LPIPS: a perceptual distance by features of VGG16 (Zhang et al., CVPR 2018, arXiv 1801.03924).

Built from the paper; published weights load by their names in torchvision and in the package lpips.
Shapes: B batch, H and W sides.
"""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Features of the convolutions of VGG16, by stage; the last of each stage are compared."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and deviation of the colors that VGG16 expects, for values in [-1, 1]."""
EPS = 1e-10


class LPIPSNetwork(nn.Module):
    """Frozen VGG16 up to its thirteenth convolution, and the weights of its features."""

    shift: Tensor
    scale: Tensor

    def __init__(self, widths: tuple[tuple[int, ...], ...] = WIDTHS):
        super().__init__()
        flat = (3, *(width for stage in widths for width in stage))
        self.stages = [len(stage) for stage in widths]
        self.convs = nn.ModuleList(
            nn.Conv2d(cin, cout, 3, padding=1) for cin, cout in itertools.pairwise(flat)
        )
        self.linear = nn.ParameterList(torch.zeros(stage[-1]) for stage in widths)
        self.register_buffer("shift", torch.tensor(SHIFT).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).reshape(1, 3, 1, 1))
        self.requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Features of images in [-1, 1], unit vectors at each pixel: [B, 3, H, W] -> of stages."""
        h, found, layers = (x - self.shift) / self.scale, [], iter(self.convs)
        for number, count in enumerate(self.stages):
            h = F.max_pool2d(h, 2) if number and min(h.shape[2:]) > 1 else h
            for _ in range(count):
                h = F.relu(next(layers)(h))
            norm = h.float().square().sum(1, keepdim=True).sqrt()
            found.append(h.float() / (norm + EPS))
        return found

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances of images [B, C, H, W] in [-1, 1], C 1, 3 or 4: float32 [B].

        Gray is repeated and alpha is not compared.
        """
        x, y = (_colors(image.float()) for image in (x, y))
        total = x.new_zeros(len(x))
        pairs = zip(self.features(x), self.features(y), self.linear, strict=True)
        for a, b, weight in pairs:
            difference = torch.einsum("bchw,c->bhw", (a - b).square(), weight)
            total = total + difference.flatten(1).mean(1)
        return total


def _colors(x: Tensor) -> Tensor:
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3]


def load_lpips(vgg: Path, linear: Path) -> LPIPSNetwork:
    """Load LPIPS from the weights of torchvision's VGG16 and those of lpips.

    Raises `ValueError` in one line for files that are none.
    """
    network = LPIPSNetwork()
    published = {k: v for k, v in _tensors(vgg).items() if k.startswith("features.")}
    order = sorted({int(name.split(".")[1]) for name in published})
    names = {f"convs.{i}.{leaf}": f"features.{number}.{leaf}"
             for i, number in enumerate(order) for leaf in ("weight", "bias")}  # fmt: skip
    state = {ours: published.get(theirs) for ours, theirs in names.items()}
    for name, value in _tensors(linear).items():
        if match := re.fullmatch(r"lin(\d)\.model\.1\.weight", name):
            state[f"linear.{match[1]}"] = value.flatten()
    state |= {name: getattr(network, name) for name in ("shift", "scale")}
    try:
        network.load_state_dict({k: v for k, v in state.items() if v is not None})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{vgg} and {linear} are not VGG16 and LPIPS: {reason}") from error
    if any((weight < 0).any() for weight in network.linear):
        raise ValueError(f"{linear} holds negative weights, which those of LPIPS never are")
    return network.eval()


def _tensors(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    except Exception as error:  # whatever torch.load raises for a foreign file
        raise ValueError(f"{path} is no file of weights: {type(error).__name__}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, and no weights by name")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
