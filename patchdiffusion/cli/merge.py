"""patchdiffusion merge RUN [--adapter A:0.7] --out MODEL"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from patchdiffusion.adapted import load_adapted, merged_model
from patchdiffusion.cli.flags import positional
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_run
from patchdiffusion.model import save_model
from patchdiffusion.nets.attached import attached_to


@dataclass(frozen=True, kw_only=True)
class MergeArguments:
    """Write a plain model that computes what a model does with adapters.

    RUN is the run of an adapter, or a model that --adapter changes. Adapters with a branch that is
    not linear, with a range of noise levels, or of edm2 have no such weights.
    """

    example: ClassVar[str] = "patchdiffusion merge runs/new --out merged"

    path: Path = field(default=Path(), metadata=positional("RUN"))
    """Folder of a run or model."""
    adapter: tuple[str, ...] = ()
    """Adapters that change the model, with a strength if it is not 1: runs/new, or runs/new:0.7."""
    out: Path | None = None
    """Folder to write the model to."""


def main(arguments: Sequence[str]) -> None:
    """Merge adapters into the weights, and write the model."""
    options = parse(MergeArguments(), arguments, "merge")
    check_run(options.path)
    out = options.out
    if out is None:
        raise ValueError("--out is missing; name the folder to write the model to: --out MODEL")
    if out.exists():
        raise ValueError(f"{out} exists, and nothing is overwritten; use another --out")
    model = load_adapted(options.path, options.adapter)
    attached = attached_to(model.network)
    if attached is None:
        raise ValueError(
            f"{options.path} has no adapter; name one that changes it: --adapter runs/new"
        )
    plain = merged_model(model)
    weights = plain.network.state_dict()
    save_model(out, plain.config, averaged=weights, raw=weights, carried=model.carried)
    print(f"{' and '.join(attached.parts)} merged into the model {out}")
