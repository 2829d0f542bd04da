"""The task of learning a concept: a one-step student and its teacher, from a few images."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.adapted import FOLDER, files_of
from patchdiffusion.data.columns import Filled
from patchdiffusion.data.pack import Pack
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.encoders.discriminator import Adversary, FeatureHeads
from patchdiffusion.encoders.embed import Embedding, embedding
from patchdiffusion.encoders.perceptual import Edges, Perceptual
from patchdiffusion.flowmap import FlowMap
from patchdiffusion.losses import Loss
from patchdiffusion.model import ModelConfig
from patchdiffusion.nets.attached import Attached, attached_to
from patchdiffusion.nets.base import Network
from patchdiffusion.nets.concepts import add_concept, newest_concept, set_concept
from patchdiffusion.nets.heads import OwnHead
from patchdiffusion.objectives.adversarial import adversarial_term, check_axes
from patchdiffusion.objectives.base import Materials, ObjectiveConfig
from patchdiffusion.objectives.echo import Echo, EchoLoss, EchoOptions
from patchdiffusion.objectives.mmd import some_images
from patchdiffusion.patches import size_name
from patchdiffusion.preconditioning import Trainable
from patchdiffusion.rng import seed_of
from patchdiffusion.system import families
from patchdiffusion.system.checks import finite
from patchdiffusion.system.files import expanded
from patchdiffusion.train.conceptpreview import ConceptPreview
from patchdiffusion.train.preview import Scene
from patchdiffusion.train.settings import Settings
from patchdiffusion.train.task import TaskConfig, check_images

FLAG = "--task.adversary"
TEACHER = "teacher"
"""Folder of the teacher's adapter in that of a model, and its name in checkpoints."""
MOST_REFERENCES = 1024
"""Images whose features are averaged, to choose the samples of the echo."""


