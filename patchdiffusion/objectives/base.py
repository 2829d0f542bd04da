"""The contract of objectives: a frozen record in the configuration that builds the loss.

A new objective is a record that inherits `ObjectiveConfig`, writes `build`, and joins the union in
`objectives/__init__.py`. The other methods default to those of plain denoising.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Never, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from patchdiffusion.denoiser import Denoiser, NetDenoiser
from patchdiffusion.encoders.features import Extractor, extractor
from patchdiffusion.encoders.maps import NoImages, Trained, Whole, no_model
from patchdiffusion.flowmap import FlowMap
from patchdiffusion.losses import AfterStep, Batch, LossOut, Objective
from patchdiffusion.nets.base import Network, NetworkConfig
from patchdiffusion.noise import Law, LogNormal, NoiseLaw
from patchdiffusion.parameterisation import EDM, Parameterisation, Precond
from patchdiffusion.patches import Size
from patchdiffusion.plans import Group
from patchdiffusion.rng import Draws
from patchdiffusion.system.dist import Team
from patchdiffusion.system.files import expanded

Fields = dict[str, Field[Any]]


class PreviewSettings(Protocol):
    """The fields of `PreviewConfig` that an objective reads or sets."""

    __dataclass_fields__: ClassVar[Fields]

    @property
    def sample_steps(self) -> int: ...
    @property
    def distance(self) -> int: ...
    @property
    def extractor(self) -> str: ...


class Settings(Protocol):
    """The fields of a `TrainConfig` that an objective reads or sets."""

    __dataclass_fields__: ClassVar[Fields]

    @property
    def network(self) -> NetworkConfig: ...
    @property
    def precond(self) -> Parameterisation: ...
    @property
    def noise(self) -> Law: ...
    @property
    def label_dropout(self) -> float: ...
    @property
    def preview(self) -> PreviewSettings: ...
    @property
    def objective(self) -> "ObjectiveConfig": ...


C = TypeVar("C", bound=Settings)


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The settings that suit an objective which starts from a trained model."""

    lr: float
    """Learning rate relative to that of the teacher's run."""
    images: float
    """Length relative to that of the teacher's run."""
    law: bool = False
    """True if the noise law stays that of the teacher."""


def _no_feed(batch: Batch, stream: str) -> Never:
    raise ValueError("these materials have no feed, which could make other crops")


def _no_images(batch: Batch) -> Never:
    raise ValueError("these materials have no feed, which could make whole images")


@dataclass(frozen=True, kw_only=True)
class Materials:
    """The parts of a run that an objective may be built from."""

    network: Network
    """The network that is trained."""
    average: Callable[[], Denoiser]
    """Makes the denoiser of the averaged weights, which changes with them."""
    precond: Parameterisation = field(default_factory=EDM)
    """Parameterisation of the configuration."""
    law: NoiseLaw = field(default_factory=LogNormal)
    """Noise law of the run."""
    teachers: tuple[Denoiser, ...] = ()
    """The frozen denoisers of `ObjectiveConfig.teachers`, in that order."""
    groups: tuple[Group, ...] = ()
    """All groups of the plan."""
    features: Callable[[str], Extractor] = extractor
    """Loads a frozen extractor of features by name."""
    view: Callable[[Batch, str], Batch] = _no_feed
    """New crops of the images of a batch, drawn from a named stream."""
    others: Callable[[Batch, str], tuple[Batch, Draws]] = _no_feed
    """For each crop another random one of its group, by a named stream, and its draws."""
    whole: Callable[[Batch], Tensor] = _no_images
    """Whole images of a batch, mirrored and augmented as they are: float32 [B, C, *canvas]."""
    examples: Callable[[], Iterator[Tensor]] = lambda: iter(())
    """All training images in a random order, whole: batches float32 [B, C, *canvas]."""
    keep: dict[str, bytes] = field(default_factory=dict)
    """Files that are made for the model, by their names in its folder."""
    captions: Sequence[str | None] = ()
    """Captions of all images, by the index in the data."""
    store: Path | None = None
    """Folder of the data, for what is computed of them once; None keeps nothing."""
    folder: Path | None = None
    """Folder of a saved model, which has the files that it needs; None for a run."""
    images: Whole = field(default_factory=NoImages)
    """All images of the data, whole and as they are, by the index in the data."""
    model: Callable[[str], Trained] = no_model
    """Loads a trained model of any kind from a run or its folder, for features; frozen."""
    digests: list[str] = field(default_factory=list)
    """Digests of frozen files that the loss depends on, which a resumed run must have, too."""
    rehearsal: bool = False
    """True if steps are tried only: nothing is written, and numbers that take long are zeros."""
    seed: int = 0
    """Random seed of the run, for initial weights of learned modules."""
    learned: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    """Modules that are trained with the network, by name; see `learn`."""
    rates: dict[str, float] = field(default_factory=dict)
    """Their learning rates relative to that of the network, by name."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    team: Team = field(default_factory=Team)

    def learn(self, name: str, module: nn.Module, rate: float = 1.0) -> None:
        """Train a module with the network and save it in checkpoints under `name`.

        `rate` is its learning rate relative to that of the network.

        Modules that are not registered, such as a teacher, are neither trained nor saved.
        """
        self.learned[name] = module.to(self.device)
        self.rates[name] = rate


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """Labels and captions of the images that are trained on."""

    train: Tensor
    """int64, indices of the training images."""
    classes: tuple[str, ...] = ()
    """Names of the classes."""
    labels: Tensor | None = None
    """int64 [N], class of each image, -1 is none; None if no image has one."""
    captions: Sequence[str | None] = ()
    """Caption of each image, as in the data."""
    sources: Tensor | None = None
    """int64 [N], the image whose caption each one is trained with; None is its own."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files that are kept with the model, by name."""


