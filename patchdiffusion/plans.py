"""Patch plans: which crop sizes a step sees, how many of each, and what that costs.

Wang et al., "Patch Diffusion: Faster and More Data-Efficient Training of Diffusion Models",
NeurIPS 2023 (arXiv 2304.12526). `patches.py` cuts the crops.

    plan = PatchPlan(canvas=(64, 64), batch=32)
    for group in plan.draw(seed=0, step=step, progress=step / total):
        crops, pos = random_crop(next_images(group.count), group.size, key=keys)
        loss += group.weight * denoising_loss(net, crops, pos).mean()
"""

import bisect
import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch

from patchdiffusion import rng
from patchdiffusion.noise import NoiseLaw, Truncated
from patchdiffusion.patches import Size, size_name

Mode = Literal["stratified", "stochastic", "progressive", "constant_pixels"]


Multiplier = Literal["inverse_side", "inverse_area", "one"]


LossNorm = Literal["area", "mean"]


Clock = Literal["equivalents", "crops", "steps"]


@dataclass(frozen=True, kw_only=True)
class PatchLaw:
    """The distribution of crop sizes, as fractions of the sides of the canvas."""

    fractions: tuple[float, ...] = (1.0, 0.5, 0.25)
    """Crop sides relative to the canvas; 1 is the whole image."""
    probs: tuple[float, ...] = (0.5, 0.3, 0.2)
    """Probability of each size, summing to 1; the share of whole images is the paper's p."""
    mode: Mode = "stratified"
    """stratified: all sizes in every step. stochastic: one size a step (the paper's default).
    progressive: small to large over the run, probs being shares of its clock. constant_pixels: one
    size a step, and batches grow with 1/area, so that every step costs the same."""
    multiplier: Multiplier = "inverse_side"
    """How the number of crops grows as they shrink; the paper uses 1, 2, 4: inverse_side."""
    loss_norm: LossNorm = "area"
    """area: a crop's gradient counts with its area, as in the paper; mean: all crops alike."""
    percentiles: tuple[tuple[float, float], ...] = ()
    """Noise levels of each size, from one quantile of the run's noise law to another; by default
    every size sees all of them."""
    pitches: tuple[int, ...] = ()
    """Image pixels that make a pixel of each size along a side: fraction 1 and pitch 2 is the
    whole image at half its resolution, with half the noise; by default 1 for every size."""

    def __post_init__(self) -> None:
        if not self.fractions or len(self.fractions) != len(self.probs):
            raise ValueError(
                "fractions and probs need the same length, at least 1, "
                f"not {len(self.fractions)} and {len(self.probs)}"
            )
        if not all(0 < f <= 1 for f in self.fractions):
            raise ValueError(f"fractions must lie in (0, 1], not {self.fractions}")
        if not all(p >= 0 for p in self.probs) or abs(sum(self.probs) - 1) > 1e-6:
            raise ValueError(f"probs must be >= 0 and sum to 1, not {self.probs}")
        for name, kind in (("mode", Mode), ("multiplier", Multiplier), ("loss_norm", LossNorm)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}, allowed: {get_args(kind)}"
                )
        for name, given in (("percentiles", self.percentiles), ("pitches", self.pitches)):
            if given and len(given) != len(self.fractions):
                raise ValueError(f"{name} needs one entry per fraction, or none, not {len(given)}")
        if not all(0 <= low < high <= 1 for low, high in self.percentiles):
            raise ValueError(f"percentiles need 0 <= low < high <= 1, not {self.percentiles}")
        if not all(pitch >= 1 for pitch in self.pitches):
            raise ValueError(f"pitches must be at least 1, not {self.pitches}")

    @property
    def views(self) -> tuple[tuple[float, float, int, tuple[float, float]], ...]:
        """Fraction, probability, pitch and percentiles of each size."""
        count = len(self.fractions)
        pitches, percentiles = (
            self.pitches or (1,) * count,
            self.percentiles or ((0.0, 1.0),) * count,
        )
        return tuple(zip(self.fractions, self.probs, pitches, percentiles, strict=True))

    @classmethod
    def paper(cls, p: float = 0.5, *, latent: bool = False) -> "PatchLaw":
        """The published law for a share p of whole images: one size a step, batch x 1, 2, 4.

        Pixels: (p, .6 (1-p), .4 (1-p)) for sides (1, 1/2, 1/4); latents: (p, 1-p) for (1, 1/2).
        """
        if not 0 <= p <= 1:
            raise ValueError(f"the share p of whole images must lie in [0, 1], not {p}")
        if latent:
            return cls(fractions=(1.0, 0.5), probs=(p, 1 - p), mode="stochastic")
        probs = (p, 0.6 * (1 - p), 0.4 * (1 - p))
        return cls(fractions=(1.0, 0.5, 0.25), probs=probs, mode="stochastic")

    @classmethod
    def whole(cls) -> "PatchLaw":
        """Whole images only: ordinary diffusion training."""
        return cls(fractions=(1.0,), probs=(1.0,))


