"""Denoisers as programs for other runtimes: torch.export (.pt2) and ONNX, with symbolic sizes.

The program is D(x, sigma, ...), the estimate of the clean image, with preconditioning; it needs
neither this library nor its configuration. Beside x and sigma it has the conditions that the
network reads, by name; coordinates are those of whole images.
"""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.model import Model
from patchdiffusion.patches import Size, size_name
from patchdiffusion.paths import per_sample
from patchdiffusion.system.optional import require
from patchdiffusion.system.serialize import encode

NOTE = "patchdiffusion.json"
"""Name of the facts in a .pt2 file; in ONNX they are metadata under `patchdiffusion`."""
OUTPUT = "denoised"
_MOST_INSIDE = 2**30  # bytes of weights in an ONNX file, of which 2 GiB is the limit
_UNUSED = {"pos", "seed", "augment", "jump", "percentile"}


class Program(nn.Module):
    """A denoiser whose conditions are tensors in the order of `names`."""

    def __init__(self, denoiser: NetDenoiser, names: tuple[str, ...]):
        super().__init__()
        self.denoiser = denoiser
        self.names = names

    def forward(self, x: Tensor, sigma: Tensor, *conditions: Tensor) -> Tensor:
        """x [B, C, *S], sigma [B] -> denoised, like x."""
        cond = Cond(**dict(zip(self.names, conditions, strict=True)))
        network = self.denoiser.network
        scales = self.denoiser.precond.on(network).scales(sigma)
        inner = per_sample(scales.inner, x) * x
        return scales.denoised(x, network(inner, scales.noise, cond))


@dataclass(frozen=True)
class Traced:
    """An exported program, with the names of its inputs and the axes that may have any length."""

    program: ExportedProgram
    inputs: tuple[str, ...]
    dynamic: dict[str, tuple[int, ...]]
    """Axes of each input whose length is free."""
    divisor: int
    """The sides of images must be multiples of it."""

    def facts(self, model: Model) -> dict[str, Any]:
        """Facts for readers of the file: inputs, free axes, configuration."""
        config = model.config
        return {
            "format": 1,
            "inputs": list(self.inputs),
            "output": OUTPUT,
            "dynamic": {name: list(axes) for name, axes in self.dynamic.items()},
            "divisor": self.divisor,
            "weights": model.digest,
            "model": encode(config),
        }


def conditions_of(model: Model, batch: int, size: Size) -> dict[str, Tensor]:
    """An example of each condition that a model reads, by name.

    Raises `ValueError` for one that a program cannot have.
    """
    network = model.config.network
    reads = network.reads - _UNUSED
    example = {
        "labels": torch.zeros(batch, dtype=torch.int64),
        "context": torch.zeros(batch, 7, network.read_features),
        "context_mask": torch.ones(batch, 7, dtype=torch.bool),
        "tokens": torch.zeros(batch, 7, dtype=torch.uint8),
        "image": torch.zeros(batch, network.image_channels, *size),
        "extra": torch.zeros(batch, network.extra_dim),
    }
    if unknown := sorted(reads - set(example)):
        raise ValueError(
            f"the network reads {', '.join(unknown)}, which a program has no input for"
        )
    return {name: value for name, value in example.items() if name in reads}


def traced(model: Model) -> Traced:
    """Trace the denoiser of a model, with any batch and, if the network permits it, any size.

    Raises `ValueError` in one line for a model that is none, or that cannot be traced.
    """
    if not model.config.objective.denoises:
        raise ValueError(
            "a consistency model denoises in one jump, and programs are denoisers: export it to "
            "safetensors or diffusers"
        )
    denoiser, divisor = model.denoiser, max(model.config.network.divisor, 1)
    canvas = model.config.canvas
    # Unequal sides, so that none is taken for another; the canvas itself if it must be that.
    sides = (-(-side // divisor) * divisor for side in canvas)
    uneven = tuple(side + (axis + 1) * divisor for axis, side in enumerate(sides))
    reasons = []
    for size, free in ((uneven, True), (canvas, False)):
        try:
            return _traced(model, denoiser, size, free)
        except Exception as error:  # of many kinds: whatever the tracer or the network raises
            reasons.append(" ".join(str(error).split())[:160])
    raise ValueError(
        f"this network cannot be traced at {size_name(canvas)} (such as one whose computation "
        f"depends on its values): {reasons[-1]}; export it to safetensors or diffusers"
    )


def _traced(model: Model, denoiser: NetDenoiser, size: Size, free: bool) -> Traced:
    batch = 3
    conditions = conditions_of(model, batch, size)
    program = Program(denoiser, tuple(conditions)).eval()
    x = torch.zeros(batch, model.config.network.channels, *size)
    inputs = (x, torch.ones(batch), *conditions.values())
    with torch.no_grad(), _quiet():
        program(*inputs)  # fills caches of tables, with tensors that are none of the tracer
        axes = range(2, x.ndim) if free else ()
        shapes: list[dict[int, Any]] = [
            {0: Dim.AUTO, **dict.fromkeys(axes, Dim.AUTO)},
            {0: Dim.AUTO},
        ]
        for name in conditions:
            any_length = name in ("context", "context_mask", "tokens")
            spatial = axes if name == "image" else (1,) if any_length else ()
            shapes.append({0: Dim.AUTO, **dict.fromkeys(spatial, Dim.AUTO)})
        more = (tuple(shapes[2:]),) if conditions else ()
        exported = torch.export.export(program, inputs, dynamic_shapes=(*shapes[:2], *more))
    names = ("x", "sigma", *conditions)
    users = set(exported.graph_signature.user_inputs)
    values = [node.meta["val"] for node in exported.graph.nodes if node.name in users]
    dynamic = {
        name: tuple(axis for axis, side in enumerate(value.shape) if not isinstance(side, int))
        for name, value in zip(names, values, strict=True)
    }
    return Traced(exported, names, dynamic, max(model.config.network.divisor, 1))


def save_torch(trace: Traced, model: Model, path: Path) -> None:
    """Write a file for `torch.export.load(path).module()`."""
    facts = json.dumps(trace.facts(model))
    with path.open("wb") as stream, _quiet():
        torch.export.save(trace.program, stream, extra_files={NOTE: facts})


def save_onnx(trace: Traced, model: Model, path: Path) -> None:
    """Write a file for ONNX; weights of more than 1 GiB lie in PATH.data beside it.

    Raises `ValueError` in one line for an operation that ONNX does not have.
    """
    require("onnxscript", extra="dev")
    weights = sum(
        value.numel() * value.element_size() for value in model.network.state_dict().values()
    )
    decomposed: dict[Any, Any] = {torch.ops.aten.searchsorted.Tensor: _counted}
    try:
        with _quiet():
            program = torch.onnx.export(
                trace.program.run_decompositions(decomposed),
                (),
                dynamo=True,
                input_names=list(trace.inputs),
                output_names=[OUTPUT],
                verbose=False,
            )
    except Exception as error:  # of many kinds
        lines = [line for line in str(error).splitlines() if "No ONNX function" in line]
        reason = " ".join((lines or [str(error)])[0].split())[:200]
        raise ValueError(f"ONNX cannot express this network: {reason}") from error
    assert program is not None
    program.model.metadata_props["patchdiffusion"] = json.dumps(trace.facts(model))
    program.save(str(path), external_data=weights > _MOST_INSIDE)


def _counted(table: Tensor, values: Tensor, **_: Any) -> Tensor:
    """`searchsorted` as the number of entries below each value, for ONNX."""
    return (table < values[..., None]).sum(-1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings about the inside of PyTorch."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
