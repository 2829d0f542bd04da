"""Trackers, which get a copy of the log and the samples: TensorBoard, W&B, trackio.

`log.jsonl` is the complete record. An error of a tracker never stops a run.
"""

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

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, path: Path, step: int) -> None:
        with Image.open(path) as image:
            self._writer.add_image(
                "samples", np.asarray(image.convert("RGB")), step, dataformats="HWC"
            )

    def close(self) -> None:
        self._writer.close()


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
        self._run.log({"samples": self._api.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": lambda folder, config: WeightsAndBiases(folder, config, "trackio"),
}


class Trackers:
    """Several trackers, each of which is closed after its first error."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._open: dict[str, Tracker] = {}

    def start(self, names: tuple[str, ...], folder: Path, config: Mapping[str, Any]) -> None:
        """Open trackers by name."""
        for name in names:
            self._try(name, lambda name=name: self._add(name, folder, config))

    def _add(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._open[name] = TRACKERS[name](folder, config)

    def numbers(self, values: Mapping[str, float | None], step: int) -> None:
        """Send numbers of a step; None values are left out."""
        present = {key: value for key, value in values.items() if value is not None}
        for name, tracker in list(self._open.items()):
            self._try(name, lambda t=tracker: t.numbers(present, step))

    def picture(self, path: Path, step: int) -> None:
        """Send a picture of a step."""
        for name, tracker in list(self._open.items()):
            self._try(name, lambda t=tracker: t.picture(path, step))

    def close(self) -> None:
        """Close all trackers at the end of the run."""
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close)
        self._open.clear()

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracker does, training goes on
            self._open.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            self._say(f"warning: {name} is left out: {reason}")
