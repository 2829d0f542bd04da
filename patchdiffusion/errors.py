"""Errors that end a program with a documented exit code.

0 finished, or stopped after a checkpoint; 2 bad configuration or data, nothing was started;
20 disk; 21 too many steps that are not finite; 25 no valid checkpoint; 26 out of memory.
"""

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error) if isinstance(error, RuntimeError) else ""
    return "allocate memory" in text or "not enough memory" in text


class Stop(Exception):
    """A run cannot go on. The message is one line for the user: what happened and what helps."""

    def __init__(self, message: str, *, code: int):
        super().__init__(message)
        self.code = code
