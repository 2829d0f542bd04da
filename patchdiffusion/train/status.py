"""Status lines and pictures of a run in progress."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from patchdiffusion.errors import Stop
from patchdiffusion.train.log import duration, quantity
from patchdiffusion.train.setup import Training

COPY_WARNING = 0.1


class Status:
    """Reports means and rates since the last report; time in `pause` does not count."""

    def __init__(self, training: Training):
        self.training = training
        self.peak = measured_peak(training.device, training.precision)
        self._mark()

    def _mark(self) -> None:
        state = self.training.state
        self._since = time.monotonic()
        self._before = (self.training.now, state.crops, state.flops)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out of the rates what happens inside."""
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start

    def report(self) -> None:
        """Print and record a status line; raises `Stop` after too many skipped steps in a row."""
        training, state, config = self.training, self.training.state, self.training.config
        means = state.meter.read()  # waits for the device
        seconds = max(time.monotonic() - self._since, 1e-9)
        now, crops, flops = self._before
        rate = (training.now - now) / seconds
        flops_rate = (state.flops - flops) / seconds
        state.seconds += seconds
        skipped = means.pop("skipped sum", 0.0)
        state.skipped += round(skipped)
        left = max(config.images - training.now, 0) / rate if rate else float("inf")
        sizes = {k[5:]: v for k, v in means.items() if k.startswith("loss ")}
        loss = means.get("loss")
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
            lr=training.stepper.optimizer.param_groups[0]["lr"],
            skipped=state.skipped,
            seconds=round(state.seconds, 3),
            images_per_second=rate,
            crops_per_second=(state.crops - crops) / seconds,
            flops_per_second=flops_rate,
            peak=self.peak,
        )
        each = " ".join(f"{size} {value:.3f}" for size, value in sizes.items())
        training.log.say(
            f"{quantity(training.now):>6}/{quantity(config.images)}"
            f"  loss {'none' if loss is None else f'{loss:.4f}'}  ({each})"
            f"  {quantity(rate)}/s  {quantity((state.crops - crops) / seconds)} crops/s"
            f"  {quantity(flops_rate)}FLOP/s ({flops_rate / self.peak:.0%} of peak)"
            + (f"  skipped {state.skipped}" if state.skipped else "")
            + f"  {duration(left)} left"
        )
        training.log.status("running", step=state.step, images=training.now, length=config.images)
        self._mark()
        in_a_row = int(training.stepper.longest_streak)
        if in_a_row >= config.optim.max_skips:
            raise Stop(
                f"{in_a_row} steps in a row had a loss or gradient that is not finite; the last "
                "checkpoint stands. Try a lower --optim.lr, or --precision fp32",
                code=21,
            )


def picture_of(training: Training) -> Path:
    """The file of the grid that belongs to where the run stands."""
    return training.folder / "samples" / f"{round(training.now):010d}.png"


def show_samples(training: Training) -> None:
    """Sample the grid, measure the held-out loss, and warn if the samples are copies."""
    log = training.log
    name = picture_of(training).name
    samples = training.watch.grid(training.averaged, picture_of(training))
    facts = training.watch.measure(training.averaged, samples)
    log.record("watch", step=training.state.step, images=training.now, picture=name, **facts)
    told = f"        samples/{name}"
    held = facts.get("held_out")
    if isinstance(held, dict):
        bands = " ".join(f"{band} {value:.3f}" for band, value in held["bands"].items())
        told += f"  held-out loss {held['loss']:.4f}  (by noise: {bands})"
    log.say(told)
    rate = facts.get("copy_rate")
    if isinstance(rate, float) and rate > COPY_WARNING:
        log.say(
            f"warning: {rate:.0%} of the samples are near copies of training images; stop "
            "earlier, or use more images, flips or dropout"
        )


def measured_peak(device: torch.device, precision: str, side: int = 1024) -> float:
    """FLOP/s of a square matrix product on this device, the yardstick of the status lines."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    side = side * 4 if device.type == "cuda" else side
    a = torch.full((side, side), 0.5, dtype=dtype, device=device)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        b = a @ a
        b[0, 0].item()  # waits for the device
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best
