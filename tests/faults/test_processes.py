"""C: processes that hang, die or disagree, and every way to start them."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import pytest
import tiny
import torch
from commands import names
from harness import (
    LONG,
    SAVE_ALWAYS,
    alone,
    check_killed_pair,
    checkpoints,
    drive,
    near_run,
    same_run,
    status,
    torchrun,
)
from safetensors.torch import load_file

from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.routing import Mask, Route, Sprint
from patchdiffusion.system.serialize import encode


def test_c1_a_rank_hangs(images: Path, tmp_path: Path) -> None:
    fault = {"kind": "sleep", "seconds": 600, "phase": "data", "step": 3, "rank": 1}
    processes = harness.start(
        images, tmp_path / "run", size=2, **LONG, run={"timeout_minutes": 0.05}, faults=[fault]
    )
    out, err = processes[0].communicate(timeout=60)
    ended = harness.Ended(processes[0].returncode, out, err)
    processes[1].kill()
    harness.finish(processes[1:])
    assert ended.code == 24
    assert names(ended.error, "another process", "rank 0")
    told = re.search(r"rank 1 \(process \d+ on .*\) for (\d+) s in data of step 3", ended.error)
    assert told and 1 <= int(told[1]) < 10, ended.error  # 3 s; 18 s until the second step
    assert status(tmp_path / "run") == "failed"


def test_c1_nobody_comes(images: Path, tmp_path: Path) -> None:
    run = {"timeout_minutes": 0.005}  # six times as long until the second step
    process = harness.start(images, tmp_path / "run", size=2, **LONG, run=run)
    process[1].kill()
    (first, _) = harness.finish(process)
    assert first.code == 24
    assert "1/2 clients joined" in first.error


def test_c2_another_configuration(images: Path, tmp_path: Path) -> None:
    fault = {"kind": "change_config", "rank": 1, "optim.lr": 0.5}
    ended = drive(images, tmp_path / "run", size=2, **LONG, faults=[fault])
    assert [e.code for e in ended] == [2, 2], ended
    assert names(ended[0].error, "rank 1", "optim.lr", 0.5, 0.01)
    assert ended[1].error == ""  # one of them tells
    assert not (tmp_path / "run").exists()


def test_c2_another_plan(images: Path, tmp_path: Path) -> None:
    fault = {"kind": "change_config", "rank": 1, "patches.loss_norm": "mean"}
    ended = drive(images, tmp_path / "run", size=2, **LONG, faults=[fault])
    assert [e.code for e in ended] == [2, 2], ended
    assert names(ended[0].error, "rank 1", "patches.loss_norm")


def test_c2_other_data(images: Path, tmp_path: Path) -> None:
    """The same path holds something else on another machine."""
    other = tiny.write_images(tmp_path / "images", 39)
    fault = {"kind": "other_data", "rank": 1, "path": str(other)}
    ended = drive(images, tmp_path / "run", size=2, **LONG, faults=[fault])
    assert [e.code for e in ended] == [2, 2], ended
    assert names(ended[0].error, "rank 1", "another data")
    assert not (tmp_path / "run").exists()


def test_c2_other_weights(images: Path, tmp_path: Path) -> None:
    fault = {"kind": "poke", "what": "weights", "step": 4, "value": 0.5, "rank": 1}
    ended = drive(images, tmp_path / "run", size=2, **LONG, run=SAVE_ALWAYS, faults=[fault])
    assert [e.code for e in ended] == [24, 24], ended
    assert names(ended[0].error, "drifted apart", "rank 1") and "weights/" in ended[0].error
    assert checkpoints(tmp_path / "run") == [2, 3]


def test_c3_rank_0_dies_while_saving(images: Path, steady_pair: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    mark = str(tmp_path / "killed")
    fault = {"kind": "die_in_save", "stage": "file 2", "save": 4, "rank": 0, "mark": mark}
    ended = torchrun(images, folder, "--max-restarts=1", **LONG, run=SAVE_ALWAYS, faults=[fault])
    assert ended.code == 0, ended.err
    assert "resume    at step 5" in ended.out  # the fifth save was that of step 6
    same_run(folder, steady_pair)


def test_c4_a_batch_that_cannot_be_divided(images: Path, tmp_path: Path) -> None:
    ended = drive(images, tmp_path / "run", size=3, **LONG)
    assert [e.code for e in ended] == [2, 2, 2], ended
    assert names(ended[0].error, "batch is 4", "3 processes", "1, 2, 4")
    assert not (tmp_path / "run").exists()


def test_c4_fewer_processes_than_before(images: Path, steady: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stop = {"kind": "send", "name": "SIGTERM", "phase": "after", "step": 5}
    assert torchrun(images, folder, **LONG, faults=[stop]).code == 0
    assert status(folder) == "preempted"
    ended = torchrun(images, folder, size=1, **LONG)
    assert ended.code == 0, ended.err
    assert "processes 2 -> 1" in ended.out
    got, expected = ([float(str(x[4])) for x in tiny.history(f)] for f in (folder, steady))
    assert got == pytest.approx(expected, rel=1e-5)


# ---- Divided weights ----


def test_shards_and_replicas_share_checkpoints(
    images: Path, steady: Path, steady_pair: Path, tmp_path: Path
) -> None:
    """replicas -> shards -> one process, and the numbers of a run that was never interrupted."""
    folder = tmp_path / "run"
    stops = [{"kind": "send", "name": "SIGTERM", "phase": "after", "step": s} for s in (4, 9)]
    first = drive(images, folder, size=2, **LONG, faults=stops[:1])
    second = drive(images, folder, size=2, **LONG, run={"shard": True}, faults=stops[1:])
    third = drive(images, folder, **LONG)
    assert [e.code for e in (*first, *second, *third)] == [0] * 5, (first, second, third)
    assert "sharded False -> True" in second[0].out
    assert "2 processes, sharded" in second[0].out
    got, expected = ([float(str(x[4])) for x in tiny.history(f)] for f in (folder, steady))
    assert got == pytest.approx(expected, rel=1e-5)


def test_a_sharded_run_is_exact(images: Path, tmp_path: Path) -> None:
    straight, folder = tmp_path / "straight", tmp_path / "run"
    sharded = {"run": {"shard": True}}
    stop = {"kind": "send", "name": "SIGTERM", "phase": "after", "step": 5, "rank": 0}
    for out, faults in ((straight, []), (folder, [stop]), (folder, [])):
        ended = drive(images, out, size=2, **LONG, **sharded, faults=faults)
        assert [e.code for e in ended] == [0, 0], ended
    same_run(folder, straight)


def test_a_learned_log_variance_is_the_same_everywhere(images: Path, tmp_path: Path) -> None:
    """One process, replicas, and shards that are interrupted."""
    spec: dict[str, Any] = {"config": {"images": 24.0, "objective.log_variance": 8}}
    stop = {"kind": "send", "name": "SIGTERM", "phase": "after", "step": 5, "rank": 0}
    kinds: dict[str, dict[str, Any]] = {
        "one": {},
        "replicas": {"size": 2},
        "shards": {"size": 2, "run": {"shard": True}},
    }
    found = []
    for name, kind in kinds.items():
        if name == "shards":
            drive(images, tmp_path / name, **spec, **kind, faults=[stop])
            assert status(tmp_path / name) == "preempted"
        ended = drive(images, tmp_path / name, **spec, **kind)
        assert all(e.code == 0 for e in ended), ended
        newest = max((tmp_path / name / "checkpoints").iterdir())
        found.append(load_file(newest / "objective.safetensors"))
    assert found[0]["log_variance.weight/step"].item() == 8
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, value in found[0].items():
            assert torch.allclose(other[name], value, rtol=1e-3, atol=1e-6), name


def test_normalized_weights_are_the_same_everywhere(images: Path, tmp_path: Path) -> None:
    """EDM2 on one process, as replicas, and as shards that are interrupted."""
    shape = {"head_width": 8, "base": 8, "blocks": 1, "attention": [1], "mult": [1, 2]}
    config: dict[str, Any] = {f"network.{name}": value for name, value in shape.items()}
    spec = {"network": "edm2", "config": {**config, "images": 24.0}}
    stop = {"kind": "send", "name": "SIGTERM", "phase": "after", "step": 5, "rank": 0}
    losses, weights = [], []
    for name, kind in (("one", {}), ("pair", {"size": 2}), ("shards", {"size": 2})):
        more: dict[str, Any] = {"run": {"shard": True}} if name == "shards" else {}
        if more:
            drive(images, tmp_path / name, **spec, **kind, **more, faults=[stop])
            assert status(tmp_path / name) == "preempted"
        ended = drive(images, tmp_path / name, **spec, **kind, **more)
        assert all(e.code == 0 for e in ended), ended
        losses.append([float(str(x[4])) for x in tiny.history(tmp_path / name)])
        (raw,) = (f for f in (tmp_path / name / "model").glob("*.safetensors") if "raw" in f.name)
        weights.append(load_file(raw))
    for other, loss in zip(weights[1:], losses[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-3)
        for name, value in weights[0].items():
            assert torch.allclose(other[name], value, rtol=1e-2, atol=1e-2), name
    convolutions = [v for w in weights for n, v in w.items() if "conv0" in n or "conv1" in n]
    rms = torch.cat([v.square().flatten(1).mean(1).sqrt() for v in convolutions])
    assert len(rms) == 3 * 256 and float((rms - 1).abs().max()) < 1e-3


LEAVING = """
import atexit
from patchdiffusion.system.place import leave

