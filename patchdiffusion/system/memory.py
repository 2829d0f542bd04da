"""The memory of a device, and settings of the memory allocator of the C library."""

import ctypes
import os
import sys

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed() -> bool:
    """Keep freed memory for reuse instead of returning it to the system; False if not supported.

    Every training step allocates the same feature maps. On a CPU glibc returns them in between and
    the next step faults them in again, page by page: 50,000 page faults for DDPM++ at 64 x 64. Peak
    memory does not change.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # musl
        return False
    # Up to 1 GiB from the heap, which is never trimmed.
    return bool(libc.mallopt(_MMAP_THRESHOLD, 2**30) and libc.mallopt(_TRIM_THRESHOLD, -1))


def total_memory(device: torch.device) -> int:
    """Bytes of memory of a device; 2^63 - 1 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**63 - 1
