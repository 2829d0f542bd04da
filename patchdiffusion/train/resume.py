"""How a run begins, goes on from a checkpoint, and goes back to one."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from patchdiffusion.system.errors import Stop
from patchdiffusion.system.files import check_writable, lock
from patchdiffusion.system.serialize import encode
from patchdiffusion.system.trust import check_links
from patchdiffusion.train import checkpoint
from patchdiffusion.train.engine import SHARED_FACTS
from patchdiffusion.train.folder import (
    changed_fields,
    clear_unfinished,
    is_same_run,
    refuse_changes,
    set_aside,
    write_config,
)
from patchdiffusion.train.restore import Found, find, load, start_from, weights_of
from patchdiffusion.train.save import Saver
from patchdiffusion.train.setup import Training
from patchdiffusion.train.state import RunFacts
from patchdiffusion.train.timing import heartbeat

LOCK_PATIENCE = 5.0  # seconds; a process that was just killed may still hold the folder


@contextlib.contextmanager
def opened(training: Training) -> Iterator[None]:
    """Hold the folder of a run that has begun, or goes on from its newest valid checkpoint.

    Everything that may be refused is checked before anything is written.
    """
    with contextlib.ExitStack() as held:
        begin(training, held)
        held.enter_context(heartbeat(training.folder, training.team.place, training.phases))
        if training.team.is_main:
            trackers = training.log.trackers
            trackers.start(training.run.track, training.folder, encode(training.config))
            held.callback(trackers.close)
        yield


def begin(training: Training, held: contextlib.ExitStack) -> None:
    """Load a checkpoint, or begin a run, perhaps from other weights; `held` gets the lock."""
    team, run, folder = training.team, training.run, training.folder
    team.agree("the processes disagree", _identity(training), code=2)

    given: dict[str, Tensor] = {}

    def choose() -> Found | None:
        check_links(folder)
        fresh = run.fresh and (folder / "config.json").exists()
        allow = run.allow_config_change
        exists = not fresh and is_same_run(folder, training.config, allow_change=allow)
        if run.start_from is not None and not exists:
            given.update(weights_of(run.start_from, training))
        training.describe()
        _take(training, held)
        if fresh:
            aside = set_aside(folder)
            (aside / "lock").unlink()
            training.log.say(f"aside     the run that was in {folder} is now in {aside}")
            _take(training, held)
        elif not exists:  # perhaps the process that was waited for has begun it
            exists = is_same_run(folder, training.config, allow_change=allow)
        clear_unfinished(folder)
        if (folder / "checkpoints").exists():
            check_writable(folder / "checkpoints")
            checkpoint.clear_unfinished(folder / "checkpoints")
        newest = _newest(training) if exists else None
        if newest is None and run.start_from is not None and not given:  # it died early
            given.update(weights_of(run.start_from, training))
        return newest

    found = team.on_main(choose)
    if found is not None:
        load(training, found)
        _tell_resumed(training, found)
    elif run.start_from is not None:
        start_from(training, given)
    team.on_main(lambda: write_config(folder, training.config))
    if found is None:
        training.log.record("start", data=training.pack.fingerprint, **training.engine)


def _identity(training: Training) -> dict[str, Any]:
    """What all processes must have in common."""

    def flat(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {where: value}
        parts = (flat(v, f"{where}.{k}" if where else k) for k, v in value.items())
        return {k: v for part in parts for k, v in part.items()}

    engine = {name: training.engine[name] for name in SHARED_FACTS}
    facts = {"data": training.pack.fingerprint, "engine": engine}
    return flat(encode(training.config), "") | flat(facts, "")


def _take(training: Training, held: contextlib.ExitStack) -> None:
    folder = training.folder
    try:
        own = held.enter_context(lock(folder / "lock", folder, patience=LOCK_PATIENCE))
    except ValueError as error:
        raise ValueError(f"{error}; two processes must not train in one folder") from error
    training.lock = own
    if not own.locked:
        training.log.say(
            f"warning: files cannot be locked in {folder}; see to it that nobody else trains there"
        )


# ---- Which checkpoint ----


def _newest(training: Training) -> Found | None:
    """The newest valid checkpoint as its folder and facts; damaged ones are set aside."""
    root = training.folder / "checkpoints"
    damaged = []
    for folder, fault in checkpoint.candidates(root):
        if fault is None:
            for wrong in damaged:
                training.log.say(f"aside     {checkpoint.set_damaged_aside(wrong)}")
            found = find(folder)
            _check(training, found.facts)
            return found
        training.log.say(f"warning: skipping a checkpoint: {fault}")
        damaged.append(folder)
    if damaged:
        raise Stop(f"no checkpoint in {root} is valid; --fresh starts again", code=25)
    return None


def _check(training: Training, facts: RunFacts) -> None:
    """Refuse to go on with other data or another configuration, unless that is allowed."""
    changed = changed_fields(facts.config, training.config)
    if changed and not training.run.allow_config_change:
        refuse_changes(training.folder, changed)
    if changed:
        training.log.record("config change", fields=changed)
        training.log.say(f"warning: the configuration has changed: {'; '.join(changed)}")
    if facts.teacher != training.teacher:
        message = f"the teacher is {training.teacher} and was {facts.teacher}"
        if not training.run.allow_config_change:
            raise ValueError(
                f"{message} when {training.folder} was begun; name that one by "
                "--objective.teacher, or go on with --allow-config-change"
            )
        training.log.record("config change", fields=[message])
        training.log.say(f"warning: {message}")
    before, now = facts.data, training.data_facts
    if before == now:
        return
    if not training.run.allow_data_change:
        raise ValueError(
            f"the data is not what {training.folder} was trained on: {now.images:,} images "
            f"({now.fingerprint[:12]}) instead of {before.images:,} "
            f"({before.fingerprint[:12]}); --allow-data-change goes on with it"
        )
    training.log.record("data change", before=encode(before), after=encode(now))


def _tell_resumed(training: Training, found: Found) -> None:
    log, state, before = training.log, training.state, found.facts.engine
    log.say(f"resume    at step {state.step:,} from {found.folder}")
    log.resume(state.step, data=training.pack.fingerprint, **training.engine)
    now = training.engine
    changed = [f"{k} {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v]
    if changed:
        log.say(f"note      not to the last bit the run it was: {', '.join(changed)}")


# ---- Going back ----


def roll_back(training: Training, saver: Saver) -> None:
    """Return to the checkpoint before a burst of spikes, and leave out the images since."""
    team, guard, cursor = training.team, training.stepper.guard, training.state.cursor
    guard.observe(wait=True)
    first, rollbacks = guard.spikes[0], guard.rollbacks
    root = training.folder / "checkpoints"

    def choose() -> Found | None:
        for folder, fault in checkpoint.candidates(root):
            if fault is None and int(folder.name[5:]) <= first:
                return find(folder)
        return None

    found = team.on_main(choose)
    if found is None:
        raise team.stop(
            f"the gradient has exploded since step {first}, and no checkpoint is older; "
            "try a lower --optim.lr",
            code=22,
        )
    at = training.state.step
    load(training, found)
    state = training.state
    state.move_cursor(cursor)
    guard.rollbacks = rollbacks + 1
    guard.spikes.clear()
    training.log.say(
        f"rollback  from step {at:,} to step {state.step:,}: the gradient has exploded since step "
        f"{first:,}; the {state.passed_crops:,} crops in between are left out"
    )
    training.log.record("rollback", step=state.step, since=at, spikes_since=first)
    saver()
    team.on_main(lambda: _forget_since(training.folder, state.step))


def _forget_since(run: Path, step: int) -> None:
    for root in (run / "checkpoints", run / "snapshots"):
        for folder in checkpoint.folders(root):
            if int(folder.name[5:]) > step:
                shutil.rmtree(folder, ignore_errors=True)
