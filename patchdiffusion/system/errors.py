"""Errors that end a program with a documented exit code.

| code | meaning |
|---|---|
| 0 | finished, or stopped after a checkpoint or before the first step |
| 2 | bad configuration or data; nothing was started |
| 20 | two saves in a row failed: the disk is full or cannot be written |
| 21 | too many steps in a row, the weights, or sampled images, are not finite |
| 22 | the gradient exploded again after a rollback |
| 23 | the prepared images are damaged |
| 24 | another process is lost, hangs, holds other weights, or has taken the folder of the run |
| 25 | no checkpoint is valid |
| 26 | out of memory |
| 130 | interrupted twice; in other commands than `train` by any signal |
| 141 | the program that read the output has ended, as `head` does |
"""


class Stop(Exception):
    """Raised when a run cannot go on, with one line for the user: what happened and what helps.

    The message is empty if another process has reported the error already.
    """

    def __init__(self, message: str, *, code: int):
        super().__init__(message)
        self.code = code


def out_of_memory(error: BaseException) -> bool:
    """True if an error means that memory ran out, on any device."""
    import torch  # here: commands that fail at once do not wait for it

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error) if isinstance(error, RuntimeError) else ""
    return "allocate memory" in text or "not enough memory" in text


def peer_lost(error: BaseException) -> bool:
    """True if an error means that another process is gone or did not answer in time."""
    import torch.distributed as c10d

    if isinstance(error, c10d.DistError):
        return True
    text = str(error) if isinstance(error, RuntimeError) else ""
    marks = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Timed out")
    return any(mark in text for mark in marks)
