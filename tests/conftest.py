"""What all tests share: a cache of their own, one thread, a small data set."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch

from patchdiffusion.nets import own
from patchdiffusion.train import status
from patchdiffusion.train.report import write_report


@pytest.fixture(autouse=True, scope="session")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test sees the cache of the user; sums do not depend on the number of cores."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATCHDIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")  # of subprocesses
        # The yardstick of the status lines and the report take longer than these runs.
        patch.setattr(status, "measured_peak", lambda device, precision: 1e9)
        patch.setattr(status, "write_report", lambda folder: folder / "report.html")
        yield


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Networks that a test allows are known to it alone."""
    yield
    own.forget()


@pytest.fixture
def with_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write their report, which takes half a second."""
    monkeypatch.setattr(status, "write_report", write_report)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 images of 16 x 16 in two classes; do not change it."""
    return tiny.write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="session")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of four steps with checkpoints after each; copy it to change it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run = tiny.run(tiny.config(images), folder, save_minutes=0.0, keep=9)
    there = sorted(run.iterdir())
    yield run
    assert sorted(run.iterdir()) == there, "a test wrote to the run that all share"
