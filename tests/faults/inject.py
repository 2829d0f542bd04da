"""What can go wrong, by name. Each function arranges for one fault in this process."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tiny
import torch
from environment import (
    block,
    cut,
    damage_pack,
    fill_disk,
    forbid,
    jump,
    limit_file_size,
    raise_in,
    remove,
    seize,
)
from moments import at, once_ever

from patchdiffusion.data.feed import Feed
from patchdiffusion.data.pack import Pack
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.losses import Batch, DenoisingLoss, LossOut
from patchdiffusion.rng import Draws
from patchdiffusion.system.place import place
from patchdiffusion.train import checkpoint, loop, samples, setup
from patchdiffusion.train.timing import Phases

# ---- Signals, hangs, deaths ----


def send(name: str, phase: str, step: int, mark: str | None = None, times: int = 1) -> None:
    """A signal to this process."""

    def act() -> None:
        for _ in range(times):
            os.kill(os.getpid(), getattr(signal, name))

    at(phase, step, once_ever(mark, act))


def sleep(seconds: float, phase: str, step: int, mark: str | None = None) -> None:
    at(phase, step, once_ever(mark, lambda: time.sleep(seconds)))


def slow_down(seconds: float) -> None:
    """Every step takes longer."""
    end = Phases.end_step

    def ended(self: Phases) -> float:
        time.sleep(seconds)
        return end(self)

    Phases.end_step = ended


def die_in_save(stage: str, save: int, mark: str | None = None) -> None:
    """SIGKILL after a stage of a save; saves count from 0."""
    kill = once_ever(mark, lambda: os.kill(os.getpid(), signal.SIGKILL))
    saves = [-1]
    calls = [0]
    save_file, write_json, write_bytes = (
        checkpoint.save_file,
        checkpoint.write_json,
        checkpoint.write_bytes,
    )
    whole = checkpoint.save

    def counted(*args: Any, **kwargs: Any) -> Any:
        saves[0] += 1
        calls[0] = 0
        return whole(*args, **kwargs)

    def after(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if saves[0] == save and name == "rename" and stage == "rename":
                kill()  # the pointer is not written yet
            result = original(*args, **kwargs)
            calls[0] += 1
            if saves[0] == save:
                reached = {
                    "file": stage == f"file {calls[0]}",
                    "json": stage == "manifest" and str(args[0]).endswith("manifest.json"),
                    "rename": stage == "pointer",
                }[name]
                if reached:
                    kill()
            return result

        return call

    checkpoint.save = counted
    checkpoint.save_file = after(save_file, "file")
    checkpoint.write_json = after(write_json, "json")
    checkpoint.write_bytes = after(write_bytes, "rename")


def send_in(name: str, where: str, time: int) -> None:
    """A signal in the middle of the n-th sampling, evaluation or saving; times count from 0."""
    _act_in(where, time, lambda: os.kill(os.getpid(), getattr(signal, name)))


def cut_in(path: str, where: str, time: int) -> None:
    """A file loses all but its first byte in the middle of the same."""
    _act_in(where, time, lambda: os.truncate(path, 1))


def _act_in(where: str, time: int, action: Callable[[], None]) -> None:
    owner, method = {
        "samples": (samples, "sample"),
        "evaluation": (samples, "held_out_losses"),
        "save": (checkpoint, "save_file"),
    }[where]
    original, calls = getattr(owner, method), [-1]

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == time:
            action()
        return original(*args, **kwargs)

    setattr(owner, method, call)


def save_every(steps: int) -> None:
    """Most saves that are due are left out."""
    write = loop.Saver.__call__

    def call(self: Any, *, final: bool = False) -> None:
        if final or self.training.finished or self.training.state.step % steps == 0:
            write(self, final=final)

    loop.Saver.__call__ = call


def record_draws() -> None:
    """A file with everything that is drawn for each crop of each step."""
    original, level = Feed.batch, DenoisingLoss.levels
    folder: list[Path] = []
    begin = loop._loop

    def begun(training: Any, *args: Any) -> None:
        folder.append(training.folder)
        begin(training, *args)

    def batch(self: Feed, group: Any, **kwargs: Any) -> Any:
        made, draws = original(self, group, **kwargs)
        facts = [
            draws.index,
            made.index,
            made.flip.long(),
            level(DenoisingLoss(), draws, made.noise),
            draws.keys("noise"),
            draws.keys("network"),
        ]
        columns = [value.tolist() for value in facts] + [made.box.tolist()]
        with open(folder[0] / f"draws-{place().rank}.jsonl", "a") as file:
            for row in zip(*columns, strict=True):
                file.write(json.dumps([draws.step, *row]) + "\n")
        return made, draws

    loop._loop, Feed.batch = begun, batch


# ---- Numbers ----


def scale_loss(
    factor: float,
    steps: list[int] | None = None,
    positions: tuple[int, int] | None = None,
    gradient_only: bool = False,
) -> None:
    """Multiply the loss of whole steps, or of crops between two positions of the sequence."""
    usual = DenoisingLoss.__call__
    where: list[int] = [0]
    stepper = setup.Stepper.__call__

    def step(self: Any, *args: Any, cursor: tuple[int, int], **kwargs: Any) -> None:
        where[0] = cursor[1]
        stepper(self, *args, cursor=cursor, **kwargs)

    def loss(self: DenoisingLoss, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        out = usual(self, denoiser, batch, draws)
        wrong = torch.zeros(len(draws.index), dtype=torch.bool)
        if steps is not None:
            wrong |= draws.step in steps
        if positions is not None:
            place = where[0] + draws.index
            wrong |= (place >= positions[0]) & (place < positions[1])
        value = out.per_sample * torch.where(wrong, factor, 1.0)
        if gradient_only:  # the value stays what it was, and its derivative is infinite
            zero = (out.per_sample - out.per_sample.detach()) * 1e6
            value = out.per_sample + zero * torch.where(wrong, 3e38, 0.0)
        return dataclasses.replace(out, per_sample=value)

    DenoisingLoss.__call__ = loss
    setup.Stepper.__call__ = step


def poke(what: str, step: int, value: float = float("nan")) -> None:
    """Write a number into one tensor of the run after a step: weights, averaged or optimizer."""
    original = loop.one_step

    def one_step(training: Any, groups: Any = None) -> None:
        original(training, groups)
        if training.state.step == step:
            (optimizer,) = training.stepper.update.optimizers
            target = {
                "weights": lambda: next(iter(training.network.parameters())),
                "averaged": lambda: training.ema.averages["averaged"][0],
                "optimizer": lambda: next(iter(optimizer.state.values()))["exp_avg"],
            }[what]()
            with torch.no_grad():
                target.view(-1)[0] = value

    loop.one_step = one_step


# ---- Surroundings ----


def change_config(**changes: Any) -> None:
    """This process is asked for another run than the others."""
    original = tiny.change
    tiny.change = lambda config, given: original(config, {**given, **changes})


def other_data(path: str) -> None:
    """This process finds other images where the others find theirs."""
    prepare = loop.prepare_data
    loop.prepare_data = lambda data: prepare(dataclasses.replace(data, path=path))


FAULTS: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (
        send,
        send_in,
        cut_in,
        save_every,
        record_draws,
        sleep,
        slow_down,
        die_in_save,
        scale_loss,
        poke,
        raise_in,
        remove,
        seize,
        block,
        jump,
        forbid,
        limit_file_size,
        fill_disk,
        cut,
        damage_pack,
        change_config,
        other_data,
    )
}

OWNERS = (
    *(Phases, Pack, Feed, DenoisingLoss, loop.Saver, setup.Stepper),
    *(checkpoint, loop, samples, tiny, shutil, os, time),
)
"""Classes and modules in which the faults above replace something."""


@contextlib.contextmanager
def undone() -> Iterator[None]:
    """At the end everything that faults have replaced is what it was."""
    before = [(owner, dict(vars(owner))) for owner in OWNERS]
    try:
        yield
    finally:
        for owner, values in before:
            for name, value in values.items():
                if vars(owner)[name] is not value:
                    setattr(owner, name, value)
