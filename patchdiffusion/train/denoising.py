"""The task of training a denoiser, or a few-step model."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from patchdiffusion.cond import CONDITIONS
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.space import shown
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.encoders.features import extractor
from patchdiffusion.losses import Objective
from patchdiffusion.nets.heads import OwnHead
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.objectives.base import Materials, with_additions
from patchdiffusion.rng import Draws
from patchdiffusion.sampling.config import Kind, SamplerConfig
from patchdiffusion.system import families
from patchdiffusion.train.preview import Scene, reads_captions
from patchdiffusion.train.samples import SamplePreview
from patchdiffusion.train.settings import Settings
from patchdiffusion.train.task import TaskConfig, check_images


@dataclass(frozen=True, kw_only=True)
class DenoiserTask(TaskConfig):
    """Generative model of images: a denoiser, or a few-step model, by --objective."""

    word: ClassVar[str] = "denoiser"

    def check(self, config: Settings, pack: Pack) -> None:
        check_images(config, pack)
        axes, channels = pack.pictures.ndim - 2, pack.pictures.shape[-1]
        in_part = shown(channels, alpha=pack.space.alpha) != channels
        if config.preview.distance and (axes != 2 or in_part):
            raise ValueError(
                f"preview.distance is {config.preview.distance}, which needs images of 2 axes and "
                f"gray, color or alpha, and these have {axes} and {channels}; "
                "set --preview.distance 0"
            )
        if reads_captions(config) and not any(pack.captions):
            raise ValueError(
                f"the images of {pack.name} have no captions; write cat.txt beside cat.png, or "
                'lines {"file_name": "cat.png", "text": "..."} in captions.jsonl, or leave out '
                "--captions"
            )
        guidance, classes = config.preview.guidance, len(pack.classes)
        if guidance != 1 and not (config.network.num_classes or reads_captions(config)):
            raise ValueError(
                f"preview.guidance is {guidance}, which needs a network with classes or captions; "
                "set --preview.guidance 1"
            )
        if guidance != 1 and not self.unconditional(config, pack):
            raise ValueError(
                f"preview.guidance {guidance} leads away from images without a class or text, "
                "which are not trained at label_dropout 0; leave it at 1"
            )
        if guidance != 1 and config.objective.few_step:
            raise ValueError(
                f"preview.guidance is {guidance}, which few-step models do not support; "
                "set --preview.guidance 1"
            )
        if config.adapter.maps and config.data.augment.p:
            raise ValueError(
                f"data.augment.p is {config.data.augment.p}, and augmentation warps images without "
                "the maps that control them; set --data.augment.p 0"
            )
        perturb = config.network.perturb
        if perturb.active and config.network.reads.isdisjoint(CONDITIONS):
            raise ValueError(
                f"network.perturb is {families.word(type(perturb))}, which is noise on classes and "
                "texts, and the network reads neither; leave it out"
            )
        if config.network.num_classes not in (0, classes):
            raise ValueError(
                f"network.num_classes is {config.network.num_classes}, and the data has {classes} "
                f"classes; set --network.num-classes {classes}, or 0 to ignore them"
            )

    def head(self, pack: Pack) -> OwnHead:
        return OwnHead()

    def model(self, network: nn.Module, config: Settings) -> NetDenoiser:
        """Denoiser that is trained, or the one inside a few-step model."""
        return NetDenoiser(network, config.objective.precond(config.precond), config.noise)

    def objective(self, config: Settings, materials: Materials) -> Objective:
        """The objective of the configuration under its additions."""
        return with_additions(config.objective.build(materials), config.additions, materials)

    def preview(self, scene: Scene) -> SamplePreview:
        settings, extract = scene.config.preview, None
        if settings.distance:
            path = settings.extractor_weights
            extract = extractor(
                settings.extractor,
                weights=None if path is None else Path(path),
                device=scene.device,
                team=scene.team,
                flag="--preview.extractor-weights",
            )
        return SamplePreview(scene, self.columns(scene.config, scene.pack), extract)

    def classes(self, config: Settings, pack: Pack) -> tuple[str, ...]:
        return pack.classes if config.network.num_classes else ()

    def levels(self, config: Settings, draws: Draws, law: NoiseLaw) -> Tensor | None:
        return config.objective.noise_levels(draws, law)

    def dropout(self, config: Settings) -> float:
        return config.label_dropout

    def not_counting(self, config: Settings) -> tuple[str, ...]:
        parts = [("--objective", config.objective), *(("--additions", a) for a in config.additions)]
        return tuple(f"{flag} {families.word(type(p))}" for flag, p in parts if not p.counts)

    def passes(self, config: Settings) -> float:
        return config.objective.passes + sum(addition.passes for addition in config.additions)

    def evaluations(self, config: Settings, pack: Pack) -> float:
        preview = config.preview
        kind = Kind.trained(config.objective, config.precond, pack.space)
        each = SamplerConfig(steps=preview.sample_steps).resolved(kind).evaluations
        drawn = (preview.grid + preview.distance) * each * (1 + (preview.guidance != 1))
        return float(min(preview.held_out, len(pack.heldout)) + drawn)

    def teachers(self, config: Settings) -> tuple[Path, ...]:
        return config.objective.teachers

    def shards(self, config: Settings) -> bool:
        return config.objective.shards and all(a.shards for a in config.additions)
