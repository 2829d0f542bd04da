"""Folders that a command fills little by little: locked, and marked until they are complete.

An interrupted command leaves its folder with the mark, and the same command goes on there.
"""

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from patchdiffusion.data.source import UNFINISHED
from patchdiffusion.system.errors import Stop
from patchdiffusion.system.files import check_place, lock, read_json, write_json
from patchdiffusion.system.signals import Interrupted

PARTS = ".parts"
"""Hidden folder for what is deleted once the folder is complete."""
_LOCK = "lock"


def check_out(out: Path | None) -> None:
    """Raise `ValueError` or `OSError` for a folder that cannot be created, or holds other files.

    Nothing is written.
    """
    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise ValueError(
            f"{out} exists and is no folder; nothing is overwritten, use another --out"
        )
    if out.exists() and not (out / UNFINISHED).is_file() and _others(out):
        raise ValueError(
            f"{out} exists and is not empty; nothing is overwritten, use another --out"
        )
    check_place(out)


@contextlib.contextmanager
def claimed(root: Path, out: Path | None, request: Mapping[str, Any]) -> Iterator[Path]:
    """Context of a locked folder for the images of a request: `out`, or a new one in `root`.

    An unfinished folder of the same request is used again. Raises `ValueError` if `out` holds
    anything else, or if another process writes there.
    """
    with contextlib.ExitStack() as held:
        is_new, folder = False, _unfinished(root, request, held) if out is None else None
        if folder is None:
            folder = _new(root) if out is None else out
            is_new = out is None or not out.exists()
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock(folder / _LOCK, folder))
        _check_request(folder, request)
        if not (folder / UNFINISHED).exists():
            write_json(folder / UNFINISHED, dict(request))
        try:
            yield folder
        finally:
            if (folder / UNFINISHED).exists() and _is_bare(folder):
                (folder / UNFINISHED).unlink()
                shutil.rmtree(folder / PARTS, ignore_errors=True)
                if is_new:
                    discard(folder)


@contextlib.contextmanager
def resumable(progress: Callable[[], str]) -> Iterator[None]:
    """Context in which a signal ends the command with what is written, and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        text = f"interrupted; {progress()}; the same command resumes"
        raise Stop(text, code=130) from error


def discard(folder: Path) -> None:
    """Delete a folder that is complete or not wanted, and the one around it if that is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # unless it holds others
        folder.parent.rmdir()


def _others(folder: Path) -> list[str]:
    """Names in a folder other than those that a killed process may leave."""
    leftovers = (_LOCK, f".{UNFINISHED}.")
    return [file.name for file in folder.iterdir() if not file.name.startswith(leftovers)]


def _is_bare(folder: Path) -> bool:
    """True if a folder holds no result yet: no file but the mark, and no part."""
    return set(_others(folder)) <= {UNFINISHED, PARTS} and not any(folder.glob(f"{PARTS}/**/*.npy"))


def _unfinished(root: Path, request: Mapping[str, Any], held: contextlib.ExitStack) -> Path | None:
    """Unfinished folder of the same request in `root` that no other process holds, or None."""
    for mark in sorted(root.glob(f"*/{UNFINISHED}")):
        folder = mark.parent
        with contextlib.suppress(OSError, ValueError):
            if not _differences(folder, request):
                held.enter_context(lock(folder / _LOCK, folder))
                if mark.exists():
                    return folder
    return None


def _new(root: Path) -> Path:
    """Create the first of root/0001, 0002, ... that does not exist."""
    root.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            (root / f"{number:04d}").mkdir()
            return root / f"{number:04d}"
    raise AssertionError("unreachable")


def _check_request(folder: Path, request: Mapping[str, Any]) -> None:
    if (folder / UNFINISHED).exists():
        if changed := _differences(folder, request):
            raise ValueError(
                f"{folder} holds unfinished samples of another command ({'; '.join(changed)}); "
                "repeat that command to resume it, or use another --out"
            )
    elif _others(folder):
        raise ValueError(
            f"{folder} exists and is not empty; nothing is overwritten, use another --out"
        )


def _differences(folder: Path, request: Mapping[str, Any]) -> list[str]:
    stored, current = read_json(folder / UNFINISHED), json.loads(json.dumps(dict(request)))
    stored = stored if isinstance(stored, dict) else {}
    names = [name for name in current | stored if stored.get(name) != current.get(name)]
    return [f"{name}: {stored.get(name)} -> {current.get(name)}" for name in names]
