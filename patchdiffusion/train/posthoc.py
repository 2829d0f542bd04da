"""Post-hoc EMA: averages of any width after training, from stored power-function profiles.

A profile of exponent g weights the past as tau^g up to time t. Karras et al., "Analyzing and
Improving the Training Dynamics of Diffusion Models", CVPR 2024 (arXiv 2312.02696), section 3.2 and
appendix C: the target profile is fitted, in the least-squares sense, by a linear combination of the
stored ones. Time is that of the clock of the run, in any unit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

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


def snapshots(run: Path | str) -> list[Snapshot]:
    """All stored profiles of a run, oldest first; raises `ValueError` for a damaged one."""
    profiles = []
    for folder in sorted((Path(run) / "snapshots").glob("step-*")):
        if not folder.name[5:].isdigit():
            continue  # unfinished
        fault = checkpoint.fault(folder)
        if fault is not None:
            raise ValueError(f"a snapshot is damaged: {fault}; delete it to go on without it")
        state = checkpoint.read_state(folder)
        for name, std in state["profiles"].items():
            profiles.append(Snapshot(folder, name, (state["images"], std), state["step"]))
    return profiles


def reconstruct(
    run: Path | str, std: float, at: float | None = None
) -> tuple[dict[str, Tensor], int]:
    """Reconstruct the average of width `std` at time `at`, by default that of the last snapshot.

    Returns float32 parameters by name, and the step of the newest snapshot that was used. Raises
    `ValueError` if there are no snapshots up to that time.
    """
    stored = snapshots(run)
    if not stored:
        raise ValueError(
            f"{run} has no snapshots, which are kept from the beginning of a run only: begin "
            "another by patchdiffusion train DATA --ema.profiles 0.05 0.1 --out FOLDER"
        )
    at = max(s.point[0] for s in stored) if at is None else at
    used = [s for s in stored if s.point[0] <= at]
    if not used:
        first = min(s.point[0] for s in stored)
        raise ValueError(f"at is {at:g}; the snapshots of {run} allow {first:g} or later")
    weights = solve([s.point for s in used], (at, std))
    total: dict[str, Tensor] = {}
    for weight, snapshot in zip(weights.tolist(), used, strict=True):
        part = checkpoint.read_tensors(snapshot.folder, snapshot.name, torch.device("cpu"))
        for name, value in part.items():
            term = value.to(torch.float64) * weight
            total[name] = total[name] + term if name in total else term
    return {name: value.to(torch.float32) for name, value in total.items()}, used[-1].step
