"""Heads of networks: the network's own output, or another head on its deep features."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets.base import Network, NetworkConfig
from patchdiffusion.nets.layers import Linear


@dataclass(frozen=True, kw_only=True)
class OwnHead:
    """The output of the network itself, an image of the input's shape."""

    kind: ClassVar[str] = "denoiser"
    classes: ClassVar[int] = 0

    def build(self, network: NetworkConfig, *, seed: int = 0) -> Network:
        """Build the network unchanged."""
        return network.build(seed=seed)


@dataclass(frozen=True, kw_only=True)
class ClassifierHead:
    """Logits of classes, from attention over the features of all locations."""

    kind: ClassVar[str] = "classifier"

    classes: int
    """Number of classes."""
    queries: int = 4
    """Number of attention queries: weighted means over locations that the logits are made of."""

    def __post_init__(self) -> None:
        for name, least in (("classes", 2), ("queries", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def build(self, network: NetworkConfig, *, seed: int = 0) -> Network:
        """Build a classifier; `ValueError` for a network without features or with class labels."""
        if network.num_classes or network.jump:
            raise ValueError(
                "the network of a classifier is conditioned on noise level and position alone: set "
                "--network.num-classes 0 and --network.no-jump"
            )
        return ClassifierNetwork(network, self, seed=seed)


@dataclass(frozen=True, kw_only=True)
class AutoencoderHead:
    """The output of an autoencoder, a reconstruction of its input."""

    kind: ClassVar[str] = "autoencoder"
    classes: ClassVar[int] = 0

    def build(self, network: NetworkConfig, *, seed: int = 0) -> Network:
        """Build the network unchanged."""
        return network.build(seed=seed)


Head = OwnHead | ClassifierHead | AutoencoderHead
"""The heads that a model file may name."""


class ClassifierNetwork(Network[NetworkConfig]):
    """The deep features of a network, pooled by attention, and a linear layer: logits [B, K].

    At the start all locations have equal weight and the logits are small.
    """

    def __init__(self, config: NetworkConfig, head: ClassifierHead, *, seed: int = 0):
        super().__init__(config)
        self.trunk = config.build(seed=seed)
        width = _width(self.trunk)
        self.trunk.remove_head()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        # A bias would be the same at all places, which softmax does not see.
        self.attention = Linear(width, head.queries, scale=0.0, bias=False, role="head")
        self.head = Linear(head.queries * width, head.classes, scale=0.1, role="head")
        self.init(seed)

    def units(self) -> list[nn.Module]:
        return self.trunk.units()

    @property
    def taps(self) -> tuple[str, ...]:
        return self.trunk.taps

    def after_step(self, applied: Tensor) -> None:
        self.trunk.after_step(applied)

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        """x [B, C, *S], noise [B] -> logits [B, K]; no dropout unless `cond.seed` is given."""
        h = self.norm(self.trunk.features(x, noise, cond, tape=tape))  # [B, P, F]
        weights = self.attention(h).softmax(dim=1)  # [B, P, queries]
        return self.head((weights.mT @ h).flatten(1))


@torch.no_grad()
def _width(network: Network) -> int:
    """Number of features of a location."""
    config = network.config
    x = torch.zeros(1, config.channels, *(config.divisor,) * config.axes)
    return network.features(x, torch.zeros(1), Cond(percentile=torch.zeros(1))).shape[-1]
