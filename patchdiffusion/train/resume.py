"""Start of a run, resumption from a checkpoint, and rollback to one."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from patchdiffusion.system import families
from patchdiffusion.system.errors import Stop
from patchdiffusion.system.files import (
    cache_dir,
    check_place,
    check_writable,
    expanded,
    is_held,
    lock,
)
from patchdiffusion.system.serialize import encode, few
from patchdiffusion.system.text import counted
from patchdiffusion.system.trust import check_links
from patchdiffusion.train import checkpoint
from patchdiffusion.train.describe import describe
from patchdiffusion.train.engine import SHARED_FACTS
from patchdiffusion.train.folder import (
    changed_fields,
    clear_unfinished,
    is_same_run,
    name_aside,
    refuse_changes,
    write_config,
)
from patchdiffusion.train.log import run_state
from patchdiffusion.train.restore import SavedRun, load, read_saved, start_from, weights_of
from patchdiffusion.train.save import Saver
from patchdiffusion.train.setup import Training
from patchdiffusion.train.state import RunFacts
from patchdiffusion.train.timing import heartbeat

LOCK_PATIENCE = 5.0  # seconds; a process that was just killed may still hold the folder


@contextlib.contextmanager
def opened(training: Training) -> Iterator[None]:
    """Context of a run that is started, or resumed from its newest valid checkpoint.

    Holds the lock of its folder. Everything is checked before anything is written.
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
    """Load a checkpoint, or start a run, perhaps from other weights; `held` gets the lock."""
    team, run, folder = training.team, training.run, training.folder
    _agree(training)

    weights: dict[str, Tensor] = {}

    def choose() -> SavedRun | None:
        fresh = run.fresh and (folder / "config.json").exists()
        allow = run.allow_config_change
        exists = _existing(training, weights)
        with contextlib.suppress(OSError, ValueError):
            run_state(folder)  # of a process that was killed
        _take(training, held)
        if fresh:
            aside = folder.rename(name_aside(folder))
            (aside / "lock").unlink()
            training.log.say(f"renamed   the run in {folder} to {aside}")
            _take(training, held)
        elif not exists:  # the process that held the lock may have started it
            exists = is_same_run(folder, training.config, allow_change=allow)
        clear_unfinished(folder)
        if (folder / "checkpoints").exists():
            check_writable(folder / "checkpoints")
            checkpoint.clear_unfinished(folder / "checkpoints")
        newest = _newest(training) if exists else None
        _forget_since(folder / "snapshots", newest.facts.step if newest else 0)  # made anew
        if newest is None and run.start_from is not None and not weights:  # it died early
            weights.update(weights_of(run.start_from, training))
        return newest

    saved = team.on_main(choose)
    if saved is not None:
        load(training, saved)
        _report_resumed(training, saved)
    elif run.start_from is not None:
        start_from(training, weights)
    team.on_main(lambda: write_config(folder, training.config))
    if saved is None:
        start = run.start_from
        origin = {} if start is None else {"start_from": str(expanded(start).resolve())}
        training.log.record("start", data=training.pack.fingerprint, **origin, **training.engine)


def rehearse(training: Training) -> None:
    """Check and load a run like `begin`, without writing anything."""
    team, run, folder = training.team, training.run, training.folder
    _agree(training)
    weights: dict[str, Tensor] = {}

    def choose() -> SavedRun | None:
        exists = _existing(training, weights)
        if is_held(folder / "lock"):
            raise ValueError(f"{folder} is in use; two processes must not train in one folder")
        if run.fresh and (folder / "config.json").exists():
            training.log.say(f"rename    the run in {folder} to {name_aside(folder)}")
        newest = _newest(training) if exists else None
        if newest is None and run.start_from is not None and not weights:
            weights.update(weights_of(run.start_from, training))
        return newest

    saved = team.on_main(choose)
    if saved is not None:
        load(training, saved)
        training.log.say(f"resume    at step {training.state.step:,} from {saved.folder}")
    elif run.start_from is not None:
        start_from(training, weights)


def _existing(training: Training, weights: dict[str, Tensor]) -> bool:
    """True if a run is resumed; a new one gets the `weights` from which it starts."""
    run, folder = training.run, training.folder
    check_links(folder)
    fresh = run.fresh and (folder / "config.json").exists()
    allow = run.allow_config_change
    exists = not fresh and is_same_run(folder, training.config, allow_change=allow)
    check_place(folder)
    if not (exists or training.config.adapter.trains_all or run.start_from):
        word = families.word(type(training.config.adapter))
        raise ValueError(
            f"adapter {word} changes a trained network: name it by --start-from RUN, or use "
            f"patchdiffusion adapt RUN DATA --adapter {word}"
        )
    if run.start_from is not None and not exists:
        weights.update(weights_of(run.start_from, training))
    describe(training)
    return exists


def _agree(training: Training) -> None:
    """Refuse processes that are not of one run; what only changes last bits is reported."""
    training.team.agree("the processes disagree", _identity(training), code=2)
    kernels = training.team.gather(training.engine["kernels"])
    for rank, other in enumerate(kernels):
        if other != kernels[0]:
            training.log.say(
                f"warning: rank {rank} computes with {other} and rank 0 with {kernels[0]}: not "
                "bit-identical to a run of equal processes"
            )


