"""Error messages for wrong subjects of a command: URLs, folders without a run, unknown words."""

import contextlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from patchdiffusion.cli.words import did_you_mean, question
from patchdiffusion.system.files import check_place, expanded
from patchdiffusion.system.hub import hub_name

_MAX_RUNS = 8  # listed in an error


def refuse_urls(arguments: Sequence[str]) -> None:
    """Raise `ValueError` if an argument is a URL."""
    for argument in arguments:
        if match := re.match(r"(?:--[^=]*=)?(([A-Za-z][\w+.-]+)://.*)", argument):
            raise ValueError(
                f"{match[1]} is a URL, which is not fetched; download it, and give the folder or "
                "file (.zip, .npy, .npz)"
            )


def check_run(path: Path, option: str = "") -> None:
    """Raise `ValueError` that lists existing runs unless a run or model may be at a path.

    A name on the hub may be.

    The message names the option that the path belongs to, if there is one.
    """
    if (path / "config.json").exists() or (path / "model").is_dir() or hub_name(str(path)):
        return
    if path.is_file():
        wrong = "is a file, not the folder of a run or model"
    else:
        wrong = "holds no run and no model" if path.exists() else "does not exist"
    same_name = [run for run in _runs(path.parent) if Path(run).name == path.name]
    hint = question(same_name) or did_you_mean(str(path), _runs(path.parent))
    subject = f"{option} is {path}, which" if option else str(path)
    raise ValueError(f"{subject} {wrong}; {runs_here(path.parent)}{hint}")


def home(path: Path) -> Path:
    """Folder for samples and evaluations of a run or model: the run of RUN/model, else itself.

    Of a model on the hub it is one of its name here.
    """
    if name := hub_name(str(path)):
        return Path(name.short)
    of_run = path.name == "model" and (path.parent / "config.json").exists()
    return path.parent if of_run else path


def run_of(path: Path) -> Path:
    """Run of a model, such as one of its averages, or the model itself."""
    above = (path, *path.absolute().parents[:2])
    return next((folder for folder in above if (folder / "log.jsonl").exists()), home(path))


def check_file(file: Path) -> None:
    """Raise an error if a file cannot be written; writes nothing."""
    if file.is_dir():
        raise ValueError(f"{file} is a folder; give the name of a file")
    check_place(file.parent)


def new_file(folder: Path, suffix: str) -> Path:
    """Create the first of folder/0001, 0002, ... that does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            file = folder / f"{number:04d}{suffix}"
            file.touch(exist_ok=False)
            return file
    raise AssertionError("unreachable")


def runs_here(folder: Path = Path()) -> str:
    """List of the runs in a folder, in runs/ and in the current folder, for an error."""
    runs = _runs(folder)
    if not runs:
        return "there are no runs here; patchdiffusion train ./photos starts runs/photos"
    return f"runs here are {', '.join(runs[:_MAX_RUNS])}{', ...' if len(runs) > _MAX_RUNS else ''}"


def _runs(folder: Path) -> list[str]:
    folders = (Path("runs"), folder, Path())
    files = (file for folder in folders for file in folder.glob("*/config.json"))
    return sorted({str(file.parent) for file in files if (file.parent / "log.jsonl").exists()})


def unknown_subject(word: str, recipes: Sequence[str]) -> str:
    """Error message for a word that is neither a recipe nor a path."""
    folder = expanded(word).parent
    files = [f.name for f in folder.iterdir()] if folder.is_dir() else []
    data = [n for n in files if (folder / n).is_dir() or n.endswith((".zip", ".npy", ".npz"))]
    form = "{}" if folder == Path() else f"{folder}/{{}}"
    hint = did_you_mean(word, recipes) or did_you_mean(Path(word).name, data, form)
    names = ", ".join(sorted(recipes))
    return f"{word!r} is neither an existing path nor a recipe; recipes are {names}{hint}"
