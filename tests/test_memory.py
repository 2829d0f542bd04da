"""Freed memory comes back without a page fault."""

import resource
import sys

import pytest
import torch

from patchdiffusion.system.memory import keep_freed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_used_again() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 * 2**20)  # 64 MiB, above what malloc ever keeps by itself
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    if not keep_freed():
        pytest.skip("another C library")
    assert min(faults() for _ in range(4)) < 1000  # of 16384
