"""Hostile files are refused in one line, or read: none executes, hangs, or fills memory or disk.

Each kind is read in a process of its own, with a limit of memory, of processor time in all and of
bytes in a file; each file also has a limit of seconds.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import CANARY, CORPORA

MEMORY = 3 * 2**30
"""Bytes of addresses beyond those after the imports."""
SECONDS = 20
"""Of a processor, for one file; of waiting ten times as many."""
DISK = 2**24
FEWEST = 200
"""Files in all."""


def read(path: Path) -> str:
    """Read a file as the commands do; "read", or the one line that refuses it."""
    from patchdiffusion.data.prepare import prepare
    from patchdiffusion.data.source import open_source
    from patchdiffusion.interop.checkpoints import read_published
    from patchdiffusion.interop.peft import read_adapter

    try:
        if path.suffix == ".safetensors":
            (path.parent / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
            target = path.with_name("adapter_model.safetensors")
            target.write_bytes(path.read_bytes())
            try:
                read_adapter(path.parent)
            except ValueError as error:
                assert "\n" not in str(error)
        if path.suffix in (".safetensors", ".pkl"):
            read_published(path)
        else:
            prepare(open_source(path), path.with_suffix(".pack"), max_bad=1.0, progress=False)
    except ValueError as error:
        return str(error)
    return "read"


def child(folder: Path) -> None:
    """Read all files of a folder within limits, and say how each of them ended."""
    import patchdiffusion.data.prepare
    import patchdiffusion.interop.checkpoints  # noqa: F401

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (DISK, DISK))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for path in sorted(folder.iterdir()):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(10 * SECONDS)
        print(json.dumps([path.name, read(path)]), flush=True)
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.alarm(0)


@pytest.mark.fault
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are those of Linux")
@pytest.mark.parametrize("kind", CORPORA)
def test_hostile_files(kind: str, tmp_path: Path) -> None:
    suffix, corpus = CORPORA[kind]
    folder = tmp_path / "files"
    folder.mkdir()
    for number, content in enumerate(corpus()):
        (folder / f"{number:04d}{suffix}").write_bytes(content)
    names = [path.name for path in sorted(folder.iterdir())]
    ended = subprocess.run(
        [sys.executable, __file__, str(folder)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    told = dict(map(json.loads, ended.stdout.splitlines()))
    rest = [name for name in names if name not in told]
    assert not rest, f"{rest[0]} ends the process, {ended.returncode}: {ended.stderr[-2000:]}"
    assert all("\n" not in text and len(text) < 1000 for text in told.values()), told
    refused = sum(text != "read" for text in told.values())
    assert 2 * refused > len(told), "most of them must be refused"
    assert not list(tmp_path.rglob(CANARY))


def test_there_are_enough() -> None:
    counts = {kind: sum(1 for _ in corpus()) for kind, (_, corpus) in CORPORA.items()}
    assert sum(counts.values()) >= FEWEST and min(counts.values()) >= 20, counts


def test_files_that_are_no_files(tmp_path: Path) -> None:
    """Pipes, which never end, and links to themselves and to devices."""
    from commands import refuses

    from patchdiffusion.data.source import open_source

    for suffix in (".tar", ".parquet", ".arrow"):
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        os.mkfifo(folder / f"pipe{suffix}")
        (folder / f"loop{suffix}").symlink_to(f"loop{suffix}")
        (folder / f"device{suffix}").symlink_to("/dev/zero")
        for name in ("pipe", "loop", "device"):
            with refuses(name, error=Exception):
                open_source(folder / f"{name}{suffix}")
        with refuses(folder.name, error=Exception):
            open_source(folder)


if __name__ == "__main__":
    child(Path(sys.argv[1]))
