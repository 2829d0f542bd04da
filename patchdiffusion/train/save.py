"""Saves of a run: checkpoints, the model, and snapshots of averages."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from patchdiffusion.adapted import files_of
from patchdiffusion.model import save_model
from patchdiffusion.system.dist import is_sharded, local
from patchdiffusion.system.errors import Stop
from patchdiffusion.system.files import read_json
from patchdiffusion.system.serialize import encode
from patchdiffusion.train import checkpoint
from patchdiffusion.train.ema import MAIN, profile_name
from patchdiffusion.train.folder import write_config
from patchdiffusion.train.optim import moments
from patchdiffusion.train.setup import Training
from patchdiffusion.train.state import RunFacts

T = TypeVar("T")
Groups = dict[str, dict[str, Tensor]]
DISK_FULL = 20


def gives_up(before: str, *, final: bool) -> bool:
    """True if a failed save ends the run: after the last one, or after a previous failure."""
    return final or bool(before)


class Saver:
    """Saves a run; a failed save is reported and repeated later, two in a row end the run."""

    def __init__(self, training: Training):
        self.training = training
        self.problem = ""
        """Reason why the last save failed, or ""."""

    def __call__(self, *, final: bool = False) -> None:
        """Write a checkpoint and the model; `final` marks the last save of the run.

        Raises `Stop` for weights, averages and moments that are not finite, or differ between
        processes. All processes must call it.
        """
        training = self.training
        groups = _state(training)
        _check_finite(training, groups)
        _check_same(training, groups)
        facts = facts_of(training, groups)
        full = _collect(training, groups)
        problem = self._on_main(lambda: _write(training, full, facts))
        if problem and gives_up(self.problem, final=final):
            raise training.team.stop(
                f"cannot save in {training.folder}: {problem}; older checkpoints are kept",
                code=DISK_FULL,
            )
        if problem:
            training.log.say(f"warning: cannot save: {problem}; training goes on")
        else:
            training.log.tell("save", checkpoint=checkpoint.name_of(facts.step))
        self.problem = problem

    def catch_up(self) -> None:
        """Write the model and the last snapshot if the run ended right after its checkpoint.

        All processes must call it.
        """
        training = self.training
        if training.team.on_main(self._model_is_old):
            full = _collect(training, _state(training))
            self._on_main(lambda: _write_model(training, full))
        self.snapshot()

    def _on_main(self, work: Callable[[], T]) -> T:
        """Let rank 0 write, if the folder is still held by this run."""

        def write() -> T:
            _check_lock(self.training)
            return work()

        return self.training.team.on_main(write)

    def _model_is_old(self) -> bool:
        try:
            facts = read_json(self.training.folder / "model" / "config.json")
            return facts["step"] != self.training.state.step
        except (OSError, ValueError, LookupError, TypeError):
            return True

    def snapshot(self) -> None:
        """Store the power-function profiles for `patchdiffusion average`, if there are any."""
        training = self.training
        stds = {profile_name(std): std for std in training.config.ema.profiles}
        if not stds:
            return
        groups = {name: training.ema.tensors(name) for name in stds}
        _check_finite(training, groups)
        full = _collect(training, groups)
        facts = {"images": training.now, "profiles": stds}
        root = training.folder / "snapshots"

        def write() -> str:
            try:
                if not (root / f"step-{training.state.step:010d}").exists():
                    _check_space(root, checkpoint.size_of(full))
                    checkpoint.save(root, training.state.step, full, facts)
            except (OSError, SafetensorError) as error:
                return str(error)
            return ""

        if problem := self._on_main(write):
            training.log.say(f"warning: cannot save a snapshot of the averages: {problem}")


def _check_lock(training: Training) -> None:
    """Raise `Stop` if another process holds the folder, because somebody deleted the lock."""
    try:
        held = training.lock is None or training.lock.keep()
    except OSError:  # the save will meet it, too
        held = True
    if not held:
        training.log.dry = True  # the records are those of the other process
        raise Stop(
            f"{training.folder} is in use by another process, since its lock or the folder was "
            "deleted; nothing was saved there",
            code=24,
        )


# ---- State ----


def _state(training: Training) -> Groups:
    """All tensors of a run, sharded or full, as this process holds them.

    Those of another process are on the meta device.
    """
    buffers = dict(training.network.named_buffers())
    learned, update = training.learned, training.stepper.update
    objective = dict(learned.named_parameters()) | dict(learned.named_buffers())
    return {
        "weights": dict(training.network.named_parameters()) | buffers,
        **{name: training.ema.tensors(name) for name in training.ema.averages},
        "optimizer": moments(update, training.network, training.owners),
        **({"objective": objective | moments(update, learned)} if objective else {}),
    }


def facts_of(training: Training, groups: Groups) -> RunFacts:
    """State of a run apart from tensors; waits for the device."""
    return RunFacts(
        format=checkpoint.FORMAT,
        step=training.state.step,
        images=training.now,
        state=training.state,
        meter=training.meter.state(),
        guard=training.stepper.guard.state(),
        loss_scale=training.stepper.update.loss_scale(),
        data=training.data_facts,
        teacher=training.teacher,
        config=training.config,
        engine=training.engine,
        groups={name: tuple(group) for name, group in groups.items()},
    )


def _collect(training: Training, groups: Groups) -> Groups:
    """Full tensors; those that are not on every process are gathered one by one, on rank 0 only."""
    full: Groups = {}
    for name, group in groups.items():
        full[name] = {}
        for key, value in group.items():
            if is_sharded(value) or training.owners.rank(key) is not None:
                gathered = training.owners.whole(key, value.detach(), training.device)
                if training.team.is_main:
                    full[name][key] = gathered.cpu()
            else:
                full[name][key] = value.detach()
    return full


def _check_finite(training: Training, groups: Groups) -> None:
    held = [x.detach() for group in groups.values() for x in group.values() if not x.is_meta]
    finite = [torch.isfinite(local(x)).all() for x in held]
    good = torch.stack(finite).all().to(torch.float32)
    if float(training.team.all_reduce(good)) < training.team.size:
        raise training.team.stop(
            "weights, averages or moments are not finite; nothing was saved, older checkpoints "
            "are kept",
            code=21,
        )


def _check_same(training: Training, groups: Groups) -> None:
    """Raise `Stop` unless replicas have the same bits."""
    if training.team.size == 1 or training.run.shard:
        return
    alike = [group for group in groups if group != "optimizer"]
    tensors = {
        f"{group}/{name}": x.detach()
        for group in alike
        for name, x in groups[group].items()
        if training.owners.rank(name) is None
    }
    sums = [x.view(torch.int32).sum(dtype=torch.int64) for x in tensors.values()]
    facts = dict(zip(tensors, torch.stack(sums).tolist(), strict=True))
    training.team.agree("the processes have drifted apart", facts, code=24)


# ---- Writing ----


def _write(training: Training, full: Groups, record: RunFacts) -> str:
    """Save on rank 0, if needed after deleting old checkpoints; returns the problem, or ""."""
    root = training.folder / "checkpoints"
    step, run, facts = record.step, training.run, encode(record)
    try:
        if not (training.folder / "config.json").exists():  # its folder is created by the log
            training.log.say(f"warning: {training.folder} has vanished; it is created again")
            write_config(training.folder, training.config)
        try:
            _check_space(root, checkpoint.size_of(full))
            checkpoint.save(root, step, full, facts)
        except PermissionError:
            raise  # more room would not help
        except (OSError, SafetensorError):
            checkpoint.prune(root, 1, run.keep_every)
            _check_space(root, checkpoint.size_of(full))
            checkpoint.save(root, step, full, facts)
        checkpoint.prune(root, run.keep, run.keep_every, training.spare)
        _write_model(training, full)
    except (OSError, SafetensorError) as error:
        return str(error)
    return ""


def _write_model(training: Training, full: Groups) -> None:
    averaged, config = full["weights"] | full[MAIN], training.model_config
    folder, adapter = training.folder / "model", files_of(config, training.network, averaged)
    more = dict(training.config.task.files(config, training.objective))
    save_model(
        folder,
        config,
        averaged,
        full["weights"],
        carried=training.kept | training.carried | adapter | more,
    )
    # The files of this run from now on, whatever becomes of those that it was started with.
    training.carried = {name: folder / name for name in training.carried}


def _check_space(root: Path, needed: int) -> None:
    existing = next(parent for parent in (root, *root.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(f"{root} needs {needed:,} bytes, and only {free:,} are free")