def annotated(additions: "Iterable[Addition]", given: Annotations) -> Annotations:
    """Annotations as several additions change them, one after another."""
    for addition in additions:
        given = addition.annotate(given)
    return given


class Addition(Protocol):
    """A record that builds a term or a change on top of any objective.

    A run may have several: the first one is applied to the objective, the next one to the result.
    With a neutral value, such as weight 0, `add` returns the objective itself.
    """

    counts: ClassVar[bool] = False
    """True if its term is one of the pixels that count alone, see `Batch.counted`."""
    shards: ClassVar[bool] = True
    """True if it can be trained with `--shard`."""

    @property
    def passes(self) -> float:
        """Forward passes of a training step beside those of the objective."""
        return 0.0

    @property
    def code(self) -> tuple[str, ...]:
        """Functions as module:callable that it executes, which files of a run alone cannot name."""
        return ()

    def located(self) -> Self:
        """A copy with absolute paths of its files, so that a run may resume in any folder."""
        return self

    def check(self, config: Settings) -> None:
        """Raise `ValueError` for a configuration that it does not fit."""

    def annotate(self, given: Annotations) -> Annotations:
        """Labels and captions that training sees instead of the given ones, by default those."""
        return given

    @abstractmethod
    def add(self, objective: Objective, materials: Materials) -> Objective:
        """The objective with the addition; learned modules are registered by `learn`."""
        ...


