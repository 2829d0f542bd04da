"""Checks the pixels that a run is trained on, in the background, while it trains."""

import threading

from patchdiffusion.data.pack import Pack
from patchdiffusion.train.guard import Order


class Verification:
    """Reads a pack once and compares its checksums, so that damage is found in minutes, not never.

    `wanted` is False where another process of the same machine does it.
    """

    def __init__(self, pack: Pack, *, wanted: bool = True):
        self.problem = ""
        """What is damaged, or nothing."""
        self._pack = pack
        if wanted:
            threading.Thread(target=self._read, name="verification", daemon=True).start()

    def _read(self) -> None:
        try:
            self._pack.verify()
        except (ValueError, OSError) as error:
            self.problem = str(error)

    def order(self) -> Order:
        """What the run has to do."""
        return Order.STOP_DATA if self.problem else Order.GO_ON
