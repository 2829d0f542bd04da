"""patchdiffusion average RUN --std 0.1"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from patchdiffusion.cli.flags import positional
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_run
from patchdiffusion.model import Model, load_model, save_model
from patchdiffusion.system.files import read_json
from patchdiffusion.train.posthoc import Sources, exponent

_NOTE = "average.json"
"""File of a model that says of which snapshots it is made."""


@dataclass(frozen=True, kw_only=True)
class AverageArguments:
    """Reconstruct averages of the weights of any width after training (post-hoc EMA).

    They are computed from the profiles that a run has stored (train --ema.profiles 0.05 0.1), and
    each is written as a model for `sample` as soon as it is made; one that is there already is
    not made again.
    """

    example: ClassVar[str] = "patchdiffusion average runs/photos --std 0.05 0.1"

    run: Path = field(default=Path(), metadata=positional("RUN"))
    """Folder of a run."""
    std: tuple[float, ...] = (0.1,)
    """Widths of the averages relative to the time at which they end; above 0, below 0.2887."""
    at: float | None = None
    """Clock time at which they end; the default is that of the last snapshot."""
    out: Path | None = None
    """Folder to write the model to, for one width; the default is averages/std-... in the run."""


def main(arguments: Sequence[str]) -> None:
    """Reconstruct averages, and write each as a model."""
    options = parse(AverageArguments(), arguments, "average")
    run = options.run
    check_run(run)
    for std in options.std:
        exponent(std)  # raises for a width that is impossible
    if options.out is not None and len(options.std) != 1:
        raise ValueError(f"--out is for one width, not {len(options.std)}; leave it out")
    sources = Sources.of(run, options.at)
    at = "" if options.at is None else f"-at-{options.at:g}"
    folders = {std: options.out or run / "averages" / f"std-{std:g}{at}" for std in options.std}
    there = {std for std, out in folders.items() if out.exists()}
    for std in there:
        _check_equal(folders[std], sources.facts(std))
    raw = load_model(run, weights="raw")
    state, config = raw.network.state_dict(), replace(raw.config, step=sources.step)
    for std, out in folders.items():
        if std not in there:
            weights = sources.reconstruct(std)
            _check(run, raw, weights)
            notes = {_NOTE: sources.facts(std)}
            save_model(
                out,
                config,
                averaged=state | weights,
                raw=state,
                notes=notes,
                carried=raw.carried,
            )
        print(f"the average of width {std:g} is {'already ' if std in there else ''}in {out}")


def _check_equal(out: Path, facts: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless a folder holds just this average, undamaged."""
    note = out / _NOTE
    if not note.is_file() or read_json(note) != facts:
        raise ValueError(
            f"{out} exists and is another average, and nothing is overwritten; use another --out"
        )
    load_model(out)


def _check(run: Path, raw: Model, weights: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` unless an average has each parameter of a run that was trained."""
    own = dict(raw.network.named_parameters())
    wrong = [name for name in weights if name not in own or weights[name].shape != own[name].shape]
    if missing := sorted(set(own) - set(weights)):  # those that were not trained are no average
        averaged = load_model(run).network
        wrong += [name for name in missing if not averaged.get_parameter(name).equal(own[name])]
    if wrong:
        raise ValueError(f"the snapshots of {run} do not fit its model: {wrong[0]} differs")
