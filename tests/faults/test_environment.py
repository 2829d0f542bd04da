"""O: loggers, clocks, memory, and the folder that a run is started from."""

import io
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pytest
import tiny
from commands import names
from harness import LONG, checkpoints, drive, here, same_run, status

from patchdiffusion.train import trackers
from patchdiffusion.train.log import RunLog
from patchdiffusion.train.report import read_log

# ---- O1: loggers ----


@pytest.mark.parametrize("name", ["log.jsonl", "run.json", "samples", "report.html"])
def test_o1_a_file_that_cannot_be_written(
    name: str, images: Path, finished: Path, tmp_path: Path, with_report: None
) -> None:
    folder = tmp_path / "run"
    fault = {"kind": "block", "path": str(folder / name), "phase": "data", "step": 1}
    if name == "samples":
        fault = {"kind": "forbid", "path": str(folder / name)}
    ended = here(images, folder, faults=[fault])
    assert (ended.code, ended.error) == (0, "")
    told = ended.warnings
    if name in ("log.jsonl", "run.json"):
        assert told.pop().startswith("warning: the report cannot be written: ")
    assert len(told) == 1 and name in told[0], told
    assert tiny.weights(folder) == tiny.weights(finished)
    if name != "run.json":
        assert status(folder) == "finished"


class Wrong:
    """A tracker of which one method fails, always."""

    calls: list[str]
    broken = ""
    reason = ""

    def __init__(self, folder: Path, config: object):
        self._do("open")

    def numbers(self, values: object, step: int) -> None:
        self._do("numbers")

    def picture(self, path: Path, step: int) -> None:
        self._do("picture")

    def close(self) -> None:
        self._do("close")

    def _do(self, name: str) -> None:
        Wrong.calls.append(name)
        if name == Wrong.broken:
            PROBLEMS[Wrong.reason]()


def unreachable() -> None:
    raise ConnectionError("the network\nis unreachable")


def interrupted() -> None:
    raise KeyboardInterrupt


PROBLEMS: dict[str, Callable[[], object]] = {
    "the network is unreachable": unreachable,
    "3": lambda: sys.exit(3),
    "KeyboardInterrupt": interrupted,
    "0.2 s": lambda: threading.Event().wait(600),
}
"""Each with what is said about it."""


@pytest.mark.parametrize("broken", ["open", "numbers", "picture", "close"])
@pytest.mark.parametrize("reason", PROBLEMS)
def test_o1_a_tracker_that_fails(
    reason: str,
    broken: str,
    images: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Wrong)
    monkeypatch.setattr(trackers, "LAST_PATIENCE", 0.2 if reason == "0.2 s" else 30.0)
    Wrong.calls, Wrong.broken, Wrong.reason = [], broken, reason
    ended = here(images, tmp_path / "run", run={"track": ("wandb",)})
    assert ended.code == 0
    told = ended.warnings
    assert len(told) == 1 and names(told[0], "wandb", reason)
    assert Wrong.calls.count(broken) == 1
    same_run(tmp_path / "run", finished)


def test_o1_a_tracker_that_hangs_is_left_out_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    go, told = threading.Event(), list[str]()

    class Slow(Wrong):
        def _do(self, name: str) -> None:
            go.wait()

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Slow)
    monkeypatch.setattr(trackers, "PATIENCE", 0.0)
    several = trackers.Trackers(told.append)
    several.start(("wandb",), Path(), {})
    (worker,) = several._open.values()
    while not worker.hangs(0.0):
        pass
    several.numbers({}, 1)
    several.numbers({}, 2)
    assert len(told) == 1 and not several._open
    go.set()


def test_o1_trackers_that_are_not_installed(
    images: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str, *, extra: str) -> Any:
        raise ImportError(f"{name} is needed: pip install '.[{extra}]'")

    monkeypatch.setattr(trackers, "require", absent)
    names = ("tensorboard", "wandb", "trackio")
    ended = here(images, tmp_path / "run", run={"track": names})
    assert ended.code == 0
    told = ended.warnings
    assert [x.split()[1] for x in told] == list(names)
    assert all("pip install '.[log]'" in x for x in told)
    same_run(tmp_path / "run", finished)


