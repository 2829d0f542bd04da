"""Rank of this process, and its end; importable without PyTorch."""

import atexit
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn


@dataclass(frozen=True)
class Place:
    """Rank of a process among all processes and among those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """True if this is rank 0, which writes the files and the messages."""
        return self.rank == 0


def place(environ: Mapping[str, str] = os.environ) -> Place:
    """Rank of this process, from the variables of torchrun and accelerate, else from srun's."""
    for rank, size, local_rank, local_size in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        # Of the job step: a script of one task in a larger allocation is one process.
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ):
        if rank in environ and size in environ:
            count = re.match(r"\d+", environ.get(local_size, "1"))  # SLURM writes 4(x2)
            process = Place(
                int(environ[rank]),
                int(environ[size]),
                int(environ.get(local_rank, 0)),
                int(count[0]) if count else 1,
            )
            if not 0 <= process.rank < process.size:
                raise ValueError(
                    f"{rank} is {process.rank} and {size} is {process.size} in the environment; "
                    f"ranks are 0 to {size} - 1"
                )
            return process
    return Place()


def leave(code: int) -> NoReturn:
    """End this process with an exit code, after the functions registered with `atexit`.

    One of several processes ends without finalizing the interpreter: a process group to which
    something still refers, as DTensor's caches do, keeps its threads, and a thread that drops a
    Python tensor during finalization aborts the process (pytorch/pytorch pull request 179291). An
    interrupted one would end by the signal if the interrupt has passed through C code.
    """
    with suppress(ValueError):  # an environment that contradicts itself, as `main` has reported
        if place().size > 1 or code == 130:
            _end(code)
    sys.exit(code)


def _end(code: int) -> NoReturn:
    atexit._run_exitfuncs()
    with suppress(OSError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
