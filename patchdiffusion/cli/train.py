"""patchdiffusion train [RECIPE] [DATA] [options]"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from patchdiffusion import recipes
from patchdiffusion.cli.flags import flat, positional, read
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.subject import Subject
from patchdiffusion.data.source import is_run
from patchdiffusion.train.config import RunConfig, TrainConfig
from patchdiffusion.train.folder import stored_config
from patchdiffusion.train.loop import train


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Train on images.

    Images without a recipe get the recipe 'folder', which chooses by resolution, number and
    hardware. The same command again goes on with the run; flags then change the stored
    configuration as far as it remains the same run.
    """

    example: ClassVar[str] = "patchdiffusion train ./photos --images 100k"
    common: ClassVar[str] = (
        "images batch data.resolution data.flip network optim.lr patches label-dropout seed "
        "name out device precision threads preview.samples preview.grid start-from max-hours "
        "track fresh dry-run"
    )

    subject: tuple[str, ...] = field(
        default=(), metadata=positional("[RECIPE] [DATA]", required=False, listed=recipes.RECIPES)
    )
    """A recipe, and a folder, zip, array or pack of images; or a run to go on with. Recipes are:"""
    config: TrainConfig = field(default_factory=TrainConfig, metadata=flat("training"))
    run: RunConfig = field(default_factory=RunConfig, metadata=flat("run"))


def main(arguments: Sequence[str]) -> None:
    """Choose the defaults, let the flags change them, train."""
    words, _ = read(arguments)
    if len(words) == 1 and is_run(Path(words[0])):  # go on with it
        arguments = [_data_of(Path(words[0])), *arguments[1:], "--out", words[0]]
    subject = Subject.of(arguments, "train")
    try:
        _parse(
            arguments, subject.generic(), subject.note()
        )  # wrong flags are found before any data is read
    except ValueError as error:
        if not str(error).startswith("network"):  # whose limits depend on the data
            raise
    given = _parse(arguments, subject.config(arguments))
    _check_code(given.config, arguments)
    train(_with_whole_paths(given.config), given.run)


def _check_code(config: TrainConfig, arguments: Sequence[str]) -> None:
    """Refuse to execute code that only the files of a run name."""
    name = config.preview.extractor
    if ":" in name and not any(name in argument for argument in arguments):
        raise ValueError(
            f"the stored configuration names {name}, which is code of somebody's own; to have it "
            f"executed add --preview.extractor {name}, else --preview.extractor inception"
        )


def _data_of(run: Path) -> str:
    stored = stored_config(run)
    assert stored is not None
    return str(stored.data.path)


def _with_whole_paths(config: TrainConfig) -> TrainConfig:
    """The same wherever the run goes on."""
    return replace(config, objective=config.objective.located())


def _parse(arguments: Sequence[str], config: TrainConfig, note: str = "") -> TrainArguments:
    return parse(TrainArguments(config=config), arguments, "train", note)
