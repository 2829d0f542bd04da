"""Train few-step models of a Gaussian mixture in the plane, for the table of docs/few-steps.md.

    python benchmarks/few_steps.py

Trains the same small network by each objective and measures the distance of samples of 1, 2, 4 and
20 steps from the data: sliced Wasserstein distance of 20,000 points, along 64 directions. Its lower
limit is that of two draws of the data. About four minutes on one core; results are written to
benchmarks/results/few-steps.json after each row, and rows that are there are not made again.
"""

import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn

from patchdiffusion import rng
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.cond import Cond, Tape
from patchdiffusion.denoiser import Denoiser, NetDenoiser, expand_sigma
from patchdiffusion.encoders.embed import Embedding
from patchdiffusion.flowmap import FlowMap
from patchdiffusion.losses import Batch, DenoisingLoss, Objective
from patchdiffusion.nets.base import initialize, put
from patchdiffusion.nets.embed import positional
from patchdiffusion.nets.layers import Linear
from patchdiffusion.noise import LogNormal, NoiseLaw
from patchdiffusion.objectives.boot import BootConfig, BootLoss
from patchdiffusion.objectives.chain import EulerMap as Chain
from patchdiffusion.objectives.consistency import ConsistencyConfig, ConsistencyLoss
from patchdiffusion.objectives.ctm import CTMConfig, TrajectoryLoss
from patchdiffusion.objectives.meanflow import MeanFlowConfig, MeanFlowLoss, MeanFlowMap
from patchdiffusion.objectives.mmd import Matched, MMDConfig, MMDLoss
from patchdiffusion.objectives.progressive import Past, ProgressiveConfig, ProgressiveLoss
from patchdiffusion.parameterisation import EDM, Precond
from patchdiffusion.paths import Flow, Path, per_sample
from patchdiffusion.solvers import run
from patchdiffusion.solvers.jumps import jump
from patchdiffusion.weighting import EDMWeight, FlowWeight

DATA = GaussianMixture.toy()
SPREAD = 0.88
"""Standard deviation of the data."""
STRAIGHT = MeanFlowConfig().precond(EDM())
"""Parameterisation whose network is conditioned on the time of the straight path."""
LARGEST = 20.0
"""Noise level at which consistency models start."""
LAW = LogNormal(mean=0.0, std=1.6)
BATCH = 256
COUNT = 20_000
STEPS = (1, 2, 4, 20)
RESULT = File(__file__).parent / "results" / "few-steps.json"


class MLP(nn.Module):
    """Three layers of 128 features for points of the plane, conditioned on noise and jump."""

    def __init__(self, seed: int = 0, width: int = 128, features: int = 32):
        super().__init__()
        self.features = features
        sizes = (2 + 2 * features, width, width, width)
        self.layers = nn.ModuleList(Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.out = Linear(width, 2)
        initialize(self, seed)

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        jump = torch.zeros_like(noise) if cond.jump is None else cond.jump
        features = [positional(4 * value, self.features) for value in (noise, jump)]
        h = torch.cat([x, *features], dim=1)
        for layer in self.layers:
            h = torch.nn.functional.silu(layer(h))
        return self.out(put(tape, "features", h))


def train(
    precond: Precond,
    objective: Callable[[Denoiser], Objective],
    steps: int,
    *,
    law: NoiseLaw = LAW,
    lr: float = 2e-3,
    seed: int = 0,
    start: nn.Module | None = None,
    learned: nn.Module | None = None,
) -> NetDenoiser:
    """Train by an objective, a function of the averaged denoiser; returns the averaged denoiser.

    `learned` is trained with the network.
    """
    network, average = MLP(seed), MLP(seed).requires_grad_(False)
    if start is not None:
        network.load_state_dict(start.state_dict())
        average.load_state_dict(start.state_dict())
    trained, averaged = NetDenoiser(network, precond), NetDenoiser(average, precond)
    loss = objective(averaged)
    more = [] if learned is None else list(learned.parameters())
    optimizer = torch.optim.Adam([*network.parameters(), *more], lr=lr)
    for step in range(steps):
        progress = step / steps
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * progress))
        index = torch.arange(BATCH)
        draws = rng.Draws(seed, step, index, index, BATCH)
        x, _ = DATA.sample(draws.keys("data"))
        none = torch.zeros(BATCH, 4, dtype=torch.int64)
        batch = Batch(x.float(), Cond(), index, none, none[:, 0].bool(), law, progress)
        optimizer.zero_grad()
        loss(trained, batch, draws).per_sample.mean().backward()
        optimizer.step()
        with torch.no_grad():
            decay = min(0.995, (1 + step) / (10 + step))
            for target, weight in zip(average.parameters(), network.parameters(), strict=True):
                target.lerp_(weight, 1 - decay)
    return averaged


