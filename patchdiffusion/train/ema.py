"""Moving averages of the weights: an exponential one for sampling, and power-function profiles.

Profiles are those of Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
Models", CVPR 2024 (arXiv 2312.02696), section 3: the weight of the past grows as a power of time,
so that the average spans a fixed share of the run. `train/posthoc.py` reconstructs other widths.
"""

import copy

import torch
from torch import Tensor, nn

from patchdiffusion.system.dist import local
from patchdiffusion.train.parallel import Owners, as_sharded
from patchdiffusion.train.posthoc import exponent, profile_name
from patchdiffusion.train.settings import EMAConfig

MAIN = "averaged"


class EMA:
    """Averages of the parameters of a network in float32, each updated by one kernel launch.

    Trained parameters are averaged; others are shared with the network. Buffers are copied once, as
    networks here only have constant ones.
    """

    def __init__(self, network: nn.Module, config: EMAConfig):
        self.config = config
        self._shell = copy.deepcopy(network).requires_grad_(False)  # its weights are the average
        parameters = dict(network.named_parameters())
        self._names = [name for name, p in parameters.items() if p.requires_grad]
        self._fixed = {name: p for name, p in parameters.items() if not p.requires_grad}
        self._sources = [parameters[name] for name in self._names]
        for name, p in self._fixed.items():
            self._shell.get_parameter(name).data = p.data
        shell: list[Tensor] = [self._shell.get_parameter(name) for name in self._names]
        self.averages: dict[str, list[Tensor]] = {MAIN: shell}
        for std in config.profiles:
            self.averages[profile_name(std)] = [p.detach().clone() for p in self._sources]
        self._owners: Owners | None = None
        self._buffers: dict[str, Tensor] = {}

    def place(self, network: nn.Module, owners: Owners) -> None:
        """Place the averages as the parameters of a network are now, in shards or on one process.

        `owners` are the processes that hold some of them alone.
        """
        parameters = dict(network.named_parameters())
        self._sources = [parameters[name] for name in self._names]
        self._fixed = {name: parameters[name] for name in self._fixed}
        for name, tensors in self.averages.items():
            pairs = zip(tensors, self._sources, strict=True)
            self.averages[name] = [as_sharded(t, like) for t, like in pairs]
        self._owners = owners
        self._buffers = {name: b.clone() for name, b in self._shell.named_buffers()}
        self._shell.to(device="meta")

    @torch.no_grad()
    def update(self, seen: float, advance: float) -> None:
        """average += (1 - decay) (weights - average) when the clock advances to `seen`."""
        sources = [local(p) for p in self._sources if not p.is_meta]
        decays = [self.config.decay(seen, advance)]
        decays += [power_decay(std, seen, advance) for std in self.config.profiles]
        for tensors, decay in zip(self.averages.values(), decays, strict=True):
            targets = [local(t) for t in tensors if not t.is_meta]
            torch._foreach_lerp_(targets, sources, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def copy(self, network: nn.Module) -> None:
        """Reset all averages to the weights of a network."""
        parameters = dict(network.named_parameters())
        for tensors in self.averages.values():
            for target, name in zip(tensors, self._names, strict=True):
                local(target).copy_(local(parameters[name]))

    def network(self) -> nn.Module:
        """Network with the main average as its weights; all processes must call it if placed."""
        if self._owners is None:
            return self._shell
        device = next(local(p).device for p in self._sources if not p.is_meta)
        network = copy.deepcopy(self._shell).to_empty(device=device)
        network.load_state_dict(self._buffers, strict=False)
        values = dict(zip(self._names, self.averages[MAIN], strict=True)) | self._fixed
        for name, target in network.named_parameters():
            target.copy_(self._owners.whole(name, values[name], device))
        return network

    def tensors(self, name: str) -> dict[str, Tensor]:
        """One of the averages, by the names of the parameters."""
        return dict(zip(self._names, self.averages[name], strict=True))


def power_decay(std: float, seen: float, advance: float) -> float:
    """Weight of the old average when the clock advances to `seen` (equation 127 of 2312.02696)."""
    return (1 - advance / seen) ** (exponent(std) + 1)
