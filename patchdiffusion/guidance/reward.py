"""Guidance by a reward or a measurement of the clean image: no training, one backward pass more.

The Jacobian J of a denoiser D gives the posterior covariance, C = Cov[x0 | x] = sigma^2 J (the
second formula of Tweedie). A term of the score is a term of D times sigma^2: the gradient in x of
f(D(x)) becomes sigma^2 J^T grad f(D) = C grad f(D), a product with C, which is one backward pass.
Rewards are functions of the clean estimate, never of the noisy image.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from patchdiffusion.cond import Call, Cond
from patchdiffusion.denoiser import Denoiser, Wrapper, ask, noise_level
from patchdiffusion.nets.attention import twice_differentiable
from patchdiffusion.paths import per_sample

Reward = Callable[[Tensor], Tensor]  # clean images [B, *S] -> [B], each sample by itself
Covariance = Callable[[Tensor], Tensor]  # v [B, *S] -> Cov[x0 | x] v, [B, *S]


def rewards_of(reward: Reward, x: Tensor) -> Tensor:
    """The reward of each image: x [B, *S] -> [B]; `ValueError` for a result of another shape."""
    value = reward(x)
    if value.shape != (len(x),):
        raise ValueError(
            f"a reward must be one number per image, [{len(x)}], not {list(value.shape)}"
        )
    return value


def gradient(reward: Reward, x: Tensor) -> Tensor:
    """The gradient of a reward at x [B, *S], also under `no_grad`: [B, *S].

    It can be differentiated again if x requires a gradient and gradients are on. Raises
    `ValueError` for a reward without a gradient.
    """
    differentiable = torch.is_grad_enabled() and x.requires_grad
    with torch.enable_grad():
        point = x if differentiable else x.detach().requires_grad_()
        value = rewards_of(reward, point)
        if not value.requires_grad:
            raise ValueError("this reward has no gradient; use steering or best_of instead")
        return torch.autograd.grad(value.sum(), point, create_graph=differentiable)[0]


# ---- Guides: terms added to the denoised image ----


class Guide(Protocol):
    """The change of a denoised image [B, *S], from it and products with Cov[x0 | x]."""

    def __call__(self, denoised: Tensor, covariance: Covariance) -> Tensor: ...


@dataclass(frozen=True)
class Tilt:
    """Guide to p(x0) exp(scale r(x0)), the maximum of E[r] - KL / scale: C grad r(D).

    Exact for a linear reward and Gaussian data, for which the mean moves by scale Cov grad r and
    the covariance is unchanged (arXiv 2404.07771, 2404.14743). With the `logp` of a `Measurement`
    this is diffusion posterior sampling (2209.14687), which neglects C in the likelihood and is
    over-confident.
    """

    reward: Reward

    def __call__(self, denoised: Tensor, covariance: Covariance) -> Tensor:
        return covariance(gradient(self.reward, denoised))


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Guide to p(x0 | y) for y = A x0 + noise: C A^T (noise^2 I + A C A^T)^-1 (y - A D).

    Exact if A is linear and the posterior Gaussian (arXiv 2310.06721); another `measure` is
    linearized at D. With a reward as `measure` and a target reward as `value` it samples images of
    that reward. Costs a backward pass for each of the m measured numbers. Raises `ValueError` for
    values that do not fit the measurement.
    """

    measure: Callable[[Tensor], Tensor]
    """A: clean images [B, *S] -> measurements, [B] or [B, m]."""
    value: Tensor | float
    """Measured value y, broadcast to the shape of the measurement. A value for each image fits a
    single batch, without classifier-free guidance around it, which doubles the batch."""
    noise: float
    """Standard deviation of the error of y, positive."""

    def __post_init__(self) -> None:
        if not 0 < self.noise < math.inf:
            raise ValueError(f"noise of a measurement must be positive, not {self.noise}")

    def residual(self, x: Tensor) -> Tensor:
        """y - A x: x [B, *S] -> [B, m]."""
        measured = self.measure(x)
        value = torch.as_tensor(self.value).to(measured)
        try:
            value = value.expand_as(measured)
        except RuntimeError:
            shapes = f"{list(value.shape)} do not fit measurements {list(measured.shape)}"
            raise ValueError(f"values {shapes}") from None
        return (value - measured).reshape(len(x), -1)

    def logp(self, x: Tensor) -> Tensor:
        """ln p(y | x0 = x) up to a constant: [B]."""
        return -self.residual(x).square().sum(1) / (2 * self.noise**2)

    def __call__(self, denoised: Tensor, covariance: Covariance) -> Tensor:
        residual = self.residual(denoised)
        rows = [gradient(partial(self._entry, j), denoised) for j in range(residual.shape[1])]
        columns = torch.stack([covariance(row) for row in rows]).flatten(2)  # C A^T, [m, B, n]
        spread = torch.einsum("ibn,jbn->bij", torch.stack(rows).flatten(2), columns)
        spread = spread + self.noise**2 * torch.eye(len(rows)).to(spread)
        weight = torch.linalg.solve(spread, residual.to(spread))
        return torch.einsum("bj,jbn->bn", weight, columns).reshape(denoised.shape)

    def _entry(self, j: int, x: Tensor) -> Tensor:
        return -self.residual(x)[:, j]


