"""Checkpoints: folders written atomically, without pickles, verified by digest.

`step-XXXXXXXXXX/` holds safetensors files, `state.json` and `manifest.json` with the size and
SHA-256 of each file. It is filled under a temporary name, flushed, and renamed; then `latest`, a
file with the name of the newest one, is rewritten, and older ones are pruned.
"""

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchdiffusion.system.files import (
    folder_atomic,
    free_name,
    read_json,
    sha256,
    write_bytes,
    write_json,
)

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Named groups of named tensors; each group becomes one file."""

FORMAT = 3


# ---- Writing ----


def size_of(tensors: Tensors) -> int:
    """Bytes of disk that `save` needs, with a margin."""
    content = sum(
        x.numel() * x.element_size() for group in tensors.values() for x in group.values()
    )
    return content + content // 50 + 2**20


def name_of(step: int) -> str:
    """Name of the folder of a checkpoint."""
    return f"step-{step:010d}"


def save(root: Path, step: int, tensors: Tensors, state: dict[str, Any]) -> Path:
    """Write `root/step-.../NAME.safetensors` for each group, and `state` as JSON."""
    folder = root / name_of(step)
    with folder_atomic(folder) as temporary:
        for name, group in tensors.items():
            whole = {key: value.detach().cpu().contiguous() for key, value in group.items()}
            save_file(whole, temporary / f"{name}.safetensors")
        write_json(temporary / "state.json", {"format": FORMAT, "step": step, **state})
        files = {
            f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)}
            for f in sorted(temporary.iterdir())
        }
        write_json(temporary / "manifest.json", {"format": FORMAT, "step": step, "files": files})
    write_bytes(root / "latest", f"{folder.name}\n".encode())
    return folder


def prune(root: Path, keep: int, every: float | None = None, spare: int | None = None) -> None:
    """Delete all but the newest `keep` valid ones, and the first after each multiple of `every`.

    The one of step `spare` is kept, too.
    """
    newest, spared, marks = 0, set(), {}
    for folder in folders(root):
        if newest < keep:
            newest += fault(folder, content=False) is None
            spared.add(folder)
        elif every is not None and fault(folder, content=False) is None:
            marks[math.floor(read_state(folder)["images"] / every)] = folder  # the oldest wins
    spared.update(folder for mark, folder in marks.items() if mark > 0)
    for folder in folders(root):
        if folder not in spared and int(folder.name[5:]) != spare:
            shutil.rmtree(folder, ignore_errors=True)


# ---- Finding and checking ----


def folders(root: Path) -> list[Path]:
    """Folders of all finished checkpoints, newest first."""
    paths = root.glob("step-*") if root.is_dir() else iter(())
    return sorted((f for f in paths if f.name[5:].isdigit()), reverse=True)


def clear_unfinished(root: Path) -> None:
    """Delete folders of saves that were killed; finished checkpoints have another name."""
    for folder in root.glob("step-*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def fault(folder: Path, *, content: bool = True) -> str | None:
    """Damage of a checkpoint in one line, or None; without `content` digests are not checked."""
    try:
        files = read_json(folder / "manifest.json")["files"]
        if not (folder / "manifest.json").read_bytes().endswith(b"}\n"):
            return f"{folder / 'manifest.json'} has been cut short"
        for name, facts in files.items():
            if _leads_outside(name):
                return f"{folder}: the manifest names a file outside the folder: {name}"
            path = folder / name
            if path.stat().st_size != facts["bytes"]:
                return f"{path} has {path.stat().st_size} bytes instead of {facts['bytes']}"
            if content and sha256(path) != facts["sha256"]:
                return f"{path} does not have the digest that its manifest gives"
        present = {"state.json", *(f.name for f in folder.glob("*.safetensors"))}
        if unlisted := sorted(present - set(files)):
            return f"{folder}: the manifest does not list {unlisted[0]}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder}: {type(error).__name__}: {error}"
    return None


def _leads_outside(name: str) -> bool:
    """True if a name does not belong to a file in the folder itself."""
    return "/" in name or "\\" in name or name.startswith(".")


def candidates(root: Path) -> Iterator[tuple[Path, str | None]]:
    """Checkpoints from newest to oldest, each with its fault or None."""
    return ((folder, fault(folder)) for folder in folders(root))


def name_aside(folder: Path) -> Path:
    """Free name for a damaged checkpoint."""
    return free_name(folder, f"{folder.name}.damaged")


def set_damaged_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither used nor counted nor lost."""
    return folder.rename(name_aside(folder))


# ---- Reading ----


def read_state(folder: Path) -> dict[str, Any]:
    """State of a checkpoint; raises `ValueError` if another version wrote it."""
    state = read_json(folder / "state.json")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{folder} is not a checkpoint of format {FORMAT}; --fresh starts again")
    return state


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each group of tensors of a checkpoint, by its manifest."""
    files = read_json(folder / "manifest.json")["files"]
    return {Path(name).stem: str(facts["sha256"]) for name, facts in files.items()}


def read_tensors(folder: Path, name: str, device: torch.device) -> dict[str, Tensor]:
    """One group of tensors of a checkpoint."""
    try:
        return load_file(folder / f"{name}.safetensors", device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{folder / name}.safetensors cannot be read: {error}") from error
