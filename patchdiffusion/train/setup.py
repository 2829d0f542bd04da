"""Assemble the parts of a run from its configuration."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchdiffusion.conditioners.base import changes, conditioned, text_of
from patchdiffusion.data.columns import relabeled
from patchdiffusion.data.feed import Feed, some_crops
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.whole import WholeImages
from patchdiffusion.encoders.features import extractor
from patchdiffusion.losses import AfterStep, Loss
from patchdiffusion.model import Model, ModelConfig, load_model
from patchdiffusion.nets.base import Network
from patchdiffusion.nets.concepts import table_classes
from patchdiffusion.nets.count import count, flops_per_mac, training_flops
from patchdiffusion.objectives.base import Annotations, Costly, Materials, annotated, stages_of
from patchdiffusion.patches import Size
from patchdiffusion.plans import PatchPlan
from patchdiffusion.system import families
from patchdiffusion.system.device import (
    best_precision,
    pick_device,
    resident,
)
from patchdiffusion.system.dist import Team
from patchdiffusion.system.files import Lock
from patchdiffusion.train.config import RunConfig, TrainConfig
from patchdiffusion.train.ema import EMA
from patchdiffusion.train.engine import engine_facts, set_globals
from patchdiffusion.train.forecast import Forecast
from patchdiffusion.train.guard import Guard
from patchdiffusion.train.log import RunLog
from patchdiffusion.train.pace import Pace
from patchdiffusion.train.parallel import LossModule, Owners, replicate, shard
from patchdiffusion.train.placement import check_placement, place_network
from patchdiffusion.train.preview import Preview, Scene
from patchdiffusion.train.state import DataFacts, Meter, TrainState
from patchdiffusion.train.step import Stepper
from patchdiffusion.train.timing import Phases


def check_team(config: TrainConfig, size: int) -> None:
    """Raise `ValueError` unless the batch can be divided evenly among `size` processes."""
    if config.batch % size:
        allowed = [n for n in range(1, min(config.batch, 64) + 1) if config.batch % n == 0]
        raise ValueError(
            f"batch is {config.batch}, which cannot be divided among {size} processes; "
            f"allowed are {', '.join(map(str, allowed))} processes"
        )


@dataclass
class Training:
    """All parts of a run in memory."""

    config: TrainConfig
    run: RunConfig
    pack: Pack
    team: Team
    folder: Path
    log: RunLog
    device: torch.device
    precision: str
    engine: dict[str, Any]
    """Software and hardware settings, see `engine.engine_facts`."""
    canvas: Size
    plan: PatchPlan
    network: Network
    objective: Loss
    learned: nn.Module
    """Modules that the objective trains, which are not part of the model; mostly none."""
    kept: dict[str, bytes]
    """Files that conditioners have made for the model."""
    carried: dict[str, Path]
    """Files that the model needs, by their paths in its folder."""
    teacher: str | None
    """Digest of the teacher."""
    ema: EMA
    owners: Owners
    """Processes that hold some parameters alone; mostly none."""
    stepper: Stepper
    phases: Phases
    pace: Pace
    flops: dict[Size, int]
    """Operations to train on one crop of each size."""
    macs: int
    """Multiply-accumulates of the network for one image, in sampling."""
    preview: Preview
    state: TrainState
    meter: Meter
    """Sums for the next status line."""
    spare: int | None = None
    """Step of a checkpoint that is kept until the images are known to be intact."""
    lock: Lock | None = None
    """Lock of the folder; held by rank 0 only."""

    @property
    def now(self) -> float:
        """Value of the clock of the run."""
        return self.state.clock(self.config.clock)

    @property
    def finished(self) -> bool:
        """True if the run has reached its full length."""
        return self.now >= self.config.images

    @property
    def averaged(self) -> Any:
        """Model with the averaged weights; all processes must call it if they are sharded."""
        return self.config.task.model(self.ema.network(), self.config)

    @property
    def model_config(self) -> ModelConfig:
        """Configuration saved with the model, which is needed to load it."""
        return ModelConfig(
            network=self.config.network,
            adapter=self.config.adapter,
            head=self.config.task.head(self.pack),
            precond=self.config.precond,
            noise=self.config.noise,
            canvas=self.canvas,
            space=self.pack.space,
            classes=self.config.task.classes(self.config, self.pack),
            counts=self.config.task.counts(self.config, self.pack),
            unconditional=self.config.task.unconditional(self.config, self.pack),
            objective=self.config.objective,
            conditioners=self.config.conditioners,
            data=self.pack.name,
            fingerprint=self.pack.fingerprint,
            images=self.state.equivalents,
            step=self.state.step,
        )

    @property
    def data_facts(self) -> DataFacts:
        """Fingerprint and size of the training data."""
        return DataFacts(fingerprint=self.pack.fingerprint, images=len(self.pack))

    @property
    def parameters(self) -> int:
        """Number of parameters of the network."""
        return sum(p.numel() for p in self.network.parameters())

    @property
    def held_parameters(self) -> int:
        """Number of those that this process holds, or a shard of them."""
        return sum(p.numel() for p in self.network.parameters() if not p.is_meta)

    @property
    def training_share(self) -> float:
        """Operations of the network in training relative to those of sampling, for whole images."""
        passes = 1 + self.config.task.passes(self.config) / 3
        return self.flops[self.canvas] / (flops_per_mac(self.network) * passes) / self.macs

    @property
    def total_steps(self) -> int:
        """Expected number of steps of the whole run."""
        cost = self.plan.cost(clock=self.config.clock)
        per_step = {
            "equivalents": self.config.batch * cost.step,
            "crops": self.config.batch * cost.crops,
            "steps": 1.0,
        }[self.config.clock]
        return max(1, math.ceil(self.config.images / per_step))

    @cached_property
    def forecast(self) -> Forecast:
        """Costs of the run, from its configuration alone."""
        config = self.config
        passes = config.task.evaluations(config, self.pack)
        return Forecast(
            plan=self.plan,
            clock=config.clock,
            length=config.images,
            flops=self.flops,
            preview=passes * 2 * self.macs,
        )

    @property
    def num_previews(self) -> int:
        """Number of previews over the whole run."""
        count = self.config.preview.samples
        return self.forecast.previews if count is None else count


def assemble(config: TrainConfig, run: RunConfig, pack: Pack, team: Team | None = None) -> Training:
    """Build all parts of a run; raises `ValueError` for parts that do not fit together."""
    team = team or Team()
    task = config.task
    canvas = tuple(pack.images.shape[1:-1])
    config = config.for_canvas(canvas, pack.channels)
    task.check(config, pack)
    check_team(config, team.size)
    check_placement(config, run)
    device = pick_device(run.device)
    set_globals(run, device, team.place)
    precision = best_precision(device) if config.precision == "auto" else config.precision
    folder = run.folder(config.name)
    plan = config.plan(canvas)
    network = _new_network(config, pack, team, device)
    sizes = dict.fromkeys([canvas, *(group.size for group in plan.groups)])
    crops = dict.fromkeys([canvas, *(group.size for group in plan.groups if group.pitch == 1)])
    share = (
        1 + task.passes(config) / 3
    )  # times `training_flops`, which counts one pass forward and backward
    text = text_of(config.conditioners, canvas)
    flops = {size: round(training_flops(network, size, text) * share) for size in sizes}
    macs = count(network, canvas, text).macs
    ema, owners = place_network(network, config, run, team)
    told = annotated(
        config.additions,
        Annotations(
            train=pack.train, classes=pack.classes, labels=pack.labels, captions=pack.captions
        ),
    )
    feed = Feed(
        resident(pack.images, device),
        relabeled(task.columns(config, pack), told.labels),
        pack.train,
        space=pack.space,
        seed=config.seed,
        flip=config.data.flip,
        augment=config.data.augment if config.data.augment.p else None,
        device=device,
        check=pack.check_sizes,
    )
    teachers = tuple(_teacher(path, config, pack, device) for path in task.teachers(config))
    materials = Materials(
        network=network,
        average=lambda: task.model(ema.network(), config),
        precond=config.precond,
        law=config.noise,
        teachers=tuple(model.denoiser for model in teachers),
        groups=plan.groups,
        features=lambda name: extractor(name, device=device, team=team),
        view=feed.view,
        others=feed.others,
        whole=feed.whole,
        examples=feed.examples,
        captions=pack.captions,
        keep=dict(told.files),
        store=pack.path,
        images=WholeImages(pack),
        model=lambda path: load_model(path, device=device),
        rehearsal=run.dry_run,
        seed=config.seed,
        device=device,
        team=team,
    )
    change = changes(config.conditioners, materials, told.sources)
    objective = task.objective(config, conditioned(materials, change, feed.draws_of))
    costly = [part for part in stages_of(objective) if isinstance(part, Costly)]
    flops = {s: f + round(sum(c.operations(s) for c in costly)) for s, f in flops.items()}
    if run.shard:  # the optimizer takes sharded weights or whole ones, not both
        for module in materials.learned.values():
            shard(module, [], team, device)
    module = LossModule(
        task.model(network, config),
        objective,
        materials.learned,
        dropout=task.dropout(config),
        change=change,
    )
    phases, parameters = Phases(), dict(network.named_parameters())
    apart = [parameters[name] for name in owners.names]
    stepper = Stepper(
        module if run.shard else replicate(module, team, apart),
        feed,
        Guard(config.guard, device),
        config=config.optim,
        roles={parameters[name]: role for name, role in network.roles().items()},
        rates={
            parameter: rate
            for name, rate in materials.rates.items()
            for parameter in materials.learned[name].parameters()
        },
        alone=[parameters[name] for name in owners.own],
        watchers=[part for part in (network, objective) if isinstance(part, AfterStep)],
        phase=getattr(objective, "phase", None),
        canvas=canvas,
        micro_batch=config.micro_batch,
        precision=precision,
        team=team,
        phases=phases,
    )
    return Training(
        config=config,
        run=run,
        pack=pack,
        team=team,
        folder=folder,
        log=RunLog(folder, quiet=not team.is_main, dry=run.dry_run),
        device=device,
        precision=precision,
        engine=engine_facts(run, device, team.place, precision),
        canvas=canvas,
        plan=plan,
        network=network,
        objective=objective,
        learned=materials.learned,
        kept=materials.keep,
        carried={n: f for c in config.conditioners for n, f in c.carried().items()},
        teacher=" ".join((*(m.digest for m in teachers), *task.digests(), *materials.digests))
        or None,
        ema=ema,
        owners=owners,
        stepper=stepper,
        phases=phases,
        pace=Pace(flops),
        flops=flops,
        macs=macs,
        preview=task.preview(
            Scene(config, pack, tuple(crops), device, precision, team, change, materials.keep)
        ),
        state=TrainState(),
        meter=Meter(),
    )


def _teacher(path: Path, config: TrainConfig, pack: Pack, device: torch.device) -> Model:
    """Load a teacher; raises `ValueError` if it does not fit the run."""
    model = load_model(path, device=device)
    if not model.config.objective.denoises:
        raise ValueError(f"the teacher {path} is a few-step model; allowed are denoisers")
    network, other = config.network, model.config.network
    own = (*pack.info.shape[1:-1], network.channels, table_classes(network))
    theirs = (*model.config.canvas, other.channels, table_classes(other))
    if network.makes != "denoiser":  # whose features are compared, of crops and without classes
        own, theirs = own[-2:-1], theirs[-2:-1]
    if own != theirs:
        raise ValueError(
            f"the teacher {path} does not fit: size, channels and classes are "
            f"{theirs} instead of {own}"
        )
    others = [c for c in model.config.conditioners if c not in config.conditioners]
    if others:
        raise ValueError(
            f"the teacher {path} does not fit: it has the conditioner "
            f"{families.word(type(others[0]))}, and the run has not, or another"
        )
    if model.config.space != pack.space:
        raise ValueError(
            f"the teacher {path} does not fit {pack.name}: its space is "
            f"{model.config.space} instead of {pack.space}"
        )
    return model


def _new_network(config: TrainConfig, pack: Pack, team: Team, device: torch.device) -> Network:
    """Initial network, with the buffers that its parameterisation computes from the data."""

    def crops(size: Size, count: int) -> Iterator[Tensor]:
        return some_crops(pack.images, pack.train, size, count, space=pack.space, seed=config.seed)

    network = config.task.head(pack).build(config.network, seed=config.seed)
    former = dict(network.named_buffers())
    config.precond.attach(network, config.network.channels)
    config.precond.fit(network, crops)
    network.to(device)
    config.adapter.attach(network, seed=config.seed)
    for name, buffer in network.named_buffers():
        if name not in former:
            team.broadcast(buffer)  # processes may round differently
    return network