@dataclass(frozen=True, kw_only=True)
class ConceptTask(TaskConfig):
    """A concept from a few images, for a one-step model and its teacher (EchoDistill, OPAD)."""

    word: ClassVar[str] = "concept"
    own_loss: ClassVar[bool] = True

    teacher: str | None = None
    """Run or model whose denoiser learns the concept, too, and teaches the one-step model."""
    names: tuple[str, ...] = ()
    """Names of all classes of the model, that of the concept last."""
    loss: EchoOptions = field(default_factory=EchoOptions)
    """Weights of the losses, noise levels, and time of the echo."""
    perceptual: Perceptual = field(default_factory=Edges)
    """Perceptual distance of samples and their corrections."""
    features: str = "random"
    """Features of the identity: random (a fixed network), pixels, inception, dinov2,
    module:callable, a folder of transformers, or a run (a classifier or denoiser)."""
    adversary: Adversary = field(
        default_factory=lambda: FeatureHeads(
            weight=1.0, balanced=False, start=0.0, warmup=0.0, rate=1.0
        )
    )
    """Discriminator of references and samples."""
    echo: int = 32
    """Samples of the student that become references of the teacher; 0 is none."""
    shared: bool = True
    """Let teacher and student share the token of the concept; else each has its own."""
    classless: bool = True
    """True if the model also makes images without a class, from which guidance leads away."""

    def __post_init__(self) -> None:
        finite(self)
        if not 0 <= self.echo <= 2**16:
            raise ValueError(f"echo must lie in [0, {2**16}], not {self.echo}")

    def check(self, config: Settings, pack: Pack) -> None:
        check_images(config, pack)
        network, word = config.network, families.word(type(config.objective))
        if not config.objective.few_step:
            raise ValueError(
                f"a concept is learned by a few-step model, and the objective is {word}; use "
                "patchdiffusion adapt for a denoiser"
            )
        if config.additions:
            raise ValueError("a concept has its own loss, without additions; leave --additions out")
        if not (network.concepts and config.adapter.concept):
            raise ValueError(
                "a concept needs a token and an adapter: --network.concepts 1 and "
                "--adapter lora --adapter.concept, or patchdiffusion concept RUN IMAGES"
            )
        if config.adapter.maps:
            raise ValueError("a concept is learned without control by pictures; use --adapter lora")
        if self.teacher is None:
            raise ValueError("task.teacher is missing: give the run or model of a denoiser")
        others = network.reads - {"labels", "jump", "pos", "seed"}
        if others:
            raise ValueError(
                f"a concept is a class, and the network also reads {', '.join(sorted(others))}; "
                "use a model without"
            )
        if len(self.names) != network.num_classes:
            raise ValueError(
                f"task.names has {len(self.names)} classes, and the network {network.num_classes}"
            )
        check_axes(self.adversary, network.axes, FLAG)
        if network.axes == 2:
            self.perceptual.check(pack.channels)
        for group in config.plan(tuple(pack.images.shape[1:-1])).groups:
            if group.size != tuple(pack.images.shape[1:-1]):
                raise ValueError(
                    f"a concept is learned from whole images, not crops of {size_name(group.size)}"
                    ": add --patches stratified --patches.fractions 1 --patches.probs 1"
                )

    def head(self, pack: Pack) -> OwnHead:
        return OwnHead()

    def columns(self, config: Settings, pack: Pack) -> tuple[Filled, ...]:
        return ()  # all images are of the concept

    def classes(self, config: Settings, pack: Pack) -> tuple[str, ...]:
        return self.names

    def counts(self, config: Settings, pack: Pack) -> tuple[int, ...]:
        return ()  # old classes had images, too

    def unconditional(self, config: Settings, pack: Pack) -> bool:
        return self.classless

    def model(self, network: nn.Module, config: Settings) -> NetDenoiser:
        """Denoiser inside the few-step model."""
        return NetDenoiser(network, config.objective.precond(config.precond), config.noise)

    def objective(self, config: Settings, materials: Materials) -> EchoLoss:
        teacher = self._teacher(config, materials)
        space = embedding(
            self.features,
            materials.images,
            extractor=materials.features,
            model=materials.model,
            device=materials.device,
        )
        materials.digests.append(space.digest)
        echo = Echo(self.echo, (config.network.channels, *materials.images.canvas))
        materials.learn("echo", echo)
        return EchoLoss(
            options=self.loss,
            product=partial(_flow_map, config.objective),
            teacher=teacher,
            label=config.network.num_classes - 1,
            weighting=cast(Trainable, teacher.precond).default_weighting(),
            features=space,
            mean=_mean_features(space, some_images(materials, MOST_REFERENCES)),
            perceptual=self.perceptual.build(materials.teachers[1:], materials.device),
            perceptual_weight=self.perceptual.weight,
            adversary=adversarial_term(self.adversary, materials, FLAG),
            echo=echo,
            seed=config.seed,
        )

    def _teacher(self, config: Settings, materials: Materials) -> NetDenoiser:
        """The teacher with an adapter of its own, and the token of the student."""
        teacher = materials.teachers[0]
        assert isinstance(teacher, NetDenoiser)
        network = cast(Network, teacher.network)
        ours = config.network
        if attached_to(network) is not None:
            raise ValueError(
                f"the teacher {self.teacher} has an adapter; make one model of both by "
                "patchdiffusion merge"
            )
        if not network.config.learns_concepts or network.config.concepts != ours.concepts - 1:
            raise ValueError(
                f"the teacher {self.teacher} has {network.config.concepts} concepts, and the "
                f"student had {ours.concepts - 1} before; use models that learned the same"
            )
        name = add_concept(network)
        config.adapter.attach(network, seed=seed_of(config.seed, TEACHER))
        config.adapter.started(network)
        attached = attached_to(network)
        assert isinstance(attached, Attached)
        materials.learn(TEACHER, attached)
        token = materials.network.get_parameter(newest_concept(materials.network))
        own = network.get_parameter(name)
        if own.shape != token.shape:
            raise ValueError(
                f"the teacher {self.teacher} embeds classes in {len(own)} numbers, and the "
                f"student in {len(token)}; use networks of one width, or --task.no-shared"
            )
        if self.shared:
            set_concept(network, token)
        else:
            rate = dict(config.optim.role_lr).get("embedding", 1.0)
            materials.learn("token", nn.ParameterList([own]), rate)
        network.to(materials.device)
        return NetDenoiser(network, teacher.precond, teacher.law)

    def preview(self, scene: Scene) -> ConceptPreview:
        return ConceptPreview(scene)

    def files(self, model: ModelConfig, objective: Loss) -> Mapping[str, bytes]:
        """The adapter of the teacher."""
        assert isinstance(objective, EchoLoss)
        network = cast(Network, objective.teacher.network)
        theirs = replace(model, network=network.config)
        files = files_of(theirs, network, network.state_dict())
        return {name.replace(FOLDER, TEACHER, 1): data for name, data in files.items()}

    def passes(self, config: Settings) -> float:
        """Three trained passes beside the student's (2 of the teacher) and 4 without gradients."""
        return 3.0 * 3 + 4

    def teachers(self, config: Settings) -> tuple[Path, ...]:
        own = () if self.teacher is None else (Path(self.teacher),)
        return own + self.perceptual.teachers

    def digests(self) -> tuple[str, ...]:
        return self.perceptual.digests

    def located(self) -> Self:
        teacher = self.teacher and str(expanded(self.teacher).resolve())
        return replace(self, teacher=teacher, perceptual=self.perceptual.located())

    def told(self) -> str:
        """Names of the teacher and the concept, for the first lines of a run."""
        return f"EchoDistill, {self.names[-1]} with the teacher {Path(self.teacher or '').name}"

    def shards(self, config: Settings) -> bool:
        return False


def _flow_map(objective: ObjectiveConfig, denoiser: NetDenoiser) -> FlowMap:
    """The flow map of a few-step model."""
    product = objective.product(denoiser)
    assert isinstance(product, FlowMap)
    return product


@torch.no_grad()
def _mean_features(space: Embedding, images: Tensor) -> Tensor:
    """Mean of the normalized features of images: [D]."""
    return F.normalize(space(images), dim=1).mean(0)
