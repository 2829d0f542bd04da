"""Hardware settings of a run: threads, kernels, compilation, and a record of them."""

import contextlib
import hashlib
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from patchdiffusion.nets import fused
from patchdiffusion.system import families
from patchdiffusion.system.memory import keep_freed
from patchdiffusion.system.place import Place
from patchdiffusion.train.config import RunConfig

_FORKED = [False]
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=lambda: _FORKED.__setitem__(0, True))


def set_globals(run: RunConfig, device: torch.device, where: Place) -> None:
    """Set PyTorch's process-wide options: threads, precision of matrix products, determinism."""
    if device.type == "cpu":
        keep_freed()
    if run.threads:
        torch.set_num_threads(run.threads)
    elif _FORKED[0]:
        torch.set_num_threads(1)  # a forked process has lost the threads of its parent
    elif where.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // where.local_size))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for operations that are not in bf16
        torch.backends.cudnn.benchmark = not run.deterministic
        if run.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)


def compiles(run: RunConfig, device: torch.device) -> bool:
    """True if blocks are compiled; on a CPU compilation takes minutes and gains nothing."""
    if run.shard_experts:  # tokens that travel break the graph of a block
        return False
    return run.compile == "on" or (run.compile == "auto" and device.type == "cuda")


def code_digest() -> str:
    """Digest of the sources of the package and of the types that were added to its families.

    The same version may have other sources: a checkout, or one that was edited.
    """
    package, content = Path(__file__).parents[1], hashlib.sha256()
    files = sorted(f for f in package.rglob("*") if f.suffix in (".py", ".c"))
    modules = {member.__module__ for member in families.added()}
    others = (getattr(sys.modules.get(name), "__file__", None) for name in sorted(modules))
    files += [Path(file) for file in others if file and package not in Path(file).parents]
    for file in files:
        content.update(file.name.encode())
        with contextlib.suppress(OSError):  # a file that is gone, and still in memory
            content.update(file.read_bytes())
    return content.hexdigest()[:16]


def engine_facts(
    run: RunConfig, device: torch.device, where: Place, precision: str
) -> dict[str, Any]:
    """Software, hardware and settings on which the last bits of a run depend."""
    cuda = device.type == "cuda"
    return {
        "version": version("patchdiffusion"),
        "code": code_digest(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "processes": where.size,
        "sharded": "experts" if run.shard_experts else run.shard,
        "compiled": compiles(run, device),
        "kernels": _kernels(run, device, precision),
        "deterministic": run.deterministic or not cuda,
    }


def _kernels(run: RunConfig, device: torch.device, precision: str) -> str:
    if compiles(run, device):
        return "compiled blocks"
    return "operators" if device.type == "cuda" or precision == "fp16" else fused.status()


SHARED_FACTS = ("version", "code", "torch", "precision", "sharded", "compiled")
"""Names of the `engine_facts` that all processes of a run must have in common."""
