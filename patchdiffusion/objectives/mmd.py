"""MMD-DDM: a sampler of a few steps is trained as a whole, to match the features of real images.

Aiello, Valsesia, Magli (arXiv 2301.07969). The gradient of the squared maximum mean discrepancy of
generated and real images goes through all steps of Euler's rule (DDIM). Nothing is compared image
by image, so there is no teacher: training starts from the weights of a denoiser.

Features that are matched measure the model no more: the discrepancy in others is always reported.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path as Folder
from typing import ClassVar, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import Denoiser, NetDenoiser
from patchdiffusion.encoders.embed import Embedding, embedding
from patchdiffusion.losses import Batch, LossOut
from patchdiffusion.noise import check_range
from patchdiffusion.objectives.base import C, Distillation, Materials, ObjectiveConfig, Settings
from patchdiffusion.objectives.chain import EulerMap
from patchdiffusion.objectives.discrepancy import Kernel, KernelName, kernel_of, mmd2, within
from patchdiffusion.objectives.discrete import Levels
from patchdiffusion.patches import size_name
from patchdiffusion.plans import WHOLE
from patchdiffusion.rng import Draws
from patchdiffusion.system.dist import Team


@dataclass(frozen=True, kw_only=True)
class MMDConfig(ObjectiveConfig):
    """MMD-DDM, finetuning of a sampler of few steps by matched features (arXiv 2301.07969)."""

    word: ClassVar[str] = "mmd"
    few_step: ClassVar[bool] = True
    denoises: ClassVar[bool] = False
    shards: ClassVar[bool] = False
    distillation: ClassVar[Distillation | None] = Distillation(lr=0.1, images=0.25, law=True)

    steps: tuple[int, ...] = (4,)
    """Steps of the sampler; several are trained in turn."""
    kernel: KernelName = "energy"
    """Kernel of features: energy, rbf (a mixture), or cubic, which sees three moments only."""
    features: str = "random"
    """Features that are matched: random (a fixed network), pixels, inception, dinov2,
    module:callable, a folder of transformers, or a run (a classifier or denoiser)."""
    held_out: str = "pixels"
    """Other features whose discrepancy is reported, too."""
    bank: int = 2048
    """Real images whose features are kept to compare with; 0 compares with those of the batch."""
    checkpoint: bool = True
    """Compute each step again in the backward pass: memory for one instead of all of them."""
    sigma_min: float = 0.002
    """Smallest noise level that the spacing of the levels is made for."""
    sigma_max: float = 80.0
    """Noise level at which sampling starts."""

    def __post_init__(self) -> None:
        check_range(self.sigma_min, self.sigma_max)
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"mmd needs steps of at least 1, not {list(self.steps)}")
        if self.kernel not in get_args(KernelName):
            allowed = ", ".join(get_args(KernelName))
            raise ValueError(f"kernel must be one of {allowed}, not {self.kernel!r}")
        if not (self.bank == 0 or 2 <= self.bank <= 2**20):
            raise ValueError(f"bank must be 0 or lie in [2, {2**20}], not {self.bank}")
        if self.features == self.held_out:
            raise ValueError(
                f"features and held_out are both {self.features}: what is trained measures "
                "nothing; give held_out other features"
            )

    @property
    def levels(self) -> Levels:
        """The noise levels between the ends."""
        return Levels(sigma_min=self.sigma_min, sigma_max=self.sigma_max)

    @property
    def jumps(self) -> int:
        """The largest number of steps."""
        return max(self.steps)

    @property
    def jump_counts(self) -> tuple[int, ...]:
        """The numbers that are trained."""
        return tuple(sorted(set(self.steps)))

    @property
    def minimized(self) -> tuple[str, ...]:
        """The features that are matched."""
        return (self.features,)

    def prefers(self, config: C) -> C:
        """The noise law of the parameterisation, a network of one time, previews in most steps."""
        return replace(
            config,
            objective=self,
            noise=config.precond.default_noise(),
            network=replace(config.network, jump=False),
            preview=replace(config.preview, sample_steps=max(self.steps)),
        )

    def taught(self, config: C, teacher: Folder) -> C:
        """The configuration that finetunes a model, on whole images."""
        return replace(super().taught(config, teacher), patches=WHOLE)  # pyright: ignore[reportCallIssue]

    def check(self, config: Settings) -> None:
        """Raise `ValueError` for a preview that reports the matched features only."""
        if config.preview.distance and config.preview.extractor == self.features:
            raise ValueError(
                f"preview.extractor is {self.features}, which is trained and measures nothing "
                "alone; choose another one, or set --preview.distance 0"
            )

    @property
    def passes(self) -> float:
        """Three for each further step, and one for each that is computed again."""
        mean = sum(self.steps) / len(self.steps)
        return 3 * (mean - 1) + mean * self.checkpoint

    def build(self, materials: Materials) -> "MMDLoss":
        """The loss, with the features of some real images; `ValueError` for crops."""
        for group in materials.groups:
            if materials.images.canvas and group.size != materials.images.canvas:
                raise ValueError(
                    f"mmd compares whole images, not crops of {size_name(group.size)}: add "
                    "--patches stratified --patches.fractions 1 --patches.probs 1"
                )
            if group.count < 2:
                raise ValueError("mmd needs 2 images in a step: set a larger --batch")
        real = None if not self.bank else some_images(materials, self.bank)
        spaces = []
        for name in (self.features, self.held_out):
            space = embedding(
                name,
                materials.images,
                extractor=materials.features,
                model=materials.model,
                device=materials.device,
            )
            materials.digests.append(space.digest)
            spaces.append(Matched.of(space, self.kernel, real))
        trained, other = spaces
        return MMDLoss(config=self, trained=trained, held_out=other, team=materials.team)

    def product(self, denoiser: NetDenoiser) -> EulerMap:
        """Euler's rule, for the numbers of steps that are trained."""
        return EulerMap(denoiser=denoiser, levels=self.levels)