# ---- The models ----


@dataclass(frozen=True)
class EulerMap:
    """Euler steps on the straight path, the usual sampler of flow matching."""

    denoiser: NetDenoiser
    path: Path = field(default_factory=Flow)
    gamma: float = 0.0

    def times(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def __call__(
        self, z: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond | None = None
    ) -> Tensor:
        now = expand_sigma(t, z)
        return z - per_sample(now - s, z) * self.denoiser.network(z, now, Cond())


def flow_matching(steps: int) -> FlowMap:
    """Baseline: velocity by flow matching."""
    loss, law = DenoisingLoss(FlowWeight()), LogNormal(mean=0.0, std=1.0)
    return EulerMap(train(STRAIGHT, lambda average: loss, steps, law=law))


def meanflow(steps: int, **changes: Any) -> FlowMap:
    """MeanFlow with different times for 3/4 of the samples, drawn from almost all of (0, 1).

    The loss has no adaptive weight: with two values per sample instead of thousands, that would
    move its minimum.
    """
    config = MeanFlowConfig(same=0.25, power=0.0, **changes)
    loss, law = MeanFlowLoss(config=config), LogNormal(mean=0.0, std=2.0)
    return MeanFlowMap(network=train(STRAIGHT, lambda average: loss, steps, law=law).network)


def consistency(steps: int, teacher: Denoiser | None = None) -> FlowMap:
    """Consistency training as in iCT, with other numbers; distillation if there is a teacher."""
    first, last = (10, 320) if teacher is None else (40, 160)
    config = ConsistencyConfig(first=first, last=last, huber=0.1, sigma_max=LARGEST)
    precond = config.precond(EDM(sigma_data=SPREAD))
    loss = ConsistencyLoss(config=config, teacher=teacher)
    return config.product(train(precond, lambda average: loss, steps))


def trajectory(steps: int) -> FlowMap:
    """Consistency trajectory model of the exact denoiser."""
    precond, weighting = EDM(sigma_data=SPREAD), EDMWeight(sigma_data=SPREAD)
    config = CTMConfig(steps=2, denoising=0.01, sigma_max=LARGEST)
    common = TrajectoryLoss(config=config, target=DATA, teacher=DATA, weighting=weighting)
    g = train(precond, lambda average: replace(common, target=average), steps)
    return config.product(g)


def boot(steps: int) -> FlowMap:
    """BOOT of the exact denoiser, which samples in one step only."""
    config = BootConfig(sigma_max=LARGEST)
    loss = BootLoss(config=config, teacher=DATA)
    return config.product(train(config.precond(DENOISING), lambda average: loss, steps, lr=1e-3))


def progressive(steps: int) -> FlowMap:
    """Progressive distillation of the exact denoiser, in five rounds from 16 steps to one."""
    config = ProgressiveConfig(sigma_max=LARGEST)

    def loss(average: Denoiser) -> ProgressiveLoss:
        assert isinstance(average, NetDenoiser)
        past = Past(average.network)
        student = NetDenoiser(past.network, DENOISING)
        return ProgressiveLoss(
            config=config, teacher=DATA, average=average.network, past=past, student=student
        )

    return config.product(train(DENOISING, loss, steps, lr=1e-3))


def matched(steps: int) -> FlowMap:
    """MMD-DDM: a denoiser, of which the last eighth of the training matches samples."""
    plain = DenoisingLoss(EDMWeight(sigma_data=SPREAD))
    base = train(DENOISING, lambda average: plain, steps - steps // 8, lr=1e-3)
    config = MMDConfig(steps=(1, 2, 4), sigma_max=LARGEST)
    space = Embedding("points", "points", lambda x: x.flatten(1))
    real = Matched.of(space, "energy", data("bank")[: config.bank])
    loss = MMDLoss(config=config, trained=real, held_out=real)
    g = train(DENOISING, lambda average: loss, steps // 8, lr=5e-4, start=base.network)
    return config.product(g)


def exact(steps: int) -> FlowMap:
    """Euler's rule with the exact denoiser: teacher of the distilled models."""
    return Chain(denoiser=DATA, levels=MMDConfig(sigma_max=LARGEST).levels)


DENOISING = EDM(sigma_data=SPREAD)
ALONE = {"BOOT": (1,), "progressive distillation": (1,), "MMD-DDM": (1, 2, 4)}
"""Numbers of steps of models that are for some only."""
MODELS: dict[str, Callable[[int], FlowMap]] = {
    "flow matching, Euler": flow_matching,
    "MeanFlow": meanflow,
    "consistency training (iCT)": consistency,
    "consistency distillation": lambda steps: consistency(steps, DATA),
    "CTM without its adversary": trajectory,
    "improved MeanFlow": lambda steps: meanflow(steps, tangent="network"),
    "BOOT": boot,
    "progressive distillation": progressive,
    "MMD-DDM": matched,
    "exact denoiser, Euler": exact,
}


# ---- The distance ----


@torch.no_grad()
def samples(flow_map: FlowMap, steps: int) -> Tensor:
    """Samples of a flow map: float32 [COUNT, 2]."""
    keys = rng.keys(0, "samples", 0, torch.arange(COUNT))
    times = flow_map.times(steps)
    z = rng.normal(keys, (2,)) * flow_map.path.s(times[0]).item()

    def noise(step: int) -> Tensor:
        return rng.normal(rng.subkeys(keys, f"noise {step}"), (2,))

    return run(jump(flow_map, z, times, noise=noise)).x


def data(stream: str = "real") -> Tensor:
    """`COUNT` points of the mixture."""
    return DATA.sample(rng.keys(0, stream, 0, torch.arange(COUNT)))[0].float()


def distance(a: Tensor, b: Tensor) -> float:
    """Sliced Wasserstein-2 distance: root mean square over 64 directions."""
    angle = torch.arange(64) * (math.pi / 64)
    directions = torch.stack([angle.cos(), angle.sin()])
    gap = (a @ directions).sort(dim=0).values - (b @ directions).sort(dim=0).values
    return gap.square().mean().sqrt().item()


def main(steps: int = 4000) -> None:
    """Train and measure all models; write the results and print them as Markdown."""
    real, stored = data(), json.loads(RESULT.read_text()) if RESULT.exists() else {}
    rows: dict[str, list[float | None]] = stored.get("sliced Wasserstein-2", {})
    if stored.get("training steps") != steps:
        rows = {}
    for name, make in MODELS.items():
        if name in rows:
            continue
        flow_map, counts = make(steps), ALONE.get(name, STEPS)
        rows[name] = [
            round(distance(samples(flow_map, n), real), 3) if n in counts else None for n in STEPS
        ]
        print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
        result = {
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "training steps": steps,
            "sampling steps": STEPS,
            "sliced Wasserstein-2": rows,
            "two draws of the data": round(distance(data("more"), real), 3),
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(table(json.loads(RESULT.read_text()))))


def table(result: dict[str, Any]) -> list[str]:
    """Table in Markdown, as lines."""
    head = [f"{n} step{'s' * (n > 1)}" for n in result["sampling steps"]]
    lines = [["model", *head], ["---"] * (len(head) + 1)]
    for name, row in result["sliced Wasserstein-2"].items():
        lines.append([name, *("" if value is None else f"{value:.3f}" for value in row)])
    return [f"| {' | '.join(cells)} |" for cells in lines]


if __name__ == "__main__":
    main()
