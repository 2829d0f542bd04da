"""patchdiffusion train [RECIPE] [DATA] [options]"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from patchdiffusion import recipes
from patchdiffusion.cli.configfile import with_config
from patchdiffusion.cli.flags import flat, positional, read
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_run
from patchdiffusion.cli.subject import Subject, data_of
from patchdiffusion.cli.values import NONE
from patchdiffusion.data.source import is_run, whole
from patchdiffusion.data.store import packs_aside
from patchdiffusion.recipes.captions import with_captions
from patchdiffusion.system import families
from patchdiffusion.system.device import pick_device
from patchdiffusion.system.serialize import decode, encode
from patchdiffusion.train.config import RunConfig, TrainConfig
from patchdiffusion.train.loop import train


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Train a model on images.

    The default recipe is 'folder', which chooses by resolution, number and hardware. The same
    command again resumes the run; flags may then change fields that do not make it another run.
    """

    example: ClassVar[str] = "patchdiffusion train ./photos --images 100k"
    common: ClassVar[str] = (
        "images batch data.resolution data.flip data.labels captions network optim.lr patches seed "
        "name out device threads start-from max-hours track fresh config print-config dry-run"
    )

    subject: tuple[str, ...] = field(
        default=(), metadata=positional("[RECIPE] [DATA]", required=False, listed=recipes.RECIPES)
    )
    """A recipe, and a folder, zip, array or pack of images; or a run to resume. Recipes are:"""
    training: TrainConfig = field(default_factory=TrainConfig, metadata=flat("training"))
    run: RunConfig = field(default_factory=RunConfig, metadata=flat("run"))
    captions: str | None = None
    """Train on captions of the images: bytes, by a small text encoder inside the network, or the
    folder or hub name of a frozen one (CLIP, T5, BERT). None leaves them out."""
    config: Path | None = None
    """File of settings, .json as in the folder of a run, or .toml; flags take precedence."""
    print_config: bool = False
    """Print all settings as JSON, for --config, and stop."""


def main(arguments: Sequence[str]) -> None:
    """Build the configuration from recipe and flags, and train."""
    with chosen(arguments) as flag_words:
        if flag_words.print_config:
            stored = decode(
                TrainConfig, encode(flag_words.training)
            )  # with numbers as they are read
            print(json.dumps(encode(stored), indent=2))
        else:
            train(flag_words.training, flag_words.run)


@contextmanager
def chosen(arguments: Sequence[str]) -> Iterator[TrainArguments]:
    """Context with the configuration that the arguments make of the defaults, or of a run."""
    typed = arguments
    arguments = with_config(TrainArguments(), arguments)
    words, flag_words = read(arguments)
    run = Path(words[0]) if len(words) == 1 and is_run(Path(words[0])) else None
    if run is not None:  # resume it
        arguments = [data_of(run, arguments), *arguments[1:], "--out", words[0]]
    subject = Subject.of(arguments, "train", run=run)
    try:  # wrong flags are found before any data is read
        early = parsed(arguments, subject.generic(), subject.note())
    except ValueError as error:
        if not str(error).startswith("network"):  # whose limits depend on the data
            raise
    else:
        if not early.print_config:
            pick_device(early.run.device)
    with packs_aside() if "dry-run" in flag_words else nullcontext():
        with redirect_stdout(sys.stderr if "print-config" in flag_words else sys.stdout):
            choice = parsed(arguments, subject.config(arguments))
        if choice.run.start_from is not None:
            check_run(choice.run.start_from, "start_from")
        if not choice.print_config:
            _check_code(choice.training, typed)
        yield replace(choice, training=with_whole_paths(choice.training))


def _check_code(config: TrainConfig, arguments: Sequence[str]) -> None:
    """Raise `ValueError` for code that is named by the files of a run only."""
    name = config.preview.extractor
    if ":" in name and not any(name in argument for argument in arguments):
        raise ValueError(
            f"preview.extractor of the stored configuration is {name}, which is code; to execute "
            f"it add --preview.extractor {name}, else --preview.extractor inception"
        )
    for addition in config.additions:
        for name in addition.code:
            if not any(name in argument for argument in arguments):
                word = families.word(type(addition))
                raise ValueError(
                    f"additions.{word} of the stored configuration names {name}, which is code; to "
                    f"execute it add --additions {word} with it"
                )


def with_whole_paths(config: TrainConfig) -> TrainConfig:
    """Configuration with absolute paths, to resume the run from any folder."""
    autoencoder = config.data.autoencoder and whole(config.data.autoencoder)
    data = replace(config.data, path=whole(config.data.path), autoencoder=autoencoder)
    weights = config.preview.extractor_weights
    preview = replace(config.preview, extractor_weights=weights and whole(weights))
    objective, task = config.objective.located(), config.task.located()
    additions = tuple(addition.located() for addition in config.additions)
    return replace(
        config,
        data=data,
        preview=preview,
        objective=objective,
        additions=additions,
        task=task,
    )


def parsed(
    arguments: Sequence[str],
    config: TrainConfig,
    note: str = "",
    run: RunConfig | None = None,
) -> TrainArguments:
    """Arguments on top of a configuration, and of that of --captions; `note` is for the help."""
    _, flag_words = read(arguments)
    if len(words := flag_words.get("captions", ())) == 1 and words[0] != NONE:
        config = with_captions(config, words[0])
    return parse(TrainArguments(training=config, run=run or RunConfig()), arguments, "train", note)