@dataclass(frozen=True)
class Group:
    """Crops of one size within one optimizer step, over all processes."""

    size: Size
    """Length of each axis of the crops in the network's input: height and width of images."""
    count: int
    """Number of crops."""
    weight: float
    """The group adds weight * mean(loss per pixel) to the loss of the step."""
    pitch: int = 1
    """Image pixels per input pixel along a side; q > 1 is a view down-sampled by averaging."""
    noise: NoiseLaw | None = None
    """Noise law of this group; None is the law of the run."""
    lr: float = 1.0
    """Factor of the learning rate of the step."""

    @property
    def name(self) -> str:
        """What logs call it: its size, then its pitch and noise levels where they are special."""
        name = size_name(self.size)
        if self.pitch > 1:
            name += f"@{self.pitch}"
        if isinstance(self.noise, Truncated) and (self.noise.low, self.noise.high) != (0.0, 1.0):
            name += f"[{self.noise.low:g}-{self.noise.high:g}]"
        return name


@dataclass(frozen=True)
class PatchSize:
    """One size of a plan: relative area a, probability, batch multiplier, share of the gradient."""

    size: Size
    area: float
    prob: float
    multiplier: float
    share: float
    pitch: int = 1
    noise: NoiseLaw | None = None

    def group(self, count: int, weight: float = 1.0) -> Group:
        """So many crops of this size."""
        return Group(self.size, max(1, count), weight, self.pitch, self.noise)


