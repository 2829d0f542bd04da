"""Adapters of low rank in the layout of peft: `adapter_config.json`, `adapter_model.safetensors`.

A weight W of shape [out, in, ...] becomes W + (alpha / rank) B A (LoRA, arXiv 2106.09685), or with
a magnitude m that times m / |W + ...|, the norm over each output (DoRA, arXiv 2402.09353).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from patchdiffusion.system.files import folder_atomic, read_json, write_json
from patchdiffusion.system.trust import read_regular

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_DOWN, _UP, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_PARTS = (_DOWN, _UP, _MAGNITUDE)
_PLAIN: Mapping[str, Sequence[Any]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "trainable_token_indices": (None, []),
}
"""Settings that change what an adapter does, with the values that are supported."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """Change of low rank of a weight [out, in, *kernel]."""

    down: Tensor
    """A [rank, in, *kernel]."""
    up: Tensor
    """B [out, rank], of a convolution [out, rank, 1 ...]."""
    alpha: float
    """The change is (alpha / rank) B A."""
    magnitude: Tensor | None = None
    """Norm of each output [out] of DoRA; None for LoRA."""

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return (self.up.shape[0], *self.down.shape[1:])

    def change(self) -> Tensor:
        """The change (alpha / rank) B A of the weight, [out, in, *kernel], without a magnitude."""
        product = self.up.flatten(1) @ self.down.flatten(1)
        return (self.alpha / self.rank * product).reshape(self.shape)


def write_adapter(folder: str | Path, adapters: Mapping[str, LowRank], base: str = "") -> None:
    """Write changes of weights, by their parameter names, as a folder that peft reads.

    `base` is the name of the model that they belong to. An older adapter there is replaced. Raises
    `ValueError` for changes that the layout cannot hold.
    """
    if not adapters:
        raise ValueError("there are no changes of weights to write")
    tensors, ranks, alphas = {}, {}, {}
    has_magnitude = {a.magnitude is not None for a in adapters.values()}
    if len(has_magnitude) > 1:
        raise ValueError("some changes have a magnitude and some have none; peft has one for all")
    for name, adapter in adapters.items():
        module = name.removesuffix(".weight")
        if module == name or not module:
            raise ValueError(f"{name} is no weight of a module: its name must end in .weight")
        _check(name, adapter)
        key, axes = _PREFIX + module, adapter.down.ndim
        tensors[f"{key}.{_DOWN}"] = adapter.down
        tensors[f"{key}.{_UP}"] = adapter.up.reshape(*adapter.up.shape[:2], *(1,) * (axes - 2))
        if adapter.magnitude is not None:
            shape = (-1,) if axes == 2 else (1, -1, *(1,) * (axes - 2))
            tensors[f"{key}.{_MAGNITUDE}"] = adapter.magnitude.reshape(shape)
        ranks[module], alphas[module] = adapter.rank, adapter.alpha
    rank, alpha = _usual(ranks), _usual(alphas)
    facts = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": has_magnitude == {True},
        "target_modules": sorted(ranks),
        "modules_to_save": None,
        "rank_pattern": {_exactly(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(m): a for m, a in alphas.items() if a != alpha},
    }
    with folder_atomic(Path(folder)) as temporary:
        plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        save_file(plain, temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / CONFIG, facts)


def read_adapter(
    folder: str | Path, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, LowRank]:
    """Read the changes of weights in a folder of peft, by their parameter names.

    `shapes` are those of the parameters of the network, which must fit. Raises `ValueError` in one
    line for adapters of another kind, and for damaged ones.
    """
    folder = Path(folder)
    try:
        facts = read_json(folder / CONFIG)
        tensors = load(read_regular(folder / WEIGHTS))
    except OSError as error:
        raise ValueError(f"{folder} holds no adapter of peft: {error}") from error
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{folder / WEIGHTS} is damaged: {' '.join(str(error).split())}"
        ) from error
    try:
        settings = _settings(facts)
        parts = _parts(tensors)
        adapters = {
            f"{module}.weight": _low_rank(module, several, settings)
            for module, several in parts.items()
        }
        for name, adapter in adapters.items():
            _check(name, adapter)
            expected = adapter.shape if shapes is None else shapes.get(name)
            if expected is None:
                raise ValueError(f"it changes {name}, which the network does not have")
            if tuple(expected) != adapter.shape:
                raise ValueError(
                    f"{name} is of the shape {list(expected)} and its change {list(adapter.shape)}"
                )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return adapters


@dataclass(frozen=True)
class _Settings:
    rank: int
    alpha: float
    dora: bool
    rslora: bool
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]


def _settings(facts: Any) -> _Settings:
    """Checked settings of `adapter_config.json`."""
    if not isinstance(facts, dict) or facts.get("peft_type") != "LORA":
        kind = facts.get("peft_type") if isinstance(facts, dict) else facts
        raise ValueError(f"peft_type is {str(kind)[:40]!r}; allowed is LORA, also with use_dora")
    for name, allowed in _PLAIN.items():
        if (value := facts.get(name, allowed[0])) not in allowed:
            raise ValueError(f"{name} is {str(value)[:80]!r}; allowed is {allowed[0]!r}")
    rank, alpha = facts.get("r", 0), facts.get("lora_alpha", "none")
    if not _is_number(rank) or not isinstance(rank, int) or rank < 1 or not _is_number(alpha):
        raise ValueError(f"r is {str(rank)[:40]} and lora_alpha {str(alpha)[:40]}, not numbers")
    flags = [facts.get(name, False) for name in ("use_dora", "use_rslora")]
    if not all(isinstance(flag, bool) for flag in flags):
        raise ValueError("use_dora and use_rslora must be true or false")
    patterns = [_exact(facts.get(name) or {}, name) for name in ("rank_pattern", "alpha_pattern")]
    return _Settings(rank, alpha, *flags, *patterns)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 1e30 and math.isfinite(value)


def _exact(patterns: Any, name: str) -> dict[str, float]:
    """Values by names of modules; expressions, which could take forever, are refused."""
    if not isinstance(patterns, dict) or not all(map(_is_number, patterns.values())):
        raise ValueError(f"{name} must have a number for each name of a module")
    names = {}
    for pattern, value in patterns.items():
        plain = re.sub(r"\\([^A-Za-z0-9])", r"\1", pattern)
        if re.search(r"[^\w.-]", plain.removeprefix("^")):
            raise ValueError(f"{name} has {pattern[:80]!r}, an expression; allowed are plain names")
        names[plain] = value
    return names


def _exactly(module: str) -> str:
    """Expression that matches a name alone; without ^ it would match endings of others, too."""
    return "^" + re.escape(module)


def _of(patterns: Mapping[str, float], module: str, usual: float) -> float:
    for name, value in patterns.items():
        if name.startswith("^"):
            if module == name[1:]:
                return value
        elif module == name or module.endswith(f".{name}"):
            return value
    return usual


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors of each module."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part = next((p for p in _PARTS if key.removesuffix(".weight") == _stem(key, p)), None)
        if part is None or not key.startswith(_PREFIX):
            raise ValueError(
                f"{key[:80]!r} is no part of an adapter; names are {_PREFIX}NAME.{_DOWN}, .{_UP} "
                f"and .{_MAGNITUDE}"
            )
        module = _stem(key, part).removeprefix(_PREFIX)
        module = module.removesuffix(part.removesuffix(".weight")).removesuffix(".")
        parts.setdefault(module, {})[part] = value
    if not parts:
        raise ValueError("it holds no changes of weights")
    return parts


def _stem(key: str, part: str) -> str:
    """The key without .weight, if it ends in that part, else ""."""
    stem = key.removesuffix(".weight")
    is_part = stem.endswith("." + part.removesuffix(".weight"))
    return stem if is_part and (part == _MAGNITUDE or key.endswith(".weight")) else ""


def _low_rank(module: str, parts: Mapping[str, Tensor], settings: _Settings) -> LowRank:
    if missing := [p for p in _PARTS[: 2 + settings.dora] if p not in parts]:
        raise ValueError(f"{module} has no {missing[0]}")
    if _MAGNITUDE in parts and not settings.dora:
        raise ValueError(f"{module} has a {_MAGNITUDE}, and use_dora is false")
    down, up = parts[_DOWN], parts[_UP]
    magnitude = parts[_MAGNITUDE].flatten() if settings.dora else None
    if up.ndim > 2 and up.flatten(1).shape[1] != up.shape[1]:
        raise ValueError(
            f"{module}.{_UP} has the shape {list(up.shape)}; allowed is [out, rank, 1]"
        )
    alpha = _of(settings.alphas, module, settings.alpha)
    rank = _of(settings.ranks, module, settings.rank)
    if down.ndim < 2 or up.ndim < 2 or down.shape[0] != rank:
        raise ValueError(f"{module}.{_DOWN} is {list(down.shape)} and its rank should be {rank:g}")
    if settings.rslora:  # alpha / sqrt(rank) there
        alpha *= math.sqrt(rank)
    return LowRank(down, up.flatten(1), float(alpha), magnitude)


def _check(name: str, adapter: LowRank) -> None:
    """Raise `ValueError` unless the parts of a change fit together."""
    down, up, magnitude = adapter.down, adapter.up, adapter.magnitude
    if down.ndim < 2 or up.ndim < 2 or not 0 < down.shape[0] == up.shape[1]:
        raise ValueError(
            f"{name}: A is {list(down.shape)} and B {list(up.shape)}; allowed are [rank, in, ...] "
            "and [out, rank]"
        )
    if magnitude is not None and tuple(magnitude.shape) != (up.shape[0],):
        raise ValueError(f"{name}: the magnitude is {list(magnitude.shape)}, not [{up.shape[0]}]")
    for tensor in (down, up, *([] if magnitude is None else [magnitude])):
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
            raise ValueError(f"{name} holds numbers that are not finite, or no floats")
    if not _is_number(adapter.alpha):
        raise ValueError(f"{name}: alpha is {adapter.alpha}, not a finite number")


def _usual(values: Mapping[str, Any]) -> Any:
    """The most frequent value."""
    listed = list(values.values())
    return max(listed, key=listed.count)
