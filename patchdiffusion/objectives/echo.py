"""EchoDistill: a concept from a few images, learned by a one-step student and its teacher at once.

"EchoDistill: Bidirectional Concept Distillation for One-Step Diffusion Personalization", later
"Adversarial Concept Distillation" (OPAD), Yang et al. (arXiv 2510.20512). The teacher denoises the
references, the student learns from the teacher's correction of its own sample and from a
discriminator, both share the token of the concept, and in the end samples of the student become
references of the teacher (echo). The code is not public and the paper prints no weights: the sum of
the losses and the order are the paper's; weights, noise levels, lengths, discriminator, old classes
that are kept, and one simultaneous update in the place of three are a reconstruction.

Both networks are frozen but for an adapter and the token, so that without these they are what they
were: what an old class was is a pass with an adapter of strength 0.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion import rng
from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import Denoiser, NetDenoiser
from patchdiffusion.encoders.embed import Embedding
from patchdiffusion.encoders.perceptual import Distance
from patchdiffusion.flowmap import FlowMap
from patchdiffusion.losses import Batch, LossOut, squared_error
from patchdiffusion.objectives.adversarial import AdversarialTerm
from patchdiffusion.patches import Size
from patchdiffusion.paths import per_sample
from patchdiffusion.rng import Draws, integers
from patchdiffusion.system.checks import MOST
from patchdiffusion.weighting import Weighting

PART = 64
"""Images that are made at once for the echo."""


@dataclass(frozen=True, kw_only=True)
class EchoOptions:
    """Weights of the losses of a concept, noise levels, and the echo."""

    identity: float = 1.0
    """Weight of 1 - the cosine of the features of student and correction."""
    pixels: float = 1.0
    """Weight of their mean squared error."""
    keep: float = 1.0
    """Weight of the changes of other classes, of both networks."""
    low: float = 0.1
    """Smallest noise level of corrections."""
    high: float = 2.0
    """Largest noise level of corrections."""
    shift: int = 2
    """Most pixels by which images are shifted for the discriminator."""
    start: float = 2 / 3
    """Share of the run after which samples of the student are references."""
    share: float = 0.5
    """Their share of the references of the teacher, from then on."""

    def __post_init__(self) -> None:
        for name in ("identity", "pixels", "keep"):
            if not 0 <= getattr(self, name) < MOST:
                raise ValueError(f"{name} must be >= 0 and finite, not {getattr(self, name)}")
        if not 0 < self.low <= self.high < MOST:
            raise ValueError(
                f"corrections need noise levels 0 < low <= high, not {self.low} and {self.high}"
            )
        if not 0 <= self.share <= 0.5 or not 0 <= self.start <= 1:
            raise ValueError(
                "start must lie in [0, 1] and share in [0, 0.5], since at least half of the "
                f"references are images, not {self.start} and {self.share}"
            )
        if not 0 <= self.shift <= 256:
            raise ValueError(f"shift must lie in [0, 256], not {self.shift}")


def one_step(flow_map: FlowMap, noise: Tensor, cond: Cond) -> Tensor:
    """The image that a flow map makes of standard normal noise in one jump: like noise."""
    times = flow_map.times(1)
    start, end = times.tolist()
    return flow_map(noise * flow_map.path.s(times[0]).item(), start, end, cond)


def without_adapters(cond: Cond, count: int) -> Cond:
    """The condition with all adapters of a network off, which is the network before: [count]."""
    labels = cond.labels
    device = None if labels is None else labels.device
    return replace(cond, adapters=torch.zeros(count, 1, device=device), seed=None)


def shifted(x: Tensor, key: Tensor, most: int) -> Tensor:
    """Images [B, C, H, W] shifted by up to so many pixels along each axis; edges are repeated."""
    if not most:
        return x
    for axis, side in ((2, x.shape[2]), (3, x.shape[3])):
        by = integers(rng.subkeys(key, f"axis {axis}"), 2 * most + 1) - most
        index = (torch.arange(side, device=x.device) + by[:, None]).clamp(0, side - 1)  # [B, side]
        shape = (len(x), 1, side, 1) if axis == 2 else (len(x), 1, 1, side)
        x = x.gather(axis, index.reshape(shape).expand_as(x))
    return x


class Echo(nn.Module):
    """Samples of the student that are references of the teacher, saved in checkpoints."""

    images: Tensor
    made: Tensor

    def __init__(self, count: int, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("images", torch.zeros(count, *shape))
        self.register_buffer("made", torch.zeros(1))

    def fill(self, images: Tensor, similarity: Tensor) -> None:
        """Keep the images of the greatest similarity, in their order."""
        best = similarity.topk(len(self.images)).indices.sort().values
        self.images.copy_(images[best])
        self.made.fill_(1)

    def mixed(self, images: Tensor, draws: Draws, share: float) -> Tensor:
        """The images, of which a share is replaced by samples."""
        index = integers(draws.keys("echo image"), len(self.images))
        where = draws.bernoulli("echo", share)
        return torch.where(per_sample(where, images), self.images[index], images)


@dataclass(frozen=True, kw_only=True, eq=False)
class EchoLoss:
    """The losses of teacher, student and discriminator, each of which changes its own part alone.

    teacher        w(sigma) |T(x + sigma n, c) - x|^2 for references x and their class c
    student        1 - cos(f(x_s), f(x_t)) + |x_s - x_t|^2 + P(x_s, x_t) + adversary,
                   x_s = S(eps, c), x_t = T(x_s + sigma n, c) without gradient
    both           keep (|S(eps, k) - S_0(eps, k)|^2 + w |T(y, k) - T_0(y, k)|^2) for an old class k

    with S_0 and T_0 the networks before, and y a noisy image of S_0. The token has the gradients of
    teacher and student together.
    """

    options: EchoOptions
    product: Callable[[NetDenoiser], FlowMap]
    """Makes the flow map of the student."""
    teacher: NetDenoiser
    label: int
    """The class of the concept, behind all others."""
    weighting: Weighting
    """Weight of the teacher's error."""
    features: Embedding
    mean: Tensor
    """Mean of the normalized features of the references: [D]."""
    perceptual: Distance | None
    perceptual_weight: float
    adversary: AdversarialTerm | None
    echo: Echo
    seed: int = 0

    def phase(self, progress: float) -> str:
        """Part of the run, by which typical gradients differ."""
        adversary = "" if self.adversary is None else self.adversary.phase(progress)
        return adversary + " echo" * self.echoes(progress)

    def operations(self, size: Size) -> float:
        """Operations of the discriminator for one image."""
        return 0.0 if self.adversary is None else self.adversary.operations(size)

    def echoes(self, progress: float) -> bool:
        """True if samples of the student are references, at this share of the run."""
        return bool(len(self.echo.images)) and progress >= self.options.start

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        if not isinstance(denoiser, NetDenoiser):
            raise ValueError(f"a concept is learned by networks, not a {type(denoiser).__name__}")
        count, student = len(batch.images), self.product(denoiser)
        cond = replace(batch.cond, labels=torch.full_like(draws.index, self.label))
        if self.echoes(batch.progress) and not int(self.echo.made):
            self.make(student, tuple(batch.images.shape[1:]))
        shown = {"concept denoising": self.denoising(batch, draws, cond)}
        fake = one_step(student, draws.normal("student", tuple(batch.images.shape[1:])), cond)
        shown |= self.alignment(fake, draws, replace(cond, seed=None))
        shown |= self.kept(student, batch, draws)
        options = self.options
        factors = {
            "identity": options.identity,
            "correction": options.pixels,
            "perceptual": self.perceptual_weight,
            "change of student": options.keep,
            "change of teacher": options.keep,
        }
        loss = torch.zeros(count, device=fake.device)
        for name, value in shown.items():
            loss = loss + factors.get(name, 1.0) * value
        scalars = {name: value.detach().mean() for name, value in shown.items()}
        if self.adversary is None:
            return LossOut(per_sample=loss, scalars=scalars)
        real, fakes = (
            shifted(x, draws.keys(f"shift of {name}"), options.shift)
            for name, x in (("real", batch.images), ("fake", fake))
        )
        more, values = self.adversary(real, fakes, loss, batch.progress)
        return LossOut(
            per_sample=loss + more, scalars={**scalars, **values}, reported=loss.detach()
        )

    def denoising(self, batch: Batch, draws: Draws, cond: Cond) -> Tensor:
        """The teacher's error of references, and of samples after the echo: [B]."""
        images = batch.images
        if self.echoes(batch.progress):
            images = self.echo.mixed(images, draws, self.options.share)
        sigma = batch.noise.icdf(draws.stratified("sigma")).to(torch.float32)
        noise = draws.normal("noise", tuple(images.shape[1:]))
        estimate = self.teacher(images + per_sample(sigma, images) * noise, sigma, cond)
        return self.weighting(sigma) * squared_error(estimate, images)

    def alignment(self, fake: Tensor, draws: Draws, cond: Cond) -> Mapping[str, Tensor]:
        """Distances of the student's samples from the teacher's corrections: [B] each."""
        low, high = math.log(self.options.low), math.log(self.options.high)
        with torch.no_grad():
            sigma = (low + (high - low) * draws.uniform("correction")).exp().to(torch.float32)
            noise = draws.normal("correction noise", tuple(fake.shape[1:]))
            goal = self.teacher(fake + per_sample(sigma, fake) * noise, sigma, cond)
            features = self.features(goal)
        cosine = F.cosine_similarity(self.features(fake), features, dim=1)
        terms = {"identity": 1 - cosine, "correction": squared_error(fake, goal)}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(fake, goal)
        return terms

    def kept(self, student: FlowMap, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        """Squared changes of images of other classes, or of none, by both networks: [B] each."""
        label = integers(draws.keys("other class"), self.label + 1)
        label = torch.where(label == self.label, -1, label)
        cond = replace(batch.cond, labels=label, seed=None)
        before = without_adapters(cond, len(label))
        shape = tuple(batch.images.shape[1:])
        noise = draws.normal("other noise", shape)
        sigma = batch.noise.icdf(draws.uniform("other sigma")).to(torch.float32)
        with torch.no_grad():
            images = one_step(student, noise, before)
            noisy = images + per_sample(sigma, images) * draws.normal("other level", shape)
            goal = self.teacher(noisy, sigma, before)
        changed = squared_error(self.teacher(noisy, sigma, cond), goal)
        return {
            "change of student": squared_error(one_step(student, noise, cond), images),
            "change of teacher": self.weighting(sigma) * changed,
        }

    @torch.no_grad()
    def make(self, student: FlowMap, shape: tuple[int, ...]) -> None:
        """Fill the echo with the better half of some samples, by their features.

        Samples that look like no reference would teach the teacher its student's errors.
        """
        device = self.mean.device
        numbers = torch.arange(2 * len(self.echo.images), device=device)
        noise = rng.normal(rng.keys(self.seed, "echo", 0, numbers), shape)
        images = torch.cat(
            [
                one_step(student, part, self._concept(len(part), device))
                for part in noise.split(PART)
            ]
        )
        features = torch.cat([self.features(part) for part in images.split(PART)])
        self.echo.fill(images, F.normalize(features, dim=1) @ self.mean)

    def _concept(self, count: int, device: torch.device) -> Cond:
        return Cond(labels=torch.full((count,), self.label, device=device))
