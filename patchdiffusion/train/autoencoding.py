"""The task of training an autoencoder, with perceptual distance and discriminator."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn

from patchdiffusion.data.pack import Pack
from patchdiffusion.encoders.discriminator import Adversary, AdversaryConfig, PatchGAN
from patchdiffusion.encoders.perceptual import Edges, Perceptual
from patchdiffusion.metrics.reconstruct import peak_of, psnr
from patchdiffusion.nets.autoencoder import AutoencoderNetwork
from patchdiffusion.nets.count import count, macs_of
from patchdiffusion.nets.heads import AutoencoderHead
from patchdiffusion.objectives.adversarial import Adversarial
from patchdiffusion.objectives.base import Materials
from patchdiffusion.objectives.reconstruct import (
    LogVariance,
    PixelError,
    ReconstructionLoss,
    Reconstructor,
    pixel_error,
)
from patchdiffusion.patches import size_name
from patchdiffusion.system.checks import finite
from patchdiffusion.system.device import autocast
from patchdiffusion.system.png import enlarge, grid
from patchdiffusion.train.preview import Abandoned, Ending, Scene, Shown
from patchdiffusion.train.settings import Settings
from patchdiffusion.train.task import TaskConfig, check_images, check_own_objective


@dataclass(frozen=True, kw_only=True)
class AutoencoderTask(TaskConfig):
    """Autoencoder of images, for diffusion on its latents (arXiv 2112.10752)."""

    word: ClassVar[str] = "autoencoder"
    own_loss: ClassVar[bool] = True

    error: PixelError = "l1"
    """Error of pixels: l1 or l2, a mean over the values of an image."""
    perceptual: Perceptual = field(default_factory=Edges)
    """Perceptual distance that is added to the error of pixels."""
    kl: float = 1e-6
    """Weight of the divergence of the posterior from N(0, 1), as published: of a sum over latents
    beside a sum over values."""
    log_variance: float = 0.0
    """Logarithm of the variance of the reconstruction, by which its error is divided."""
    learn_log_variance: bool = False
    """Learn the log-variance from this start."""
    adversary: Adversary = field(default_factory=PatchGAN)
    """Discriminator that the autoencoder is trained against."""

    def __post_init__(self) -> None:
        finite(self)
        if self.error not in get_args(PixelError):
            raise ValueError(f"error must be one of {get_args(PixelError)}, not {self.error!r}")
        if self.kl < 0:
            raise ValueError(f"kl must be >= 0, not {self.kl}")

    def check(self, config: Settings, pack: Pack) -> None:
        check_images(config, pack, "autoencoder")
        check_own_objective(config, "an autoencoder")
        if pack.space.random:
            raise ValueError(
                f"{pack.name} holds {pack.space.word}, and an autoencoder is trained on images; "
                "give the images themselves"
            )
        if config.data.augment.p:
            raise ValueError(
                f"data.augment.p is {config.data.augment.p}, and autoencoders are not conditioned "
                "on augmentation; set --data.augment.p 0"
            )
        self.perceptual.check(pack.channels)
        for group in config.plan(tuple(pack.images.shape[1:-1])).groups:
            self.adversary.check(group.size)

    def head(self, pack: Pack) -> AutoencoderHead:
        return AutoencoderHead()

    def classes(self, config: Settings, pack: Pack) -> tuple[str, ...]:
        return ()

    def model(self, network: nn.Module, config: Settings) -> Reconstructor:
        assert isinstance(network, AutoencoderNetwork)
        return Reconstructor(network)

    def objective(self, config: Settings, materials: Materials) -> ReconstructionLoss:
        network, adversary = materials.network, None
        assert isinstance(network, AutoencoderNetwork)
        if isinstance(self.adversary, AdversaryConfig):
            discriminator = self.adversary.build(network.config.channels, config.seed)
            materials.learn("discriminator", discriminator, self.adversary.rate)
            adversary = Adversarial(self.adversary, discriminator)
        log_variance = self.log_variance
        if self.learn_log_variance:
            log_variance = LogVariance(self.log_variance)
            materials.learn("log_variance", log_variance)
        if (upkeep := network.upkeep()) is not None:
            materials.learn("upkeep", upkeep)
        return ReconstructionLoss(
            error=self.error,
            perceptual=self.perceptual.build(materials.teachers, materials.device),
            perceptual_weight=self.perceptual.weight,
            kl_weight=self.kl,
            log_variance=log_variance,
            adversary=adversary,
            upkeep=upkeep,
            team=materials.team,
        )

    def preview(self, scene: Scene) -> "ReconstructionPreview":
        distance = None
        if not self.perceptual.teachers:
            distance = self.perceptual.build((), scene.device)
        return ReconstructionPreview(scene, self, distance)

    def passes(self, config: Settings) -> float:
        """Passes of discriminator and perceptual distance, in operations of the autoencoder."""
        channels = config.network.channels
        side = getattr(config.network, "side", 0) or 64  # of one that takes no other
        with torch.device("meta"):
            network = config.network.build()
            x = torch.empty(1, channels, side, side)
            whole, total = count(network, (side, side)).macs, 3.0 * self.perceptual.macs(x)
            if isinstance(self.adversary, AdversaryConfig):
                share = min(1.0, 1 - self.adversary.start + self.adversary.warmup)
                total += 9 * share * macs_of(self.adversary.build(channels, 0), x)
        return total / whole

    def teachers(self, config: Settings) -> tuple[Path, ...]:
        return self.perceptual.teachers

    def digests(self) -> tuple[str, ...]:
        return self.perceptual.digests

    def located(self) -> Self:
        return replace(self, perceptual=self.perceptual.located())

    def told(self) -> str:
        """Terms of the loss, for the first lines of a run."""
        parts = [self.error]
        if self.perceptual.told:
            parts.append(f"{self.perceptual.weight:g} x {self.perceptual.told}")
        adversary = self.adversary
        if isinstance(adversary, AdversaryConfig):
            parts.append(f"a discriminator that counts from {adversary.start:.0%} of the run")
        return ", ".join(parts)

    def shards(self, config: Settings) -> bool:
        return False


@dataclass(frozen=True)
class ReconstructionPreview:
    """Error and PSNR of held-out images, and a picture of them beside their reconstructions."""

    scene: Scene
    task: AutoencoderTask
    distance: Any

    def show(self, model: Reconstructor, ending: Ending = bool) -> Shown:
        """Pairs of an image, left, and its reconstruction."""
        scene, pack = self.scene, self.scene.pack
        table = self.measure(model, ending)
        facts: dict[str, Any] = {}
        text, numbers = "", {}
        if len(table):
            loss, decibels = (float(value) for value in table.mean(0))
            sizes = {size_name(scene.sizes[0]): loss}
            facts = {"held_out": {"loss": loss, "bands": {}, "sizes": sizes}, "psnr": decibels}
            numbers = {"held-out loss": loss, "psnr": decibels}
            text = f"  held-out loss {loss:.4f}  PSNR {decibels:.2f} dB"
        pairs = self._pairs(model)
        columns = 2 * max(1, round((len(pairs) / 2) ** 0.5))
        pack.check_sizes()
        return Shown(
            enlarge(grid(pairs, columns=columns)),
            facts,
            text=text,
            numbers=numbers,
            notes={"pairs": "image, reconstruction"},
        )

    def measure(self, model: Reconstructor, ending: Ending = bool) -> Tensor:
        """Error and PSNR of held-out images: float64 [N, 2]."""
        scene = self.scene
        chosen = scene.pack.some_held_out(scene.config.preview.held_out)

        def rows() -> Tensor:
            part = scene.team.shard(len(chosen))
            index = chosen[part.start : part.stop]
            found = [torch.zeros(0, 2, dtype=torch.float64)]
            for some in index.split(scene.batch):
                if ending():
                    raise Abandoned
                found.append(self._rows(model, some))
            return torch.cat(found)

        return torch.cat(scene.everywhere(rows))

    @torch.no_grad()
    def _rows(self, model: Reconstructor, index: Tensor) -> Tensor:
        x = self._images(index)
        with autocast(self.scene.device, self.scene.precision):
            y = model(x)
        error = pixel_error(x, y, self.task.error)
        if self.distance is not None:
            error = error + self.task.perceptual.weight * self.distance(y, x)
        space = self.scene.pack.space
        peak = peak_of(space, x.shape[1])
        shown = y.clamp(-1, 1) if getattr(space, "limits", None) else y
        return torch.stack([error.double(), psnr(x, shown, peak)], dim=1).cpu()

    def _images(self, index: Tensor) -> Tensor:
        """Whole images in the units of the network: float32 [B, C, H, W]."""
        pack = self.scene.pack
        stored = pack.images[index].movedim(-1, 1).to(self.scene.device, torch.float32)
        return pack.space.to_network(stored.contiguous())

    @torch.no_grad()
    def _pairs(self, model: Reconstructor) -> np.ndarray:
        """Images and their reconstructions in turn, as pictures: uint8 [2 N, H, W, C]."""
        scene, pack = self.scene, self.scene.pack
        source = pack.heldout if len(pack.heldout) else pack.train
        count = min(max(scene.config.preview.grid // 2, 1), len(source))
        x = self._images(source[torch.arange(count) * len(source) // count])
        with autocast(scene.device, scene.precision):
            y = torch.cat([model(part) for part in x.split(scene.batch)])
        both = torch.stack([x, y], dim=1).flatten(0, 1)
        return pack.space.to_picture(pack.space.to_values(both))
