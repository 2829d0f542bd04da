"""ControlNet as an adapter: a branch beside a frozen network, which is shown a map of each image.

Zhang et al., arXiv 2302.05543; the branch itself is in `controlbranch`.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from patchdiffusion.nets.adapterbase import AdapterConfig, Changes
from patchdiffusion.nets.attached import attached_to
from patchdiffusion.nets.base import Network
from patchdiffusion.nets.controlbranch import BRANCH, ControlBranch
from patchdiffusion.nets.controlmaps import ControlMaps, Edges


@dataclass(frozen=True, kw_only=True)
class ControlAdapter(AdapterConfig):
    """Base of adapters that are a branch beside the network."""

    blocks: int = 0
    """Blocks of a transformer that are copied; 0 is half of them. Of a U-Net it is the encoder."""

    def changes(self, network: Network) -> Changes:
        return {BRANCH: self.branch(network)}

    def branch(self, network: Network) -> ControlBranch:
        """A new branch beside a network."""
        branch = network.control_branch(self.blocks)
        assert isinstance(branch, ControlBranch)
        branch.maps = self.maps
        return branch

    def continues(self, other: AdapterConfig) -> bool:
        return other == self

    def started(self, network: Network) -> Network:
        branch_of(network).start(network)
        return network

    def prefers(self, config: Any) -> Any:
        """The configuration with this adapter; copies of trained weights want a smaller rate."""
        config = super().prefers(config)
        return replace(config, optim=replace(config.optim, lr=3e-4))


@dataclass(frozen=True, kw_only=True)
class ControlNet(ControlAdapter):
    """A copy of the first blocks, which is shown edges, colors or depth (2302.05543)."""

    word: ClassVar[str] = "control"

    condition: ControlMaps = field(default_factory=Edges)
    """Map of each image that controls the network."""

    @property
    def maps(self) -> tuple[ControlMaps, ...]:
        return (self.condition,)


def branch_of(network: Network, name: str = "adapter") -> ControlBranch:
    """The branch of an adapter by its name."""
    attached = attached_to(network)
    branch = None if attached is None else attached.change(name, BRANCH)
    assert isinstance(branch, ControlBranch)
    return branch