@dataclass(frozen=True)
class PatchPlan:
    """Which groups each step is made of: a pure function of (seed, step, progress).

    Every process calls `draw` with the same arguments and gets the same answer, so no process
    waits for another one that drew a larger size. `divisor` is the total down-sampling of the
    network; crop sides are rounded to multiples of it. The whole canvas is never rounded.
    """

    canvas: Size
    batch: int
    law: PatchLaw = PatchLaw()
    divisor: int = 1
    noise: NoiseLaw | None = None
    """Noise law of the run, which a law of sizes with percentiles or pitches divides."""

    def __post_init__(self) -> None:
        if self.noise is None and (self.law.percentiles or self.law.pitches):
            raise ValueError("percentiles or pitches of a patch law need the noise law of the run")
        if isinstance(self.canvas, int) or not self.canvas or min(self.canvas) < 1:
            raise ValueError(
                f"canvas must be the positive length of each axis, not {self.canvas}; "
                "(height, width) of images"
            )
        if self.batch < 1 or self.divisor < 1:
            raise ValueError(
                f"batch and divisor must be at least 1, not {self.batch} and {self.divisor}"
            )

    @classmethod
    def paper(
        cls,
        canvas: Size,
        batch: int,
        *,
        p: float = 0.5,
        latent: bool = False,
        divisor: int = 1,
    ) -> "PatchPlan":
        """The plan of the paper: see `PatchLaw.paper`."""
        return cls(canvas, batch, PatchLaw.paper(p, latent=latent), divisor)

    @cached_property
    def sizes(self) -> tuple[PatchSize, ...]:
        """The distinct sizes with a positive probability, largest first."""
        total = math.prod(self.canvas)
        probs: dict[tuple[Size, int, NoiseLaw | None], float] = {}
        for fraction, prob, pitch, levels in self.law.views:
            size = tuple(self._side(axis, fraction, pitch) for axis in range(len(self.canvas)))
            view = (size, pitch, self._noise(pitch, levels))
            probs[view] = probs.get(view, 0.0) + prob
        found = [(math.prod(view[0]) / total, view, p) for view, p in probs.items() if p]
        found.sort(key=lambda one: (one[0], one[1][0]), reverse=True)
        sides = -1.0 / len(self.canvas)
        power = {"inverse_side": sides, "inverse_area": -1.0, "one": 0.0}[self.law.multiplier]
        multipliers = [a**power for a, _, _ in found]
        by_area = self.law.loss_norm == "area"
        shares = [p * a if by_area else p for a, _, p in found]
        drawn = [p for _, _, p in found]
        if self.law.mode == "constant_pixels":  # as many crops of each size, in steps of equal cost
            images = [p * m * a for (a, _, p), m in zip(found, multipliers, strict=True)]
            drawn = [i / sum(images) for i in images]
            multipliers = [1 / a for a, _, _ in found]
        return tuple(
            PatchSize(size, a, prob, m, share / sum(shares), pitch, noise)
            for (a, (size, pitch, noise), _), prob, m, share in zip(
                found, drawn, multipliers, shares, strict=True
            )
        )

    def frequencies(self, clock: Clock = "equivalents") -> tuple[float, ...]:
        """How often a step is of each size, where it is of one.

        Probabilities of a progressive plan are shares of the clock: the smaller a size, the more
        of its steps go into the same area.
        """
        if self.law.mode != "progressive":
            return tuple(k.prob for k in self.sizes)
        counts = []
        for k in self.sizes:
            crops = self._alone(k)[0].count
            step = {"equivalents": crops * k.area, "crops": crops, "steps": 1.0}
            counts.append(k.prob / step[clock])
        return tuple(count / sum(counts) for count in counts)

    def kinds(self, clock: Clock = "equivalents") -> tuple[tuple[float, tuple[Group, ...]], ...]:
        """The groups of each kind of step, and how often it comes; `clock` is that of the run."""
        if self.law.mode == "stratified":
            return ((1.0, self.draw(seed=0, step=0)),)
        return tuple(zip(self.frequencies(clock), map(self._alone, self.sizes), strict=True))

    def _side(self, axis: int, fraction: float, pitch: int) -> int:
        side, divisor = self.canvas[axis], self.divisor
        if fraction == 1 and pitch == 1:
            return side
        most = side if pitch == 1 else side // pitch // divisor * divisor
        if most < 1:
            raise ValueError(
                f"a canvas of {self.canvas} is too small for pitch {pitch} and a network that "
                f"divides sides by {divisor}"
            )
        rounded = round(fraction * side / pitch / divisor) * divisor
        return min(max(rounded, divisor), most)

    def _noise(self, pitch: int, levels: tuple[float, float]) -> NoiseLaw | None:
        if self.noise is None or (pitch == 1 and levels == (0.0, 1.0)):
            return None
        return Truncated(law=self.noise, low=levels[0], high=levels[1], scale=1 / pitch)

    def draw(self, *, seed: int, step: int, progress: float | None = None) -> tuple[Group, ...]:
        """The groups of one step.

        `progress` in [0, 1] is the share of the run that is done, which progressive sizes need.
        """
        if self.law.mode == "stratified":
            return tuple(
                k.group(round(self.batch * k.multiplier * k.prob), k.share) for k in self.sizes
            )
        if self.law.mode == "progressive":
            if progress is None:
                raise ValueError("a progressive plan draws by the progress of the run, in [0, 1]")
            order, u = self.sizes[::-1], progress
        else:
            key = rng.keys(seed, "patch size", step, torch.zeros(1, dtype=torch.int64))
            order, u = self.sizes, float(rng.uniform(key, 1))
        edges = list(itertools.accumulate(k.prob for k in order))
        return self._alone(order[min(bisect.bisect_right(edges, u), len(order) - 1)])

    def _alone(self, k: PatchSize) -> tuple[Group, ...]:
        return (k.group(round(self.batch * k.multiplier), k.share / k.prob),)

    def cost(
        self,
        *,
        clock: Clock = "equivalents",
        world: int = 1,
        synced: bool = True,
        attention: float = 0.0,
    ) -> "Cost":
        """Expected cost of a step, in full images; `attention` is its quadratic share of one.

        `clock` is that of the run. `synced=False` is the time of `world` processes that draw sizes
        independently and wait for the slowest, as in the published code.
        """
        whole, steps, crops = math.prod(self.canvas), [], 0.0
        for prob, groups in self.kinds(clock):
            spent = 0.0
            for group in groups:
                area = math.prod(group.size) / whole
                spent += group.count * (area * (1 - attention) + area**2 * attention)
                crops += prob * group.count / self.batch
            steps.append((spent / self.batch, prob))
        mean = sum(prob * cost for cost, prob in steps)
        if not synced:
            mean, below = 0.0, 0.0
            for cost, prob in sorted(steps):
                mean += cost * ((below + prob) ** world - below**world)
                below += prob
        return Cost(crops=crops, step=mean, crop=mean / crops)


@dataclass(frozen=True)
class Cost:
    """Expected cost of a plan relative to whole-image training at the same batch."""

    crops: float
    """Crops per step and per image of the batch (M in the paper's bookkeeping)."""
    step: float
    """Cost of a step."""
    crop: float
    """Cost of a crop, if crops are counted as images the way the paper does."""


def equivalents(groups: tuple[Group, ...], canvas: Size) -> float:
    """Area of the crops of a step in whole images, the unit of the clock."""
    pixels = sum(g.count * math.prod(g.size) for g in groups)
    return pixels / math.prod(canvas)
