"""Trackers, which get a copy of the log and the samples: TensorBoard, W&B, trackio.

`log.jsonl` is the complete record. An error of a tracker never stops a run.
"""

import json
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from patchdiffusion.system.optional import require


class Tracker(Protocol):
    """Receiver of numbers and pictures."""

    def numbers(self, values: Mapping[str, float], step: int) -> None: ...
    def picture(self, path: Path, step: int) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in the folder of the run: `tensorboard --logdir runs`."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        require("tensorboard", extra="log")
        self._writer = require("torch.utils.tensorboard", extra="log").SummaryWriter(str(folder))
        content = json.dumps(dict(config), indent=2)
        self._writer.add_text("configuration", "".join(f"    {x}\n" for x in content.splitlines()))
        self._settings(config)

    def _settings(self, config: Mapping[str, Any]) -> None:
        """Columns of the tab of hyperparameters, beside the last values of some numbers."""
        summary = require("torch.utils.tensorboard.summary", extra="log")
        shown = dict.fromkeys(("train/loss", "preview/held-out loss"), 0.0)
        for record in summary.hparams(flat(config), shown):
            self._writer.file_writer.add_summary(record)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # every few seconds at most; a killed run keeps what is written

    def picture(self, path: Path, step: int) -> None:
        with Image.open(path) as image:
            self._writer.add_image(
                "samples", np.asarray(image.convert("RGB")), step, dataformats="HWC"
            )
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def flat(config: Mapping[str, Any], outer: str = "") -> dict[str, str | bool | int | float]:
    """Values of a nested configuration by names such as optim.lr; lists as text, None as none."""
    values: dict[str, str | bool | int | float] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{outer}{name}.")
        elif isinstance(value, bool | int | float | str):
            values[outer + name] = value
        else:
            values[outer + name] = "none" if value is None else json.dumps(value)
    return values


class WeightsAndBiases:
    """Run of wandb, or of trackio, which has the same interface."""

    def __init__(self, folder: Path, config: Mapping[str, Any], module: str = "wandb"):
        self._api = require(module, extra="log")
        where = {"dir": str(folder)} if module == "wandb" else {}
        name = folder.resolve().name
        self._run = self._api.init(
            project="patchdiffusion", name=name, config=dict(config), **where
        )

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, path: Path, step: int) -> None:
        image = self._api.Image(str(path), caption=f"{path.stem.lstrip('0') or 0} images seen")
        self._run.log({"samples": image}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": lambda folder, config: WeightsAndBiases(folder, config, "trackio"),
}


PATIENCE = 300.0  # seconds that one action of a tracker may take
LAST_PATIENCE = 30.0  # seconds that the end of a run waits for what is under way


class Worker:
    """Tracker in a thread of its own, so that the run does not wait for one that hangs."""

    def __init__(self, make: Callable[[], Tracker]):
        self.problem = ""
        """Reason why it ended before it was closed, or ""."""
        self._since: float | None = None
        self._actions: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(make,), daemon=True)
        self._thread.start()

    def _work(self, make: Callable[[], Tracker]) -> None:
        try:
            self._since = time.monotonic()
            tracker = make()
            while (action := self._next()) is not None:
                action(tracker)
            tracker.close()
        except BaseException as error:  # whatever it raises, also SystemExit
            self.problem = " ".join(str(error).split()) or type(error).__name__

    def _next(self) -> Callable[[Tracker], None] | None:
        self._since = None
        action = self._actions.get()
        self._since = time.monotonic()
        return action

    def do(self, action: Callable[[Tracker], None] | None) -> None:
        """Queue an action; None closes the tracker."""
        self._actions.put(action)

    def hangs(self, patience: float) -> bool:
        """True if the current action has taken more than `patience` seconds."""
        since = self._since
        return self._thread.is_alive() and since is not None and time.monotonic() - since > patience

    def join(self, seconds: float) -> bool:
        """Wait until it is closed, at most `seconds`; returns whether it is."""
        self._thread.join(seconds)
        return not self._thread.is_alive()


class Trackers:
    """Several trackers, each of which is closed after its first error."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._open: dict[str, Worker] = {}

    def start(self, names: tuple[str, ...], folder: Path, config: Mapping[str, Any]) -> None:
        """Open trackers by name."""
        for name in names:
            self._open[name] = Worker(lambda name=name: TRACKERS[name](folder, config))

    def numbers(self, values: Mapping[str, float | None], step: int) -> None:
        """Send numbers of a step; None values are left out."""
        present = {key: value for key, value in values.items() if value is not None}
        self._do(lambda tracker: tracker.numbers(present, step))

    def picture(self, path: Path, step: int) -> None:
        """Send a picture of a step."""
        self._do(lambda tracker: tracker.picture(path, step))

    def close(self) -> None:
        """Close all trackers at the end of the run; unfinished ones are dropped after a while."""
        self._do(None)
        end = time.monotonic() + LAST_PATIENCE
        for name, worker in self._open.items():
            if not worker.join(max(end - time.monotonic(), 0)):
                self._leave_out(name, f"it has not ended within {LAST_PATIENCE:g} s")
            elif worker.problem:
                self._leave_out(name, worker.problem)
        self._open.clear()

    def _do(self, action: Callable[[Tracker], None] | None) -> None:
        for name, worker in list(self._open.items()):
            worker.do(action)
            if worker.problem or worker.hangs(PATIENCE):
                del self._open[name]
                self._leave_out(name, worker.problem or f"it hangs for more than {PATIENCE:g} s")

    def _leave_out(self, name: str, reason: str) -> None:
        self._say(f"warning: {name} is left out: {reason}")