class Tensor:
    def __del__(self):
        print("taken apart")

pending = Tensor()
atexit.register(print, "at exit")
print("done")
leave(3)
"""


def test_c3_ranks_end_without_taking_the_interpreter_apart() -> None:
    """Threads of gloo that still work would take its lock, and abort the process."""
    told = "done\nat exit\n"
    for size, expected in ((1, f"{told}taken apart\n"), (2, told)):
        (ended,) = harness.finish([harness.script(LEAVING, rank=0, size=size)])
        assert (ended.code, ended.out) == (3, expected), ended


def test_one_process_cannot_be_divided(images: Path, tmp_path: Path) -> None:
    ended = alone(images, tmp_path / "run", **LONG, run={"shard": True})
    assert ended.code == 2 and "shard" in ended.error


# ---- Ways to start ----


def test_two_hosts_one_of_which_is_lost(images: Path, steady_pair: Path, tmp_path: Path) -> None:
    """Two agents; the one without the store is killed with its process, and started again."""
    folder, port = tmp_path / "run", harness.free_port()
    arguments = harness.arguments(images, folder, **LONG, run=SAVE_ALWAYS, faults=[SLOW])

    def agent(number: int) -> subprocess.Popen[str]:
        flags = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
        flags += [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=two-hosts"]
        flags += [f"--rdzv-conf=is_host={number == 0},join_timeout=60,last_call_timeout=1"]
        flags += ["--local-addr=127.0.0.1"]
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *flags, *arguments],
            # With a shared store PyTorch 2.13 leaves a new agent waiting for an old address.
            env={**harness.environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    agents = [agent(0), agent(1)]
    try:
        deadline = time.monotonic() + 60
        while not (folder / "checkpoints" / "step-0000000003").exists():
            assert time.monotonic() < deadline and agents[1].poll() is None
            time.sleep(0.05)
        _kill_host(agents[1].pid)
        agents[1].communicate()
        agents[1] = agent(1)
        ended = harness.finish(agents)
    finally:
        for process in agents:
            _kill_host(process.pid)
    assert [e.code for e in ended] == [0, 0], ended
    assert "resume    at step" in ended[0].out + ended[1].out
    same_run(folder, steady_pair)


SLOW = {"kind": "slow_down", "seconds": 0.25}


def _kill_host(agent: int) -> None:
    """SIGKILL for a process and all it has started, as when its machine goes down."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, rest = entry.parent.name, entry.read_text().rsplit(")", 1)[1].split()
            parents[int(pid)] = int(rest[1])
    family = {agent}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_srun_is_understood(images: Path, steady_pair: Path, tmp_path: Path) -> None:
    """What srun tells each task is enough, without any launcher."""
    port = harness.free_port()
    processes = []
    for rank in range(2):
        own = {
            **harness.environment(),
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_TASKS_PER_NODE": "2",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_JOB_ID": "77",
            "MASTER_PORT": str(port),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, *harness.arguments(images, tmp_path / "run", **LONG)],
                env=own,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ended = harness.finish(processes)
    assert [e.code for e in ended] == [0, 0], ended
    same_run(tmp_path / "run", steady_pair)


