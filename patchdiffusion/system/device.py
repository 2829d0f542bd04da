"""Devices: choice, precision, memory, memory format and compilation."""

import contextlib
import sys
from typing import Any

import torch
from torch import Tensor, nn

MAX_GRAPHS = 256  # blocks differ in widths, and each size of crops has its own
SHARE_FOR_IMAGES = 0.3  # of the free memory of a device


def best_precision(device: torch.device) -> str:
    """Fastest safe precision: bf16 on CUDA and CPUs with AMX or AVX512-BF16, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Only private names tell; a CPU without these emulates bf16, several times slower than fp32.
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return "bf16" if any(getattr(torch.cpu, n, bool)() for n in names) else "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Context of bf16 or fp16 autocast on a device, or an empty one for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype)


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context without autocast on the device of x."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()  # the meta device refuses even a disabled one
    return torch.autocast(device, enabled=False)


def resident(images: Tensor, device: torch.device) -> Tensor:
    """Move the images of a pack to the device if they fit easily, else leave them."""
    if device.type != "cuda":
        return images
    free, _ = torch.cuda.mem_get_info(device)
    return images.to(device) if images.nbytes < SHARE_FOR_IMAGES * free else images


def channels_last(network: nn.Module) -> None:
    """Convert 4-D and 5-D weights to the channels-last memory format, in place."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in network.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.to(memory_format=formats[parameter.ndim])


def compile_units(units: list[nn.Module], *, backend: Any = "inductor") -> None:
    """Compile the repeated parts of a network in place, one graph for each input shape."""
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MAX_GRAPHS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * MAX_GRAPHS)
    for unit in units:
        unit.compile(dynamic=False, fullgraph=True, backend=backend)


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes, on the device or, for a CPU, in total."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            peak = next(line for line in lines if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    except (OSError, StopIteration):
        return 0


def reset_peak_memory(device: torch.device) -> None:
    """Reset `peak_memory`, where the system supports that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def compiled_graphs() -> int:
    """Number of graphs that were compiled in this process."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")  # slow to import
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0


def pick_device(choice: torch.device | str = "auto") -> torch.device:
    """Device by name, "auto" for cuda if available; raises `ValueError` if it is not available."""
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(choice)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device is {str(choice)!r}, but no CUDA device is available; use --device cpu"
        )
    return device


def use_threads(threads: int | None) -> None:
    """Set the CPU threads of this process; None leaves them to PyTorch.

    Raises `ValueError` for a number below 1.
    """
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    torch.set_num_threads(threads)
