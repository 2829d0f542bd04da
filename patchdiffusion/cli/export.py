"""patchdiffusion export RUN --to diffusers|safetensors|torch|onnx|peft"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, get_args

from patchdiffusion.adapted import merged_model
from patchdiffusion.cli.flags import positional
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_run
from patchdiffusion.model import Model, load_model
from patchdiffusion.nets.base import Weights
from patchdiffusion.system.files import check_place, write_atomic

Form = Literal["diffusers", "safetensors", "torch", "onnx", "peft"]
SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt2", "onnx": ".onnx"}
"""Ends of the names of files, by form."""


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Write a model for other programs: diffusers, safetensors, torch.export, ONNX or peft.

    A folder of diffusers samples; a program for torch or ONNX is the denoiser D(x, sigma), with
    any batch size and, if the network permits it, any size of images; safetensors has weights and
    configuration in one file. The adapter of a run is merged into the weights; peft is the adapter
    alone.
    """

    example: ClassVar[str] = "patchdiffusion export runs/a --to onnx"

    path: Path = field(default=Path(), metadata=positional("RUN"))
    """Folder of a run or model."""
    to: Form = "diffusers"
    """diffusers: folder of a pipeline; safetensors: one file; torch: .pt2; onnx: .onnx; peft:
    folder of the LoRA or DoRA of a run."""
    out: Path | None = None
    """Folder or file to write, which must not exist; the default is exported/NAME."""
    weights: Weights = "averaged"
    """averaged: moving average of the weights; raw: weights as trained."""


def main(arguments: Sequence[str]) -> None:
    """Write the model."""
    options = parse(ExportArguments(), arguments, "export")
    check_run(options.path)
    suffix = SUFFIXES.get(options.to, "")
    out = options.out or Path("exported") / f"{options.path.resolve().name}{suffix}"
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists, and nothing is overwritten; use another --out")
    if suffix and out.suffix != suffix:
        raise ValueError(f"--out is {out}, and --to {options.to} writes a file {suffix}")
    check_place(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    model = load_model(options.path, weights=options.weights)
    model.require("denoiser")
    for line in _write(model, options.to, out):
        print(line)
    print(f"written to {out}")


def _write(model: Model, form: Form, out: Path) -> list[str]:
    """Write a model in a form; returns lines about the result."""
    # Each of these imports takes a second.
    if form == "peft":
        from patchdiffusion.interop.peftadapter import export_peft

        export_peft(model, out)
        return []
    model = merged_model(model)
    if form == "diffusers":
        from patchdiffusion.interop.diffusersout import export_diffusers

        return [export_diffusers(model, out)]
    if form == "safetensors":
        from patchdiffusion.interop.singlefile import save_single

        write_atomic(out, lambda path: save_single(model, path))
        return []
    from patchdiffusion.interop.program import save_onnx, save_torch, traced

    assert form in get_args(Form)
    trace = traced(model)
    save = save_torch if form == "torch" else save_onnx
    if form == "torch":
        write_atomic(out, lambda path: save(trace, model, path))
    else:  # whose larger weights are a second file, named like the first
        save(trace, model, out)
    axes = trace.dynamic["x"]
    free = [
        name for axis, name in enumerate(("batch", "channels", "height", "width")) if axis in axes
    ]
    fixed = "" if len(free) > 2 else "; this network has one size"
    sides = f" (sides in multiples of {trace.divisor})" if trace.divisor > 1 and not fixed else ""
    return [f"inputs    {', '.join(trace.inputs)}", f"free      {', '.join(free)}{sides}{fixed}"]
