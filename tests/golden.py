"""Reference outputs of published networks, where they are on this machine."""

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor


def golden(name: str) -> Path:
    """Path of a file of reference outputs; skips the test if it is not there."""
    sibling = Path(__file__).parents[2] / "shared" / "golden"
    path = Path(os.environ.get("PATCHDIFFUSION_GOLDEN", sibling)) / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"no reference outputs: {path} is not there (set PATCHDIFFUSION_GOLDEN)")
    return path


def weights_and_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Published weights by their names, and all tensors of the file."""
    tensors = load_file(path)
    prefix = "weights/"
    weights = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
    return weights, tensors