class ObjectiveConfig(Protocol):
    """A training objective: its loss, and the sampler that the trained network becomes."""

    few_step: ClassVar[bool] = False
    """True if `product` is a flow map, which samples by jumps; else it is a denoiser."""
    denoises: ClassVar[bool] = True
    """True if the network without a jump is E[x0 | x], so that solvers and held-out losses work."""
    estimates: ClassVar[bool] = False
    """True if its loss reports the denoised crops, see `LossOut.estimate`."""
    counts: ClassVar[bool] = False
    """True if its loss is that of the pixels that count alone, see `Batch.counted`."""
    shards: ClassVar[bool] = True
    """True if it can be trained with `--shard`."""
    distillation: ClassVar[Distillation | None] = None
    """Settings to distill a trained model by; None if it does not learn from one."""

    def prefers(self, config: C) -> C:
        """The configuration with this objective and the noise law, network ... that it prefers."""
        return replace(config, objective=self)

    def check(self, config: Settings) -> None:
        """Raise `ValueError` for a configuration that this objective cannot train."""

    def precond(self, chosen: Parameterisation) -> Precond:
        """The preconditioner of its network, for the parameterisation of the configuration."""
        return chosen

    def of_another_precond(self) -> Self:
        """A copy for another parameterisation, with the defaults that depend on it."""
        return self

    def meaning(self, chosen: Parameterisation) -> tuple[object, ...]:
        """Key of the input and output of its network, see `Trainable.meaning`."""
        return chosen.meaning

    @property
    def passes(self) -> float:
        """Forward passes of a training step beside that of the network."""
        return 0.0

    @property
    def teachers(self) -> tuple[Path, ...]:
        """Runs or models of the teachers."""
        return ()

    def located(self) -> Self:
        """A copy with absolute paths of its teachers, so that a run may resume in any folder."""
        return self

    def noise_levels(self, draws: Draws, law: NoiseLaw) -> Tensor | None:
        """The noise levels that a step draws, for error reports: [B], or None if unknown."""
        return None

    @property
    def jumps(self) -> int:
        """Number of jumps of a sample where none is chosen, of a flow map."""
        return 2

    @property
    def jump_counts(self) -> tuple[int, ...]:
        """Numbers of jumps that a comparison tries, of a flow map."""
        return (1, 2, 4)

    @property
    def minimized(self) -> tuple[str, ...]:
        """Extractors whose distance training minimizes, so that alone it measures nothing."""
        return ()

    def taught(self, config: C, teacher: Path) -> C:
        """The configuration that distills a model, from that of the run which trained it."""
        return self.prefers(config)

    @abstractmethod
    def build(self, materials: Materials) -> Objective:
        """The loss: (denoiser, batch, draws) -> `LossOut`."""
        ...

    def product(self, denoiser: NetDenoiser) -> Denoiser | FlowMap:
        """The sampler of a trained network: a denoiser or a flow map."""
        return denoiser


class Distilled(ObjectiveConfig, Protocol):
    """An objective with an optional teacher (distillation)."""

    __dataclass_fields__: ClassVar[Fields]
    teacher: str | None

    @property
    def teachers(self) -> tuple[Path, ...]:
        """The one teacher, or none."""
        return () if self.teacher is None else (Path(self.teacher),)

    def located(self) -> Self:
        """A copy with the absolute path of its teacher."""
        (path,) = self.teachers or (None,)
        changes = {} if path is None else {"teacher": str(expanded(path).resolve())}
        return replace(self, **changes)

    def taught(self, config: C, teacher: Path) -> C:
        """The configuration that distills a model, which becomes the teacher."""
        return replace(self, teacher=str(teacher)).prefers(config)


@runtime_checkable
class Costly(Protocol):
    """An objective or addition that computes beside the network that is trained."""

    def operations(self, size: Size) -> float:
        """Operations to train on one crop of a size, beside those of the network."""
        ...


@runtime_checkable
class Told(Protocol):
    """An objective or addition with facts that no configuration has."""

    @property
    def told(self) -> str:
        """Facts for the first lines of a run."""
        ...


@runtime_checkable
class Phased(Protocol):
    """An objective or addition whose gradients differ between parts of the run."""

    def phase(self, progress: float) -> str:
        """Part of the run at a share of it, for the guard; empty for the usual one."""
        ...


def stages_of(objective: Any) -> tuple[Any, ...]:
    """An objective and what its additions made of it, in order."""
    return objective.stages if isinstance(objective, Stages) else (objective,)


def with_additions(
    objective: Objective, additions: Sequence[Addition], materials: Materials
) -> Objective:
    """The objective under additions, the first one innermost; unchanged if all are neutral."""
    stages = [objective]
    for addition in additions:
        stage = addition.add(stages[-1], materials)
        if stage is not stages[-1]:
            stages.append(stage)
    return Stages(tuple(stages)) if len(stages) > 1 else objective


@dataclass(frozen=True, eq=False)
class Stages:
    """An objective, then the results of its additions in order; the last one is the loss."""

    stages: tuple[Objective, ...]

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        return self.stages[-1](denoiser, batch, draws)

    def after_step(self, applied: Tensor) -> None:
        """Call `after_step` of every stage that has one."""
        for stage in self.stages:
            if isinstance(stage, AfterStep):
                stage.after_step(applied)

    def phase(self, progress: float) -> str:
        """Part of the run, by which typical gradients differ, of all stages that have some."""
        return "".join(s.phase(progress) for s in self.stages if isinstance(s, Phased))
