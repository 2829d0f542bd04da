"""R1 to R3 with random kills for some minutes: PATCHDIFFUSION_CHAOS_MINUTES, by default 10.

Prints its seed; PATCHDIFFUSION_CHAOS_SEED repeats the same kills.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import harness
import pytest
from harness import LONG, SAVE_ALWAYS, checkpoints, same_run, status
from test_interruptions import EVERY_THIRD, STAGES

from patchdiffusion.train import checkpoint

FINE = 0.05
"""Seconds of a step, so that kills by the clock fall into training."""


def fault(chance: random.Random) -> dict[str, Any] | None:
    """A kill at a random phase or stage of a save, or none: then the clock decides."""
    kind = chance.choice(["phase", "save", "clock"])
    if kind == "phase":
        phase = chance.choice(["data", "forward", "backward", "wait", "update", "average", "after"])
        send = {"kind": "send", "name": "SIGKILL", "phase": phase}
        return {**send, "step": chance.randrange(16)}
    if kind == "save":
        return {"kind": "die_in_save", "stage": chance.choice(STAGES), "save": chance.randrange(4)}
    return None


def attempt(images: Path, folder: Path, size: int, chance: random.Random) -> list[int]:
    """Start the run, and kill one of its processes unless it ends before; the exit codes."""
    planned, victim = fault(chance), chance.randrange(size)
    faults: list[dict[str, Any]] = [{"kind": "slow_down", "seconds": FINE}]
    if chance.random() < 0.5:
        faults.append(EVERY_THIRD)
    if planned is not None:
        faults.append({**planned, "rank": 0 if planned["kind"] == "die_in_save" else victim})
    run = {**SAVE_ALWAYS, "timeout_minutes": 0.5}
    processes = harness.start(images, folder, size=size, **LONG, run=run, faults=faults)
    if planned is None:
        time.sleep(chance.uniform(1.0, 8.0))
        processes[victim].kill()
    while all(process.poll() is None for process in processes):
        time.sleep(0.05)
    for process in processes:  # as launchers do with those that are left
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
    return [ended.code for ended in harness.finish(processes)]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_chaos(size: int, images: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    expected = request.getfixturevalue("steady" if size == 1 else "steady_pair")
    seed = int(os.environ.get("PATCHDIFFUSION_CHAOS_SEED", random.SystemRandom().getrandbits(32)))
    minutes = float(os.environ.get("PATCHDIFFUSION_CHAOS_MINUTES", "10")) / 2  # of each size
    print(f"PATCHDIFFUSION_CHAOS_SEED={seed}")
    chance, end = random.Random(seed), time.monotonic() + 60 * minutes
    runs = kills = 0
    while time.monotonic() < end:
        folder = tmp_path / f"run-{runs}"
        attempts, codes = 0, [1]
        while codes != [0] * size or status(folder) != "finished":
            attempts += 1
            assert attempts < 40, "the run does not get on"
            codes = attempt(images, folder, size, chance)
            assert set(codes) <= {0, 24, -signal.SIGKILL}, codes
            kills += -signal.SIGKILL in codes
            for step in checkpoints(folder):
                whole = folder / "checkpoints" / f"step-{step:010d}"
                assert checkpoint.fault(whole) is None
        same_run(folder, expected)
        shutil.rmtree(folder)
        runs += 1
        print(f"run {runs} equal after {attempts} attempts")
    print(f"{runs} runs, {kills} kills")
    assert kills