def test_o1_nobody_listens(tmp_path: Path) -> None:
    """`patchdiffusion train ... | head`, or a terminal that was closed."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    gone = io.StringIO()
    gone.close()
    for stream in (Closed(), gone):
        log = RunLog(tmp_path, stream=stream)
        log.say("hello")
        log.record("status", step=1)
        log.status("running")
    assert len(read_log(tmp_path)) == 2 and status(tmp_path) == "running"


# ---- O2: clocks ----


def test_o2_the_clock_jumps(images: Path, steady: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    jumps = [(3, -3600.0), (6, 3600.0), (9, 7200.0), (12, -1e9)]
    faults = [{"kind": "jump", "seconds": s, "phase": "data", "step": k} for k, s in jumps]
    ended = here(images, folder, **LONG, run={"max_hours": 0.5, "save_minutes": 30}, faults=faults)
    assert (ended.code, status(folder)) == (0, "finished")
    assert checkpoints(folder) == [16]  # none was due
    records = [r for r in read_log(folder) if r["kind"] == "status"]
    times = [r["time"] for r in records]
    assert max(times) - min(times) > 3600  # it has jumped
    for record in records:
        for name in ("images_per_second", "crops_per_second", "flops_per_second"):
            assert 0.01 < record[name] < 1e15
        assert 0 <= record["seconds"] < 600 and min(record["phases"].values()) >= 0
    left = [x.split("  ")[-1] for x in ended.out.splitlines() if x.endswith(" left")]
    assert len(left) > 1  # nothing is known on the first line
    assert not any("-" in x or "?" in x or "h" in x or "d" in x for x in left[1:]), left
    same_run(folder, steady)


# ---- O3: memory ----


def out_of_memory(phase: str, step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "raise_in", "error": "memory", "phase": phase, "step": step, **more}


def test_o3_out_of_memory(images: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = here(images, folder, run={"save_minutes": 0.0}, faults=[out_of_memory("backward", 2)])
    assert (ended.code, status(folder)) == (26, "failed")
    assert names(ended.error, "out of memory", "--micro-batch 2")
    assert checkpoints(folder) == [1, 2]
    again = here(images, folder, config={"micro_batch": 2})
    assert again.code == 0 and "resume    at step 2" in again.out
    close(folder, finished)


def close(folder: Path, other: Path) -> None:
    """Losses to rounding."""
    losses = [[float(str(x[4])) for x in tiny.history(f)] for f in (folder, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def draws(folder: Path) -> list[Any]:
    """What was drawn for each crop, without what was drawn twice."""
    return sorted({str(x): x for x in harness.lines(folder / "draws-0.jsonl")}.values())


@pytest.mark.parametrize("phase", ["data", "forward", "backward", "wait"])
def test_o3_auto_micro_batch(phase: str, images: Path, steady: Path, tmp_path: Path) -> None:
    """Wherever it happens, what the failed attempt has done to the gradients is forgotten."""
    folder, straight = tmp_path / "run", tmp_path / "straight"
    record = {"kind": "record_draws"}
    faults = [record, out_of_memory(phase, 2), out_of_memory(phase, 5)]
    ended = here(images, folder, **LONG, run={"auto_micro_batch": True}, faults=faults)
    assert ended.code == 0, ended.err
    told = [x for x in ended.out.splitlines() if x.startswith("note      out of memory")]
    assert [x.split()[-1] for x in told] == ["2", "1"]
    assert [r["size"] for r in read_log(folder) if r["kind"] == "micro batch"] == [2, 1]
    assert here(images, straight, **LONG, faults=[record]).code == 0
    assert draws(folder) == draws(straight)
    close(folder, steady)


def test_o3_on_two_ranks(images: Path, tmp_path: Path) -> None:
    """One of them would have to tell the other in the middle of a step: both end."""
    fault = out_of_memory("forward", 2, rank=1)
    run = {"auto_micro_batch": True, "timeout_minutes": 0.2}
    ended = drive(images, tmp_path / "run", size=2, run=run, faults=[fault])
    assert [e.code for e in ended] == [24, 26], ended
    assert names(ended[1].error, "rank 1", "--micro-batch 2")
    assert names(ended[0].error, "another process")


# ---- O4: where a run is started from ----


def test_o4_a_thread(images: Path, finished: Path, tmp_path: Path) -> None:
    """Signals stay what they are: only the main thread may handle them."""
    done: list[Path] = []
    thread = threading.Thread(
        target=lambda: done.append(tiny.run(tiny.config(images), tmp_path / "run"))
    )
    thread.start()
    thread.join(60)
    assert done == [tmp_path / "run"]
    same_run(tmp_path / "run", finished)


BEGIN = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
import torch, tiny
from patchdiffusion.train import loop, status
status.measured_peak = lambda device, precision: 1e9
status.write_report = lambda folder: folder
images, out = map(Path, sys.argv[1:3])
"""

FORK = """
import multiprocessing
torch.set_num_threads(2)
for _ in range(3):
    torch.randn(600, 600) @ torch.randn(600, 600)
    torch.nn.functional.conv2d(torch.randn(8, 8, 64, 64), torch.randn(8, 8, 3, 3))
tiny.run(tiny.config(images), out / "before")
child = multiprocessing.get_context(KIND).Process(
    target=tiny.run, args=(tiny.config(images), out / "run")
)
child.start()
child.join(60)
alive = child.is_alive()
child.kill()
sys.exit("it hangs" if alive else child.exitcode)
"""

NOTEBOOK = """
import asyncio, code
cells = [
    "from patchdiffusion import RunConfig, train",
    "config = tiny.config(images)",
    "path = train(config, RunConfig(out=out / 'run'))",
    "print('shown', path)",
]
interpreter = code.InteractiveInterpreter(globals())

async def kernel():
    for cell in cells:
        assert not interpreter.runsource(cell)
        await asyncio.sleep(0)

asyncio.run(kernel())
"""


@pytest.mark.parametrize(
    "program",
    [
        "torch.set_num_threads(1)\ntiny.run(tiny.config(images), out / 'run')",
        FORK.replace("KIND", "'fork'"),
        FORK.replace("KIND", "'spawn'"),
        NOTEBOOK,
    ],
    ids=["script", "fork", "spawn", "notebook"],
)
def test_o4_a_program(program: str, images: Path, finished: Path, tmp_path: Path) -> None:
    paths = (Path(tiny.__file__).parent, Path(__file__).parent)
    (ended,) = harness.finish([harness.script(BEGIN + program, images, tmp_path, *paths)])
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err, ended.err
    assert status(tmp_path / "run") == "finished"
    same_run(tmp_path / "run", finished)
