"""Filling a run from files that only the leading process reads: a checkpoint, or a model."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from patchdiffusion.model import Model, load_model
from patchdiffusion.system.dist import Team
from patchdiffusion.system.serialize import decode
from patchdiffusion.train import checkpoint
from patchdiffusion.train.optim import Update, moments
from patchdiffusion.train.parallel import as_sharded, is_sharded, local
from patchdiffusion.train.setup import Training
from patchdiffusion.train.state import Meter, RunFacts

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Found:
    """A valid checkpoint."""

    folder: Path
    facts: RunFacts


def find(folder: Path) -> Found:
    """A checkpoint whose digests are right; `ValueError` if its facts have another form."""
    try:
        facts = decode(RunFacts, checkpoint.read_state(folder))
    except ValueError as error:
        raise ValueError(f"{folder / 'state.json'} is not that of a run: {error}") from error
    for group in ("weights", "optimizer"):
        if group not in facts.groups:
            raise ValueError(f"{folder} has no {group}")
    return Found(folder, facts)


def load(training: Training, found: Found) -> None:
    """Take over everything a checkpoint holds; all processes must call it."""
    network, facts = training.network, found.facts
    own = dict(network.named_parameters())
    _read(training.team, found, "weights", own | dict(network.named_buffers()))
    for name in training.ema.averages:
        targets = training.ema.tensors(name)
        if name in facts.groups:
            _read(training.team, found, name, targets)
        else:  # a profile that is new
            for key, target in targets.items():
                local(target).copy_(local(own[key].detach()))
    update = training.stepper.update
    update.clear()
    empty = empty_moments(update, network, facts.groups["optimizer"])
    _read(training.team, found, "optimizer", empty)
    _load_learned(training, found)
    training.state = replace(facts.state)
    training.meter = Meter.of(facts.meter, training.device)
    training.stepper.guard.load(facts.guard)
    update.set_loss_scale(facts.loss_scale)


def _load_learned(training: Training, found: Found) -> None:
    """Take over the modules of the objective; what a changed one adds begins anew."""
    saved = found.facts.groups.get("objective", ())
    both = {_module(name) for name in saved} & set(dict(training.learned.named_children()))
    if not both:
        return
    own = {k: v for k, v in _tensors(training.learned).items() if _module(k) in both}
    names = [name for name in saved if "/" in name and _module(name) in both]
    empty = empty_moments(training.stepper.update, training.learned, names)
    _read(training.team, found, "objective", own | empty, both)


def _module(name: str) -> str:
    """The module that a parameter belongs to, by the name it was registered under."""
    return name.partition(".")[0]


def _read(
    team: Team,
    found: Found,
    group: str,
    targets: Mapping[str, Tensor],
    modules: Collection[str] | None = None,
) -> None:
    """Fill the targets from a group of a checkpoint, or from some modules in it."""
    given: dict[str, Tensor] = {}

    def read() -> None:
        tensors = checkpoint.read_tensors(found.folder, group, CPU)
        given.update({k: v for k, v in tensors.items() if not modules or _module(k) in modules})
        forms, wanted = ({k: (v.shape, v.dtype) for k, v in x.items()} for x in (given, targets))
        wrong = forms.items() ^ wanted.items()
        if wrong:
            raise ValueError(
                f"{found.folder / group}.safetensors does not fit the network: "
                f"{min(name for name, _ in wrong)} differs"
            )

    team.on_main(read)
    fill(team, targets, given)


@torch.no_grad()
def fill(team: Team, targets: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Copy what the leading process has been given to the targets of all processes."""
    for name, target in targets.items():
        value = given[name] if team.is_main else torch.empty(target.shape, dtype=target.dtype)
        value = value.to(target.device)
        if is_sharded(target):
            target.copy_(as_sharded(value, target))
        else:
            target.copy_(team.broadcast(value.contiguous()))


def empty_moments(update: Update, network: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The state of the optimizers, zero, for the parameters of which a checkpoint has any."""
    parameters = dict(network.named_parameters())
    owners = dict.fromkeys(path.rsplit("/", 1)[0] for path in names)
    for name in owners:
        if name not in parameters or not parameters[name].requires_grad:
            raise ValueError(f"the checkpoint has moments of {name}, which is not trained here")
    update.begin(parameters[name] for name in owners)
    return moments(update, network)


# ---- Beginning with the weights of a model ----


def weights_of(path: Path, training: Training) -> dict[str, Tensor]:
    """The averaged weights of a run or model that a new run may start from.

    A network may start from one without its neutral parameters, such as those of coordinates or
    of a jump: they are zero, so that it is the same function. Raises `ValueError` if anything else
    differs, also what the network predicts.
    """
    model = load_model(path)
    _check_meaning(path, model, training)
    given, own = model.network.state_dict(), _tensors(training.network)
    wrong = [name for name in given if name not in own or given[name].shape != own[name].shape]
    wrong += sorted(set(own) - set(given) - training.network.neutral())
    if wrong:
        raise ValueError(
            f"cannot start from {path}: its network differs in {len(wrong)} tensors "
            f"(first {wrong[0]}); use the same --network settings"
        )
    training.log.say(f"start     from the averaged weights of {path} ({model.digest})")
    return given


def _check_meaning(path: Path, model: Model, training: Training) -> None:
    """Refuse weights whose output means something else here."""
    kinds = model.config.head.kind, training.model_config.head.kind
    if kinds[0] != kinds[1]:
        raise ValueError(f"cannot start from {path}: it is a {kinds[0]}, and this run a {kinds[1]}")

    configs = (model.config, training.config)
    theirs, ours = (c.objective.meaning(c.precond) for c in configs)
    if theirs != ours:
        theirs, ours = (c.objective.precond(c.precond) for c in configs)
        raise ValueError(
            f"cannot start from {path}: it was trained as {theirs}, and this run is {ours}; "
            "train both alike"
        )


def start_from(training: Training, given: Mapping[str, Tensor]) -> None:
    """Begin with weights that the leading process has; all processes must call it."""
    names = training.team.on_main(lambda: list(given))
    own = _tensors(training.network)
    fill(training.team, {name: own[name] for name in names}, given)
    training.ema.copy(training.network)


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.named_parameters()) | dict(network.named_buffers())
