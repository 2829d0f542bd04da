"""Runs `driver.py` here, in a process of its own, or as ranks, and looks at what is left."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import driver
import inject
import pytest
import tiny

from patchdiffusion import cli
from patchdiffusion.system.files import read_json, sha256, write_json

DRIVER = Path(__file__).with_name("driver.py")
SECONDS = float(os.environ.get("FAULT_SECONDS", "120"))
LONG: dict[str, Any] = {"config": {"images": 48.0}}  # 16 steps
SAVE_ALWAYS = {"save_minutes": 0.0}
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
PORTS = iter(range(15000 + 1000 * WORKER, 16000 + 1000 * WORKER))
NEWEST, OLDER = "step-0000000004", "step-0000000003"
FILES = (
    "averaged.safetensors",
    "manifest.json",
    "optimizer.safetensors",
    "state.json",
    "weights.safetensors",
)
"""Of a checkpoint."""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str

    @property
    def warnings(self) -> list[str]:
        """Lines that warn, but for that of the few images all these tests have."""
        lines = [x for x in self.out.splitlines() if x.startswith("warning: ")]
        return [line for line in lines if "images are few" not in line]

    @property
    def error(self) -> str:
        """The one line of a refusal."""
        lines = [x for x in self.err.splitlines() if x.startswith("patchdiffusion: error: ")]
        assert len(lines) <= 1, self.err
        assert "Traceback" not in self.err, self.err
        return lines[0].removeprefix("patchdiffusion: error: ") if lines else ""


def here(images: Path, out: Path, **spec: Any) -> Ended:
    """A run in this process, which is afterwards as it was; ten times as quick as another one."""
    told, wrong = io.StringIO(), io.StringIO()
    with (
        inject.undone(),
        mock.patch.dict(cli.COMMANDS),
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(wrong),
    ):
        code = driver.carry_out({"images": images, "out": out, **spec})
    return Ended(code, told.getvalue(), wrong.getvalue())


def free_port() -> int:
    """A port that nothing uses before the processes that are told of it.

    Those the system hands out are not: a connection of another test can be given the same one.
    """
    for port in PORTS:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is left")


def arguments(images: Path, out: Path, **spec: Any) -> list[str]:
    return [str(DRIVER), json.dumps({"images": str(images), "out": str(out), **spec})]


def environment(rank: int = 0, size: int = 1, port: int = 0) -> dict[str, str]:
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    if size > 1:
        own |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    return own


def start(images: Path, out: Path, *, size: int = 1, **spec: Any) -> list[subprocess.Popen[str]]:
    """Processes of one run, under way."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *arguments(images, out, **spec)],
            env=environment(rank, size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def script(
    code: str, *arguments: object, rank: int = 0, size: int = 1, port: int = 0
) -> subprocess.Popen[str]:
    """A Python program of its own, under way."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment(rank, size, port),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something that a process does."""
    deadline = time.monotonic() + SECONDS
    while not reached():
        assert time.monotonic() < deadline and process.poll() is None, finish([process])
        time.sleep(0.02)


def finish(processes: list[subprocess.Popen[str]]) -> list[Ended]:
    """Wait for the processes; none is left behind.

    One that hangs is told to end by SIGABRT, at which `driver.py` writes where it was.
    """
    ended = []
    try:
        for process in processes:
            try:
                out, err = process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGABRT)
                out, err = process.communicate(timeout=10)
            ended.append(Ended(process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return ended


def drive(images: Path, out: Path, *, size: int = 1, **spec: Any) -> list[Ended]:
    """Run to the end, whatever it is."""
    return finish(start(images, out, size=size, **spec))


def alone(images: Path, out: Path, **spec: Any) -> Ended:
    """One process."""
    return drive(images, out, **spec)[0]


def torchrun(images: Path, out: Path, *flags: str, size: int = 2, **spec: Any) -> Ended:
    """PyTorch's own launcher, with as many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}"]
    command += [f"--master-port={free_port()}", *flags, *arguments(images, out, **spec)]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return finish([process])[0]


def status(folder: Path) -> str:
    return read_json(folder / "run.json")["status"]


def checkpoints(folder: Path) -> list[int]:
    """Steps of all finished checkpoints."""
    found = (folder / "checkpoints").glob("step-*")
    return sorted(int(f.name[5:]) for f in found if f.name[5:].isdigit())


def reseal(folder: Path) -> None:
    """Rewrite the manifest of a checkpoint, so that it vouches for the files as they are."""
    files = {
        f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)}
        for f in folder.iterdir()
        if f.name != "manifest.json"
    }
    write_json(folder / "manifest.json", {"files": files})


def lines(file: Path) -> list[Any]:
    """The JSON values of a file, one a line."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def same_run(folder: Path, other: Path) -> None:
    """Losses as exact numbers, digests of weights and pictures."""
    assert tiny.history(folder) == tiny.history(other)
    assert tiny.weights(folder) == tiny.weights(other)
    assert tiny.digests(folder / "samples") == tiny.digests(other / "samples")


def near_run(folder: Path, other: Path) -> None:
    """Losses and gradient norms are equal but for rounding, of sums in another order."""
    for a, b in zip(tiny.history(folder), tiny.history(other), strict=True):
        assert a[4] == pytest.approx(b[4], rel=1e-5) and a[6] == pytest.approx(b[6], rel=1e-4)


def check_killed_pair(images: Path, folder: Path, **spec: Any) -> tuple[Path, Path]:
    """A run of two processes is that of one, and to the bit that of a pair killed and resumed.

    Returns the folders of one process and of two.
    """
    one, two, killed = (folder / name for name in ("one", "two", "killed"))
    kill = {"kind": "send", "name": "SIGKILL", "phase": "after", "step": 5}
    assert alone(images, one, **spec).code == 0
    for out, faults in ((two, []), (killed, [kill]), (killed, [])):
        ended = drive(images, out, size=2, **spec, faults=faults)
        assert [e.code for e in ended] == [-signal.SIGKILL if faults else 0] * 2, ended
    same_run(killed, two)
    near_run(one, two)
    return one, two
