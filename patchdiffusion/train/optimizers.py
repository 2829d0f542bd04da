"""Configurations of optimizers, which build those of PyTorch.

Learning rate, decay and update rule may depend on the role of a parameter (`nets.base.Role`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import nn
from torch.optim import Optimizer as TorchOptimizer

from patchdiffusion.nets.base import Role
from patchdiffusion.system.checks import positive
from patchdiffusion.train.matrices import Matrices
from patchdiffusion.train.schedules import Schedule, Trapezoid


class Trained(NamedTuple):
    """A trained parameter and its role."""

    parameter: nn.Parameter
    role: Role | None
    """None for parameters of the objective."""
    rate: float = 1.0
    """Learning rate relative to that of its role."""
    alone: bool = False
    """True if no other process has it."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(ABC):
    """Base of optimizers, with the fields of AdamW, which takes parameters that no other rule does.

    `build` groups parameters by role; each group has a `factor` of the learning rate.
    """

    shardable: ClassVar[bool] = True
    """True if a part of a matrix can be updated by itself, as `--shard` needs."""

    lr: float = 2e-4
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW: decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW: term added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip: float = 1.0
    """Gradient clipping: largest norm of the gradient."""
    schedule: Schedule = field(default_factory=Trapezoid)
    """Schedule of the learning rate."""
    role_lr: tuple[tuple[Role, float], ...] = ()
    """Factors of the learning rate by role of the parameters, such as: head 0.1 embedding 2."""
    role_decay: tuple[tuple[Role, float], ...] = ()
    """Weight decay by role, overriding weight_decay, such as: norm 0 embedding 0."""
    role_betas: tuple[tuple[Role, float, float], ...] = ()
    """AdamW: betas by role, overriding betas, such as: embedding 0.9 0.99."""

    def __post_init__(self) -> None:
        positive(self, "lr", "eps", "clip")
        by_role = {f"role_betas of {role}": (b1, b2) for role, b1, b2 in self.role_betas}
        for name, betas in {"betas": self.betas, **by_role}.items():
            if not all(0 <= beta < 1 for beta in betas):
                raise ValueError(f"{name} must lie in [0, 1), not {betas}")
        numbers = {"weight_decay": self.weight_decay}
        numbers |= {f"role_lr of {role}": value for role, value in self.role_lr}
        numbers |= {f"role_decay of {role}": value for role, value in self.role_decay}
        for name, value in numbers.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, not {value}")
        largest = max(self.weight_decay, *(decay for _, decay in self.role_decay), 0.0)
        if self.lr * largest > 1:
            raise ValueError(
                f"a step takes lr x weight_decay off the weights, {self.lr * largest:g}, which "
                f"must be at most 1; weight_decay is {largest:g} and lr {self.lr:g}"
            )

    def learning_rate(self, progress: float, seen: float = 0.0) -> float:
        """Learning rate at a fraction `progress` of the run, with the clock at `seen`."""
        return self.lr * self.schedule.factor(progress, seen)

    @abstractmethod
    def build(self, parameters: Sequence[Trained]) -> list[TorchOptimizer]:
        """Optimizers that together update all parameters."""

    def adamw(self, parameters: Sequence[Trained]) -> list[TorchOptimizer]:
        """Fused AdamW for some parameters; empty list for none."""
        groups: dict[tuple[Any, ...], list[nn.Parameter]] = {}
        betas = {role: (b1, b2) for role, b1, b2 in self.role_betas}
        for parameter, role, rate, _ in parameters:
            factor, decay = self._settings(role)
            settings = (factor * rate, decay, betas.get(role, self.betas) if role else self.betas)
            groups.setdefault(settings, []).append(parameter)
        listed = [
            {"params": group, "factor": factor, "weight_decay": decay, "betas": betas}
            for (factor, decay, betas), group in groups.items()
        ]
        if not listed:
            return []
        return [torch.optim.AdamW(listed, lr=self.lr, eps=self.eps, fused=True)]

    def _settings(self, role: Role | None) -> tuple[float, float]:
        """Factor of the learning rate, and weight decay."""
        factors, decays = dict(self.role_lr), dict(self.role_decay)
        if role is None:
            return 1.0, self.weight_decay
        return factors.get(role, 1.0), decays.get(role, self.weight_decay)

    def inherit(self, old: object, first: object) -> Self:
        """Copy with the base fields of the optimizer that it replaces."""
        shared = {f.name for f in fields(OptimizerConfig)}
        return replace(self, **{name: getattr(old, name) for name in shared if hasattr(old, name)})


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerConfig):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    word: ClassVar[str] = "adamw"

    def build(self, parameters: Sequence[Trained]) -> list[TorchOptimizer]:
        """One fused optimizer."""
        return self.adamw(parameters)


@dataclass(frozen=True, kw_only=True)
class Muon(OptimizerConfig):
    """Orthogonalized momentum for hidden matrices (Keller Jordan, 2024), AdamW for the rest.

    Convolutions count as matrices [rows, columns] = [out, in * height * width].
    """

    word: ClassVar[str] = "muon"
    shardable: ClassVar[bool] = False

    momentum: float = 0.95
    """Momentum coefficient."""
    nesterov: bool = True
    """Use Nesterov momentum."""
    iterations: int = 5
    """Number of Newton-Schulz iterations of the orthogonalization."""
    adjust: Literal["match_rms", "original"] = "match_rms"
    """Scale of updates; match_rms: 0.2 sqrt(max(rows, columns)), the RMS of AdamW's updates, so
    that learning rates of AdamW fit (arXiv 2502.16982); original: sqrt(max(1, rows / columns)),
    for learning rates of about 0.02."""
    roles: tuple[Role, ...] = ("attention", "mlp", "conv")
    """Roles of the parameters that Muon updates, if these are matrices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), not {self.momentum}")
        if not 1 <= self.iterations < 100:
            raise ValueError(f"iterations must lie in [1, 99], not {self.iterations}")

    def build(self, parameters: Sequence[Trained]) -> list[TorchOptimizer]:
        """Muon for matrices, AdamW for the rest; raises `ValueError` if PyTorch has no Muon."""
        selected = [t for t in parameters if t.role in self.roles and t.parameter.ndim >= 2]
        matrices = {id(t.parameter) for t in selected}
        rest = [t for t in parameters if id(t.parameter) not in matrices]
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter, role, rate, _ in selected:
            factor, decay = self._settings(role)
            groups.setdefault((factor * rate, decay), []).append(parameter)
        listed: list[dict[str, Any]] = [
            {"params": group, "factor": factor, "lr": self.lr, "weight_decay": decay}
            for (factor, decay), group in groups.items()
        ]
        optimizers: list[TorchOptimizer] = []
        if listed:
            optimizers.append(
                Matrices(
                    listed,
                    momentum=self.momentum,
                    nesterov=self.nesterov,
                    ns_steps=self.iterations,
                    adjust_lr_fn="match_rms_adamw" if self.adjust == "match_rms" else "original",
                )
            )
        return optimizers + self.adamw(rest)


Optimizer = AdamW | Muon
"""Family of optimizers."""
