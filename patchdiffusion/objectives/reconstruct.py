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

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from patchdiffusion.cond import Tape
from patchdiffusion.encoders.perceptual import Distance
from patchdiffusion.losses import Batch, LossOut
from patchdiffusion.nets.autoencoder import AutoencoderNetwork, Bottleneck, Noise, Upkeep
from patchdiffusion.nets.layers import pad_to_multiple
from patchdiffusion.objectives.adversarial import Adversarial
from patchdiffusion.rng import Draws
from patchdiffusion.system.dist import Team

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
        return "" if self.adversary is None else self.adversary.phase(progress)

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
            last = model.network.last_weight
            more, told = self.adversary.losses(x, y, nll, last, batch.progress, self.team)
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