# ---- The guided denoiser ----


class GradientGuidance(Wrapper):
    """D + scale * guide(D, Cov[x0 | x]), also under `no_grad`.

    `scale` 1 samples the density of the guide and 0 is the denoiser, bit for bit at its cost. Only
    noise levels under `below` are guided, by at most `clip` times |x - D| for each image. Without
    `jacobian` the covariance is approximated by that of independent pixels of deviation `data_std`,
    sigma^2 data_std^2 / (sigma^2 + data_std^2) I: no backward pass through the network. With the
    default, sigma^2 I, it is far too strong where sigma exceeds the spread of the data, and off its
    support; use it with `clip`. Networks run without autocast. It can be differentiated in x, so
    that it nests.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        guide: Guide,
        scale: float = 1.0,
        *,
        below: float = math.inf,
        clip: float = math.inf,
        jacobian: bool = True,
        data_std: float = math.inf,
    ):
        if not math.isfinite(scale):
            raise ValueError(f"the scale of guidance must be finite, not {scale}")
        if not (below > 0 and clip > 0 and data_std > 0):
            raise ValueError(
                f"below, clip and data_std must be positive, not {below}, {clip} and {data_std}"
            )
        super().__init__(denoiser)
        self.guide = guide
        self.scale = scale
        self.below = below
        self.clip = clip
        self.jacobian = jacobian
        self.data_std = data_std

    @property
    def edges(self) -> tuple[float, ...]:
        # An edge belongs to the levels below it, and `below` to those above.
        guides = self.scale != 0 and self.below < math.inf
        return (math.nextafter(self.below, 0),) if guides else ()

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        levels = per_sample(noise_level(sigma, x), x)
        if self.scale == 0 or not bool((levels < self.below).any()):
            return ask(self.inner[0], x, sigma, cond, call)
        if torch.is_inference_mode_enabled():
            raise ValueError("guidance needs gradients: use torch.no_grad, not inference_mode")
        differentiable = torch.is_grad_enabled() and x.requires_grad
        # Gradients through half precision are too coarse to be multiplied by sigma^2.
        with torch.autocast(x.device.type, enabled=False):
            point = x if differentiable else x.detach().requires_grad_()
            nested = twice_differentiable() if differentiable else contextlib.nullcontext()
            with nested, torch.set_grad_enabled(self.jacobian or differentiable):
                output = ask(self.inner[0], point, sigma, cond, call)
            denoised = output if differentiable else output.detach()

            def covariance(v: Tensor) -> Tensor:
                if self.jacobian:
                    (v,) = torch.autograd.grad(
                        output, point, v, retain_graph=True, create_graph=differentiable
                    )
                    return levels**2 * v
                return levels**2 / (1 + (levels / self.data_std) ** 2) * v

            change = self.scale * self.guide(denoised, covariance)
        if self.clip < math.inf:
            change = change * self._share(change, x - denoised)
        return torch.where(levels < self.below, denoised + change, denoised).to(x.dtype)

    def _share(self, change: Tensor, noise: Tensor) -> Tensor:
        """Factor that limits the change of each image to `clip` |x - D|: [B, 1, ...]."""
        longest = self.clip * noise.flatten(1).norm(dim=1)
        length = change.flatten(1).norm(dim=1)
        share = longest / length.clamp(min=torch.finfo(length.dtype).tiny)
        return per_sample(share.clamp(max=1), change)
