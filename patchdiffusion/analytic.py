"""Denoisers with closed forms: the exact references that solvers, losses and metrics are tested by.

All compute in float64 whatever the dtype of x, take any spatial shape, and draw their samples from
keys. A mixture of K Gaussians over x0 stays one under noise, which gives E[x0 | x], its covariance
and ln p(x) exactly (arXiv 2510.21890); a stationary field stays one under cropping.
"""

import math
from functools import cached_property

import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.cond import Cond, Position, Tape
from patchdiffusion.denoiser import expand_sigma, noise_level
from patchdiffusion.patches import Size
from patchdiffusion.paths import per_sample

# ---- Mixtures ----


class LowRankMixture:
    """x0 ~ sum_k weight_k N(mean_k, U_k diag(variance_k) U_k^T + residual I) (arXiv 2409.02426).

    Images of shape S with n numbers are flattened. Each component is a class, so a label picks
    one component and -1 the whole mixture.
    """

    def __init__(
        self,
        bases: Tensor,
        variances: Tensor,
        weights: Tensor | None = None,
        *,
        means: Tensor | None = None,
        residual: float = 0.0,
    ):
        """bases [K, n, r], orthonormal columns; variances [K, r]; weights [K]; means [K, *S].

        Without weights all components weigh the same; without means all are 0. `residual` is the
        variance in the n - r other directions, and is added to `variances`.
        """
        count, n, rank = bases.shape
        means = torch.zeros(count, n) if means is None else means
        weights = torch.ones(count) if weights is None else weights
        if variances.shape != (count, rank) or means.shape[0] != count or means[0].numel() != n:
            raise ValueError(
                f"bases of {count} components in {n} dimensions do not fit variances "
                f"{tuple(variances.shape)} and means {tuple(means.shape)}"
            )
        if weights.shape != (count,) or bool((weights <= 0).any()):
            raise ValueError(f"weights must be {count} positive numbers, not {weights.tolist()}")
        self.shape = tuple(means.shape[1:])
        self.means = means.double().flatten(1)
        self.bases = bases.double()
        self.variances = variances.double() + residual
        self.residual = residual
        self.weights = weights.double() / weights.double().sum()
        gram = self.bases.mT @ self.bases
        if not torch.allclose(gram, torch.eye(rank).to(gram).expand_as(gram), atol=1e-6):
            raise ValueError("the columns of every basis must be orthonormal")

    def _terms(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Noise variance [B, 1, 1]; offset from the means within [B, K, r] and outside bases."""
        t = (expand_sigma(sigma, x.double())[:, None, None] ** 2).clamp(min=1e-300)  # no 0 / 0
        offset = x.double().flatten(1)[:, None] - self.means
        inside = torch.einsum("bkn,knr->bkr", offset, self.bases)
        if self.bases.shape[1] == self.bases.shape[2]:
            return t, inside, torch.zeros_like(offset)
        return t, inside, offset - torch.einsum("bkr,knr->bkn", inside, self.bases)

    def _log_joint(self, terms: tuple[Tensor, Tensor, Tensor], cond: Cond | None) -> Tensor:
        """ln weight_k + ln N(x; component k with noise): [B, K]; -inf for the other classes."""
        t, inside, outside = terms
        _, n, rank = self.bases.shape
        total, rest = self.variances + t, self.residual + t[..., 0]
        square = (inside**2 / total).sum(-1) + outside.square().sum(-1) / rest
        logdet = total.log().sum(-1) + (n - rank) * rest.log()
        joint = self.weights.log() - (square + logdet + n * math.log(2 * math.pi)) / 2
        if cond is None or cond.labels is None:
            return joint
        other = _other(cond.labels, torch.arange(len(self.means), device=joint.device))
        if bool(other.all(1).any()):
            raise ValueError(f"labels must be below {len(self.means)}, not {cond.labels}")
        return joint.masked_fill(other, -torch.inf)

    def _means(self, terms: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Posterior mean under each component: [B, K, n]."""
        t, inside, outside = terms
        shrunk = inside * self.variances / (self.variances + t)
        inner = torch.einsum("bkr,knr->bkn", shrunk, self.bases)
        return self.means + inner + outside * (self.residual / (self.residual + t))

    def posterior(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """Probability of each component given x: float64 [B, K]."""
        return self._log_joint(self._terms(x, sigma), cond).softmax(-1)

    def logp(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """ln p(x; sigma) in nats, with a label ln p(x, label; sigma): float64 [B]."""
        return self._log_joint(self._terms(x, sigma), cond).logsumexp(-1)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        position: Position | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        """E[x0 | x]: x [B, *S] -> [B, *S]."""
        terms = self._terms(x, sigma)
        share = self._log_joint(terms, cond).softmax(-1)
        return torch.einsum("bk,bkn->bn", share, self._means(terms)).reshape(x.shape).to(x)

    def score(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """The gradient of ln p(x; sigma) in x, (D - x) / sigma^2: float64 [B, *S]."""
        x = x.double()
        return (self(x, sigma, cond) - x) / per_sample(expand_sigma(sigma, x) ** 2, x)

    def covariance(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """Cov[x0 | x]: float64 [B, n, n]; the Jacobian of the denoiser is this over sigma^2."""
        terms = self._terms(x, sigma)
        t, share, centers = terms[0], self._log_joint(terms, cond).softmax(-1), self._means(terms)
        spread = self.variances * t / (self.variances + t)
        rest = self.residual * t / (self.residual + t)
        within = torch.einsum("knr,bkr,kmr->bknm", self.bases, spread - rest, self.bases)
        within = within + rest[..., None] * torch.eye(self.bases.shape[1]).to(within)
        off = centers - torch.einsum("bk,bkn->bn", share, centers)[:, None]
        return torch.einsum("bk,bknm->bnm", share, within + off[..., :, None] * off[..., None, :])

    def sample(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Clean images and their components, one per key: float64 [B, *S] and int64 [B]."""
        _, n, rank = self.bases.shape
        u = rng.uniform(rng.subkeys(key, "component"), 1)
        label = torch.searchsorted(self.weights.cumsum(0)[:-1].contiguous(), u[:, 0])
        z = rng.normal(rng.subkeys(key, "inside"), (rank,), torch.float64)
        std = (self.variances - self.residual).sqrt()[label]
        x = torch.einsum("br,br,bnr->bn", z, std, self.bases[label])
        if self.residual:
            z = rng.normal(rng.subkeys(key, "outside"), (n,), torch.float64)
            x = x + math.sqrt(self.residual) * z
        return (self.means[label] + x).reshape(-1, *self.shape), label


class GaussianMixture(LowRankMixture):
    """x0 ~ sum_k weight_k N(mean_k, cov_k); each component is a class."""

    def __init__(self, means: Tensor, covs: Tensor, weights: Tensor | None = None):
        """means [K, *S] with n numbers each, covs [K, n, n], weights [K]."""
        variances, bases = torch.linalg.eigh(covs.double())
        if bool((variances < -1e-9).any()):
            raise ValueError("covariances must be positive semi-definite")
        super().__init__(bases, variances.clamp(min=0), weights, means=means)

    @classmethod
    def toy(cls) -> "GaussianMixture":
        """Three Gaussians in the plane, the test problem for the order of solvers."""
        covs = torch.stack([std**2 * torch.eye(2).double() for std in (0.15, 0.25, 0.2)])
        means = torch.tensor([[-1, 0], [0.6, 0.8], [0.5, -0.9]], dtype=torch.float64)
        return cls(means, covs, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))


def perturbed_class(mean: Tensor, cov: Tensor, gamma: float) -> GaussianMixture:
    """The images that linear denoisers generate which saw their condition with noise.

    For a class of mean [n] and covariance [n, n], each noise level has a denoiser that is linear in
    image and condition, and was trained with the condition 1 + gamma xi, xi ~ N(0, 1). With the
    condition 1 these are exact for N(mean / (1 + gamma^2), cov + kappa mean mean^T), kappa =
    gamma^2 / (1 + gamma^2). In arXiv 2405.20494, lemma 2, kappa |mean|^2 I stands in the place of
    the term of rank one, which no minimum of the loss has.
    """
    mean, cov = mean.double(), cov.double()
    kappa = gamma**2 / (1 + gamma**2)
    return GaussianMixture((mean * (1 - kappa))[None], (cov + kappa * mean[:, None] * mean)[None])


def _other(labels: Tensor, classes: Tensor) -> Tensor:
    """True for the classes [K] that a label [B] excludes; -1 excludes none: bool [B, K]."""
    return (labels[:, None] >= 0) & (labels[:, None] != classes)


# ---- Random fields ----


def power_law(canvas: Size, *, alpha: float = 2.0, variance: float = 0.25) -> Tensor:
    """Spectrum (1 + k^2)^(-alpha / 2) of a field of that variance: float64 [4 H, 4 W].

    k are the integer frequencies of a torus 4 times larger than the canvas.
    """
    k = [torch.fft.fftfreq(4 * n, 0.25 / n, dtype=torch.float64) for n in canvas]
    power = (1 + k[0][:, None] ** 2 + k[1] ** 2) ** (-alpha / 2)
    return power * (variance / power.mean())


class GaussianField:
    """A stationary Gaussian field of mean 0 on a canvas, channels independent.

    The marginal of a crop is a field of the same kind, so the optimal denoiser of crops of size S
    is exact: C_S (C_S + sigma^2 I)^-1, or with the diagonal matrix of a map of noise levels.
    """

    def __init__(self, canvas: Size, power: Tensor | None = None):
        """`power` is its spectrum on a torus larger than the canvas; None is `power_law`."""
        self.canvas = canvas
        self.power = power_law(canvas) if power is None else power.double()
        if any(n < side for n, side in zip(self.power.shape, canvas, strict=True)):
            raise ValueError(f"the torus {tuple(self.power.shape)} is smaller than {canvas}")

    @cached_property
    def matrix(self) -> Tensor:
        """Covariance of the pixels in row-major order: float64 [H W, H W]."""
        covariance = torch.fft.ifft2(self.power).real
        i, j = (torch.arange(side) for side in self.canvas)
        rows, cols = i[:, None] - i, j[:, None] - j  # negative lags wrap around, as on the torus
        n = math.prod(self.canvas)
        return covariance[rows[:, None, :, None], cols[None, :, None, :]].reshape(n, n)

    @cached_property
    def law(self) -> GaussianMixture:
        """One channel of the field as a Gaussian, with its logp, score and covariance."""
        return GaussianMixture(torch.zeros(1, *self.canvas), self.matrix[None])

    def crop(self, size: Size) -> "GaussianField":
        """The marginal of a crop, the same at every position."""
        return GaussianField(size, self.power)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        position: Position | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        """E[x0 | x]: x [B, C, H, W] of the size of the canvas -> [B, C, H, W]."""
        if (level := noise_level(sigma, x)).ndim > 1:
            noise = level.double().flatten(1)  # [B, n]
            pixels = x.double().flatten(2).mT  # [B, n, C]
            whitened = torch.linalg.solve(self.matrix + torch.diag_embed(noise**2), pixels)
            return (self.matrix @ whitened).mT.reshape(x.shape).to(x)
        channels = x.flatten(0, -3)
        levels = expand_sigma(sigma, x).repeat_interleave(len(channels) // len(x))
        return self.law(channels, levels).reshape(x.shape)

    def error(self, sigma: float) -> Tensor:
        """Least mean squared error of each pixel, Var[x0 | x]: float64 [H, W]."""
        variances, bases = self.law.variances[0], self.law.bases[0]
        return (bases**2 @ (variances * sigma**2 / (variances + sigma**2))).reshape(self.canvas)

    def excess(self, size: Size, sigma: float, corner: tuple[int, int] | None = None) -> float:
        """Relative increase of the mean squared error when only a crop is seen.

        Compared with the mean over the whole canvas or, with a corner (top, left), over the
        pixels of the crop at that corner.
        """
        error = self.error(sigma)
        if corner is not None:
            error = error[corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]
        return float(self.crop(size).error(sigma).mean() / error.mean()) - 1

    def sample(self, key: Tensor, channels: int = 1) -> Tensor:
        """Clean images, one per key: float64 [B, channels, H, W]."""
        shape = (channels, *self.power.shape)
        white = torch.fft.fft2(rng.normal(key, shape, torch.float64))
        return torch.fft.ifft2(white * self.power.sqrt()).real[
            ..., : self.canvas[0], : self.canvas[1]
        ]


# ---- Finite data sets ----


class IdealDenoiser:
    """Posterior mean of the empirical distribution of a data set: a network that memorized it.

    D = sum_i softmax_i(-|x - x_i|^2 / (2 sigma^2)) x_i over the images, or those of a class where
    `cond.labels` is not -1. Exact; images are visited in chunks, so memory stays bounded.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None, *, chunk: int = 4096):
        """images [N, *S] in [-1, 1], labels int64 [N]."""
        if len(images) == 0 or (labels is not None and labels.shape != (len(images),)):
            raise ValueError("IdealDenoiser needs at least one image, and a label for each or none")
        self.images = images
        self.labels = labels
        self.chunk = chunk

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        position: Position | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        """E[x0 | x]: x [B, *S] -> [B, *S]."""
        flat, t = x.double().flatten(1), expand_sigma(sigma, x.double())[:, None] ** 2
        labels = cond.labels if cond is not None else None
        top = flat.new_full((len(x), 1), -torch.inf)
        total, mean = torch.zeros_like(top), torch.zeros_like(flat)
        for start in range(0, len(self.images), self.chunk):
            part = self.images[start : start + self.chunk].double().flatten(1)
            logit = (flat @ part.mT - part.square().sum(1) / 2) / t  # |x|^2 cancels
            if labels is not None and self.labels is not None:
                classes = self.labels[start : start + self.chunk]
                logit = logit.masked_fill(_other(labels, classes), -torch.inf)
            highest = torch.maximum(top, logit.amax(1, keepdim=True))
            pivot = highest.clamp(min=torch.finfo(torch.float64).min)  # -inf: no image so far
            share, shrink = (logit - pivot).exp(), (top - pivot).exp()
            total, mean = total * shrink + share.sum(1, keepdim=True), mean * shrink + share @ part
            top = highest
        if bool((total == 0).any()):
            raise ValueError(f"no image has one of the labels {labels}")
        return (mean / total).reshape(x.shape).to(x)
