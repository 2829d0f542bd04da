"""Load a run from a checkpoint or a model, which only rank 0 reads."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from patchdiffusion.adapted import merged_model
from patchdiffusion.model import Model, load_model
from patchdiffusion.nets.adapters import label_names
from patchdiffusion.nets.concepts import table_classes
from patchdiffusion.system.dist import is_sharded, local
from patchdiffusion.system.serialize import decode
from patchdiffusion.train import checkpoint
from patchdiffusion.train.optim import Update, moments
from patchdiffusion.train.parallel import Owners, as_sharded
from patchdiffusion.train.setup import Training
from patchdiffusion.train.state import Meter, RunFacts

CPU = torch.device("cpu")


@dataclass(frozen=True)
class SavedRun:
    """Folder and facts of a valid checkpoint."""

    folder: Path
    facts: RunFacts


def read_saved(folder: Path) -> SavedRun:
    """Facts of a checkpoint whose digests are right; raises `ValueError` for another form."""
    try:
        facts = decode(RunFacts, checkpoint.read_state(folder))
    except ValueError as error:
        raise ValueError(f"{folder / 'state.json'} is not the state of a run: {error}") from error
    for group in ("weights", "optimizer"):
        if group not in facts.groups:
            raise ValueError(f"{folder} has no {group}")
    return SavedRun(folder, facts)


def load(training: Training, saved: SavedRun) -> None:
    """Load everything from a checkpoint; all processes must call it."""
    network, facts = training.network, saved.facts
    parameters = dict(network.named_parameters())
    _read(training.owners, saved, "weights", parameters | dict(network.named_buffers()))
    for name in training.ema.averages:
        targets = training.ema.tensors(name)
        if name in facts.groups:
            _read(training.owners, saved, name, targets)
        else:  # a profile that is new
            for key, target in targets.items():
                local(target).copy_(local(parameters[key].detach()))
    update = training.stepper.update
    update.clear()
    empty = empty_moments(update, network, facts.groups["optimizer"], training.owners)
    _read(training.owners, saved, "optimizer", empty)
    _load_learned(training, saved)
    training.state = replace(facts.state)
    training.meter = Meter.of(facts.meter, training.device)
    training.stepper.guard.load(facts.guard)
    update.set_loss_scale(facts.loss_scale)


def _load_learned(training: Training, saved: SavedRun) -> None:
    """Load the modules of the objective; those that are new in it keep their initial values."""
    tensors = saved.facts.groups.get("objective", ())
    both = {_module(name) for name in tensors} & set(dict(training.learned.named_children()))
    if not both:
        return
    targets = {k: v for k, v in _tensors(training.learned).items() if _module(k) in both}
    # Parameters of adapters have a slash in their names, as moments have.
    others = (name for name in tensors if "/" in name and name not in targets)
    names = [name for name in others if _module(name) in both]
    empty = empty_moments(training.stepper.update, training.learned, names)
    _read(training.owners, saved, "objective", targets | empty, both)


def _module(name: str) -> str:
    """Registered name of the module to which a parameter belongs."""
    return name.partition(".")[0]


def _read(
    owners: Owners,
    saved: SavedRun,
    group: str,
    targets: Mapping[str, Tensor],
    modules: Collection[str] | None = None,
) -> None:
    """Fill the targets from a group of a checkpoint, or from some modules in the group."""
    values: dict[str, Tensor] = {}

    def read() -> None:
        tensors = checkpoint.read_tensors(saved.folder, group, CPU)
        values.update({k: v for k, v in tensors.items() if not modules or _module(k) in modules})
        stored, own = ({k: (v.shape, v.dtype) for k, v in x.items()} for x in (values, targets))
        wrong = stored.items() ^ own.items()
        if wrong:
            raise ValueError(
                f"{saved.folder / group}.safetensors does not fit the network: "
                f"{min(name for name, _ in wrong)} differs"
            )

    owners.team.on_main(read)
    fill(owners, targets, values)


@torch.no_grad()
def fill(owners: Owners, targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy `values` of rank 0, by name, to the targets of all processes."""
    team = owners.team
    for name, target in targets.items():
        value = values[name] if team.is_main else torch.empty(target.shape, dtype=target.dtype)
        if owners.rank(name) is not None:
            value = team.broadcast(value.cpu().contiguous())
            if not target.is_meta:
                target.copy_(value)
            continue
        value = value.to(target.device)
        if is_sharded(target):
            target.copy_(as_sharded(value, target))
        else:
            target.copy_(team.broadcast(value.contiguous()))


