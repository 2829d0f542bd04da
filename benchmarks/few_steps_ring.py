"""Targets of distillation on eight Gaussians on a circle, for docs/few-steps.md.

    python benchmarks/few_steps_ring.py

BOOT against steps of its teacher, which is exact, by the distance from the end of the exact path of
the same noise; MMD-DDM and MeanFlow by the energy distance from the data. The network is that of
few_steps.py. About ten minutes on one core; results are written to
benchmarks/results/few-steps-ring.json.
"""

import itertools
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import few_steps as toy
import torch
from torch import Tensor, nn

from patchdiffusion import rng
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.encoders.embed import Embedding
from patchdiffusion.flowmap import FlowMap
from patchdiffusion.losses import DenoisingLoss
from patchdiffusion.nets.base import initialize
from patchdiffusion.nets.layers import Linear
from patchdiffusion.noise import LogNormal
from patchdiffusion.objectives.boot import BootConfig, BootLoss
from patchdiffusion.objectives.chain import EulerMap
from patchdiffusion.objectives.discrepancy import KernelName, energy, mmd2
from patchdiffusion.objectives.meanflow import MeanFlowConfig, MeanFlowLoss, MeanFlowMap
from patchdiffusion.objectives.mmd import Matched, MMDConfig, MMDLoss
from patchdiffusion.parameterisation import EDM
from patchdiffusion.patches import Size
from patchdiffusion.solvers import heun, run, solve
from patchdiffusion.solvers.jumps import jump
from patchdiffusion.solvers.schedules import karras
from patchdiffusion.weighting import EDMWeight, FlowWeight

RESULT = toy.RESULT.with_name("few-steps-ring.json")
COUNT = 4000
DENOISING = EDM(sigma_data=0.71)
LAW = LogNormal(mean=-0.4, std=1.0)
Tangent = Literal["data", "network", "head"]
TANGENTS: tuple[Tangent, ...] = ("data", "network", "head")


def ring() -> GaussianMixture:
    """Eight Gaussians of deviation 0.1 on the unit circle, with weights 1 ... 8."""
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    means = torch.stack([angle.cos(), angle.sin()], dim=1)
    covs = 0.01 * torch.eye(2, dtype=torch.float64).expand(8, 2, 2)
    return GaussianMixture(means, covs, torch.arange(1, 9, dtype=torch.float64))


DATA = ring()


def energy_distance(flow_map: FlowMap, steps: int) -> float:
    """Energy distance of samples from the data, unbiased."""
    real = toy.data()[:COUNT].double()
    return round(float(mmd2(toy.samples(flow_map, steps)[:COUNT].double(), real, energy)), 4)


def noise(count: int = 2000) -> Tensor:
    """Noise of paired errors: float64 [count, 2]."""
    return rng.normal(rng.keys(0, "samples", 0, torch.arange(count)), (2,), torch.float64)


@torch.no_grad()
def paired(flow_map: FlowMap, steps: int) -> float:
    """Mean squared distance of images from the ends of the exact paths of the same noise."""
    start = 80 * noise()
    exact = solve(heun, DATA, start, karras(400))
    found = run(jump(flow_map, start.float(), flow_map.times(steps))).x
    return round(float((found - exact).square().mean()), 4)


# ---- The models ----


def boot(steps: int = 2500, **changes: Any) -> FlowMap:
    """BOOT of the exact denoiser."""
    config = BootConfig(**changes)
    loss = BootLoss(config=config, teacher=DATA)
    return config.product(toy.train(config.precond(DENOISING), lambda _: loss, steps, lr=1e-3))


def denoiser(steps: int = 3000) -> NetDenoiser:
    """A denoiser, from which MMD-DDM starts."""
    loss = DenoisingLoss(EDMWeight(sigma_data=DENOISING.sigma_data))
    return toy.train(DENOISING, lambda _: loss, steps, lr=1e-3)


def matched(base: NetDenoiser, kernel: KernelName, steps: int = 300) -> FlowMap:
    """A sampler of three steps after MMD-DDM, compared with the points of each batch."""
    config = MMDConfig(steps=(3,), kernel=kernel, bank=0)
    space = Matched.of(Embedding("points", "", lambda x: x.flatten(1)), kernel, None)
    loss = MMDLoss(config=config, trained=space, held_out=space)
    network = toy.train(DENOISING, lambda _: loss, steps, lr=2e-4, start=base.network)
    return EulerMap(denoiser=network)


def flow(steps: int = 4000) -> FlowMap:
    """Flow matching by Euler's rule."""
    loss = DenoisingLoss(FlowWeight())
    return toy.EulerMap(toy.train(toy.STRAIGHT, lambda _: loss, steps, law=LAW, lr=1e-3))


class PointHead(nn.Module):
    """The head of improved MeanFlow for points: two layers behind the last features."""

    tap = "features"

    def __init__(self, seed: int, width: int = 128):
        super().__init__()
        self.layers = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, 2))
        initialize(self, seed)

    def forward(self, activation: Tensor, size: Size) -> Tensor:
        return self.layers(activation)

    def operations(self, size: Size) -> float:
        """Not counted."""
        return 0.0


def meanflow(tangent: Tangent = "data", seed: int = 0, steps: int = 4000) -> FlowMap:
    """MeanFlow with different times for 3/4 of the samples."""
    head = PointHead(seed) if tangent == "head" else None
    config = MeanFlowConfig(same=0.25, power=0.0, tangent=tangent)
    loss = MeanFlowLoss(config=config, head=head)
    trained = toy.train(
        toy.STRAIGHT, lambda _: loss, steps, law=LAW, lr=1e-3, seed=seed, learned=head
    )
    return MeanFlowMap(network=trained.network)


# ---- All of it ----


def main() -> None:
    """Train what has no number yet, and write all numbers."""
    toy.DATA = DATA
    stored = json.loads(RESULT.read_text()) if RESULT.exists() else {}

    def row(name: str, make: Any, measure: Any, steps: Sequence[int]) -> None:
        if name not in stored:
            flow_map = make()
            stored[name] = {str(n): measure(flow_map, n) for n in steps}
            RESULT.write_text(json.dumps(stored, indent=1) + "\n")
        print(f"{name}: {stored[name]}", file=sys.stderr, flush=True)

    row("teacher, paired error", lambda: EulerMap(denoiser=DATA), paired, (2, 5, 9, 17))
    row("BOOT, paired error", boot, paired, (1,))
    row("BOOT by Euler's rule, paired error", lambda: boot(heun=0.0), paired, (1,))
    row("BOOT, delta 0.1", lambda: boot(heun=0.0, delta=0.1), paired, (1,))
    row("flow matching, energy distance", flow, energy_distance, (1, 2, 4, 16))
    row("MeanFlow, energy distance", meanflow, energy_distance, (1, 2, 4, 16))
    for seed, tangent in itertools.product(range(2), TANGENTS):
        if (tangent, seed) == ("data", 0):  # is the row before
            continue
        name = f"MeanFlow, tangent {tangent}, seed {seed}"
        row(name, partial(meanflow, tangent, seed), energy_distance, (1, 2, 4, 16))
    kernels: tuple[KernelName, ...] = ("cubic", "rbf", "energy")
    if all(f"MMD-DDM, {kernel}" in stored for kernel in kernels):
        return
    base = denoiser()
    row("denoiser, energy distance", lambda: EulerMap(denoiser=base), energy_distance, (3, 10))
    for kernel in kernels:
        row(f"MMD-DDM, {kernel}", partial(matched, base, kernel), energy_distance, (3,))


if __name__ == "__main__":
    main()
