"""The training loop: source -> feed -> plan -> crops -> objective -> optimizer -> average."""

import itertools
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.data.store import packs_aside
from patchdiffusion.plans import Group
from patchdiffusion.system.dist import Vote, join
from patchdiffusion.system.errors import Stop, out_of_memory, peer_lost
from patchdiffusion.system.place import place
from patchdiffusion.system.signals import STOPPING, handling
from patchdiffusion.system.text import counted
from patchdiffusion.train.callbacks import Callback, Callbacks
from patchdiffusion.train.config import RunConfig, TrainConfig
from patchdiffusion.train.guard import Order, Verification
from patchdiffusion.train.log import duration, quantity
from patchdiffusion.train.outlook import learn_pace, outlook
from patchdiffusion.train.preview import Ending
from patchdiffusion.train.resume import opened, rehearse, roll_back, set_doubtful_aside
from patchdiffusion.train.save import Saver
from patchdiffusion.train.setup import Training, assemble, check_team
from patchdiffusion.train.status import Status, is_shown, refresh_report, show_samples
from patchdiffusion.train.timing import whereabouts

PATIENCE = 6  # times as long until the second step

SIGNALS = STOPPING


def train(
    config: TrainConfig, run: RunConfig | None = None, callbacks: Sequence[Callback] = ()
) -> Path:
    """Train until the clock reaches `config.images`; returns the folder of the run.

    The same call resumes a run that ended early. Every process of a run must make it. `callbacks`
    are called with every `callbacks.Event`; one that returns True or raises ends the run, which is
    saved before. Raises `ValueError` for an impossible configuration or data, before anything is
    written, and `Stop` if a run cannot go on.
    """
    run = run or RunConfig()
    started = time.monotonic()
    check_team(config, place().size)  # before they meet: who leaves at once would look lost
    if run.dry_run:
        return _rehearse(config, run)
    pack = prepare_data(config.data)  # takes long, so before other processes wait for this one
    with join(PATIENCE * run.timeout_minutes) as team:
        training = assemble(config, run, pack, team)
        heard = Callbacks(callbacks, training)
        try:
            with opened(training):
                _execute(training, started, heard)
        except Exception as error:
            if peer_lost(error):
                raise Stop(_lost(training, error), code=24) from error
            raise
        return training.folder


def _rehearse(config: TrainConfig, run: RunConfig) -> Path:
    """Check a run like a real one, and print its duration and memory; writes nothing."""
    with packs_aside():
        pack = prepare_data(config.data)
        with join(PATIENCE * run.timeout_minutes) as team:
            training = assemble(config, run, pack, team)
            rehearse(training)
            if training.finished:
                training.log.say(f"{training.folder} is finished; a larger --images extends it")
            else:
                training.log.say(outlook(training, one_step))
            return training.folder


def _execute(training: Training, started: float, heard: Callbacks) -> None:
    log = training.log
    if training.finished:
        Saver(training).catch_up()  # it may have been killed after its last checkpoint
        _catch_up(training)
        log.status("finished", **_position(training))
        log.say(f"{training.folder} is finished; a larger --images extends it")
        training.team.on_main(lambda: refresh_report(training))
        heard.check()
        return
    try:
        with stop_signals() as stop:
            heard.attach(stop)
            log.open_bar(training.config.images, training.now)
            _loop(training, stop, started)
    except BaseException as error:
        _record_failure(training, error)
        if out_of_memory(error):
            raise Stop(_too_large(training), code=26) from error
        raise
    finally:
        log.close_bar()
    if heard.error is not None:
        _record_failure(training, heard.error)
    path = training.team.on_main(lambda: refresh_report(training))
    heard.check()  # after all processes have met: the others end as after a stop
    if path:
        log.say(f"report    {path}")


def _record_failure(training: Training, error: BaseException) -> None:
    reason = str(error) or type(error).__name__
    training.log.status("failed", reason=reason, **_position(training))


def _loop(training: Training, stop: threading.Event, started: float) -> None:
    config, preview, run = training.config, training.config.preview, training.run
    team, guard, phases = training.team, training.stepper.guard, training.phases
    saver = Saver(training)
    vote = Vote(team, 3)
    pixels = Verification(training.pack, enabled=team.place.local_rank == 0)
    deadline = deadline_of(run, started)
    saved = time.monotonic()
    began = training.spare = training.state.step
    training.log.status("running", **_position(training))
    if not _catch_up(training, stop.is_set):
        return _report_end(training, "preempted")
    learn_pace(training, one_step)
    status = Status(training, saver)
    for num_steps in itertools.count(1):
        before = training.now
        _step(training)
        training.log.tell("step")
        now, last = training.now, training.finished
        training.log.advance(now)
        late = time.monotonic() > deadline
        due_save = time.monotonic() - saved > run.save_minutes * 60
        with phases("wait"):
            order = max(guard.observe(), pixels.order())
            ending, save, order = vote((stop.is_set() or late, due_save, order))
        if num_steps == 2:  # compilation and other first-time work is done
            team.patience(run.timeout_minutes)
        early = training.state.step.bit_count() == 1  # steps 1, 2, 4, 8 ...
        if early or due(preview.status, before, now, config.images) or last:
            status.report()
        if order == Order.GO_BACK:
            vote.forget()
            with status.pause():
                roll_back(training, saver)
            began = training.spare = min(began, training.state.step)
            continue
        if pixels.intact:
            training.spare = None
        if order == Order.STOP_DATA:
            team.on_main(partial(set_doubtful_aside, training, began))
        if order > Order.GO_BACK:
            raise _refusal(training, Order(order), pixels)
        show = due(training.num_previews, training.state.shown, now, config.images) or last
        if due(config.ema.snapshots, before, now, config.images) or last:
            with status.pause(), phases("save"):
                saver.snapshot()  # before the checkpoint, after which nobody would miss it
        if show or ending or save:
            with status.pause(), phases("save"):
                saver(final=bool(ending) or last)
            saved = time.monotonic()
        ending = bool(ending) and not last
        if show and not ending:
            ending = not status.preview(stop.is_set)
        if ending or last:
            vote.forget()
            return _report_end(training, "preempted" if ending else "finished")