def empty_moments(
    update: Update, network: nn.Module, names: Sequence[str], owners: Owners | None = None
) -> dict[str, Tensor]:
    """Zero state of the optimizers for the parameters of which a checkpoint has any: `names`.

    With `owners` also for those that other processes hold, on the meta device.
    """
    parameters = dict(network.named_parameters())
    chosen = dict.fromkeys(path.rsplit("/", 1)[0] for path in names)
    for name in chosen:
        if name not in parameters or not (
            parameters[name].requires_grad or parameters[name].is_meta
        ):
            raise ValueError(f"the checkpoint has moments of {name}, which is not trained here")
    update.begin(parameters[name] for name in chosen if not parameters[name].is_meta)
    return moments(update, network, owners)


# ---- Starting from the weights of a model ----


def weights_of(path: Path, training: Training) -> dict[str, Tensor]:
    """Averaged weights of a run or model from which a new run starts, with its adapter in them.

    They may lack the neutral parameters of the network, such as those of coordinates or of a jump:
    these add nothing, so the function is the same. A network may make its own of others, such as
    experts of an MLP, see `Network.adopted`. With another number of classes the parameters of
    labels are not taken. Raises `ValueError` if anything else differs, including what the
    network predicts.
    """
    model = load_model(path)
    if not training.config.adapter.continues(model.config.adapter):
        model = merged_model(model)
    _check_meaning(path, model, training)
    own = _tensors(training.network)
    weights = dict(training.network.adopted(model.network.state_dict()))
    theirs, ours = model.config.network, training.config.network
    labels: set[str] = set()
    if table_classes(theirs) != table_classes(ours) or theirs.concepts > ours.concepts:
        labels = label_names(model.network) | label_names(training.network)
        weights = {name: value for name, value in weights.items() if name not in labels}
    wrong = [name for name in weights if name not in own or weights[name].shape != own[name].shape]
    wrong += sorted(set(own) - set(weights) - training.network.neutral() - labels)
    if wrong:
        raise ValueError(
            f"start_from is {path}, whose network differs in {len(wrong)} tensors "
            f"(first {wrong[0]}); use the same --network settings"
        )
    counts = f"{theirs.num_classes} classes are now {ours.num_classes}"
    but = f"; {counts}, whose parameters are new" if labels else ""
    training.log.say(f"start     from the averaged weights of {path} ({model.digest}){but}")
    return weights


def _check_meaning(path: Path, model: Model, training: Training) -> None:
    """Raise `ValueError` if the output of the model has another meaning than that of this run."""
    kinds = model.config.head.kind, training.model_config.head.kind
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"start_from is {path}, a {kinds[0]}, and this run trains a {kinds[1]}; choose another"
        )

    configs = (model.config, training.config)
    theirs, ours = (c.objective.meaning(c.precond) for c in configs)
    if theirs != ours:
        theirs, ours = (c.objective.precond(c.precond) for c in configs)
        raise ValueError(
            f"start_from is {path}, which was trained with {theirs}, and this run has {ours}; "
            "use the same --precond and --objective"
        )


def start_from(training: Training, weights: Mapping[str, Tensor]) -> None:
    """Start a run from `weights` of rank 0; all processes must call it."""
    names = training.team.on_main(lambda: list(weights))
    tensors = _tensors(training.network)
    fill(training.owners, {name: tensors[name] for name in names}, weights)
    if not any(name.startswith("adapters.") for name in names):
        training.config.adapter.started(training.network)
    training.ema.copy(training.network)


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.named_parameters()) | dict(network.named_buffers())