def _identity(training: Training) -> dict[str, Any]:
    """Facts that all processes of a run must have in common."""

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
        held_lock = held.enter_context(lock(folder / "lock", folder, patience=LOCK_PATIENCE))
    except ValueError as error:
        raise ValueError(f"{error}; wait for it, or choose another folder with --out") from error
    training.lock = held_lock
    if not held_lock.locked:
        training.log.say(f"warning: files cannot be locked in {folder}; start no second run in it")


# ---- Which checkpoint ----


def _newest(training: Training) -> SavedRun | None:
    """Newest valid checkpoint; damaged ones are renamed, but not by a dry run."""
    root = training.folder / "checkpoints"
    damaged = []
    for folder, fault in checkpoint.candidates(root):
        if fault is None:
            for wrong in damaged:
                if training.run.dry_run:
                    training.log.say(f"rename    {wrong} to {checkpoint.name_aside(wrong)}")
                else:
                    training.log.say(f"renamed   to {checkpoint.set_damaged_aside(wrong)}")
            saved = read_saved(folder)
            _check(training, saved.facts)
            return saved
        training.log.say(f"warning: skipping a checkpoint: {fault}")
        damaged.append(folder)
    if damaged:
        raise Stop(f"no checkpoint in {root} is valid; --fresh starts again", code=25)
    return None


def _check(training: Training, facts: RunFacts) -> None:
    """Raise `ValueError` for changed data or a changed configuration, unless that is allowed."""
    changed = changed_fields(facts.config, training.config)
    if changed and not training.run.allow_config_change:
        refuse_changes(training.folder, changed)
    if changed:
        training.log.record("config change", fields=changed)
        training.log.say(f"warning: the configuration has changed: {few(changed)}")
    if facts.teacher != training.teacher:
        message = f"the teacher has changed from {facts.teacher} to {training.teacher}"
        if not training.run.allow_config_change:
            raise ValueError(
                f"{message} since {training.folder} was started; use that one by "
                "--objective.teacher, or resume with --allow-config-change"
            )
        training.log.record("config change", fields=[message])
        training.log.say(f"warning: {message}")
    before, now = facts.data, training.data_facts
    if before == now:
        return
    if not training.run.allow_data_change:
        raise ValueError(
            f"the data differs from that of {training.folder}: {counted(now.images, 'image')} "
            f"({now.fingerprint[:12]}) instead of {before.images:,} "
            f"({before.fingerprint[:12]}); use --allow-data-change to resume with it"
        )
    training.log.record("data change", before=encode(before), after=encode(now))


def _report_resumed(training: Training, saved: SavedRun) -> None:
    log, state, before = training.log, training.state, saved.facts.engine
    log.say(f"resume    at step {state.step:,} from {saved.folder}")
    log.resume(state.step, data=training.pack.fingerprint, **training.engine)
    now = training.engine
    changed = [f"{k} {before[k]} -> {v}" for k, v in now.items() if before.get(k, v) != v]
    if changed:
        log.say(f"note      not bit-identical to the run so far: {', '.join(changed)}")


# ---- Rollback ----


def roll_back(training: Training, saver: Saver) -> None:
    """Return to the checkpoint before a burst of spikes, and skip the images since."""
    team, guard, cursor = training.team, training.stepper.guard, training.state.cursor
    guard.observe(wait=True)
    first, rollbacks = guard.spikes[0], guard.rollbacks
    root = training.folder / "checkpoints"

    def choose() -> SavedRun | None:
        for folder, fault in checkpoint.candidates(root):
            if fault is None and int(folder.name[5:]) <= first:
                return read_saved(folder)
        return None

    saved = team.on_main(choose)
    if saved is None:
        raise team.stop(
            f"the gradient has exploded since step {first}, and there is no older checkpoint; "
            "try a lower --optim.lr",
            code=22,
        )
    at = training.state.step
    load(training, saved)
    state = training.state
    state.move_cursor(cursor)
    guard.rollbacks = rollbacks + 1
    guard.spikes.clear()
    training.log.say(
        f"rollback  from step {at:,} to step {state.step:,}: the gradient has exploded since step "
        f"{first:,}; the {state.passed_crops:,} crops in between are skipped"
    )
    training.log.record("rollback", step=state.step, since=at, spikes_since=first)
    saver()
    for name in ("checkpoints", "snapshots"):
        team.on_main(lambda name=name: _forget_since(training.folder / name, state.step))


def set_doubtful_aside(training: Training, since: int) -> None:
    """Rename what was saved after a step: it was trained on images that are damaged.

    A prepared data set in the cache is renamed, too, so that the same command makes it anew.
    """
    folder, say = training.folder, training.log.say
    doubtful = [
        saved
        for root in (folder / "checkpoints", folder / "snapshots")
        for saved in checkpoint.folders(root)
        if int(saved.name[5:]) > since
    ]
    model, pack = folder / "model", training.pack.path
    if doubtful and model.exists():
        doubtful.append(model)
    if cache_dir() / "packs" in pack.parents:
        doubtful.append(pack)
    for path in doubtful:
        say(f"aside     {checkpoint.set_damaged_aside(path)}, of damaged images")


def _forget_since(root: Path, step: int) -> None:
    for folder in checkpoint.folders(root):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder, ignore_errors=True)
