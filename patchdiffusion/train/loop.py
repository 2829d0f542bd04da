"""The training loop: source -> feed -> plan -> crops -> objective -> optimizer -> average."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from patchdiffusion.errors import Stop, out_of_memory
from patchdiffusion.report import write_report
from patchdiffusion.train.config import RunConfig, TrainConfig
from patchdiffusion.train.log import duration, quantity
from patchdiffusion.train.resume import begin, save
from patchdiffusion.train.setup import Training, assemble, prepare_data
from patchdiffusion.train.status import Status, picture_of, show_samples


def train(config: TrainConfig, run: RunConfig | None = None) -> Path:
    """Train until the clock shows `config.images`; returns the folder of the run, with a report.

    The same call again goes on where the last one ended. Raises `ValueError` for a configuration
    or data that cannot work, before anything is written, and `Stop` when a run cannot go on.
    """
    run = run or RunConfig()
    if run.threads:
        torch.set_num_threads(run.threads)
    training = assemble(config, run, prepare_data(config.data))
    if run.dry_run:
        training.describe()
        return training.folder
    begin(training)
    if training.finished:
        if not picture_of(training).exists():  # it was killed after its last checkpoint
            show_samples(training)
        training.log.status("finished", **_place(training))
        training.log.say(f"{training.folder} is finished; a larger --images extends it")
        write_report(training.folder)
        return training.folder
    try:
        _loop(training)
    except Exception as error:
        training.log.status("failed", reason=str(error), **_place(training))
        if not out_of_memory(error):
            raise
        half = max(1, (config.micro_batch or config.batch) // 2)
        raise Stop(
            f"out of memory; go on with --micro-batch {half}: the same training in smaller "
            "parts (or take a smaller network or resolution)",
            code=26,
        ) from error
    training.log.say(f"report    {write_report(training.folder)}")
    return training.folder


def _loop(training: Training) -> None:
    config, watch = training.config, training.config.watch
    status = Status(training)
    deadline = time.monotonic() + (training.run.max_hours or math.inf) * 3600
    saved = time.monotonic()
    training.log.status("running", **_place(training))
    with stop_signals() as stop:
        while not training.finished:
            before = training.now
            one_step(training)
            now, last = training.now, training.finished
            early = training.state.step.bit_count() == 1  # steps 1, 2, 4, 8 ...: soon, then rarely
            if early or due(watch.status, before, now, config.images) or last:
                status.report()
            ending = stop.is_set() or time.monotonic() > deadline
            show = due(watch.samples, before, now, config.images) or last
            if show or ending or time.monotonic() - saved > training.run.save_minutes * 60:
                with status.pause():
                    save(training)
                saved = time.monotonic()
            if show:
                with status.pause():
                    show_samples(training)
            if ending and not last:
                training.log.status("stopped", **_place(training))
                training.log.say(f"stopped at {quantity(now)}; the same command goes on")
                return
    training.log.status("finished", **_place(training))
    training.log.say(f"finished in {duration(training.state.seconds)} of training")


def one_step(training: Training) -> None:
    """One optimizer step, its counters and its average."""
    config, state, before = training.config, training.state, training.now
    progress = min(before / config.images, 1.0)
    groups = training.plan.draw(seed=config.seed, step=state.step, progress=progress)
    training.stepper(groups, state.meter, step=state.step, position=state.crops, progress=progress)
    flops = sum(training.flops[group.size] * group.count for group in groups)
    state.advance(groups, training.canvas, flops)
    training.ema.update(config.ema.decay(training.now, training.now - before))


def due(times: int, before: float, now: float, total: float) -> bool:
    """Whether one of `times` evenly spaced marks of the run lies in (before, now]."""
    return math.floor(now / total * times) > math.floor(before / total * times)


def _place(training: Training) -> dict[str, object]:
    return {"step": training.state.step, "images": training.now, "length": training.config.images}


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second SIGINT ends the program at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return

    def handle(number: int, frame: object) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
