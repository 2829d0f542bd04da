"""Parameters and multiply-accumulates (MAC) of a network, counted without computing anything."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from patchdiffusion.cond import Cond
from patchdiffusion.nets.base import Network


@dataclass(frozen=True)
class Count:
    """Size of a network, and its cost for one image."""

    macs: int
    """Multiply-accumulates of one forward pass of one image; 2 FLOP each."""
    params: int
    """Trained parameters."""
    idle: int = 0
    """Those of experts that a token does not pass through, see `Network.idle`."""

    @property
    def active(self) -> int:
        """Parameters that are used for one token."""
        return self.params - self.idle

    @property
    def parameters_text(self) -> str:
        """Number of parameters, and of active ones if these are fewer."""
        active = f", {self.active / 1e6:.2f}M active" if self.idle else ""
        return f"{self.params / 1e6:.2f}M parameters{active}"

    def __str__(self) -> str:
        return f"{self.parameters_text}, {self.macs / 1e9:.3g} GMAC"


def count(network: Network, size: int | tuple[int, ...], cond: Cond | None = None) -> Count:
    """Count the cost of one image of `size` (one side for all axes, or each).

    Weights may be on any device, also on meta. Convolutions, matrix products and attention count;
    normalization, activations and resampling do not. `cond` is of batch 1, on meta.
    """
    cond = cond or Cond()
    sides = (size,) * network.config.axes if isinstance(size, int) else size
    params = sum(p.numel() for p in network.parameters())
    shape = (1, network.config.channels, *sides)
    cond = cond if network.adapters is None else network.adapters.counted_with(cond, sides)
    x, noise = torch.empty(shape, device="meta"), torch.empty(1, device="meta")
    try:
        return Count(macs=macs_of(network, x, noise, cond), params=params, idle=network.idle)
    except (RuntimeError, NotImplementedError):  # a network of somebody's own may have to compute
        device = next(network.parameters()).device
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            given = cond.map(lambda x: torch.zeros_like(x, device=device))
            network(torch.zeros(shape, device=device), torch.zeros(1, device=device), given)
    return Count(macs=counter.get_total_flops() // 2, params=params, idle=network.idle)


def macs_of(module: nn.Module, *inputs: object) -> int:
    """Multiply-accumulates of a module, whose weights may be on any device, for inputs on meta."""
    return macs_of_call(module, module, *inputs)


def macs_of_call(network: nn.Module, function: Callable[..., object], *inputs: object) -> int:
    """Multiply-accumulates of a function of a network, such as a part of it, as `macs_of`."""
    call = _Call(network, function)
    tensors = {**dict(call.named_parameters()), **dict(call.named_buffers())}
    shells = {name: torch.empty_like(x, device="meta") for name, x in tensors.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(call, shells, inputs)
    return counter.get_total_flops() // 2


class _Call(nn.Module):
    """A function of a network as a module with its weights."""

    def __init__(self, network: nn.Module, function: Callable[..., object]):
        super().__init__()
        self.network = network
        self._function = (function,)  # not a second name of the network

    def forward(self, *inputs: object) -> object:
        return self._function[0](*inputs)


class MacCounter(TorchDispatchMode):
    """Counts the multiply-accumulates of all that is computed in its context, as `count` does.

    What is not computed, as by an accelerator, does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.macs += sdpa_flop_count(*(x.shape for x in args[:3])) / 2
        elif (flop := flop_registry.get(packet)) is not None:
            self.macs += flop(*args, **(kwargs or {}), out_val=out) / 2
        return out


def training_flops(
    network: Network, size: int | tuple[int, ...], cond: Cond | None = None
) -> float:
    """FLOP to train on one image of `size`, see `flops_per_mac`.

    With a seed, as in training: a network may leave out some of its tokens then. `cond` is that of
    `count`.
    """
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    macs = count(network, size, replace(cond or Cond(), seed=seed)).macs
    return flops_per_mac(network) * macs


def flops_per_mac(network: nn.Module) -> float:
    """FLOP of training for a MAC of the network: 6, as backward is twice the forward pass.

    Frozen weights have no gradient of their own, which is half of the backward pass.
    """
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    trained = sum(n for n, is_trained in sizes if is_trained) / max(sum(n for n, _ in sizes), 1)
    return 4.0 + 2.0 * trained