def some_images(materials: Materials, count: int) -> Tensor:
    """Some training images, whole: float32 [at most `count`, C, *canvas]."""

    def parts() -> Iterator[Tensor]:
        left = count
        for images in materials.examples():
            yield images[:left]
            left -= len(images)
            if left <= 0:
                return

    images = list(parts())
    if sum(map(len, images)) < 2:
        raise ValueError("mmd needs at least 2 training images to compare with")
    return torch.cat(images).to(materials.device)


@dataclass(frozen=True, eq=False)
class Matched:
    """A space of features, and those of real images in it."""

    space: Embedding
    kernel: KernelName
    real: Tensor | None
    """float32 [N, D]; None compares with the images of the batch."""
    compare: Kernel | None
    inside: Tensor | None
    """Mean similarity of real images."""

    @classmethod
    @torch.no_grad()
    def of(cls, space: Embedding, kernel: KernelName, images: Tensor | None) -> "Matched":
        """The features of real images [N, C, *S], computed once."""
        if images is None:
            return cls(space, kernel, None, None, None)
        real = torch.cat([space(part) for part in images.split(64)])
        compare = kernel_of(kernel, real)
        return cls(space, kernel, real, compare, within(real, compare))

    def discrepancy(self, features: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Squared discrepancy of features [B, D] from real ones, and mean similarity of those."""
        real, compare, inside = self.real, self.compare, self.inside
        if real is None or compare is None or inside is None:
            with torch.no_grad():
                real = self.space(images)
                compare = kernel_of(self.kernel, real)
                inside = within(real, compare)
        return mmd2(features, real, compare, inside), inside


@dataclass(frozen=True, kw_only=True, eq=False)
class MMDLoss:
    """MMD^2 of the features of images from a chain of Euler steps, and of real ones.

    Processes compare all their images together. The squared discrepancy is unbiased and may be
    negative; guard and log see it plus the mean similarity of real images, which is constant.
    """

    config: MMDConfig
    trained: Matched
    held_out: Matched
    team: Team = field(default_factory=Team)

    def generate(self, denoiser: Denoiser, noise: Tensor, steps: int, cond: Cond) -> Tensor:
        """Images from standard normal noise, through which the gradient flows: like noise."""
        chain = EulerMap(denoiser=denoiser, levels=self.config.levels)
        times = chain.times(steps).tolist()
        x = noise * times[0]
        for t, s in itertools.pairwise(times):
            if self.config.checkpoint and torch.is_grad_enabled():
                x = checkpoint(chain, x, t, s, cond, use_reentrant=False)
            else:
                x = chain(x, t, s, cond)
        return x

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        config = self.config
        steps = config.steps[draws.step % len(config.steps)]
        noise = draws.normal("noise", tuple(batch.images.shape[1:]))
        images = self.generate(denoiser, noise, steps, batch.cond)
        with torch.autocast(noise.device.type, enabled=False):
            features = self._together(self.trained.space(images))
            loss, inside = self.trained.discrepancy(features, batch.images)
            with torch.no_grad():
                others = self._together(self.held_out.space(images.detach()))
                other, _ = self.held_out.discrepancy(others, batch.images)
        scaled = loss.detach() + self.team.size * (loss - loss.detach())  # processes are averaged
        return LossOut(
            per_sample=scaled.expand(len(noise)),
            scalars={
                f"mmd {self.trained.space.name}": loss.detach(),
                f"mmd {self.held_out.space.name} (held out)": other,
            },
            reported=(loss.detach() + inside.abs()).expand(len(noise)),
        )

    def _together(self, own: Tensor) -> Tensor:
        """Features of the images of all processes, those of others without gradient: [N, D]."""
        if self.team.size == 1:
            return own
        parts = self.team.gather(own.detach().cpu())
        rank = self.team.place.rank
        return torch.cat([own if i == rank else p.to(own) for i, p in enumerate(parts)])
