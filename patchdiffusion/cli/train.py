"""patchdiffusion train [RECIPE or PATH] [options]"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from patchdiffusion import recipes
from patchdiffusion.cli.flags import FLAT, read
from patchdiffusion.cli.parse import parse, parse_some, take_first
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.data.source import is_run
from patchdiffusion.objectives import ConsistencyConfig
from patchdiffusion.recipes import Facts
from patchdiffusion.system.dist import place
from patchdiffusion.train.config import RunConfig, TrainConfig
from patchdiffusion.train.folder import stored_config
from patchdiffusion.train.loop import train

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

    run: RunConfig = field(default_factory=RunConfig, metadata=FLAT)
    config: TrainConfig = field(default_factory=TrainConfig, metadata=FLAT)


def main(arguments: Sequence[str]) -> None:
    """Choose the defaults, let the flags change them, train."""
    first, flags = take_first(arguments)
    what = subject(first, flags)
    if is_run(Path(what)):  # go on with it
        flags = [*flags, "--out", what]
        what = str(_stored(Path(what)).data.path)
    try:
        # Wrong flags are found before any data is read.
        _parse(flags, _begun(what, _early(flags)) or generic_config(what))
    except ValueError as error:
        if not str(error).startswith("network"):  # whose limits depend on the data
            raise
    given = _parse(flags, default_config(what, flags))
    train(_with_whole_paths(given.config), given.run)


def subject(first: str | None, flags: Sequence[str]) -> str:
    """A recipe, images or a run: the first argument, else --data.path, else glyphs."""
    return first or _early(flags).data.path or "glyphs"


def _with_whole_paths(config: TrainConfig) -> TrainConfig:
    """The same wherever the run goes on."""
    objective = config.objective
    if not isinstance(objective, ConsistencyConfig) or objective.teacher is None:
        return config
    path = str(Path(objective.teacher).expanduser().resolve())
    return replace(config, objective=replace(objective, teacher=path))


def for_objective(config: TrainConfig, flags: Sequence[str]) -> TrainConfig:
    """The configuration with the objective that the flags name."""
    words = read(flags).get("objective", ())
    return recipes.with_objective(config, words[0] if words else None)


def _parse(flags: Sequence[str], config: TrainConfig) -> TrainArguments:
    return parse(
        TrainArguments(config=for_objective(config, flags)),
        flags,
        prog="patchdiffusion train [RECIPE or PATH]",
        description=DESCRIPTION,
    )


def generic_config(what: str) -> TrainConfig:
    """What a recipe gives without having seen any images."""
    recipe = recipes.RECIPES.get(what, recipes.folder)
    return recipe(Facts(path=what))


def _early(flags: Sequence[str]) -> _Early:
    return parse_some(_Early(data=DataConfig(path="")), flags)


def _stored(folder: Path) -> TrainConfig:
    config = stored_config(folder)
    assert config is not None
    return config


def default_config(what: str, flags: Sequence[str]) -> TrainConfig:
    """What a recipe gives for these images, or what a run was begun with; prepares the images."""
    early = _early(flags)
    path = Path(what).expanduser()
    if path.exists():
        recipe, images = recipes.folder, str(path.resolve())
    else:
        recipe, images = recipes.find(what), early.data.path
    if (stored := _begun(what, early)) is not None:
        return _same_data(stored, early.data.path or images)
    data = recipe(Facts(path="")).data  # some recipes bring images of their own
    if images:
        data = replace(data, path=images)
    if not data.path:
        raise ValueError(f"the recipe {what} needs images: give them with --data.path")
    data = parse_some(_Early(data=data), flags).data
    chosen = recipe(Facts.of(prepare_data(data), data.path, early.device))
    if place().is_main:
        print(f"recipe    {recipe.__name__}: {(recipe.__doc__ or '').strip().splitlines()[0]}")
    return replace(chosen, name=_name(what, early), data=replace(data, flip=chosen.data.flip))


def _name(what: str, early: _Early) -> str:
    path = Path(what).expanduser()
    own = path.resolve().name.split(".")[0] or "run"
    return early.name or (own if path.exists() else what)


def _begun(what: str, early: _Early) -> TrainConfig | None:
    """The configuration of the run that these flags go on with, if there is one."""
    folder = RunConfig(out=early.out).folder(_name(what, early))
    return _stored(folder) if not early.fresh and is_run(folder) else None


def _same_data(stored: TrainConfig, given: str) -> TrainConfig:
    """The stored configuration; refused if other images are given than it was trained on."""
    if given and Path(given).resolve() != Path(stored.data.path).resolve():
        raise ValueError(
            f"there is a run of that name already, on {stored.data.path}; use --name or --out for "
            f"another one, --fresh to set it aside, or its own folder to go on with it"
        )
    return stored
