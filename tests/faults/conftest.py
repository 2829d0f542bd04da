"""Undisturbed runs, which the disturbed ones must equal."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import harness
import pytest
import tiny

STEPS = 16


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.fault)


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """Signals end programs, as on a terminal, also if these tests run in the background."""
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGTERM: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def steady(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 16 steps that nothing disturbs; do not change it."""
    return tiny.run(tiny.config(images, steps=STEPS), tmp_path_factory.mktemp("runs") / "steady")


@pytest.fixture(scope="session")
def steady_pair(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two processes."""
    folder = tmp_path_factory.mktemp("runs") / "pair"
    ended = harness.drive(images, folder, size=2, config={"images": 48.0})
    assert [e.code for e in ended] == [0, 0], ended
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run of four steps, with a checkpoint of each, that may be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
