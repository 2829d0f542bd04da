"""Steps in which an encoder is evaluated: even ones, published lists, and those that it needs."""

import itertools
import weakref
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from patchdiffusion import rng
from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.nets.base import Network
from patchdiffusion.nets.cuts import Encoder
from patchdiffusion.solvers.core import towards

Keys = frozenset[int]
Rule = Literal["auto", "change"]

MEASURED = 8
"""Images of the path by which `needed` steps are found."""

PUBLISHED: dict[str, tuple[int, str, tuple[int, ...]]] = {
    "ddim-50": (50, "U-Net", (0, 1, 2, 3, 5, 10, 15, 25, 35)),
    "dpm-20": (20, "U-Net", (0, 1, 2, 3, 5, 10, 15)),
    "dit-250": (
        250,
        "transformer",
        tuple(i for i in range(250) if not (1 <= i < 230 and i % 10 < 6)),
    ),
}
"""Lists of Faster Diffusion: number of steps, kind of network, steps (0 is the noisiest)."""

_NEEDED: weakref.WeakKeyDictionary[nn.Module, dict[tuple, Keys]] = weakref.WeakKeyDictionary()


def even(steps: int, count: int) -> Keys:
    """So many of the steps, evenly spaced, from 0."""
    return frozenset(i * steps // count for i in range(count))


def by_change(changes: Sequence[float], count: int) -> Keys:
    """About `count` steps between which features change alike.

    `changes` are the relative squared changes at each step since the one before. Step 0, and the
    first steps at which the sum of their square roots reaches k / count of the total.
    """
    sums = list(itertools.accumulate(max(change, 0.0) ** 0.5 for change in changes))
    total = sums[-1]
    if total == 0:
        return even(len(changes), count)
    reached = (k * total / count * (1 - 1e-12) for k in range(1, count))
    return frozenset({0, *(next(i for i, s in enumerate(sums) if s >= r) for r in reached)})


class Followed(NamedTuple):
    """A path of Euler's method from the noise of fixed seeds."""

    end: Tensor
    """Its images, [`MEASURED`, C, *S]."""
    changes: list[float]
    """Relative squared change of the features of the encoder at each key step, from 0."""


class Search(NamedTuple):
    """Key steps that a model needs, and what it took to find them."""

    keys: Keys
    decoded: int = 0
    """Evaluations of the decoder, each image by itself."""
    encoded: int = 0
    """Evaluations of the encoder."""


@torch.no_grad()
def followed(
    net: NetDenoiser, blocks: int, sigmas: Sequence[float], shape: tuple[int, ...], keys: Keys
) -> Followed:
    """Follow the path of `MEASURED` images [C, *S], of the classes in turn, with these key steps.

    A change sums over the levels of the encoder mean |E_i - E_j|^2 / mean |E_i|^2, with j the key
    step before i.
    """
    network = net.network
    assert isinstance(network, Encoder) and isinstance(network, Network)
    device = next(network.parameters()).device
    seeds = torch.arange(MEASURED, device=device)
    x = rng.normal(rng.keys(0, "key steps", 0, seeds), shape).float() * sigmas[0]
    classes = network.config.num_classes
    cond = Cond(labels=seeds % classes if classes else None)
    changes, encoding = [0.0], None
    for i, sigma in enumerate(sigmas[:-1]):
        inner, noise, filled, scales = net.scaled(x, sigma, cond)
        if encoding is None or i in keys:
            before, encoding = encoding, network.encoded(inner, noise, filled, blocks)
            if before is not None:
                changes.append(sum(map(_change, encoding.features, before.features)))
        denoised = scales.denoised(x, encoding.decode(noise, filled))
        x = towards(denoised, x, sigmas[i + 1] / sigma)
    return Followed(x, changes)


def _change(now: Tensor, before: Tensor) -> float:
    difference = (now - before).double().square().mean() / now.double().square().mean()
    return float(difference.nan_to_num())


def needed(
    net: NetDenoiser,
    blocks: int,
    sigmas: tuple[float, ...],
    shape: tuple[int, ...],
    count: int,
    rule: Rule = "auto",
) -> Search:
    """About `count` steps at which a network needs its encoder, measured once for a schedule.

    change: those between which the features change alike; auto: these or even ones, whichever
    leaves the images of `followed` closer to those with all steps.
    """
    network = net.network
    versions = sum(0 if p.is_inference() else p._version for p in network.parameters())
    measured = _NEEDED.setdefault(network, {})
    key = (blocks, sigmas, shape, count, rule, versions)
    if key in measured:
        return Search(measured[key])
    every = frozenset(range(len(sigmas) - 1))
    exact = followed(net, blocks, sigmas, shape, every)
    candidates = [by_change(exact.changes, count)]
    if rule == "auto" and (regular := even(len(every), count)) not in candidates:
        candidates.append(regular)
    tried = candidates if len(candidates) > 1 else []
    ends = [followed(net, blocks, sigmas, shape, keys).end for keys in tried]
    errors = [float((end - exact.end).double().square().mean()) for end in ends]
    measured[key] = candidates[errors.index(min(errors))] if errors else candidates[0]
    encoded = MEASURED * (len(every) + sum(map(len, tried)))
    return Search(measured[key], MEASURED * len(every) * (1 + len(tried)), encoded)
