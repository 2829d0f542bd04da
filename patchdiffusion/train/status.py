"""Status lines and previews of a run in progress."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from patchdiffusion.patches import size_name
from patchdiffusion.system.device import peak_memory
from patchdiffusion.system.png import save_png
from patchdiffusion.train.guard import Event, describe
from patchdiffusion.train.log import REFERENCE, duration, quantity
from patchdiffusion.train.preview import Abandoned, Ending
from patchdiffusion.train.report import read_log, write_report
from patchdiffusion.train.save import Saver
from patchdiffusion.train.setup import Training
from patchdiffusion.train.timing import COMPUTE, Slow

REPORT_SECONDS = 60.0
"""Least time between two reports that are written during a run."""
MAX_EVENTS = 8  # printed per status line


class Status:
    """Reports means and rates since the last report, without the time spent in `pause`."""

    def __init__(self, training: Training, saver: Saver):
        self.training = training
        self.saver = saver
        self.peak = measured_peak(training.device, training.precision)
        self.preview_seconds: float | None = None
        """Duration of the last preview."""
        self._reported = time.monotonic()
        self._bar_text = ""
        self._mark()

    def _mark(self) -> None:
        state = self.training.state
        self._since = time.monotonic()
        self._before = (self.training.now, state.crops, state.flops)
        self.training.phases.read()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Context whose time does not count in the rates."""
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start

    def preview(self, ending: Ending) -> bool:
        """Make the preview and, on long runs, rewrite the report; False if it was abandoned."""
        training = self.training
        with self.pause(), training.phases("samples"):
            start = time.monotonic()
            complete = show_samples(training, ending)
            self.preview_seconds = time.monotonic() - start
            training.log.now(self._bar_text)
            # By rank 0 alone: nobody else may wait for it, since the clocks of ranks differ.
            if training.team.is_main and start - self._reported > REPORT_SECONDS:
                refresh_report(training)
                self._reported = start
        return complete

    def report(self) -> None:
        """Print and record a status line; all processes must call it."""
        training, state, config = self.training, self.training.state, self.training.config
        means = training.meter.read()  # waits for the device
        seconds = max(time.monotonic() - self._since, 1e-9)
        now, crops, flops = self._before
        rate = (training.now - now) / seconds
        crops_rate, flops_rate = (state.crops - crops) / seconds, (state.flops - flops) / seconds
        state.seconds += seconds
        training.pace.measure(seconds)
        state.skipped += round(means.pop("skipped sum", 0.0))
        left = self.seconds_left()
        sizes = {k[5:]: v for k, v in means.items() if k.startswith("loss ")}
        loss = means.get("loss")
        common = {"loss", "grad norm", "skipped", *(f"loss {size}" for size in sizes)}
        others = {k: v for k, v in means.items() if k not in common}  # of the objective
        phases, slow = training.phases.read()
        self._report_events()
        self._report_slow(slow)
        training.log.record(
            "status",
            step=state.step,
            images=training.now,
            crops=state.crops,
            equivalents=state.equivalents,
            flops=state.flops,
            loss=loss,
            sizes=sizes,
            grad_norm=means.get("grad norm"),
            lr=training.stepper.update.lr,
            skipped=state.skipped,
            seconds=round(state.seconds, 3),
            images_per_second=rate,
            crops_per_second=crops_rate,
            flops_per_second=flops_rate,
            rates=training.pace.rates,
            peak=self.peak * training.team.size,
            phases={name: round(spent, 4) for name, spent in phases.items()},
            memory=peak_memory(training.device),
            **({"scalars": others} if others else {}),
        )
        share = flops_rate / (self.peak * training.team.size)
        shown = {
            "train/loss": loss,
            "train/gradient norm": means.get("grad norm"),
            "train/learning rate": training.stepper.update.lr,
            "train/skipped steps": state.skipped,
            "progress/images seen": training.now,
            "speed/images per second": rate,
            "speed/share of peak (%)": 100 * share,
            "memory/peak (GiB)": peak_memory(training.device) / 2**30,
        }
        shown |= {f"loss by size/{size}": value for size, value in sizes.items()}
        shown |= {f"train/{name}": value for name, value in others.items()}
        training.log.trackers.numbers(shown, state.step)
        done = f"{quantity(training.now)}/{quantity(config.images)}"
        error = "none" if loss is None else f"{loss:.4f}"
        problem = f"  NOT SAVED: {self.saver.problem}" if self.saver.problem else ""
        rest = f"{duration(left)} left{self._next()}"
        if training.log.bar is None:
            training.log.say(
                f"{done:>11}  loss {error}{_by_size(sizes)}"
                + "".join(f"  {name} {value:.4f}" for name, value in others.items())
                + f"  {quantity(rate)}/s"
                + (f"  {quantity(crops_rate)} crops/s" if config.clock != "crops" else "")
                + f"  {share:.0%} of peak"
                + _waiting(phases)
                + (f"  skipped {state.skipped}" if state.skipped else "")
                + f"{problem}  {rest}"
            )
        else:  # what a person waits for, on one line of a terminal
            self._bar_text = f"{done}  loss {error}{problem}  {rest}"
            training.log.now(self._bar_text)
        training.log.status("running", step=state.step, images=training.now, length=config.images)
        self._mark()

    def seconds_left(self) -> float:
        """Seconds until the end of the run, with its previews; infinity if none can be told yet."""
        training, each = self.training, self.preview_seconds
        share, count = training.now / training.config.images, training.num_previews
        coming = max(count - math.floor(share * count), 0)
        if each is None and coming:
            each = training.pace.seconds_of(training.forecast.preview, training.canvas)
        return training.forecast.left(training.now, training.pace.seconds) + coming * (each or 0.0)

    def _next(self) -> str:
        """The next change of the crop sizes, if there is one."""
        stage = self.training.forecast.next_stage(self.training.now)
        return "" if stage is None else f"; {stage[1]} from {quantity(stage[0])}"

    def _report_events(self) -> None:
        """Print and record the events of the guard, with images and noise levels of their steps."""
        training = self.training
        events = training.stepper.guard.take_events()
        for event in events[:MAX_EVENTS]:
            training.log.say(f"guard     {describe(event)}")
            facts: dict[str, object] = {"loss": event.loss, "grad_norm": event.norm}
            facts["usual_norm"] = event.median
            facts |= {"what": event.what, "groups": _draws_of(training, event)}
            training.log.record("guard", step=event.step, **facts)
        if len(events) > MAX_EVENTS:
            training.log.say(f"guard     and {len(events) - MAX_EVENTS} more such steps")

    def _report_slow(self, slow: Slow | None) -> None:
        everywhere = self.training.team.gather(slow)
        worst = max(
            ((s, rank) for rank, s in enumerate(everywhere) if s is not None),
            key=lambda pair: pair[0].seconds,
            default=None,
        )
        if worst is not None:
            step, rank = worst
            where = f" on rank {rank}" if self.training.team.size > 1 else ""
            self.training.log.say(
                f"slow      step {step.step}{where} took {step.seconds:.1f} s, "
                f"{step.in_phase:.1f} s of it in {step.phase}"
            )