@pytest.mark.parametrize("objective", ["meanflow", "consistency", "ctm"])
def test_few_step_models_on_two_processes(objective: str, images: Path, tmp_path: Path) -> None:
    """Derivatives and targets are inside of what is replicated, so gradients are averaged."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert harness.here(images, one, objective=objective).code == 0
    ended = drive(images, two, size=2, objective=objective)
    assert [e.code for e in ended] == [0, 0], ended
    near_run(one, two)


@pytest.mark.parametrize("rule", [Route(), Sprint(), Mask()], ids=["route", "sprint", "mask"])
def test_tokens_that_skip_on_two_processes(
    rule: Route | Sprint | Mask, images: Path, tmp_path: Path
) -> None:
    """The same tokens skip for any number of processes and any micro-batches."""
    network = encode(DiTConfig(width=16, depth=6, heads=2, num_classes=2, tokens=rule))
    one, two = tmp_path / "one", tmp_path / "two"
    assert harness.here(images, one, network=network).code == 0
    ended = drive(images, two, size=2, network=network, config={"micro_batch": 1})
    assert [e.code for e in ended] == [0, 0], ended
    near_run(one, two)


SMALL = {"network.width": 16, "network.heads": 2, "network.depths": (1, 1, 1)}


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        {
            "network": encode(DiTConfig(patch=(2, 2), width=16, depth=2, heads=2, num_classes=2)),
            "objective": "patch-forcing",
        },
        {"network": "lego", "objective": "bricks", "config": SMALL},
    ],
    ids=["levels of tokens", "bricks"],
)
def test_parts_of_a_network_on_two_processes(
    spec: dict[str, Any], shard: bool, images: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert harness.here(images, one, **spec).code == 0
    ended = drive(images, two, size=2, **spec, run={"shard": shard})
    assert [e.code for e in ended] == [0, 0], ended
    near_run(one, two)


def test_a_classifier_on_two_processes(images: Path, tmp_path: Path) -> None:
    """The weights of one process; those of an undisturbed pair, to the bit, if both are killed."""
    spec: dict[str, Any] = {"task": "classifier", "run": SAVE_ALWAYS}
    spec["config"] = {"images": 24.0, "network.num_classes": 0}
    one, two = check_killed_pair(images, tmp_path, **spec)
    raw, other = (load_file(f / "model" / "raw.safetensors") for f in (one, two))
    assert raw.keys() == other.keys() and "head.weight" in raw
    for name, value in raw.items():
        assert torch.allclose(other[name], value, rtol=1e-3, atol=1e-5), name


def test_the_command_line_under_torchrun(images: Path, tmp_path: Path) -> None:
    network = ["--network.base", "4", "--network.mult", "1", "--network.blocks", "1"]
    options = [*network, "--network.attention", "--batch", "4", "--images", "9", "--device", "cpu"]
    options += ["--preview.samples", "1", "--preview.grid", "3"]
    flags = ["--nproc-per-node=2", f"--master-port={harness.free_port()}"]
    command = [sys.executable, "-m", "torch.distributed.run", *flags, "-m", "patchdiffusion"]
    done = subprocess.run(
        [*command, "train", str(images), *options],
        cwd=tmp_path,
        env=harness.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("recipe    folder") == 1
    assert status(tmp_path / "runs" / "images") == "finished"
    report = (tmp_path / "runs" / "images" / "report.html").read_text()
    assert report.count("<figure>") == 2
    assert not (tmp_path / "runs" / "images" / "ranks").exists()
    shutil.rmtree(tmp_path / "runs")
