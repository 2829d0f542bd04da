"""What the hardware is told before a run: threads, precision, where the pixels are, compilation."""

import contextlib
import sys
from typing import Any

import torch
from torch import Tensor, nn

MOST_GRAPHS = 256  # blocks differ in widths, and each size of crops has its own
SHARE_FOR_IMAGES = 0.3  # of the free memory of a device


def best_precision(device: torch.device) -> str:
    """bf16 where the hardware has it (CUDA, CPUs with AMX or AVX512-BF16), else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Only private names tell; a CPU without these emulates bf16, several times slower than fp32.
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return "bf16" if any(getattr(torch.cpu, n, bool)() for n in names) else "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """bf16 or fp16 autocast on a device, or nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype)


def resident(images: Tensor, device: torch.device) -> Tensor:
    """The images of a pack on the device if they fit there easily, else where they are."""
    if device.type != "cuda":
        return images
    free, _ = torch.cuda.mem_get_info(device)
    return images.to(device) if images.nbytes < SHARE_FOR_IMAGES * free else images


def channels_last(network: nn.Module) -> None:
    """Lay out the weights of convolutions with their channels last, in place: 2-D and 3-D ones."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in network.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.to(memory_format=formats[parameter.ndim])


def compile_units(units: list[nn.Module], *, backend: Any = "inductor") -> None:
    """Compile the repeated parts of a network in place, one graph for each shape they meet."""
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MOST_GRAPHS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * MOST_GRAPHS)
    for unit in units:
        unit.compile(dynamic=False, fullgraph=True, backend=backend)


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held, on the device or, on a CPU, altogether."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            peak = next(line for line in lines if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    except (OSError, StopIteration):
        return 0


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` begin anew, where the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def compiled_graphs() -> int:
    """Graphs that have been compiled in this process."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")  # slow to import, if nobody has yet
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0


def pick_device(choice: torch.device | str = "auto") -> torch.device:
    """cuda where there is one if `choice` is "auto"; raises `ValueError` if it cannot be had."""
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(choice)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device is available here; use --device cpu")
    return device
