"""The training loop: source -> feed -> plan -> crops -> objective -> optimizer -> average."""

import itertools
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.plans import Group
from patchdiffusion.system.dist import Vote, join
from patchdiffusion.system.errors import Stop, out_of_memory, peer_lost
from patchdiffusion.train.config import RunConfig, TrainConfig
from patchdiffusion.train.guard import Order, Verification
from patchdiffusion.train.log import duration, quantity
from patchdiffusion.train.preview import Ending
from patchdiffusion.train.report import write_report
from patchdiffusion.train.resume import opened, roll_back
from patchdiffusion.train.save import Saver
from patchdiffusion.train.setup import Training, assemble
from patchdiffusion.train.status import Status, picture_of, show_samples
from patchdiffusion.train.timing import whereabouts

PATIENCE = 6  # times as long until the second step

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)


def train(config: TrainConfig, run: RunConfig | None = None) -> Path:
    """Train until the clock shows `config.images`; returns the folder of the run, with a report.

    The same call again goes on where the last one ended. Every process of a run makes it. Raises
    `ValueError` for a configuration or data that cannot work, before anything is written, and
    `Stop` when a run cannot go on.
    """
    run = run or RunConfig()
    started = time.monotonic()
    pack = prepare_data(config.data)  # takes its time, which no other process has to wait for
    with join(PATIENCE * run.timeout_minutes) as team:
        training = assemble(config, run, pack, team)
        if run.dry_run:
            training.describe()
            return training.folder
        try:
            with opened(training):
                _carry_out(training, started)
        except Exception as error:
            if peer_lost(error):
                raise Stop(_lost(training, error), code=24) from error
            raise
        return training.folder


def _carry_out(training: Training, started: float) -> None:
    log = training.log
    if training.finished:
        Saver(training).catch_up()  # it may have been killed after its last checkpoint
        _catch_up(training)
        log.status("finished", **_place(training))
        log.say(f"{training.folder} is finished; a larger --images extends it")
        training.team.on_main(lambda: _report(training))
        return
    try:
        with stop_signals() as stop:
            _loop(training, stop, started)
    except Exception as error:
        log.status("failed", reason=str(error), **_place(training))
        if out_of_memory(error):
            raise Stop(_too_large(training), code=26) from error
        raise
    if written := training.team.on_main(lambda: _report(training)):
        log.say(f"report    {written}")


def _report(training: Training) -> str:
    """Where the page is; nothing if it cannot be written, which is no fault of the training."""
    try:
        return str(write_report(training.folder))
    except (OSError, ValueError) as error:
        training.log.say(f"warning: there is no report: {error}")
        return ""


def _loop(training: Training, stop: threading.Event, started: float) -> None:
    config, preview, run = training.config, training.config.preview, training.run
    team, guard, phases = training.team, training.stepper.guard, training.phases
    saver = Saver(training)
    status = Status(training, saver)
    vote = Vote(team, 3)
    pixels = Verification(training.pack, wanted=team.place.local_rank == 0)
    deadline = deadline_of(run, started)
    saved = time.monotonic()
    training.log.status("running", **_place(training))
    _catch_up(training, stop.is_set)
    for taken in itertools.count(1):
        before = training.now
        _step(training)
        now, last = training.now, training.finished
        late = time.monotonic() > deadline
        due_save = time.monotonic() - saved > run.save_minutes * 60
        with phases("wait"):
            order = max(guard.observe(), pixels.order())
            ending, save, order = vote((stop.is_set() or late, due_save, order))
        if taken == 2:  # whatever is compiled or chosen at first is there
            team.patience(run.timeout_minutes)
        early = training.state.step.bit_count() == 1  # steps 1, 2, 4, 8 ...: soon, then rarely
        if early or due(preview.status, before, now, config.images) or last:
            status.report()
        if order == Order.GO_BACK:
            vote.forget()
            with status.pause():
                roll_back(training, saver)
            continue
        if order > Order.GO_BACK:
            raise _refusal(training, Order(order), pixels)
        show = due(preview.samples, training.state.shown, now, config.images) or last
        if show or ending or save:
            with status.pause(), phases("save"):
                saver(final=bool(ending) or last)
            saved = time.monotonic()
        if due(config.ema.snapshots, before, now, config.images) or last:
            with status.pause(), phases("save"):
                saver.snapshot()
        ending = bool(ending) and not last
        if show and not ending:
            with status.pause(), phases("samples"):
                ending = not show_samples(training, stop.is_set)
        if ending or last:
            vote.forget()
            return _tell_end(training, "preempted" if ending else "finished")


