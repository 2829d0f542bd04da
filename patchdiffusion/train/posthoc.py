"""Post-hoc EMA: averages of any width after training, from stored power-function profiles.

A profile of exponent g weights the past as tau^g up to time t. Karras et al., "Analyzing and
Improving the Training Dynamics of Diffusion Models", CVPR 2024 (arXiv 2312.02696), section 3.2 and
appendix C: the target profile is fitted, in the least-squares sense, by a linear combination of the
stored ones. Time is that of the clock of the run, in any unit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.system.checks import positive
from patchdiffusion.system.serialize import decode
from patchdiffusion.system.trust import check_links
from patchdiffusion.train import checkpoint
from patchdiffusion.train.settings import WIDEST

Point = tuple[float, float]
"""A profile: the time it ends at, and its width relative to that time."""


@lru_cache
def exponent(std: float) -> float:
    """Exponent of the profile with a relative standard deviation (equation 126).

    Raises `ValueError` unless `std` lies above 0 and below 1 / sqrt(12), where the exponent is 0.
    """
    if not 0 < std < WIDEST:
        raise ValueError(f"std must lie above 0 and below {WIDEST:.4f}, not {std}")
    inverse = std**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots[np.abs(roots.imag) < 1e-9].real.max())


def inner_product(a: Point, b: Point) -> float:
    """Integral of the product of two profiles over time (appendix C.2)."""
    (ta, ga), (tb, gb) = ((t, exponent(std)) for t, std in (a, b))
    ratio = (ta / tb) ** (gb if ta < tb else -ga)
    return (ga + 1) * (gb + 1) * ratio / ((ga + gb + 1) * max(ta, tb))


def solve(stored: Sequence[Point], target: Point) -> np.ndarray:
    """Weights of the stored profiles whose combination is closest to the target; they sum to 1.

    float64 [len(stored)].
    """
    gram = np.array([[inner_product(a, b) for b in stored] for a in stored])
    products = np.array([inner_product(a, target) for a in stored])
    weights = np.linalg.lstsq(gram, products, rcond=None)[0]
    return weights / weights.sum()


# ---- Snapshots on disk ----


@dataclass(frozen=True)
class Snapshot:
    """One stored profile."""

    folder: Path
    name: str
    point: Point
    step: int


@dataclass(frozen=True, kw_only=True)
class SnapshotFacts:
    """The file `state.json` of a snapshot."""

    format: int
    step: int
    images: float
    """Value of the clock of the run."""
    profiles: dict[str, float]
    """Relative width of each profile, by name."""

    def __post_init__(self) -> None:
        positive(self, "step", "images")
        for name, std in self.profiles.items():
            exponent(std)
            if name != profile_name(std):
                raise ValueError(f"the profile of width {std:g} cannot be {name!r}")


def profile_name(std: float) -> str:
    """The name of a profile in checkpoints and snapshots."""
    return f"power-{std:g}"


def snapshots(run: Path | str) -> list[Snapshot]:
    """All stored profiles of a run, oldest first; raises `ValueError` for a damaged one."""
    check_links(Path(run))
    profiles = []
    for folder in sorted((Path(run) / "snapshots").glob("step-*")):
        if not folder.name[5:].isdigit():
            continue  # unfinished
        fault = checkpoint.fault(folder)
        if fault is not None:
            raise ValueError(f"a snapshot is damaged: {fault}; delete it to go on without it")
        try:
            facts = decode(SnapshotFacts, checkpoint.read_state(folder))
        except ValueError as error:
            raise ValueError(f"{folder} is no snapshot: {error}") from error
        if facts.step != int(folder.name[5:]):
            raise ValueError(f"{folder} is no snapshot: it is of step {facts.step}")
        for name, std in facts.profiles.items():
            profiles.append(Snapshot(folder, name, (facts.images, std), facts.step))
    return profiles


@dataclass(frozen=True)
class Sources:
    """The snapshots that an average at a time is made of; `used` is not empty."""

    at: float
    used: tuple[Snapshot, ...]

    @classmethod
    def of(cls, run: Path | str, at: float | None = None) -> "Sources":
        """Snapshots of a run up to time `at`, by default that of the last one.

        Raises `ValueError` if there are none.
        """
        stored = snapshots(run)
        if not stored:
            raise ValueError(
                f"{run} has no snapshots, which are kept from the beginning of a run only: begin "
                "another by patchdiffusion train DATA --ema.profiles 0.05 0.1 --out FOLDER"
            )
        at = max(s.point[0] for s in stored) if at is None else at
        if not 0 < at < math.inf:
            raise ValueError(f"the time of an average must be positive and finite, not {at}")
        used = tuple(s for s in stored if s.point[0] <= at)
        if not used:
            first = min(s.point[0] for s in stored)
            raise ValueError(f"at is {at:g}; the snapshots of {run} allow {first:g} or later")
        return cls(at, used)

    @property
    def step(self) -> int:
        """Step of the newest snapshot."""
        return self.used[-1].step

    def facts(self, std: float) -> dict[str, Any]:
        """Everything that the average of width `std` depends on, for JSON."""
        files = {s.folder: checkpoint.digests(s.folder) for s in self.used}
        tensors = {f"{s.folder.name}/{s.name}": files[s.folder][s.name] for s in self.used}
        return {"std": std, "at": self.at, "snapshots": tensors}

    def reconstruct(self, std: float) -> dict[str, Tensor]:
        """Float32 parameters of the average of width `std` by name."""
        weights = solve([s.point for s in self.used], (self.at, std))
        total: dict[str, Tensor] = {}
        for weight, snapshot in zip(weights.tolist(), self.used, strict=True):
            part = checkpoint.read_tensors(snapshot.folder, snapshot.name, torch.device("cpu"))
            shapes = {name: value.shape for name, value in part.items()}
            if snapshot is not self.used[0] and shapes != {
                n: value.shape for n, value in total.items()
            }:
                raise ValueError(f"the tensors of {snapshot.name} in {snapshot.folder} differ")
            for name, value in part.items():
                if value.dtype != torch.float32 or not value.isfinite().all():
                    file = snapshot.folder / snapshot.name
                    raise ValueError(f"{name} in {file}.safetensors is not finite, or no float32")
                term = value.to(torch.float64) * weight
                total[name] = total[name] + term if name in total else term
        return {name: value.to(torch.float32) for name, value in total.items()}
