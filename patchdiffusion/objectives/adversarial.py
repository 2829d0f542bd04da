"""Adversarial terms of losses: a discriminator, and the balance of its gradient with others.

One backward pass trains both: the generator term sees the discriminator through constant weights,
the discriminator sees constant images. The weight of the generator term is that of VQGAN (arXiv
2012.09841), lambda = |d loss| / (|d generator| + 1e-4), of gradients on the last layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from patchdiffusion.encoders.discriminator import (
    Adversary,
    AdversaryConfig,
    discriminator_loss,
    generator_loss,
)
from patchdiffusion.nets.base import Network
from patchdiffusion.nets.count import macs_of
from patchdiffusion.objectives.base import Materials
from patchdiffusion.patches import Size
from patchdiffusion.system.dist import Team

EPS = 1e-4  # of the norm of the gradient of the generator


@dataclass(frozen=True, eq=False)
class Adversarial:
    """Discriminator and settings of the adversarial loss."""

    config: AdversaryConfig
    network: nn.Module

    def counts(self, progress: float) -> bool:
        """True if the generator is trained against it, at this share of the run."""
        return progress >= self.config.start

    def learns(self, progress: float) -> bool:
        """True if it is trained itself."""
        return progress >= self.config.start - self.config.warmup

    def phase(self, progress: float) -> str:
        """Part of the run, by which typical gradients differ: none, warm-up or adversary."""
        if not self.learns(progress):
            return ""
        return " adversary" if self.counts(progress) else " discriminator"

    def operations(self, channels: int, size: Size) -> float:
        """Operations of the discriminator for one crop of a size, on average over the run."""
        x = torch.empty(1, channels, *size, device="meta")
        share = min(1.0, 1 - self.config.start + self.config.warmup)
        return 18 * share * macs_of(self.network, x)  # nine passes

    def losses(
        self,
        real: Tensor,
        fake: Tensor,
        loss: Tensor,
        weight: Tensor,
        progress: float,
        team: Team,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Losses of generator and discriminator [B], or a scalar 0 before their time; log values.

        `loss` [B] is that of the generator without its adversary, with whose gradient on `weight`
        the adversarial gradient is balanced.
        """
        if not self.learns(progress):
            return self.idle(), {}
        total = self.told_apart(real, fake)
        scalars = {"discriminator": total.mean()}
        if self.counts(progress):
            fooled = self.fooled(fake)
            scalars["generator"] = fooled.mean()
            factor: Tensor | float = self.config.weight
            if self.config.balanced:
                balance = adaptive_weight(loss, fooled, weight, self.config.limit, team)
                factor, scalars["adversarial weight"] = self.config.weight * balance, balance
            total = total + factor * fooled
        return total, scalars

    def fooled(self, fake: Tensor) -> Tensor:
        """Loss of the generator [B], through constant weights of the discriminator."""
        constant = {name: p.detach() for name, p in self.network.named_parameters()}
        logits = functional_call(self.network, constant, (fake,))
        return generator_loss(logits, self.config.form)

    def told_apart(self, real: Tensor, fake: Tensor) -> Tensor:
        """Loss of the discriminator [B], with constant images."""
        loss = discriminator_loss(self.network(real), self.network(fake.detach()), self.config.form)
        if not self.config.r1:
            return loss
        x = real.detach().requires_grad_()
        with torch.autocast(x.device.type, enabled=False):
            means = self.network(x).flatten(1).mean(1)
            (slope,) = torch.autograd.grad(means.sum(), x, create_graph=True)
        return loss + 0.5 * self.config.r1 * slope.square().flatten(1).sum(1)

    def idle(self) -> Tensor:
        """Zero that keeps its weights in the graph, which DistributedDataParallel needs."""
        return torch.stack([p.sum() for p in self.network.parameters()]).sum() * 0.0


def adaptive_weight(
    loss: Tensor, generator: Tensor, weight: Tensor, limit: float, team: Team
) -> Tensor:
    """lambda of the module, a constant scalar: ratio of the gradients of two losses [B].

    Of the means over the crops of a pass on all processes, so that these agree.
    """
    gradients = [
        torch.autograd.grad(part.sum(), weight, retain_graph=True)[0].float()
        for part in (loss, generator)
    ]
    count = torch.full((1,), float(len(loss)), device=weight.device)
    flat = team.all_reduce(torch.cat([*(g.flatten() for g in gradients), count]))
    of_loss, of_generator = (flat[:-1] / flat[-1]).chunk(2)
    return (of_loss.norm() / (of_generator.norm() + EPS)).clamp(max=limit)


def last_matrix(network: Network[Any]) -> nn.Parameter:
    """The last trained matrix of a network: that before the output, if it is trained."""
    roles = network.roles()
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in trained if p.ndim >= 2]
    heads = [(name, p) for name, p in matrices if roles[name] == "head"]
    return (heads or matrices)[-1][1]


@dataclass(frozen=True, eq=False)
class AdversarialTerm:
    """An adversarial loss whose gradient is balanced on a matrix of the network that is trained."""

    parts: Adversarial
    last: nn.Parameter
    channels: int
    team: Team

    def __call__(
        self, real: Tensor, fake: Tensor, loss: Tensor, progress: float
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Losses of generator and discriminator, see `Adversarial.losses`; values without graph."""
        term, shown = self.parts.losses(real, fake, loss, self.last, progress, self.team)
        return term, {name: value.detach() for name, value in shown.items()}

    def phase(self, progress: float) -> str:
        """Part of the run, by which typical gradients differ."""
        return self.parts.phase(progress)

    def operations(self, size: Size) -> float:
        """Operations of the discriminator for one crop of a size."""
        return self.parts.operations(self.channels, size)


def adversarial_term(config: Adversary, materials: Materials, flag: str) -> AdversarialTerm | None:
    """The term of a discriminator, which is trained with the network; None without one.

    `flag` is that of the discriminator on the command line. Raises `ValueError` for crops that it
    cannot judge.
    """
    if not isinstance(config, AdversaryConfig):
        return None
    for group in sorted(materials.groups, key=lambda group: min(group.size)):
        config.check(group.size, flag)
    channels = materials.network.config.channels
    network = config.build(channels, materials.seed)
    materials.learn("discriminator", network, config.rate)
    last = last_matrix(materials.network)
    return AdversarialTerm(Adversarial(config, network), last, channels, materials.team)


def check_axes(config: Adversary, axes: int, flag: str) -> None:
    """Raise `ValueError` for a discriminator of data that are no images."""
    if isinstance(config, AdversaryConfig) and axes != 2:
        raise ValueError(f"the discriminator is of images, not of {axes} axes: set {flag} none")