def _by_size(sizes: Mapping[str, float]) -> str:
    """The loss of each crop size, or the name of the only one."""
    if len(sizes) == 1:
        return f" ({next(iter(sizes))})"
    return f" ({' '.join(f'{size} {value:.3f}' for size, value in sizes.items())})"


def _waiting(phases: dict[str, float]) -> str:
    """Share of the time outside of the network and its update, if above 10 %."""
    total = sum(spent for name, spent in phases.items() if name not in ("save", "samples"))
    other = total - sum(phases.get(name, 0.0) for name in COMPUTE)
    return f"  {other / total:.0%} waiting" if total and other > 0.1 * total else ""


def _draws_of(training: Training, event: Event) -> list[dict[str, object]]:
    """Images and noise levels of an earlier step, drawn again."""
    step, position = event.cursor
    feed, config, first, draws_of_groups = training.stepper.feed, training.config, 0, []
    for group in event.groups:
        start = position + first
        images = feed.which(np.arange(start, start + group.count)).tolist()
        facts: dict[str, object] = {"size": list(group.size), "images": images}
        draws = feed.draws(group, step=step, first=first, chunk=range(group.count))
        levels = config.task.levels(config, draws, group.noise)
        if levels is not None:
            facts["sigma"] = [round(sigma, 6) for sigma in levels.tolist()]
        draws_of_groups.append(facts)
        first += group.count
    return draws_of_groups


