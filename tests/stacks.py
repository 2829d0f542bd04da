"""A network of bricks that counts how often each of them is evaluated."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets.base import Network, NetworkConfig
from patchdiffusion.nets.layers import Conv
from patchdiffusion.paths import per_sample


@dataclass(frozen=True, kw_only=True)
class StackConfig(NetworkConfig):
    """Convolutions, each of the image and of what the one before makes of it."""

    bricks: int = 3

    @property
    def reads(self) -> frozenset[str]:
        return super().reads | {"pos"}

    def build(self, *, seed: int = 0) -> "Stack":
        return Stack(self).init(seed)


class Stack(Network[StackConfig]):
    """A stack of bricks for tests."""

    def __init__(self, config: StackConfig):
        super().__init__(config)
        inputs = 2 * config.channels + 2
        self.convs = nn.ModuleList(
            Conv(inputs, config.channels, role="conv") for _ in range(config.bricks)
        )
        self.labels = nn.Parameter(torch.linspace(0.5, 1.5, config.num_classes + 1))
        self.role = "embedding"
        self.calls = [0] * config.bricks

    @property
    def num_bricks(self) -> int:
        return self.config.bricks

    @property
    def needs_first(self) -> bool:
        return self.config.bricks < 4

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        return self.run(x, noise, cond, tape=tape)[-1]

    def run(
        self,
        x: Tensor,
        noise: Tensor,
        cond: Cond,
        *,
        bricks: Collection[int] | None = None,
        tape: Tape | None = None,
    ) -> list[Tensor]:
        pos = torch.zeros_like(x[:, :1]).expand(-1, 2, -1, -1) if cond.pos is None else cond.pos
        label = self.labels[-1:] if cond.labels is None else self.labels[cond.labels]
        out, below = [], torch.zeros_like(x)
        for number in sorted(range(self.num_bricks) if bricks is None else bricks):
            self.calls[number] += 1
            h = self.convs[number](torch.cat([x, below, pos], dim=1))
            below = below + torch.tanh(h * per_sample(label * (1 + noise), x))
            out.append(below)
        return out

    def macs_of_bricks(self, size: tuple[int, ...]) -> list[float]:
        return [float((number + 1) * size[0] * size[1]) for number in range(self.num_bricks)]
