"""patchdiffusion average RUN --std 0.1"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from patchdiffusion.cli.flags import positional
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_run
from patchdiffusion.model import Model, load_model, save_model
from patchdiffusion.train.posthoc import reconstruct


@dataclass(frozen=True, kw_only=True)
class AverageArguments:
    """Reconstruct an average of the weights of any width after training (post-hoc EMA).

    It is computed from the profiles that a run has stored (train --ema.profiles 0.05 0.1), and
    written as a model for `sample`.
    """

    example: ClassVar[str] = "patchdiffusion average runs/photos --std 0.1"

    run: Path = field(default=Path(), metadata=positional("RUN"))
    """Folder of a run."""
    std: float = 0.1
    """Width of the average relative to the time at which it ends; above 0, below 0.2887."""
    at: float | None = None
    """Clock time at which it ends; the default is that of the last snapshot."""
    out: Path | None = None
    """Folder to write the model to; the default is averages/std-... in the folder of the run."""


def main(arguments: Sequence[str]) -> None:
    """Reconstruct an average and write it as a model."""
    options = parse(AverageArguments(), arguments, "average")
    run = options.run
    check_run(run)
    weights, step = reconstruct(run, options.std, options.at)
    raw = load_model(run, weights="raw")
    at = "" if options.at is None else f"-at-{options.at:g}"
    out = options.out or run / "averages" / f"std-{options.std:g}{at}"
    if out.exists():
        raise ValueError(f"{out} exists, and nothing is overwritten; use another --out")
    _check(run, raw, weights)
    state = raw.network.state_dict()
    config = replace(raw.config, step=step)
    save_model(out, config, averaged=state | weights, raw=state)
    print(f"the average of width {options.std:g} is in {out}")


def _check(run: Path, raw: Model, weights: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` unless an average has each parameter of a run that was trained."""
    own = dict(raw.network.named_parameters())
    wrong = [name for name in weights if name not in own or weights[name].shape != own[name].shape]
    if missing := sorted(set(own) - set(weights)):  # those that were not trained are no average
        averaged = load_model(run).network
        wrong += [name for name in missing if not averaged.get_parameter(name).equal(own[name])]
    if wrong:
        raise ValueError(f"the snapshots of {run} do not fit its model: {wrong[0]} differs")
