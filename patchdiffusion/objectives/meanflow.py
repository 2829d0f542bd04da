"""MeanFlow: a network of the mean velocity between any two times of the straight path.

Geng, Deng, Bai, Kolter, He, "Mean Flows for One-step Generative Modeling" (arXiv 2505.13447), with
the tangent and the auxiliary head of "Improved Mean Flows" (2512.02012) as options. z_t = (1 - t)
x0 + t eps, noise at t = 1, velocity v = eps - x0. The network F(z, t, cond) is conditioned on the
length of the jump, t - s, by `cond.jump`; at jump 0 it is the velocity, of which `FlowMatching`
makes a denoiser.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path as Folder
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from patchdiffusion.cond import CONDITIONS, Cond
from patchdiffusion.denoiser import Denoiser, NetDenoiser, expand_sigma, prepare
from patchdiffusion.losses import Batch, LossOut, squared_error
from patchdiffusion.noise import LogitNormal, LogNormal, NoiseLaw
from patchdiffusion.objectives.base import C, Distillation, Distilled, Materials, Settings
from patchdiffusion.objectives.tangent import derivative
from patchdiffusion.objectives.velocityhead import (
    Head,
    learned_velocity,
    still_velocity,
    velocity_head,
    with_tap,
)
from patchdiffusion.parameterisation import EDM, FlowMatching, Parameterisation
from patchdiffusion.patches import Size
from patchdiffusion.paths import Flow, Path, per_sample
from patchdiffusion.rng import Draws

LATEST = 1 - 1e-4
"""The largest time whose noise level is asked for; that of 1 is infinite."""
Raw = Callable[[Tensor, Tensor, Cond], Tensor]
"""A network: z [B, C, *S], time [B] and a condition -> the shape of z."""


def mean_velocity(network: Raw, z: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
    """u(z, s, t), the mean velocity from time t to s; z [B, C, *S], t and s [B]."""
    return network(z, t, replace(cond, jump=t - s))


def slope(network: Raw, z: Tensor, t: Tensor, s: Tensor, cond: Cond, along: Tensor) -> Tensor:
    """du/dt = along du/dz + du/dt with s held fixed: like z, 0 where s = t."""
    total, rows = torch.zeros_like(z), (s < t).nonzero()[:, 0]  # worth the host synchronization
    if len(rows):
        z, t, s, cond = z[rows], t[rows], s[rows], cond.take(rows)
        total[rows] = derivative(
            lambda z, t: mean_velocity(network, z, t, s, cond), (z, t), (along[rows], 1.0)
        )
    return total


@dataclass(frozen=True, kw_only=True)
class MeanFlowMap:
    """The flow map z_s = z_t - (t - s) u(z_t, s, t) (algorithm 2)."""

    network: nn.Module
    path: Path = field(default_factory=Flow, init=False)
    gamma: float = field(default=0.0, init=False)

    def times(self, steps: int) -> Tensor:
        """Evenly spaced from 1 to 0: float64 [steps + 1]."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def __call__(
        self, z: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond | None = None
    ) -> Tensor:
        """z [B, C, *S] at time t to s, both [B] or scalars; the network computes in float32."""
        t, s, cond = expand_sigma(t, z), expand_sigma(s, z), cond or Cond()
        prepare(self.network, Flow().sigma(t.clamp(max=LATEST)).float(), cond)
        u = mean_velocity(self.network, z.float(), t.float(), s.float(), cond)
        return (z - per_sample(t - s, z) * u).to(z.dtype)


