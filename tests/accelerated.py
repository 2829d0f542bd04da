"""Small networks and trajectories for the tests of accelerators."""

from collections.abc import Callable

import tiny
import torch
from torch import Tensor, nn

from patchdiffusion import Cond
from patchdiffusion.accel import Accelerator
from patchdiffusion.denoiser import Denoiser, NetDenoiser, PatchDenoiser
from patchdiffusion.guidance.base import Surroundings
from patchdiffusion.nets.base import NetworkConfig
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.lego import LegoConfig
from patchdiffusion.nets.unet import UNetConfig
from patchdiffusion.parameterisation import EDM
from patchdiffusion.sampling.companions import Companions
from patchdiffusion.solvers import Euler, Method, solve
from patchdiffusion.solvers.schedules import karras

CANVAS = (8, 12)
LABELS = torch.tensor([0, 1])
SIGMAS = karras(6, 0.02, 20.0)
NETS: dict[str, NetworkConfig] = {
    "unet": UNetConfig(base=4, mult=(1, 2), blocks=1, attention=(), num_classes=2, channels=1),
    "dit": DiTConfig(
        width=16, depth=4, heads=2, patch=(4, 4), num_classes=2, channels=1, registers=1
    ),
    "lego": LegoConfig(
        **{"width": 16, "heads": 2, "regions": (4, 0), "patches": (2, 4), "depths": (1, 1)},
        **{"num_classes": 2, "channels": 1, "canvas": CANVAS},
    ),
}


def denoiser(name: str = "unet") -> NetDenoiser:
    network = NETS[name].build().eval()
    tiny.randomize(network)
    return NetDenoiser(network, EDM())


def noisy(count: int = 2, seed: int = 1) -> Tensor:
    return 20 * torch.randn(count, 1, *CANVAS, generator=torch.Generator().manual_seed(seed))


def wrapped(net: Denoiser, part: Accelerator) -> Denoiser:
    """A denoiser with an accelerator, for the steps of `SIGMAS`."""
    levels = SIGMAS.tolist()
    around = Surroundings(CANVAS, (levels[-2], levels[0]), Companions(), tuple(levels))
    return part.wrap(net, around)


def solved(
    model: Denoiser,
    solver: Method | None = None,
    x: Tensor | None = None,
    cond: Cond | None = None,
) -> Tensor:
    start = noisy() if x is None else x
    cond = cond or Cond(labels=torch.arange(len(start)) % 2)

    def noise(index: int) -> Tensor:
        return torch.full_like(start, (-1.0) ** index)

    whole = PatchDenoiser(model, CANVAS)
    return solve(solver or Euler(), whole, start, SIGMAS, cond=cond, noise=noise)


def calls_of(module: nn.Module) -> Callable[[], int]:
    """Function that returns the number of calls of a module since the last question."""
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))

    def since() -> int:
        found = len(calls)
        calls.clear()
        return found

    return since


def middle(net: NetDenoiser) -> nn.Module:
    """The middle of a U-Net."""
    return next(net.network.mid.children())  # pyright: ignore
