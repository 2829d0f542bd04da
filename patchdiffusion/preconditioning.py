"""The contract of parameterisations: a denoiser from the output of a network, and its defaults."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, Self

from torch import Tensor, nn

from patchdiffusion.noise import Law, LogNormal
from patchdiffusion.paths import per_sample
from patchdiffusion.system import families
from patchdiffusion.weighting import LossWeight

RandomCrops = Callable[[tuple[int, ...], int], Iterable[Tensor]]
"""(size, count) -> batches [B, C, *size] of random crops of the training images, `count` in all."""


class Affine(Protocol):
    """A denoiser at some noise levels, as an affine function of the output of its network."""

    @property
    def inner(self) -> Tensor:
        """c_in, the factor of the network's input: [B] or a map [B, 1, *S]."""
        ...

    @property
    def noise(self) -> Tensor:
        """c_noise, the noise argument of the network: [B] or a map [B, 1, *S]."""
        ...

    def denoised(self, x: Tensor, raw: Tensor) -> Tensor:
        """D from the noisy x and the network's output F: shape and dtype of x."""
        ...


class Scales(NamedTuple):
    """The four functions of sigma, each [B] or a map [B, 1, *S] (EDM, equation 7)."""

    skip: Tensor
    out: Tensor
    inner: Tensor
    noise: Tensor

    def denoised(self, x: Tensor, raw: Tensor) -> Tensor:
        """c_skip x + c_out F, in the precision of the scales: shape and dtype of x."""
        raw = raw.to(self.out.dtype)
        return (per_sample(self.skip, x) * x + per_sample(self.out, x) * raw).to(x.dtype)


class Bound(Protocol):
    """A preconditioner of one network."""

    def scales(self, sigma: Tensor) -> Affine: ...


class Precond(Protocol):
    """A preconditioner: the four scales of a network's input, output, skip and noise argument."""

    def scales(self, sigma: Tensor) -> Scales: ...

    def on(self, network: nn.Module) -> Bound:
        """The preconditioner of a network whose buffers it may read; by default itself."""
        return self


class Trainable(Precond, ABC):
    """Base of the parameterisations of `--precond`, with their default weight and noise law."""

    @property
    def predicts_eps(self) -> bool:
        """True if the network predicts eps, whose error is sigma times as large in the image."""
        return False

    @abstractmethod
    def scales(self, sigma: Tensor) -> Scales:
        """The four functions of sigma."""

    @abstractmethod
    def default_weighting(self) -> LossWeight:
        """Default weight of the loss: mostly the mean squared error of the network's output."""

    def default_noise(self) -> Law:
        """Default noise law, as published."""
        return LogNormal()

    @property
    def meaning(self) -> tuple[object, ...]:
        """Key of the input and output of the network; weights of another net fit if it is equal."""
        return (type(self),)

    def for_canvas(self, canvas: tuple[int, ...], network: Any) -> "Trainable":
        """The parameterisation for a size of images and a `NetworkConfig`; by default itself."""
        return self

    def attach(self, network: nn.Module, channels: int) -> None:
        """Add the buffers that it needs beside the weights to a new network, without values.

        They are saved, averaged and loaded with the network; by default none.
        """

    def fit(self, network: nn.Module, crops: RandomCrops) -> None:
        """Fill the buffers before training; by default there are none."""

    def check_noise(self, law: object) -> None:
        """Raise `ValueError` for a noise law that it cannot be trained with; allows any."""
        return None

    def inherit(self, old: object, config: object) -> Self:
        """A copy with sigma_data or the steps of the parameterisation that it replaces."""
        return families.copy_fields(self, old)

    def prefers(self, config: Any) -> Any:
        """The configuration with this one and its defaults: weight, and noise law if it differs."""
        law, former = self.default_noise(), config.precond.default_noise()
        noise = config.noise if law == former else law
        objective = config.objective.of_another_precond()
        return replace(config, precond=self, noise=noise, objective=objective)


def check_time_scale(value: float) -> None:
    """Raise `ValueError` unless c_noise can be the time multiplied by this value."""
    if not 0 < value < math.inf:
        raise ValueError(f"time_scale must be positive and finite, not {value}")
    if value > 2**24:
        raise ValueError(
            f"time_scale must be at most 2^24, as float32 tells no finer times apart, not {value}"
        )
