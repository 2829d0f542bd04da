"""Measure all claims about the speed and memory of the training engine.

    python benchmarks/engine.py --data emoji-128.zip --out benchmarks/results/DATE-engine.json

Every step is timed by `patchdiffusion bench` in a process of its own; ratios are of medians, and
the processes of a ratio take turns, so that a slowdown of the machine affects both. Needs two idle
cores, and about twenty minutes.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source

NETWORK = "--network.base 64 --network.mult 1 2 2 2 --network.blocks 4 --network.attention 2"
NETWORK += " --network.dropout 0.05 --network.num-classes 0 --batch 8"
CONSTANT = "--patches constant-pixels"
PAPER = "--patches stochastic"

Result = dict[str, Any]


class Bench:
    """Runs `patchdiffusion bench` and keeps all results."""

    def __init__(self, data: str, repeats: int, folder: Path):
        self.common = f"bench {data} --data.resolution 64 --data.channels 3 {NETWORK}".split()
        self.common += ["--repeats", str(repeats)]
        self.file = folder / "bench.json"
        self.raw: list[Result] = []

    def __call__(
        self,
        options: str,
        *,
        cores: list[str] | None = None,
        kernels: bool = True,
        together: bool = True,
    ) -> Result:
        """Result of one process for each entry of `cores`, lists for `taskset`; by default one.

        Unless they train `together`, each trains for itself; the result is that of the last one.
        """
        cores = cores or [",".join(map(str, range(os.cpu_count() or 1)))]
        port = _free_port()
        command = [sys.executable, "-m", "patchdiffusion", *self.common, *options.split()]
        processes = []
        for rank, allowed in enumerate(cores):
            environment = {**os.environ, "PATCHDIFFUSION_KERNELS": str(int(kernels))}
            environment |= {"OMP_NUM_THREADS": str(len(allowed.split(",")))}
            if len(cores) > 1 and together:
                environment |= {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(len(cores)),
                    "MASTER_PORT": str(port),
                }
                environment |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(len(cores))}
                environment |= {"MASTER_ADDR": "127.0.0.1"}
            save = ["--save", str(self.file)]
            processes.append(
                subprocess.Popen(
                    ["taskset", "-c", allowed, *command, *save],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        for process in processes:
            _, err = process.communicate()
            if process.returncode:
                raise SystemExit(f"{' '.join(command)} failed: {err}")
        result: Result = json.loads(self.file.read_text())
        del result["config"]
        settings = {"options": options, "cores": cores, "kernels": kernels, "together": together}
        self.raw.append(settings | result)
        print(f"    {options} on {len(cores)} x {cores[0]}: {_summary(result)}", flush=True)
        return result


def _summary(result: Result) -> str:
    rows = ((name, row["seconds"], row["crops_per_second"]) for name, row in result["rows"].items())
    return ", ".join(f"{name} {s * 1e3:.0f} ms {rate:.1f}/s" for name, s, rate in rows)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rate(result: Result, row: str = "whole images") -> float:
    return result["rows"][row]["crops_per_second"]


def _median(turns: int, measure: Callable[[], float]) -> float:
    return statistics.median(measure() for _ in range(turns))


# ---- The claims ----


def best_against_eager(bench: Bench, turns: int) -> Result:
    """Images per second of steps of whole images: fastest settings against fp32 without kernels."""
    whole = "--patches.fractions 1 --patches.probs 1"
    pairs = [
        (
            _rate(bench(f"{whole} --precision fp32", kernels=False)),
            _rate(bench(f"{whole} --precision auto")),
        )
        for _ in range(turns)
    ]
    slow, fast = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    return {"fp32_eager": slow, "best": fast, "ratio": ratio}


def mixture(bench: Bench, turns: int) -> Result:
    """Crops per second, counted as images like the paper, relative to training on whole images."""
    name = "counted_images_against_whole"
    rates: Result = {}
    for label, options in (("constant pixels", CONSTANT), ("paper's growth", PAPER)):
        rows = [bench(options)["rows"]["mixture"] for _ in range(turns)]
        rates[label] = statistics.median(row[name] for row in rows)
        rates[f"{label}, time outside"] = statistics.median(row["outside"] for row in rows)
    rows = [bench(CONSTANT, cores=["0", "1"])["rows"]["mixture"] for _ in range(turns)]
    rates["constant pixels, 2 processes"] = statistics.median(row[name] for row in rows)
    rates["default plan"] = statistics.median(
        bench("--patches stratified")["rows"]["mixture"][name] for _ in range(turns)
    )
    return rates


def scaling(bench: Bench, turns: int) -> Result:
    """Two processes on one core each against one process on one core, with the same batch.

    The limit of the machine is that of two independent processes.
    """
    whole = "--patches.fractions 1 --patches.probs 1 --batch 16 --micro-batch 8"
    rates = [
        (
            _rate(bench(whole, cores=["0"])),
            _rate(bench(whole, cores=["0", "1"])),
            2 * _rate(bench(whole, cores=["0", "1"], together=False)),
        )
        for _ in range(turns)
    ]
    one, two, limit = (statistics.median(column) for column in zip(*rates, strict=True))
    return {
        "one": one,
        "two": two,
        "ratio": statistics.median(b / a for a, b, _ in rates),
        "limit": limit,
        "ratio of the limit": statistics.median(c / a for a, _, c in rates),
    }


def start(data: str, turns: int, folder: Path) -> Result:
    """Seconds from the command to the first status line, with prepared images."""

    def once() -> float:
        out = Path(tempfile.mkdtemp(dir=folder)) / "run"
        options = f"train {data} --data.resolution 64 --data.channels 3 {NETWORK}".split()
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "patchdiffusion", *options, "--out", str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            if "crops/s" in line:
                break
        seconds = time.monotonic() - started
        process.kill()
        process.communicate()
        print(f"    first step after {seconds:.1f} s", flush=True)
        return seconds

    return {"seconds": _median(turns, once)}


def memory(data: str, folder: Path) -> Result:
    """Anonymous memory of a process that trains on a small pack, and on a sparse one of 10 GB."""
    small = prepare(open_source(data), resolution=64, channels=3, progress=False)
    large = _inflate(small, folder / "large", images=10 * 10**9 // (64 * 64 * 3))
    bytes_used = {}
    for name, pack in (("small", small.path), ("10 GB", large)):
        out = folder / f"memory-{name}"
        options = f"train {pack} --batch 8 --network.base 16 --network.blocks 1".split()
        options += ["--images", "4000", "--out", str(out), "--preview.samples", "1"]
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "patchdiffusion", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        lines = 0
        for line in process.stdout:
            lines += "crops/s" in line
            if lines == 20:
                break
        bytes_used[name] = _anonymous(process.pid)
        process.kill()
        process.communicate()
        print(f"    {name}: {bytes_used[name] / 2**20:.0f} MiB", flush=True)
    return bytes_used


def _inflate(pack: Pack, folder: Path, images: int) -> Path:
    """Pack with more images, whose files are sparse."""
    folder.mkdir()
    facts = json.loads((pack.path / "pack.json").read_text())
    facts["stamp"] = "inflated"
    for name, array in facts["arrays"].items():
        array["shape"][0] = images
        whole, rest = divmod(images, array["block"])
        row = bytes(int(np.prod(array["shape"][1:])) * np.dtype(array["dtype"]).itemsize)
        array["crc32"] = [zlib.crc32(row * array["block"])] * whole
        array["crc32"] += [zlib.crc32(row * rest)] if rest else []
        with open(folder / f"{name}.bin", "wb") as file:
            file.truncate(images * len(row))
    (folder / "pack.json").write_text(json.dumps(facts))
    with open(folder / "keys.jsonl", "w") as lines:
        lines.writelines(f'["{i}", null]\n' for i in range(images))
    return folder


def _anonymous(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("Anonymous")).split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="images to train on")
    parser.add_argument("--repeats", type=int, default=7, help="steps timed in each process")
    parser.add_argument(
        "--turns", type=int, default=3, help="processes of which the median is reported"
    )
    parser.add_argument("--only", default="", help="names of claims, separated by commas")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(options.data, options.repeats, folder)
        claims: dict[str, Callable[[], Result]] = {
            "best against eager": lambda: best_against_eager(bench, options.turns),
            "mixture": lambda: mixture(bench, options.turns),
            "scaling": lambda: scaling(bench, options.turns),
            "start": lambda: start(options.data, options.turns, folder),
            "memory": lambda: memory(options.data, folder),
        }
        results = {}
        for claim, measure in claims.items():
            if not options.only or claim in options.only.split(","):
                print(claim, flush=True)
                results[claim] = measure()
                print(f"  {results[claim]}", flush=True)
    if options.out:
        options.out.write_text(json.dumps({"claims": results, "raw": bench.raw}, indent=1) + "\n")


if __name__ == "__main__":
    main()
