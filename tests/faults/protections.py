"""Takes the protections out of the package, one at a time: the tests that belong to them must fail.

python tests/faults/protections.py [ROW ...] [--list]

Each line of `protections.toml` names a promise, the function, method or constant of the package
that keeps it, what takes its place, and the tests that must notice. It does so in every process
that the tests start, as soon as its module has been executed and before others can import it.
Without its protection the package still trains; one ordinary test sees to that. The exit code is
1 if a test still passes.
"""

import argparse
import contextlib
import functools
import importlib.machinery
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import standins

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
PACKAGE = "patchdiffusion"
ORDINARY = "tests/test_train_loop.py::test_everything_is_in_the_folder"
SECONDS = float(os.environ.get("FAULT_SECONDS", "60"))
"""A program that takes longer hangs, which is a failure, too."""


@dataclass(frozen=True)
class Protection:
    """What keeps one promise, and the tests that must notice when it is gone."""

    row: str
    promise: str
    name: str
    """In the package, with dots."""
    standin: str
    tests: tuple[str, ...]

    @property
    def module(self) -> str:
        """The module that has the name."""
        folder, parts = ROOT / PACKAGE, self.name.split(".")
        for count, part in enumerate(parts):
            if not (folder / part).is_dir() and not (folder / f"{part}.py").is_file():
                return ".".join([PACKAGE, *parts[:count]])
            folder = folder / part
        raise ValueError(f"{self.name} is a module")

    def take_out(self, module: types.ModuleType) -> None:
        """Change the module; `AttributeError` if the name is not there."""
        *inside, last = f"{PACKAGE}.{self.name}".removeprefix(f"{module.__name__}.").split(".")
        owner = functools.reduce(getattr, inside, module)
        setattr(owner, last, getattr(standins, self.standin)(getattr(owner, last)))


def table() -> list[Protection]:
    """All of them."""
    with open(FOLDER / "protections.toml", "rb") as stream:
        rows = tomllib.load(stream)
    return [
        Protection(row, promise, name, standin, tuple(tests))
        for row, promises in rows.items()
        for promise, (name, standin, *tests) in promises.items()
    ]


@functools.cache
def all_tests() -> dict[str, Path]:
    """The names of all tests of faults, and where they are."""
    files = sorted(FOLDER.glob("test_*.py"))
    found = [(name, f) for f in files for name in re.findall(r"def (test_\w+)", f.read_text())]
    return dict(found)


def rows_of(test: str) -> list[str]:
    """The rows of the suite that a test belongs to, by its name; none for some."""
    return ["two_hosts"] if "two_hosts" in test else re.findall(r"(?<=_)[a-z]\d(?=_)", test)


# ---- In the processes of the tests ----


class Finder:
    """Finds the module of a protection, and takes that out once the module has been executed."""

    def __init__(self, protection: Protection):
        self.protection = protection

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.protection.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def executed(module: types.ModuleType) -> None:
            execute(module)
            self.protection.take_out(module)

        spec.loader.exec_module = executed
        return spec


def take_out(promise: str) -> None:
    """Have what keeps a promise taken out of the package, which is yet to be imported."""
    (protection,) = [p for p in table() if p.promise == promise]
    sys.meta_path.insert(0, Finder(protection))


# ---- Running them ----


def verdict(protection: Protection) -> tuple[bool, str]:
    """Whether the tests fail without a protection, and how."""
    with tempfile.TemporaryDirectory() as temporary:
        tests = all_tests()
        nodes = [f"{tests[name.split('[')[0]]}::{name}" for name in protection.tests]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rpfE"]
        command += [f"--basetemp={temporary}/pytest", str(ROOT / ORDINARY), *nodes]
        told = _run(command, protection)
    return (True, "FAILS as it should (hangs)") if told is None else judge(told)


def _run(command: Sequence[str], without: Protection) -> str | None:
    """What a program tells, or None if it hangs."""
    own = {"PYTHONPATH": f"{FOLDER / 'without'}:{ROOT}", "FAULTS_WITHOUT": without.promise}
    own |= {"FAULT_SECONDS": str(SECONDS), "COLUMNS": "240"}
    own["PATCHDIFFUSION_KERNELS"] = "0"  # they protect nothing, and take a second to compile
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=2 * SECONDS + 60)[0]
    except subprocess.TimeoutExpired:
        for number in (signal.SIGTERM, signal.SIGKILL):  # torchrun takes its children along
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.communicate(timeout=10)
        return None


def judge(told: str) -> tuple[bool, str]:
    """The same from what pytest tells of an ordinary test and of those that must fail."""
    # A signal such as SIGBUS takes pytest along, and with it its list of outcomes; the ordinary
    # test is the first.
    if crash := re.search(r"^\.\S*Fatal Python error: (.*)", told, re.M):
        return True, f"FAILS as it should (crashes): {crash[1]}"
    lines = re.findall(r"^(PASSED|FAILED|ERROR) \S*?(\w+\.py::.+?)(?: - (.*))?$", told, re.M)
    of: dict[str, set[str]] = {"PASSED": set(), "FAILED": set(), "ERROR": set()}
    for outcome, node, _ in lines:
        of[outcome].add(node)
    ordinary = {node for node in of["PASSED"] if ORDINARY.endswith(node)}
    if not ordinary:
        return False, f"BREAKS what is ordinary:\n{told[-2000:]}"
    # A test that passes and ends in an error has found something when it looked around afterwards.
    if still := of["PASSED"] - of["ERROR"] - ordinary:
        return False, f"STILL PASSES: {', '.join(sorted(still))}"
    failed = of["FAILED"] | of["PASSED"] & of["ERROR"]
    if not failed or of["ERROR"] - failed:
        return False, f"CANNOT TELL:\n{told[-2000:]}"
    why = next(reason for outcome, _, reason in lines if outcome in ("FAILED", "ERROR"))
    return True, f"FAILS as it should ({len(failed)} failed): {why[:100]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Show what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="r1, d7 ...; all without any")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    given = parser.parse_args(arguments)
    rows = {row.lower() for row in given.rows}
    chosen = [p for p in table() if not rows or p.row in rows]
    if unknown := rows - {p.row for p in chosen}:
        parser.error(f"there are no rows {', '.join(sorted(unknown))}")
    start, wrong = time.monotonic(), 0
    for protection in chosen:
        name = f"{protection.row:<10}{protection.promise:<68}"
        if given.list:
            print(f"{name}{', '.join(protection.tests)}")
            continue
        good, told = verdict(protection)
        wrong += not good
        print(f"{name}{told}", flush=True)
    if not given.list:
        seconds = time.monotonic() - start
        print(f"{len(chosen)} protections, {wrong} of them missed by their tests; {seconds:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
