"""The loss of autoencoders: reconstruction, posterior and adversary (arXiv 2112.10752).

Published losses are sums over the C H W values of an image; here all are divided by C H W. With

    rec = mean |x - xr| + w_p P(x, xr)           P a perceptual distance
    nll = rec / exp(s) + s                       s the log-variance, 0 unless it is learned
    loss = nll + w_kl kl / (C H W) + penalty + w_d lambda generator + discriminator

the ratio of all terms is the published one: kl is a sum over latents in nats, and lambda is
|d nll| / (|d generator| + 1e-4), of gradients on the last layer, at most `limit`.

One backward pass trains both: the generator term sees the discriminator through constant weights,
the discriminator sees constant reconstructions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from patchdiffusion.cond import Tape
from patchdiffusion.encoders.discriminator import (
    AdversaryConfig,
    discriminator_loss,
    generator_loss,
)
from patchdiffusion.encoders.perceptual import Distance
from patchdiffusion.losses import Batch, LossOut
from patchdiffusion.nets.autoencoder import AutoencoderNetwork, Bottleneck, Noise, Upkeep
from patchdiffusion.nets.layers import pad_to_multiple
from patchdiffusion.rng import Draws
from patchdiffusion.system.dist import Team

EPS = 1e-4  # of the norm of the gradient of the generator

PixelError = Literal["l1", "l2"]


class Reconstructor(nn.Module):
    """An autoencoder in training, on images of any size."""

    def __init__(self, network: AutoencoderNetwork[Any]):
        super().__init__()
        self.network = network

    def recording(self, tape: Tape) -> "Reconstructor":
        """This model; autoencoders record nothing."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction by the mean of the posterior: float32, like x [B, C, H, W]."""
        mean, _ = self.network.moments(self._padded(x))
        return _cut(self.network.decode(mean), x).float()

    def sampled(self, x: Tensor, noise: Noise) -> tuple[Tensor, Bottleneck]:
        """Reconstruction by the latents of training, float32 like x, and these."""
        latents = self.network.bottleneck(self._padded(x), noise)
        return _cut(self.network.decoded(latents.z), x).float(), latents

    def _padded(self, x: Tensor) -> Tensor:
        return pad_to_multiple(x, (self.network.factor,) * (x.ndim - 2))


def _cut(reconstruction: Tensor, x: Tensor) -> Tensor:
    return reconstruction[(..., *(slice(side) for side in x.shape[2:]))]


def pixel_error(x: Tensor, y: Tensor, kind: PixelError) -> Tensor:
    """Mean absolute or squared difference of the values of each image: float32 [B]."""
    difference = (x - y).float()
    each = difference.abs() if kind == "l1" else difference.square()
    return each.flatten(1).mean(1)


class LogVariance(nn.Module):
    """Log-variance s of the reconstruction error, one learned number."""

    def __init__(self, start: float):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(start))


@dataclass(frozen=True, eq=False)
class Adversarial:
    """Discriminator and settings of the adversarial loss."""

    config: AdversaryConfig
    network: nn.Module

    def counts(self, progress: float) -> bool:
        """True if the autoencoder is trained against it, at this share of the run."""
        return progress >= self.config.start

    def learns(self, progress: float) -> bool:
        """True if it is trained itself."""
        return progress >= self.config.start - self.config.warmup

    def fooled(self, reconstruction: Tensor) -> Tensor:
        """Loss of the generator [B], through constant weights of the discriminator."""
        constant = {name: p.detach() for name, p in self.network.named_parameters()}
        logits = functional_call(self.network, constant, (reconstruction,))
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


@dataclass(frozen=True, eq=False)
class ReconstructionLoss:
    """The loss of an autoencoder and its discriminator; see the module."""

    error: PixelError = "l1"
    perceptual: Distance | None = None
    perceptual_weight: float = 1.0
    kl_weight: float = 1e-6
    log_variance: float | LogVariance = 0.0
    adversary: Adversarial | None = None
    upkeep: Upkeep | None = None
    team: Team = field(default_factory=Team)

    def phase(self, progress: float) -> str:
        """Part of the run, by which typical gradients differ: none, warm-up or adversary."""
        if self.adversary is None or not self.adversary.learns(progress):
            return ""
        return " adversary" if self.adversary.counts(progress) else " discriminator"

    def after_step(self, applied: Tensor) -> None:
        """Let the autoencoder update what no gradient changes, such as averages of a codebook."""
        if self.upkeep is not None:
            self.upkeep.after_step(applied, self.team)

    def __call__(self, model: Reconstructor, batch: Batch, draws: Draws) -> LossOut:
        x, values = batch.images, batch.images[0].numel()
        y, latents = model.sampled(x, lambda shape: draws.normal("latents", shape))
        errors, scalars = self._errors(x, y)
        s = self.log_variance
        s = s.value if isinstance(s, LogVariance) else torch.tensor(s, device=x.device)
        nll = errors / s.exp() + s
        loss = nll
        if latents.kl is not None:
            loss = loss + self.kl_weight / values * latents.kl
            scalars["kl"] = latents.kl.mean()
        if latents.penalty is not None:
            loss = loss + latents.penalty
            scalars["codebook"] = latents.penalty.mean()
        if self.upkeep is not None:
            self.upkeep.observe(latents, draws)
            scalars |= self.upkeep.numbers()
        if isinstance(self.log_variance, LogVariance):
            scalars["log-variance"] = s
        if self.adversary is not None:
            more, told = self._adversarial(model, x, y, nll, batch.progress)
            loss, scalars = loss + more, {**scalars, **told}
        scalars = {name: value.detach() for name, value in scalars.items()}
        return LossOut(loss, scalars, reported=errors.detach())

    def _errors(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Error of reconstructions [B], of pixels and features."""
        error = pixel_error(x, y, self.error)
        scalars = {self.error: error.mean()}
        if self.perceptual is not None:
            distance = self.perceptual(y, x)
            scalars["perceptual"] = distance.mean()
            error = error + self.perceptual_weight * distance
        return error, scalars

    def _adversarial(
        self, model: Reconstructor, x: Tensor, y: Tensor, nll: Tensor, progress: float
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Losses of generator and discriminator [B], or a scalar 0 before its time."""
        adversary = self.adversary
        assert adversary is not None
        if not adversary.learns(progress):
            return adversary.idle(), {}
        loss = adversary.told_apart(x, y)
        scalars = {"discriminator": loss.mean()}
        if adversary.counts(progress):
            fooled = adversary.fooled(y)
            last, limit = model.network.last_weight, adversary.config.limit
            balance = adaptive_weight(nll, fooled, last, limit, self.team)
            loss = loss + adversary.config.weight * balance * fooled
            scalars |= {"generator": fooled.mean(), "adversarial weight": balance}
        return loss, scalars


def adaptive_weight(
    nll: Tensor, generator: Tensor, weight: Tensor, limit: float, team: Team
) -> Tensor:
    """lambda of the module, a constant scalar: ratio of the gradients of two losses [B].

    Of the means over the crops of a pass on all processes, so that these agree.
    """
    gradients = [
        torch.autograd.grad(loss.sum(), weight, retain_graph=True)[0].float()
        for loss in (nll, generator)
    ]
    count = torch.full((1,), float(len(nll)), device=weight.device)
    flat = team.all_reduce(torch.cat([*(g.flatten() for g in gradients), count]))
    of_nll, of_generator = (flat[:-1] / flat[-1]).chunk(2)
    return (of_nll.norm() / (of_generator.norm() + EPS)).clamp(max=limit)
