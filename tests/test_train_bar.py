"""The bar of a run on a terminal, and the time that is said to be left."""

import io
import math
from pathlib import Path

import pytest
import tiny

from patchdiffusion.train.log import RunLog
from patchdiffusion.train.save import Saver
from patchdiffusion.train.status import Status


class Terminal(io.StringIO):
    """A stream that is a terminal, until it is closed by the other side."""

    gone = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(5, "Input/output error")
        return super().write(text)


def test_lines_go_above_the_bar(tmp_path: Path) -> None:
    terminal = Terminal()
    log = RunLog(tmp_path, stream=terminal)
    log.open_bar(200.0, 50.0)
    log.say("a line")
    log.advance(150.0)
    log.now("loss .5")
    log.close_bar()
    log.say("the last line")
    shown = terminal.getvalue()
    assert "25%" in shown and "75%" in shown and "loss .5" in shown
    lines = [line.rpartition("\r")[2].strip() for line in shown.split("\n")]
    assert "a line" in lines and "the last line" in lines


def test_no_bar_in_a_file(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path, stream=stream)
    log.open_bar(200.0, 0.0)
    log.advance(100.0)
    log.now("loss .5")
    log.say("a line")
    assert stream.getvalue() == "a line\n"


def test_a_terminal_that_goes_away_ends_nothing(tmp_path: Path) -> None:
    terminal = Terminal()
    log = RunLog(tmp_path, stream=terminal)
    log.open_bar(200.0, 0.0)
    terminal.gone = True
    log.say("a line")
    log.advance(200.0)
    log.now("loss .5")
    log.close_bar()
    log.say("the last line")


def test_the_time_left_has_the_previews_in_it(images: Path, tmp_path: Path) -> None:
    config = tiny.change(tiny.config(images, steps=10), {"preview.samples": 4})
    training = tiny.training(config, tmp_path / "run")
    status = Status(training, Saver(training))
    assert status.seconds_left() == math.inf  # nothing is known yet
    ((_, step),) = training.plan.kinds(config.clock)
    training.pace.add([step], training.pace.operations(step) / 100)
    operations = training.forecast.left(0.0)
    previews = 4 * training.forecast.preview
    assert status.seconds_left() == pytest.approx((operations + previews) / 100)
    status.preview_seconds = 7.0  # measured: instead of its operations
    assert status.seconds_left() == pytest.approx(operations / 100 + 28)
