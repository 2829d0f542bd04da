"""Takes the protections out of the package, one at a time: the tests that belong to them must fail.

python tests/faults/protections.py [ROW ...] [--list]

Each entry of `protections.toml` names a row of the suite and what it promises, a text of the
package that keeps the promise, what to put in its place, and the tests that must notice. Without
its protection the package still trains; one ordinary test sees to that. The exit code is 1 if a
test still passes or an entry is out of date.
"""

import argparse
import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "patchdiffusion"
FOLDER = Path(__file__).parent
ORDINARY = "tests/test_train_loop.py::test_everything_is_in_the_folder"
SECONDS = 60.0
"""A program that takes longer hangs, which is a failure, too."""


@dataclass(frozen=True)
class Edit:
    """A text of the package and what takes its place."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Protection:
    """What keeps one promise, and the tests that must notice when it is gone."""

    row: str
    promise: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    seconds: float

    @classmethod
    def of(cls, entry: dict[str, Any]) -> "Protection":
        """From the table, where further edits are given by `also`."""
        edits = [Edit(**{name: e[name] for name in ("file", "old", "new")}) for e in _all(entry)]
        seconds = entry.get("seconds", SECONDS)
        return cls(entry["row"], entry["promise"], tuple(edits), tuple(entry["tests"]), seconds)

    def stale(self, tests: dict[str, Path]) -> str:
        """Why the entry is out of date, or nothing."""
        for edit in self.edits:
            count = (PACKAGE / edit.file).read_text().count(edit.old)
            if count != 1:
                return f"{edit.file} has {count} times {edit.old!r}"
        missing = [name for name in self.tests if name.split("[")[0] not in tests]
        return f"there is no {missing[0]}" if missing else ""

    def remove(self, package: Path) -> None:
        """Take it out of a copy of the package."""
        for edit in self.edits:
            file = package / edit.file
            file.write_text(file.read_text().replace(edit.old, edit.new))


def _all(entry: dict[str, Any]) -> list[dict[str, str]]:
    return [entry, *entry.get("also", [])]


def table() -> list[Protection]:
    """All entries."""
    with open(FOLDER / "protections.toml", "rb") as stream:
        return [Protection.of(entry) for entry in tomllib.load(stream)["protection"]]


@functools.cache
def all_tests() -> dict[str, Path]:
    """The names of all tests of faults, and where they are."""
    files = sorted(FOLDER.glob("test_*.py"))
    found = [(name, f) for f in files for name in re.findall(r"def (test_\w+)", f.read_text())]
    return dict(found)


def rows_of(test: str) -> list[str]:
    """The rows of the suite that a test belongs to, by its name; none for some."""
    return ["two_hosts"] if "two_hosts" in test else re.findall(r"(?<=_)[a-z]\d(?=_)", test)


# ---- Running ----


def verdict(protection: Protection, tests: dict[str, Path]) -> tuple[bool, str]:
    """Whether the tests fail without a protection, and how."""
    if stale := protection.stale(tests):
        return False, f"IS OUT OF DATE: {stale}"
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "copy"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, copy / "patchdiffusion", ignore=ignored)
        protection.remove(copy / "patchdiffusion")
        nodes = [f"{tests[name.split('[')[0]]}::{name}" for name in protection.tests]
        # The copy is found first, as it lies in the current folder.
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rpfE"]
        command += [f"--basetemp={temporary}/pytest", str(ROOT / ORDINARY), *nodes]
        told = _run(command, copy, protection.seconds)
    return (True, "FAILS as it should (hangs)") if told is None else judge(told)


def _run(command: Sequence[str], copy: Path, seconds: float) -> str | None:
    """What a program tells, or None if it hangs."""
    own = {"PYTHONPATH": str(copy), "FAULT_SECONDS": str(seconds), "COLUMNS": "240"}
    own["PATCHDIFFUSION_KERNELS"] = "0"  # they protect nothing, and take a second to compile
    process = subprocess.Popen(
        command,
        cwd=copy,
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=2 * seconds + 60)[0]
    except subprocess.TimeoutExpired:
        for number in (signal.SIGTERM, signal.SIGKILL):  # torchrun takes its children along
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.communicate(timeout=10)
        return None


def judge(told: str) -> tuple[bool, str]:
    """The same from what pytest tells of an ordinary test and of those that must fail."""
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
    tests, start, wrong = all_tests(), time.monotonic(), 0
    for protection in chosen:
        name = f"{protection.row:<10}{protection.promise:<58}"
        if given.list:
            print(f"{name}{', '.join(protection.tests)}")
            continue
        good, told = verdict(protection, tests)
        wrong += not good
        print(f"{name}{told}", flush=True)
    if not given.list:
        seconds = time.monotonic() - start
        print(f"{len(chosen)} protections, {wrong} of them missed by their tests; {seconds:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