def deadline_of(run: RunConfig, started: float) -> float:
    """When `max_hours` is over, on the monotonic clock; infinity without such a limit."""
    return started + (run.max_hours or math.inf) * 3600


def _tell_end(training: Training, how: str) -> None:
    """The run has been saved where it stands."""
    training.log.status(how, **_place(training))
    if how == "finished":
        training.log.say(f"finished in {duration(training.state.seconds)} of training")
    else:
        training.log.say(f"stopped at {quantity(training.now)}; the same command goes on")


def _catch_up(training: Training, ending: Ending = bool) -> None:
    """Show the samples that belong to where the run stands, if it ended before it could."""
    state, config = training.state, training.config
    missed = due(config.preview.samples, state.shown, training.now, config.images)
    if missed or training.finished:
        if picture_of(training).exists():
            state.shown = training.now
        else:
            show_samples(training, ending)


def _step(training: Training) -> None:
    """One step, in smaller parts if memory runs out and that is allowed."""
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
        training.log.say(f"note      out of memory; going on with --micro-batch {size // 2}")
        training.log.record("micro batch", step=training.state.step, size=size // 2)


def one_step(training: Training, groups: tuple[Group, ...] | None = None) -> None:
    """One optimizer step, its counters and its average, by the plan or with the groups given."""
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
    phases.end_step()


def due(times: int, before: float, now: float, total: float) -> bool:
    """Whether one of `times` evenly spaced marks of the run lies in (before, now]."""
    return math.floor(now / total * times) > math.floor(before / total * times)


def _refusal(training: Training, order: Order, pixels: Verification) -> Stop:
    """Why the run must stop, for everybody to raise."""
    guard, team = training.stepper.guard, training.team
    if order == Order.STOP_DATA:
        problems = [text for text in team.gather(pixels.problem) if text]
        return team.stop(f"{problems[0]}; prepare the data again", code=23)
    if order == Order.STOP_SKIPS:
        return team.stop(
            f"{guard.config.max_skips} steps in a row had a loss or gradient that is not finite; "
            "the last checkpoint stands. Try a lower --optim.lr, or --precision fp32",
            code=21,
        )
    return team.stop(
        f"the gradient has exploded again after {guard.rollbacks} rollbacks; the last checkpoint "
        "stands. Try a lower --optim.lr, or --guard.rollbacks for one more",
        code=22,
    )


def _lost(training: Training, error: Exception) -> str:
    here, own = training.phases, training.team.place
    closed = "Connection" in str(error)
    return (
        f"{'another process has ended' if closed else 'another process does not answer'}; this is "
        f"rank {own.rank} in {here.broken_in or here.current} of step {here.step}; "
        f"{whereabouts(training.folder, own)}"
    )


def _too_large(training: Training) -> str:
    config = training.config
    half = max(1, (training.stepper.micro_batch or config.batch) // 2)
    return (
        f"out of memory; go on with --micro-batch {half}: the same training in smaller parts "
        "(or take a smaller network or resolution)"
    )


def _place(training: Training) -> dict[str, object]:
    return {"step": training.state.step, "images": training.now, "length": training.config.images}


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT, SIGTERM and SIGUSR1 set; a second SIGINT ends the program at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return
    interrupts = 0

    def handle(number: int, frame: object) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            raise KeyboardInterrupt
        event.set()

    old = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
