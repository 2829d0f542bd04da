"""Small transformers none of whose parts is silent, and inputs for them."""

from dataclasses import replace

import torch
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.nets.dit import DiT, DiTConfig

LITTLE = DiTConfig(width=16, depth=4, heads=2, embedding="late")
MODERN = replace(
    LITTLE, mlp="swiglu", norm="rms", qk_norm=True, positions="rope", registers=2,
    value_residual=True, context=3,
)  # fmt: skip


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def alive(config: DiTConfig) -> DiT:
    network = config.build()
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            parameter.copy_(
                drawn(*parameter.shape, seed=index) / max(parameter.shape[-1], 4) ** 0.5
            )
    return network


def inputs(config: DiTConfig, sides: tuple[int, ...] = (8, 12)) -> tuple[Tensor, Tensor, Cond]:
    x, noise = drawn(2, config.channels, *sides), drawn(2, seed=1)
    context = drawn(2, 4, config.context, seed=2) if config.context else None
    return x, noise, Cond(context=context)