def deadline_of(run: RunConfig, started: float) -> float:
    """Monotonic time at which `max_hours` are over; infinity without such a limit."""
    return started + (run.max_hours or math.inf) * 3600


def _report_end(training: Training, how: str) -> None:
    """Record and print that a run has ended, after its last save."""
    training.log.status(how, **_position(training))
    training.log.tell("end", status=how)
    if how == "finished":
        training.log.say(f"finished in {duration(training.state.seconds)} of training")
    else:
        training.log.say(f"stopped at {quantity(training.now)}; the same command resumes the run")


def _catch_up(training: Training, ending: Ending = bool) -> bool:
    """Make the preview that is due at this point, if it is missing; False if the run is to end."""
    state, config = training.state, training.config
    missed = due(training.num_previews, state.shown, training.now, config.images)
    if not missed and not training.finished:
        return True
    if training.team.on_main(lambda: is_shown(training)):
        state.shown = training.now
        return True
    return show_samples(training, ending)


def _step(training: Training) -> None:
    """One step, with a smaller micro-batch if memory runs out and that is allowed."""
    alone = training.team.size == 1  # others would wait for the first attempt
    while True:
        try:
            return one_step(training)
        except Exception as error:
            size = training.stepper.micro_batch or training.config.batch
            if not (training.run.auto_micro_batch and alone and size > 1 and out_of_memory(error)):
                raise
        # Here the error, which kept what the step had allocated, is gone.
        training.stepper.micro_batch = size // 2
        training.log.say(f"note      out of memory; continuing with --micro-batch {size // 2}")
        training.log.record("micro batch", step=training.state.step, size=size // 2)


def one_step(training: Training, groups: tuple[Group, ...] | None = None) -> None:
    """One optimizer step with its counters and averages, on `groups` or else those of the plan."""
    config, state, before = training.config, training.state, training.now
    phases, cursor = training.phases, training.state.cursor
    phases.begin_step(state.step)
    progress = min(before / config.images, 1.0)
    groups = groups or training.plan.draw(seed=config.seed, step=cursor[0], progress=progress)
    training.stepper(
        groups, training.meter, step=state.step, cursor=cursor, progress=progress, seen=before
    )
    flops = sum(training.flops[group.size] * group.count for group in groups)
    state.advance(groups, training.canvas, flops)
    with phases("average"):
        training.ema.update(training.now, training.now - before)
    training.pace.count(groups, phases.end_step())


def due(times: int, before: float, now: float, total: float) -> bool:
    """True if one of `times` evenly spaced points of the run lies in (before, now]."""
    return math.floor(now / total * times) > math.floor(before / total * times)


def _refusal(training: Training, order: Order, pixels: Verification) -> Stop:
    """Error for the reason to stop, which all processes raise."""
    guard, team = training.stepper.guard, training.team
    if order == Order.STOP_DATA:
        problems = [text for text in team.gather(pixels.problem) if text]
        return team.stop(f"{problems[0]}; prepare the data again", code=23)
    if order == Order.STOP_SKIPS:
        return team.stop(
            f"{counted(guard.config.max_skips, 'step')} in a row had a loss or gradient that is "
            "not finite; the last checkpoint is valid; try a lower --optim.lr, or --precision fp32",
            code=21,
        )
    return team.stop(
        f"the gradient has exploded again after {counted(guard.rollbacks, 'rollback')}; "
        "the last checkpoint is valid; try a lower --optim.lr, or "
        f"--guard.rollbacks {guard.rollbacks + 1}",
        code=22,
    )


def _lost(training: Training, error: Exception) -> str:
    phases, process = training.phases, training.team.place
    closed = "Connection" in str(error)
    return (
        f"{'another process has ended' if closed else 'another process does not answer'}; this is "
        f"rank {process.rank} in {phases.broken_in or phases.current} of step {phases.step}; "
        f"{whereabouts(training.folder, process)}"
    )


def _too_large(training: Training) -> str:
    config = training.config
    half = max(1, (training.stepper.micro_batch or config.batch) // 2)
    return (
        f"out of memory; resume with --micro-batch {half}, the same training in smaller parts, "
        "or choose a smaller network or resolution"
    )


def _position(training: Training) -> dict[str, object]:
    return {"step": training.state.step, "images": training.now, "length": training.config.images}


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Event that SIGNALS set; a second SIGINT ends the program at once."""
    event, interrupts = threading.Event(), 0

    def handle(number: int, frame: object) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            raise KeyboardInterrupt
        event.set()

    with handling(handle, SIGNALS):
        yield event