def refresh_report(training: Training) -> str:
    """Write the report; returns its path, or "" if it cannot be written."""
    try:
        return str(write_report(training.folder))
    except (OSError, ValueError) as error:
        training.log.say(f"warning: the report cannot be written: {error}")
        return ""


def picture_of(training: Training) -> Path:
    """File of the preview at this point of the run."""
    return training.folder / "samples" / f"{round(training.now):010d}.png"


def is_shown(training: Training) -> bool:
    """True if the picture of the current step and its record, which is written last, exist."""
    return picture_of(training).exists() and _is_recorded(training)


def _is_recorded(training: Training) -> bool:
    try:
        records = read_log(training.folder)
    except OSError:
        return False
    return any(r["kind"] == "preview" and r.get("step") == training.state.step for r in records)


def show_samples(training: Training, ending: Ending = bool) -> bool:
    """Make the preview of the task: a picture and measurements of the averaged weights.

    Gives up when the run is to end, and returns False; the preview is made when the run is resumed.
    A picture that cannot be written is reported and left out.
    """
    log, path, problem = training.log, picture_of(training), ""
    log.now(f"drawing samples/{path.name} ...")
    try:
        shown = training.preview.show(training.averaged, ending)
    except Abandoned:
        log.say(f"        samples/{path.name} will be drawn when the run is resumed")
        return False
    try:
        if training.team.is_main:  # the picture last: it says that all is done
            for name, chart in shown.charts.items():
                save_png(path.with_name(f"{path.stem}-{name}.png"), chart, {})
            save_png(path, shown.picture, {**shown.notes, "software": "patchdiffusion"})
            if shown.reference is not None:
                save_png(training.folder / REFERENCE, shown.reference)
    except OSError as error:
        problem = str(error)
    state = training.state
    state.shown = training.now
    stage = _stage(training)
    if not _is_recorded(training):
        facts = {"stage": stage} if stage else {}
        facts |= {"images": training.now, "picture": path.name, **shown.facts}
        if shown.charts:
            facts["charts"] = [f"{path.stem}-{name}.png" for name in shown.charts]
        log.record("preview", step=state.step, **facts)
    if problem:
        log.say(f"warning: cannot write samples/{path.name}: {problem}")
    else:
        log.trackers.picture(path, state.step)
    if shown.numbers:
        log.trackers.numbers(
            {f"preview/{name}": value for name, value in shown.numbers.items()}, state.step
        )
    log.say(f"        samples/{path.name}{shown.text}" + (f"  ({stage})" if stage else ""))
    for warning in shown.warnings:
        log.say(f"warning: {warning}")
    return True


def _stage(training: Training) -> str:
    """Crop sizes so far, while a run has not trained on whole images; else ""."""
    forecast, now = training.forecast, training.now
    largest, stage = forecast.largest(now), forecast.next_stage(now)
    if stage is None or largest == training.canvas:
        return ""
    return f"crops up to {size_name(largest)} so far; {stage[1]} from {quantity(stage[0])}"


def measured_peak(device: torch.device, precision: str, side: int = 1024) -> float:
    """FLOP/s of a square matrix product on this device, as the peak for status lines."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    side = side * 4 if device.type == "cuda" else side
    a = torch.full((side, side), 0.5, dtype=dtype, device=device)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        b = a @ a
        b[0, 0].item()  # waits for the device
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best
