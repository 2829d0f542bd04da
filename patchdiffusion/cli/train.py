"""patchdiffusion train [RECIPE or PATH] [options]"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from patchdiffusion import recipes
from patchdiffusion.cli.parse import parse, parse_some, take_first
from patchdiffusion.recipes import Facts
from patchdiffusion.train.config import DataConfig, RunConfig, TrainConfig
from patchdiffusion.train.folder import stored_config
from patchdiffusion.train.loop import train
from patchdiffusion.train.setup import prepare_data

DESCRIPTION = (
    "Train on images. The first argument is a folder, zip, array or pack of images, or one of the "
    f"recipes {', '.join(recipes.RECIPES)}, or a run to go on with; images get the recipe "
    "'folder', which chooses by resolution, number and hardware. The same command again goes on "
    "with the run; flags then change the stored configuration as far as it remains the same run."
)


@dataclass(frozen=True, kw_only=True)
class _Early:
    """What must be known before the defaults of all other flags are."""

    name: str | None = None
    out: Path | None = None
    fresh: bool = False
    device: str = "auto"
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Everything that can be set."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


def main(arguments: Sequence[str]) -> None:
    """Choose the defaults, let the flags change them, train."""
    first, flags = take_first(arguments)
    what = first or "glyphs"
    run = stored_config(Path(what))  # the folder of a run goes on with that run
    if run is not None:
        what, flags = run.data.path, [*flags, "--out", what]
    try:
        _parse(flags, _generic(what))  # wrong flags are found before any data is read
    except ValueError as error:
        if not str(error).startswith("network"):  # whose limits depend on the data
            raise
    given = _parse(flags, _default(what, flags))
    train(given.config, given.run)


def _parse(flags: Sequence[str], config: TrainConfig) -> TrainArguments:
    return parse(
        TrainArguments,
        flags,
        default=TrainArguments(config=config),
        prog="patchdiffusion train [RECIPE or PATH]",
        description=DESCRIPTION,
    )


def _generic(what: str) -> TrainConfig:
    recipe = recipes.RECIPES.get(what, recipes.folder)
    return recipe(Facts(path=what))


def _default(what: str, flags: Sequence[str]) -> TrainConfig:
    path = Path(what).expanduser()
    is_data = path.exists()
    recipe = recipes.folder if is_data else recipes.find(what)
    data = DataConfig(path=what) if is_data else recipe(Facts()).data
    early = parse_some(_Early, flags, default=_Early(data=data))
    name = early.name or (path.absolute().name.split(".")[0] if is_data else what)
    folder = RunConfig(out=early.out).folder(name)
    stored = None if early.fresh else stored_config(folder)
    if stored is not None:
        return replace(stored, data=replace(stored.data, path=early.data.path))
    pack = prepare_data(early.data)
    chosen = recipe(Facts.of(pack, early.data.path, early.device))
    print(f"recipe    {recipe.__name__}: {(recipe.__doc__ or '').strip().splitlines()[0]}")
    return replace(chosen, name=name, data=replace(early.data, flip=chosen.data.flip))