@dataclass(frozen=True, kw_only=True)
class MeanFlowConfig(Distilled):
    """MeanFlow, with or without a teacher; the first time is sigma / (1 + sigma) of the law."""

    word: ClassVar[str] = "meanflow"
    same: float = 0.75
    """Share of samples with equal times, which is flow matching."""
    mean: float | None = None
    """Mean of the logit of the second time; None draws it by the noise law."""
    std: float = 1.0
    """Standard deviation of that logit, if `mean` is set."""
    power: float = 1.0
    """Exponent p of adaptive weights: losses are divided by (loss + eps)^p without gradient."""
    eps: float = 1e-6
    """Constant of those weights, for the mean square over pixels; published values are of sums."""
    guidance: float = 1.0
    """Guidance weight of the target velocity; with mix, the scale is guidance / (1 - mix)."""
    mix: float = 0.0
    """Share of the network's velocity with the label in the target velocity."""
    tangent: Literal["data", "network", "head"] = "data"
    """Direction of the derivative: data, eps - x0, or improved MeanFlow: network, its velocity, or
    head, that of a second output, which is trained beside it."""
    head_weight: float = 1.0
    """Weight of the error of that output, if tangent is head."""
    head_tap: str = ""
    """Activation that it reads, of those that patchdiffusion info lists; empty is the last one."""
    teacher: str | None = None
    """Run or model whose velocity replaces eps - x0 (distillation); None is training."""

    few_step: ClassVar[bool] = True
    shards: ClassVar[bool] = False
    distillation: ClassVar[Distillation | None] = Distillation(lr=1.0, images=0.5)

    def __post_init__(self) -> None:
        if not 0 <= self.same <= 1 or not 0 <= self.mix < 1:
            raise ValueError(
                f"meanflow needs same in [0, 1] and mix in [0, 1), not {self.same}, {self.mix}"
            )
        if not (0 <= self.power <= 1 and 0 < self.eps < math.inf and 0 < self.std < math.inf):
            raise ValueError(
                "meanflow needs power in [0, 1] and finite eps and std > 0, "
                f"not {self.power}, {self.eps}, {self.std}"
            )
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"meanflow needs guidance >= 0 and finite, not {self.guidance}")
        if not 0 < self.head_weight < math.inf:
            raise ValueError(
                f"meanflow needs head_weight > 0 and finite, not {self.head_weight}; "
                "leave the head out by --objective.tangent network"
            )
        if self.head_tap and self.tangent != "head":
            raise ValueError(
                f"head_tap is {self.head_tap}, and tangent is {self.tangent}, which has no head: "
                "add --objective.tangent head"
            )
        if self.eps > 2**24:
            raise ValueError(
                f"meanflow needs eps <= 2^24, as no loss in float32 changes larger ones, not "
                f"{self.eps}"
            )
        LogitNormal(mean=self.mean or 0.0, std=self.std)  # raises for impossible values

    @property
    def guided(self) -> bool:
        """True if guidance changes the target velocity."""
        return (self.guidance, self.mix) != (1.0, 0.0)

    def prefers(self, config: C) -> C:
        """The noise law of the authors, a network of two times, previews in two steps."""
        return replace(
            config,
            objective=self,
            noise=LogNormal(mean=-0.4, std=1.0),
            network=replace(config.network, jump=True),
            preview=replace(config.preview, sample_steps=2),
        )

    def taught(self, config: C, teacher: Folder) -> C:
        """The configuration that distills a model, which becomes the teacher."""
        return super().taught(replace(config, precond=EDM()), teacher)

    def precond(self, chosen: Parameterisation) -> FlowMatching:
        """Flow matching, for its network as a denoiser, whatever the configuration has."""
        return FlowMatching(time_scale=1.0)

    def meaning(self, chosen: Parameterisation) -> tuple[object, ...]:
        """The key of flow matching, whatever the configuration has."""
        return self.precond(chosen).meaning

    def check(self, config: Settings) -> None:
        """Raise `ValueError` for a network or a parameterisation that MeanFlow cannot train."""
        network = config.network
        if not isinstance(config.precond, EDM):
            raise ValueError(
                f"meanflow has its own parameterisation, not {config.precond}: leave --precond out"
            )
        if "jump" not in network.reads:
            raise ValueError("meanflow needs a network of two times: set --network.jump")
        if not network.smooth_in_noise:
            raise ValueError(
                "meanflow needs --network.embedding positional, and no task-routing and experts: "
                "the derivatives of this network in the noise level are too large"
            )
        if self.guided and not network.num_classes:
            raise ValueError(
                f"guidance {self.guidance} and mix {self.mix} of the objective need a network "
                "with classes; leave them at 1 and 0"
            )
        if self.guided and not config.label_dropout:
            raise ValueError(
                "objective.guidance needs a label_dropout above 0: the network must be trained "
                "without labels, too"
            )

    def build(self, materials: Materials) -> "MeanFlowLoss":
        """The MeanFlow loss, with its head if there is one."""
        head = velocity_head(materials, self.head_tap) if self.tangent == "head" else None
        return MeanFlowLoss(config=self, teacher=next(iter(materials.teachers), None), head=head)

    def product(self, denoiser: NetDenoiser) -> MeanFlowMap:
        """The flow map along the mean velocity."""
        return MeanFlowMap(network=denoiser.network)

    @property
    def passes(self) -> float:
        """Two for each derivative, one for each further velocity and for a teacher."""
        further = (self.tangent != "data") + (self.teacher is not None)
        return 2 * (1 - self.same) + further + self.guided * (1 + (self.mix > 0))


