"""patchdiffusion train [RECIPE or PATH] [options]"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from patchdiffusion import recipes
from patchdiffusion.cli.parse import parse, parse_some, take_first, take_word
from patchdiffusion.dist import place
from patchdiffusion.recipes import Facts
from patchdiffusion.train.config import DataConfig, RunConfig, TrainConfig
from patchdiffusion.train.folder import is_run, stored_config
from patchdiffusion.train.loop import train
from patchdiffusion.train.setup import prepare_data

DESCRIPTION = (
    "Train on images. The first argument is a folder, zip, array or pack of images, or one of the "
    f"recipes {', '.join(recipes.RECIPES)}, or a run to go on with; images get the recipe "
    "'folder', which chooses by resolution, number and hardware. The same command again goes on "
    "with the run; flags then change the stored configuration as far as it remains the same run. "
    f"--objective {'|'.join(recipes.OBJECTIVES)} chooses what is trained, with its own flags."
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
    objective, flags = take_word(flags, "--objective", recipes.OBJECTIVES)
    what = first or _early(flags).data.path or "glyphs"
    if is_run(Path(what)):  # go on with it
        flags = [*flags, "--out", what]
        what = str(_stored(Path(what)).data.path)
    try:
        # Wrong flags are found before any data is read.
        known = _going_on(what, flags) or generic_config(what)
        _parse(flags, recipes.with_objective(known, objective))
    except ValueError as error:
        if not str(error).startswith("network"):  # whose limits depend on the data
            raise
    given = _parse(flags, recipes.with_objective(default_config(what, flags), objective))
    train(given.config, given.run)


def _parse(flags: Sequence[str], config: TrainConfig) -> TrainArguments:
    return parse(
        TrainArguments,
        flags,
        default=TrainArguments(config=config),
        prog="patchdiffusion train [RECIPE or PATH]",
        description=DESCRIPTION,
    )


def generic_config(what: str) -> TrainConfig:
    """What a recipe gives without having seen any images."""
    recipe = recipes.RECIPES.get(what, recipes.folder)
    return recipe(Facts(path=what))


def _early(flags: Sequence[str]) -> _Early:
    return parse_some(_Early, flags, default=_Early(data=DataConfig(path="")))


def _stored(folder: Path) -> TrainConfig:
    config = stored_config(folder)
    assert config is not None
    return config


def _going_on(what: str, flags: Sequence[str]) -> TrainConfig | None:
    """The configuration of the run that these arguments go on with, if there is one."""
    early = _early(flags)
    folder = RunConfig(out=early.out).folder(early.name or _name(what))
    return _stored(folder) if not early.fresh and is_run(folder) else None


def _name(what: str) -> str:
    """What a run is called by default."""
    path = Path(what).expanduser()
    return (path.resolve().name.split(".")[0] or "run") if path.exists() else what


def default_config(what: str, flags: Sequence[str]) -> TrainConfig:
    """What a recipe gives for these images, or what a run was begun with; prepares the images."""
    early = _early(flags)
    path = Path(what).expanduser()
    if path.exists():
        recipe, images = recipes.folder, str(path.resolve())
    else:
        recipe, images = recipes.find(what), early.data.path
    if stored := _going_on(what, flags):
        return _same_data(stored, early.data.path or images)
    name = early.name or _name(what)
    data = recipe(Facts()).data
    if recipe not in recipes.DEMOS or images:
        data = replace(data, path=images)
    if not data.path:
        raise ValueError(f"the recipe {what} needs images: give them with --data.path")
    data = parse_some(_Early, flags, default=_Early(data=data)).data
    chosen = recipe(Facts.of(prepare_data(data), data.path, early.device))
    if place().lead:
        print(f"recipe    {recipe.__name__}: {(recipe.__doc__ or '').strip().splitlines()[0]}")
    return replace(chosen, name=name, data=replace(data, flip=chosen.data.flip))


def _same_data(stored: TrainConfig, given: str) -> TrainConfig:
    """The stored configuration; refused if other images are given than it was trained on."""
    if given and Path(given).resolve() != Path(stored.data.path).resolve():
        raise ValueError(
            f"there is a run of that name already, on {stored.data.path}; use --name or --out for "
            f"another one, --fresh to set it aside, or its own folder to go on with it"
        )
    return stored
