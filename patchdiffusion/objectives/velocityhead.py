"""The second output of improved MeanFlow: the velocity, learned beside the mean velocity.

"Improved Mean Flows" (Geng et al., arXiv 2512.02012) differentiates along a velocity that the
network estimates itself. It is the mean velocity of a jump of length 0, or the output of an
auxiliary head, which shares the layers before it, is trained at every jump, and is used in training
only. In the paper the head has several blocks of its own; here it has three layers of each place.
"""

import math
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.nets.projector import Projector
from patchdiffusion.nets.tapmaps import TapMap, as_map, chosen, tap_maps
from patchdiffusion.nets.tokens import fold
from patchdiffusion.objectives.base import Materials
from patchdiffusion.objectives.taps import full_size
from patchdiffusion.patches import Size
from patchdiffusion.rng import seed_of


class Head(Protocol):
    """A learned function of an activation of the network."""

    @property
    def tap(self) -> str:
        """Name of the activation."""
        ...

    def __call__(self, activation: Tensor, size: Size) -> Tensor:
        """The velocity of images of a size: [B, C, *size]."""
        ...

    def operations(self, size: Size) -> float:
        """Operations to train it on one crop of a size."""
        ...


class VelocityHead(nn.Module):
    """Three layers of each place, from normalized features at a tap to the pixels of the place."""

    def __init__(self, place: TapMap, channels: int, tokens: Size, seed: int):
        """`tokens` are the sides of the patches that become tokens, empty without any.

        Raises `ValueError` for a tap whose places are not whole pixels.
        """
        super().__init__()
        if any(c != int(c) for c in place.cell):
            raise ValueError(
                f"the tap {place.name} has places of {place.cell} pixels; choose one of whole "
                "pixels for objective.head_tap"
            )
        self.place, self.tokens = place, tokens
        self.patch = tuple(int(c) for c in place.cell)
        self.layers = Projector(
            "mlp", place.features, channels * math.prod(self.patch), seed=seed_of(seed, "head")
        )

    @property
    def tap(self) -> str:
        """Name of the activation that it reads."""
        return self.place.name

    def operations(self, size: Size) -> float:
        """Operations of one pass forward, and of one forward and backward."""
        return 8.0 * self.place.places(size) * self.layers.macs

    def forward(self, activation: Tensor, size: Size) -> Tensor:
        """The velocity from the activation [B, D, *G] or [B, T, D]: [B, C, *size]."""
        h = as_map(activation, size, self.tokens).movedim(1, -1)
        out = self.layers(F.layer_norm(h, h.shape[-1:], eps=1e-6).movedim(-1, 1))
        grid = tuple(out.shape[2:])
        return fold(out.flatten(2).mT, grid, self.patch)[(..., *(slice(side) for side in size))]


def velocity_head(materials: Materials, tap: str = "") -> VelocityHead:
    """The head of a network at a tap, by default the last one, which is trained with it.

    Raises `ValueError` for a network without such a tap.
    """
    network = materials.network
    maps = tap_maps(network.config.build, full_size(materials))
    place = chosen(network.taps, maps, tap, lambda: list(maps)[-1])
    config = network.config
    head = VelocityHead(place, config.channels, config.token_size, materials.seed)
    materials.learn("velocity_head", head)
    return head


def with_tap(denoiser: NetDenoiser, head: Head) -> NetDenoiser:
    """The denoiser with a tape that records what the head reads, in the pass with gradients."""
    if denoiser.tape is None:
        return denoiser.recording(Tape((head.tap,)))
    denoiser.tape.want(head.tap)
    return denoiser


def learned_velocity(denoiser: NetDenoiser, head: Head, z: Tensor) -> Tensor:
    """The head's velocity at z, of the pass that was recorded: like z."""
    assert denoiser.tape is not None
    return head(denoiser.tape.activations[head.tap], tuple(z.shape[2:]))


@torch.no_grad()
def still_velocity(denoiser: NetDenoiser, head: Head, z: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The head's velocity at z, of a pass without a jump and without a graph: like z."""
    tape = Tape((head.tap,))
    denoiser.raw(z, t, replace(cond, jump=torch.zeros_like(t)), tape=tape)
    return head(tape.activations[head.tap], tuple(z.shape[2:])).to(z.dtype)
