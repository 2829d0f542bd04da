"""Randomness as a function: (seed, stream, step, index) -> draws, with no generator and no state.

Each sample of a step owns a 64-bit key. Everything drawn for it is a hash of that key, so the
same seed gives the same order, crops, noise and dropout for any number of processes,
micro-batches and restarts. Bits come from SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), a
counter-based generator, evaluated with tensor operations on whatever device holds the keys.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import reduce
from operator import mul

import numpy as np
import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_INVERSE = -1018231460777725123  # of _GOLDEN modulo 2^64
_MIX1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def seed_of(*parts: int | str) -> int:
    """A signed 64-bit integer from any mixture of numbers and names (BLAKE2b)."""
    # Not the type's own name: numpy integers must count as integers.
    text = "/".join(f"{'str' if isinstance(p, str) else 'int'}:{p}" for p in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts signed integers arithmetically


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def keys(seed: int, stream: str, step: int, index: Tensor) -> Tensor:
    """One key for each sample index of a step: int64 [B] -> int64 [B]."""
    return _mix(index * _GOLDEN + seed_of(seed, stream, step))


def subkeys(key: Tensor, stream: str) -> Tensor:
    """Independent keys of the same samples for another purpose: int64 [B] -> int64 [B]."""
    return _mix(key ^ _number(stream))


def _number(stream: str) -> int:
    return seed_of(stream)


# A name is a constant of a compiled block, its hash too. This is what the decorator
# torch.compiler.assume_constant_result does, which takes a second to import the compiler.
vars(_number)["_dynamo_marked_constant"] = True


def bits(key: Tensor, count: int) -> Tensor:
    """`count` random 64-bit words for each key: int64 [B] -> int64 [B, count]."""
    # key + counter * _GOLDEN, in a form that the compiler does not mistake for index arithmetic,
    # which would overflow.
    counter = key[:, None] * _INVERSE + torch.arange(1, count + 1, device=key.device)
    return _mix(counter * _GOLDEN)


def uniform(key: Tensor, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform draws in the open interval (0, 1): [B, count]."""
    if dtype == torch.float64:
        return (_shift(bits(key, count), 12).to(dtype) + 0.5) * 2.0**-52
    return (_shift(bits(key, count), 41).to(dtype) + 0.5) * 2.0**-23


def normal(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal draws for each key by the Box-Muller transform: [B, *shape].

    float32 draws use 32 bits each, so they reach +-6.7 standard deviations.
    """
    numel = reduce(mul, shape, 1)
    half = (numel + 1) // 2
    if dtype == torch.float64:
        radius, angle = uniform(key, 2 * half, dtype).chunk(2, dim=1)
    else:
        word = bits(key, half)
        radius = ((word & 0xFFFFFFFF).to(torch.float32) + 0.5) * 2.0**-32
        angle = (_shift(word, 32).to(torch.float32) + 0.5) * 2.0**-32
    radius = radius.log_().mul_(-2).clamp_(min=0).sqrt_()
    angle = angle.mul_(2 * math.pi)
    pair = torch.cat([radius * angle.cos(), radius.mul_(angle.sin())], dim=1)
    return pair[:, :numel].reshape(len(key), *shape).to(dtype)


def integers(key: Tensor, high: int | Tensor) -> Tensor:
    """One integer in [0, high) for each key: int64 [B]; `high` may differ per sample."""
    return (uniform(key, 1)[:, 0] * high).floor().to(torch.int64)


def bernoulli(key: Tensor, probability: float) -> Tensor:
    """One Bernoulli draw for each key: bool [B]."""
    return uniform(key, 1)[:, 0] < probability


def keep_level(drop: float) -> int:
    """Threshold of dropout: the least int16 draw at which a value is kept.

    Raises `ValueError` unless 0 <= drop < 1.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"the dropout probability must lie in [0, 1), not {drop}")
    return min(round(drop * 2**16), 2**16 - 1) - 2**15  # 2^15 would wrap around in int16


def keep_mask(key: Tensor, shape: tuple[int, ...], drop: float) -> Tensor:
    """Dropout masks, True where a value is kept: bool [B, *shape]; four draws per 64-bit word.

    Raises `ValueError` unless 0 <= drop < 1.
    """
    level = keep_level(drop)
    numel = reduce(mul, shape, 1)
    word = bits(key, (numel + 3) // 4)
    return (word.view(torch.int16) >= level)[:, :numel].reshape(len(key), *shape)


def keep_scale(drop: float) -> float:
    """Factor of the kept values that preserves the mean, for the rounded share of `keep_mask`."""
    return 1 / (1 - round(drop * 2**16) / 2**16)


def permutation(seed: int, stream: str, epoch: int, length: int) -> np.ndarray:
    """A random order of `length` items, a function of its arguments alone: int64 [length]."""
    generator = np.random.Generator(np.random.Philox(key=seed_of(seed, stream, epoch) % 2**64))
    return generator.permutation(length)


@dataclass(frozen=True)
class Draws:
    """Random draws of some samples of one training step.

    `index` [B] is the position of each sample in the whole step (over all ranks, micro-batches
    and groups) and `count` the number of samples in its group, of which it is number `rank`.
    A slice of a step therefore draws exactly what the whole step draws there.
    """

    seed: int
    step: int
    index: Tensor
    rank: Tensor
    count: int

    def to(self, device: torch.device | str) -> "Draws":
        """These draws, computed on another device."""
        index, rank = self.index.to(device), self.rank.to(device)
        return Draws(self.seed, self.step, index, rank, self.count)

    def keys(self, stream: str) -> Tensor:
        """The keys of the samples in a stream: int64 [B]."""
        return keys(self.seed, stream, self.step, self.index)

    def others(self, stream: str) -> "Draws":
        """For each sample the draws of another random sample of its group.

        Raises `ValueError` for a group of one sample.
        """
        if self.count < 2:
            raise ValueError(f"a group needs 2 samples for one to have another, not {self.count}")
        away = 1 + integers(self.keys(stream), self.count - 1)
        rank = (self.rank + away) % self.count
        return Draws(self.seed, self.step, self.index - self.rank + rank, rank, self.count)

    def normal(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal float32 [B, *shape]."""
        return normal(self.keys(stream), shape)

    def uniform(self, stream: str) -> Tensor:
        """Independent uniform float64 [B] in (0, 1)."""
        return uniform(self.keys(stream), 1)[:, 0]

    def stratified(self, stream: str) -> Tensor:
        """Uniform float64 [B] in (0, 1), one in each of `count` equal intervals of the group.

        Each sample is still uniform over (0, 1) for itself: a random shift, common to the
        group, is added modulo 1.
        """
        shift = seed_of(self.seed, stream, "shift", self.step) / 2.0**64
        u = (self.rank + self.uniform(stream)) / self.count + shift
        return (u - u.floor()).clamp(2.0**-53, 1 - 2.0**-53)

    def bernoulli(self, stream: str, probability: float) -> Tensor:
        """Independent Bernoulli draws: bool [B]."""
        return bernoulli(self.keys(stream), probability)
