"""The contract of objectives: a frozen record in the configuration that builds what is minimised.

A new objective is a record that inherits `ObjectiveConfig`, writes `build`, and joins the union in
`objectives/__init__.py`. The methods beside `build` have the answers of plain denoising.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Never, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from patchdiffusion.denoiser import Denoiser, NetDenoiser
from patchdiffusion.encoders.features import Extractor, extractor
from patchdiffusion.flowmap import FlowMap
from patchdiffusion.losses import Batch, Objective
from patchdiffusion.nets.base import Network, NetworkConfig
from patchdiffusion.noise import Law, LogNormal, NoiseLaw
from patchdiffusion.parameterisation import EDM, Parameterisation, Precond
from patchdiffusion.plans import Group
from patchdiffusion.rng import Draws
from patchdiffusion.system.dist import Team

Fields = dict[str, Field[Any]]


class PreviewSettings(Protocol):
    """The part of `PreviewConfig` that belongs to an objective."""

    __dataclass_fields__: ClassVar[Fields]

    @property
    def sample_steps(self) -> int: ...


class Settings(Protocol):
    """The fields of a `TrainConfig` that an objective depends on or has a preference for."""

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


def _no_feed(batch: Batch, stream: str) -> Never:
    raise ValueError("these materials know no feed, which could make other crops")


@dataclass(frozen=True, kw_only=True)
class Materials:
    """The parts of a run that an objective may be built from."""

    network: Network
    """The network that is trained."""
    average: Callable[[], Denoiser]
    """Makes the denoiser of the averaged weights, which follows them."""
    precond: Parameterisation = field(default_factory=EDM)
    """The parameterisation in the configuration."""
    law: NoiseLaw = field(default_factory=LogNormal)
    """Noise law of the run."""
    teachers: tuple[Denoiser, ...] = ()
    """The frozen denoisers of `ObjectiveConfig.teachers`, in that order."""
    groups: tuple[Group, ...] = ()
    """All groups of the plan."""
    features: Callable[[str], Extractor] = extractor
    """Loads a frozen extractor of features by name."""
    view: Callable[[Batch, str], Batch] = _no_feed
    """A second look at the images of a batch: crops by the draws of a named stream."""
    others: Callable[[Batch, str], tuple[Batch, Draws]] = _no_feed
    """For each crop another one of its group, chosen by a named stream, with its draws."""
    learned: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    """Modules that are trained with the network, by name; see `learn`."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    team: Team = field(default_factory=Team)

    def learn(self, name: str, module: nn.Module) -> None:
        """Train a module with the network and save it in checkpoints, under a name of its own.

        What is not registered here, such as a teacher, is neither trained nor saved.
        """
        self.learned[name] = module.to(self.device)


class Addition(Protocol):
    """A record that builds a term or a change on top of any objective.

    A run may have several: the first one is applied to the objective, the next one to the result.
    With a neutral value, such as weight 0, `add` returns the objective it is given.
    """

    @property
    def passes(self) -> float:
        """Forward passes of a training step beside those of the objective."""
        return 0.0

    def check(self, config: Settings) -> None:
        """Raise `ValueError` for a configuration that it does not fit."""

    @abstractmethod
    def add(self, objective: Objective, materials: Materials) -> Objective:
        """The objective with the addition; modules it learns are registered by `learn`."""
        ...


class ObjectiveConfig(Protocol):
    """What a network is trained for, and what it is once it is trained."""

    few_step: ClassVar[bool] = False
    """Whether `product` is a flow map, which samples by jumps; else it is a denoiser."""
    denoises: ClassVar[bool] = True
    """Whether the network without a jump is E[x0 | x], so that solvers and held-out losses work."""
    estimates: ClassVar[bool] = False
    """Whether its loss reports the denoised crops, see `LossOut.estimate`."""
    shards: ClassVar[bool] = True
    """Whether it can be trained with `--shard`."""

    def prefers(self, config: C) -> C:
        """The same configuration for this objective, with what belongs to it: noise law, network,
        sampling steps of previews.
        """
        return replace(config, objective=self)

    def check(self, config: Settings) -> None:
        """Raise `ValueError` for a configuration that cannot be trained so."""

    def precond(self, given: Parameterisation) -> Precond:
        """The preconditioning of its network if the configuration has `given`."""
        return given

    def of_another_precond(self) -> Self:
        """The same when another parameterisation is chosen, which has defaults of its own."""
        return self

    def meaning(self, given: Parameterisation) -> tuple[object, ...]:
        """What its network predicts from what: weights may be taken over where this is equal."""
        return given.meaning

    @property
    def passes(self) -> float:
        """Forward passes of a training step beside the usual one."""
        return 0.0

    @property
    def teachers(self) -> tuple[Path, ...]:
        """Runs or models whose denoisers it needs."""
        return ()

    def located(self) -> Self:
        """The same with absolute paths of its teachers, so that a run may go on from anywhere."""
        return self

    def noise_levels(self, draws: Draws, law: NoiseLaw) -> Tensor | None:
        """The noise levels that a step draws, for reports of what went wrong: [B], or None."""
        return None

    @abstractmethod
    def build(self, materials: Materials) -> Objective:
        """What is minimised: (denoiser, batch, draws) -> `LossOut`."""
        ...

    def product(self, denoiser: NetDenoiser) -> Denoiser | FlowMap:
        """What a trained network samples with."""
        return denoiser


class Distilled(ObjectiveConfig, Protocol):
    """An objective that learns from a teacher, if its field of that name is given."""

    __dataclass_fields__: ClassVar[Fields]
    teacher: str | None

    @property
    def teachers(self) -> tuple[Path, ...]:
        """The one teacher, or none."""
        return () if self.teacher is None else (Path(self.teacher),)

    def located(self) -> Self:
        """The same with the absolute path of its teacher."""
        (path,) = self.teachers or (None,)
        changes = {} if path is None else {"teacher": str(path.expanduser().resolve())}
        return replace(self, **changes)


def with_additions(
    objective: Objective, additions: Sequence[Addition], materials: Materials
) -> list[Objective]:
    """The objective, then with one addition after the other; the last one is minimised."""
    stages = [objective]
    for addition in additions:
        stages.append(addition.add(stages[-1], materials))
    return stages
