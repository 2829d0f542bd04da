"""Checkpoints: folders that are complete or absent, without pickles, verified by digest.

`step-XXXXXXXXXX/` holds safetensors files, `state.json` and `manifest.json` with the size and
SHA-256 of each file. It is filled under a temporary name, flushed, and renamed.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patchdiffusion.files import folder_atomic, read_json, sha256, write_json

Tensors = Mapping[str, Mapping[str, Tensor]]


def save(root: Path, step: int, tensors: Tensors, state: dict[str, Any], *, keep: int) -> Path:
    """Write `root/step-.../NAME.safetensors` for each entry of `tensors`, then prune old ones."""
    folder = root / f"step-{step:010d}"
    with folder_atomic(folder) as temporary:
        for name, group in tensors.items():
            whole = {key: value.detach().cpu().contiguous() for key, value in group.items()}
            save_file(whole, temporary / f"{name}.safetensors")
        write_json(temporary / "state.json", state)
        files = {
            f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)}
            for f in sorted(temporary.iterdir())
        }
        write_json(temporary / "manifest.json", {"format": 1, "step": step, "files": files})
    for old in _folders(root)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _folders(root: Path) -> list[Path]:
    """All finished checkpoints, newest first."""
    found = root.glob("step-*") if root.is_dir() else iter(())
    return sorted((f for f in found if f.name[5:].isdigit()), reverse=True)


def clear_unfinished(root: Path) -> None:
    """Delete what a killed save has left; a finished checkpoint has another name."""
    for folder in root.glob("step-*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in one line, or None."""
    try:
        files = read_json(folder / "manifest.json")["files"]
        for name, facts in files.items():
            if "/" in name or "\\" in name or name.startswith("."):
                return f"{folder}: the manifest names a file outside the folder: {name}"
            path = folder / name
            if path.stat().st_size != facts["bytes"]:
                return f"{path} has {path.stat().st_size} bytes instead of {facts['bytes']}"
            if sha256(path) != facts["sha256"]:
                return f"{path} does not have the digest that its manifest gives"
        if "state.json" not in files:
            return f"{folder}: the manifest does not list state.json"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder}: {type(error).__name__}: {error}"
    return None


def candidates(root: Path) -> Iterator[tuple[Path, str | None]]:
    """Checkpoints from the newest to the oldest, each with its fault or None."""
    return ((folder, fault(folder)) for folder in _folders(root))


def read_state(folder: Path) -> dict[str, Any]:
    """The scalars of a checkpoint."""
    return read_json(folder / "state.json")


def read_tensors(folder: Path, name: str, device: torch.device) -> dict[str, Tensor]:
    """One group of tensors of a checkpoint."""
    return load_file(folder / f"{name}.safetensors", device=str(device))


# ---- Optimizers as named tensors ----


def optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """The state of an optimizer, each tensor under "PARAMETER/ENTRY"."""
    return {
        f"{name}/{entry}": value
        for name, parameter in network.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, network: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = dict(network.named_parameters())
    for path, value in tensors.items():
        name, entry = path.rsplit("/", 1)
        parameter = parameters[name]
        if value.shape == parameter.shape:
            # Fused optimizers walk through memory: the layout must be that of the parameter.
            value = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][entry] = value
