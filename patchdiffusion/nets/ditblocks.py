"""Parts of a transformer over patches, made from its configuration."""

import torch
from torch import nn

from patchdiffusion.cond import Tape
from patchdiffusion.nets.base import put
from patchdiffusion.nets.ditshape import DiTShape
from patchdiffusion.nets.experts import MlpExperts
from patchdiffusion.nets.layers import Linear
from patchdiffusion.nets.tokenblock import Routed, TokenBlock


def stem_of(pixels: int, bottleneck: int, width: int) -> nn.Module:
    """Embedding of patches, through fewer features if there is a bottleneck."""
    if not bottleneck:
        return Linear(pixels, width, role="stem")
    return nn.Sequential(
        Linear(pixels, bottleneck, bias=False, role="stem"), Linear(bottleneck, width, role="stem")
    )


def block_of(config: DiTShape, index: int) -> TokenBlock:
    """A block, by its number."""
    first = index in (0, *config.half[:1])  # of its stage
    return TokenBlock(
        config.width,
        config.heads,
        config.mlp_ratio,
        drop=config.dropout,
        norm=config.norm,
        mlp=config.mlp,
        kind=config.modulation,
        qk_norm=config.qk_norm,
        gives=config.value_residual and first,
        mixes=config.value_residual and not first,
        context=config.attends,
        experts=config.experts.build(config.mlp_shape, index, config.depth),
    )


def record(rule: MlpExperts, name: str, routed: Routed, registers: int, tape: Tape) -> None:
    """Put the experts of a block on the tape, and in training their auxiliary loss.

    Registers, which are first, are not recorded.
    """
    put(tape, name, routed.chosen[:, registers:])
    loss = rule.loss(routed) if torch.is_grad_enabled() else None
    if loss is not None:
        tape.add_loss("balance", loss)
