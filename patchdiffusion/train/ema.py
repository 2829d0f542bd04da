"""The exponential moving average of the weights."""

import copy

import torch
from torch import Tensor, nn


class EMA:
    """A second network whose parameters follow those of the first, in float32.

    Parameters are averaged; buffers are copied once, as networks here only have constant ones.
    """

    def __init__(self, network: nn.Module):
        self.network = copy.deepcopy(network).requires_grad_(False)
        self._targets: list[Tensor] = list(self.network.parameters())
        self._sources: list[Tensor] = list(network.parameters())

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """average <- decay average + (1 - decay) weights."""
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            self._targets, self._sources, 1 - decay
        )
