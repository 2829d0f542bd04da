"""A stepper to try things on."""

from dataclasses import replace

import numpy as np
import tiny
import torch
from torch import Tensor

from patchdiffusion.data.columns import Filled, Label
from patchdiffusion.data.feed import Feed
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.losses import DenoisingLoss, Objective
from patchdiffusion.nets.unet import SongUNet
from patchdiffusion.parameterisation import EDM
from patchdiffusion.plans import Group, PatchPlan, Stratified
from patchdiffusion.train.guard import Guard
from patchdiffusion.train.optimizers import AdamW, Muon, OptimizerConfig
from patchdiffusion.train.parallel import LossModule
from patchdiffusion.train.schedules import Trapezoid
from patchdiffusion.train.settings import GuardConfig
from patchdiffusion.train.state import Meter
from patchdiffusion.train.step import Stepper

CANVAS = (8, 8)
IMAGES = torch.from_numpy(np.stack([tiny.picture(n, 8) for n in range(12)]))
LABELS = torch.arange(12) % 2
FREE = AdamW(clip=1e9, schedule=Trapezoid(warmup=0.0))
MUON = Muon(clip=1e9, schedule=Trapezoid(warmup=0.0))
GROUPS = PatchPlan(CANVAS, 6, tiny.LAW, 2).draw(seed=0, step=0)  # 3 of 8x8, 6 of 4x4
WHOLE = PatchPlan(CANVAS, 6, Stratified.whole(), 2).draw(seed=0, step=0)


def make(
    objective: Objective | None = None,
    *,
    network: SongUNet | None = None,
    config: OptimizerConfig = FREE,
    guard: GuardConfig | None = None,
    micro_batch: int | None = None,
    precision: str = "fp32",
    dropout: float = 0.1,
) -> tuple[Stepper, SongUNet]:
    """A stepper around a network in which every weight matters, and a network."""
    if network is None:
        network = SongUNet(replace(tiny.NETWORK, dropout=0.1))
        tiny.randomize(network)
    stepper = Stepper(
        LossModule(NetDenoiser(network, EDM()), objective or DenoisingLoss(), dropout=dropout),
        Feed(IMAGES, [Filled(Label(), LABELS)], torch.arange(12), seed=7, flip=True),
        Guard(guard or GuardConfig(), torch.device("cpu")),
        config=config,
        roles={network.get_parameter(name): role for name, role in network.roles().items()},
        canvas=CANVAS,
        micro_batch=micro_batch,
        precision=precision,
    )
    return stepper, network


def take(
    stepper: Stepper, groups: tuple[Group, ...] = GROUPS, *, step: int = 0, progress: float = 0.5
) -> dict[str, float]:
    meter = Meter()
    stepper(groups, meter, step=step, cursor=(step, 9 * step), progress=progress, seen=0.0)
    return meter.read()


def gradients(network: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {name: gradient.clone() for name, gradient in found.items()}


def everything(stepper: Stepper, network: torch.nn.Module) -> dict[str, Tensor]:
    """Weights, moments and step counts."""
    state = {name: p.detach().clone() for name, p in network.named_parameters()}
    for i, p in enumerate(stepper.parameters):
        for name, value in stepper.update.state(p).items():
            state[f"{i}/{name}"] = value.clone()
    return state


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
