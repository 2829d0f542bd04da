"""Encoders, data and crops for tests of alignment."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import tiny
import torch
import torch.nn.functional as F
from oracles import batch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.cond import Cond
from patchdiffusion.data.space import Pixels
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.losses import Batch
from patchdiffusion.nets.base import NetworkConfig
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.objectives.base import Materials
from patchdiffusion.parameterisation import EDM
from patchdiffusion.plans import Group

DIT = DiTConfig(width=16, depth=3, heads=2, patch=(2, 2))


def pixels(images: Tensor) -> Tensor:
    """Twelve features of blocks of 4 x 4 pixels: uint8 [B, 3, H, W] -> [B, 12, H / 4, W / 4]."""
    x = images.float() / 127.5 - 1
    means = F.avg_pool2d(x, 4)
    return torch.cat([means, means**2, F.max_pool2d(x, 4), -F.max_pool2d(-x, 4)], dim=1)


def brightness() -> Callable[[Tensor], Tensor]:
    return pixels


def vectors() -> Callable[[Tensor], Tensor]:
    return lambda images: images.float().flatten(2).mean(2)


class Data:
    """Images of 16 x 16, which count how often they are read."""

    name, fingerprint, canvas, space = "pictures", "0" * 64, (16, 16), Pixels()

    def __init__(self, picture: Callable[[int], np.ndarray], count: int = 6):
        self.all = torch.from_numpy(np.stack([picture(n) for n in range(count)]))
        self.reads = 0

    def __len__(self) -> int:
        return len(self.all)

    def values(self, index: Tensor) -> Tensor:
        return Pixels().to_network(self.pictures(index).movedim(-1, 1).float())

    def pictures(self, index: Tensor) -> Tensor:
        self.reads += 1
        return self.all[index]


def box_of(count: int, corner: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    return torch.tensor([*corner, *size]).expand(count, -1)


def batch_of(
    count: int, size: tuple[int, int], *, corner: tuple[int, int] = (0, 0), labels: bool = False
) -> Batch:
    images = rng.normal(rng.keys(0, "x", 0, torch.arange(count)), (3, *size))
    cond = Cond(labels=torch.arange(count) % 2) if labels else Cond()
    return replace(batch(images, cond), box=box_of(count, corner, size))


def materials(config: NetworkConfig, **parts: Any) -> Materials:
    """Of a run on `Data`."""
    network = config.build()
    return Materials(
        network=network,
        average=lambda: NetDenoiser(network, EDM()),
        groups=(Group((16, 16), 2, 1.0), Group((8, 8), 2, 1.0)),
        images=Data(tiny.picture),
        **parts,
    )