@dataclass(frozen=True, kw_only=True)
class MeanFlowLoss:
    """|u - sg(v - (t - s) du/dt)|^2 with du/dt along the path, s held fixed (algorithm 1).

    Conditions such as coordinates are constant along the path: their tangent is zero. The square is
    a mean over pixels, so published values of c, which are for sums, must be divided by C h w.
    """

    config: MeanFlowConfig
    teacher: Denoiser | None = None
    """Estimates E[x0 | x], from which the velocity follows; None takes that of the sample."""
    head: Head | None = None
    """Output of the velocity, of tangent head; trained with the network by its own error."""

    def __post_init__(self) -> None:
        if (self.config.tangent == "head") != (self.head is not None):
            raise ValueError(
                f"tangent is {self.config.tangent}, and the loss has {self.head} as its head; "
                "tangent head needs one, others none"
            )

    def times(self, draws: Draws, law: NoiseLaw) -> tuple[Tensor, Tensor]:
        """Two times of each sample, the larger one first: float32 [B] each."""
        config = self.config
        other = law if config.mean is None else LogNormal(mean=config.mean, std=config.std)
        a = Flow().time(law.icdf(draws.stratified("sigma")))
        b = Flow().time(other.icdf(draws.uniform("span")))
        t, s = torch.maximum(a, b), torch.minimum(a, b)
        # Independent of the labels that are dropped.
        s = torch.where(draws.bernoulli("same time", config.same), t, s)
        return t.to(torch.float32), s.to(torch.float32)

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        """The loss of the network of a `NetDenoiser`; `ValueError` for other denoisers."""
        if not isinstance(denoiser, NetDenoiser):
            raise ValueError(f"MeanFlow trains a NetDenoiser, not a {type(denoiser).__name__}")
        if self.head is not None:
            denoiser = with_tap(denoiser, self.head)
        network, config = denoiser.raw, self.config
        t, s = self.times(draws, batch.noise)
        images, cond = batch.images, batch.cond
        noise = draws.normal("noise", tuple(images.shape[1:]))
        z = images + per_sample(t, images) * (noise - images)
        with torch.no_grad():
            v = self._velocity(network, z, t, cond, self._taught(z, t, cond, noise - images))
            along = v
            if config.tangent == "network":  # whose output may be of low precision
                along = mean_velocity(network, z, t, t, cond).to(z.dtype)
            if self.head is not None:
                along = still_velocity(denoiser, self.head, z, t, cond)
            target = v - per_sample(t - s, z) * slope(network, z, t, s, cond, along)
        square = (mean_velocity(network, z, t, s, cond) - target).square().flatten(1).mean(1)
        loss, scalars = self._adaptive(square), {"velocity error": square.detach().mean()}
        if self.head is not None:
            error = squared_error(learned_velocity(denoiser, self.head, z), v)
            loss = loss + config.head_weight * self._adaptive(error)
            scalars["head error"] = error.detach().mean()
        return LossOut(per_sample=loss, scalars=scalars)

    def operations(self, size: Size) -> float:
        """Operations of the head for one crop of a size."""
        return 0.0 if self.head is None else self.head.operations(size)

    def _adaptive(self, square: Tensor) -> Tensor:
        """Squared errors [B] with the adaptive weights."""
        return square / (square.detach() + self.config.eps) ** self.config.power

    def _taught(self, z: Tensor, t: Tensor, cond: Cond, v: Tensor) -> Tensor:
        """The teacher's estimate of eps - x0 at z; without a teacher v, that of the sample."""
        if self.teacher is None:
            return v
        wide = per_sample(t.clamp(max=LATEST), z)
        sigma = (wide / (1 - wide)).flatten()
        estimate = self.teacher(z / (1 - wide), sigma, replace(cond, seed=None))
        return (z - estimate) / wide  # z = (1 - t) x0 + t eps

    def _velocity(self, network: Raw, z: Tensor, t: Tensor, cond: Cond, v: Tensor) -> Tensor:
        """w v + (1 - w - k) u(z, t, t | null) + k u(z, t, t | label), v without a label."""
        config = self.config
        if not config.guided or cond.labels is None:
            return v
        goal = config.guidance * v
        null = mean_velocity(network, z, t, t, cond.without(*CONDITIONS))
        goal = goal + (1 - config.guidance - config.mix) * null
        if config.mix:
            goal = goal + config.mix * mean_velocity(network, z, t, t, cond)
        return torch.where(per_sample(cond.labels >= 0, z), goal, v)
