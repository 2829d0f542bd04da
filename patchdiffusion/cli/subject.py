"""The subject of a command: a recipe, its images, and the name of its run."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from patchdiffusion import recipes
from patchdiffusion.cli.flags import read
from patchdiffusion.cli.parse import parse_some
from patchdiffusion.cli.places import unknown_subject
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.data.source import is_run, is_there, name_of, whole
from patchdiffusion.patches import size_name
from patchdiffusion.recipes import Facts, Recipe
from patchdiffusion.system.files import expanded
from patchdiffusion.system.place import place
from patchdiffusion.train.config import RunConfig, TrainConfig
from patchdiffusion.train.folder import stored_config, trained_on


@dataclass(frozen=True, kw_only=True)
class Early:
    """Flags on which the defaults of all others depend."""

    name: str | None = None
    out: Path | None = None
    fresh: bool = False
    device: str = "auto"
    data: DataConfig = field(default_factory=lambda: DataConfig(path=""))


@dataclass(frozen=True)
class Subject:
    """A recipe, its images, and the name of its run."""

    recipe: Recipe
    images: str
    """Path of the images; empty if the recipe has its own."""
    name: str
    early: Early
    run: Path | None = None
    """Run named by its folder, to resume it."""

    @classmethod
    def of(
        cls,
        arguments: Sequence[str],
        command: str,
        *,
        required: bool = True,
        run: Path | None = None,
    ) -> "Subject":
        """Subject named by the words before the flags; for help, by default the recipe of a folder.

        One word is data if it exists as a path, else a recipe; two are a recipe and data. Raises
        `ValueError` if nothing is named, and for unknown words.
        """
        words, flag_words = read(arguments)
        early = parse_some(Early(), arguments)
        words = words or [early.data.path] * bool(early.data.path)
        if not words and required and "help" not in flag_words:
            behind = (word for values in flag_words.values() for word in values[1:])
            if late := [word for word in behind if expanded(word).exists()]:
                raise ValueError(f"nothing is given to {command}; put {late[0]} before all flags")
            raise ValueError(
                f"nothing is given to {command}: type patchdiffusion {command} ./photos (a folder, "
                f".zip, .npy, .npz or pack), or a recipe: {', '.join(sorted(recipes.RECIPES))}"
            )
        recipe, path, stem = cls._named(words or ["folder"])
        return cls(recipe, early.data.path or path, early.name or stem, early, run)

    @staticmethod
    def _named(words: Sequence[str]) -> tuple[Recipe, str, str]:
        """Recipe, images, and name of their run."""
        if words[0] == "control" and not expanded("control").exists():
            raise ValueError(
                "a branch is trained beside a model that it controls: patchdiffusion adapt RUN "
                "DATA --adapter control --adapter.condition edges"
            )
        if len(words) > 2:
            raise ValueError(f"{words[2]!r} is one argument too many after a recipe and data")
        path = expanded(words[-1])
        is_data = path.exists() and not (words[-1] in recipes.RECIPES and is_run(path))
        if is_data and is_run(path):
            raise ValueError(
                f"{words[-1]} is the folder of a run, not of images; "
                f"patchdiffusion train {words[-1]} goes on with it"
            )
        images = str(path.resolve()) if is_data else words[-1]
        stem = Path(os.path.abspath(path)).name.split(".")[0] or "run"  # of a link its own
        if not is_data and is_there(words[-1]):
            stem = name_of(words[-1])
        if len(words) == 2:
            _check_recipe_comes_first(words)
            return recipes.find(words[0]), images, f"{stem}-{words[0]}"
        if is_data:
            return recipes.folder, images, stem
        if words[0] not in recipes.RECIPES and is_there(words[0]):  # on the hub, or a pattern
            return recipes.folder, words[0], stem
        if words[0] not in recipes.RECIPES:
            raise ValueError(unknown_subject(words[0], list(recipes.RECIPES)))
        return recipes.find(words[0]), "", words[0]

    @property
    def resumes(self) -> bool:
        """True if there is a run of that name, which goes on."""
        return self._existing() is not None

    @property
    def data(self) -> DataConfig:
        """Preparation of the images by the recipe."""
        data = self.recipe(Facts(path=self.images)).data
        return replace(data, path=self.images) if self.images else data

    def generic(self) -> TrainConfig:
        """Configuration before any images are read: that of the run, or of the recipe."""
        return self._existing() or self.recipe(Facts(path=self.images))

    def note(self) -> str:
        """Origin of the values of `generic`, for the help."""
        if self._existing() is not None:
            return f" of the run {RunConfig(out=self.early.out).folder(self.name)}"
        name = recipes.word(self.recipe)
        size = size_name(Facts.canvas)
        return f" of the recipe {name}" + f" for images of {size} on a CPU" * (name == "folder")

    def config(self, arguments: Sequence[str]) -> TrainConfig:
        """Configuration of the run, or that of the recipe for its prepared images."""
        if (stored := self._existing()) is not None:
            return self._same_data(stored)
        config = self.fresh(arguments)
        if place().is_main:
            about = (self.recipe.__doc__ or "").strip().splitlines()[0]
            print(f"recipe    {recipes.word(self.recipe)}: {about}")
        return config

    def fresh(self, arguments: Sequence[str]) -> TrainConfig:
        """Configuration by the recipe for its prepared images."""
        name = recipes.word(self.recipe)
        data = parse_some(Early(data=self.data), arguments).data
        if not data.path:
            raise ValueError(f"the recipe {name} needs images: patchdiffusion train {name} DATA")
        chosen = self.recipe(Facts.of(prepare_data(data), data.path, self.early.device))
        return replace(chosen, name=self.name, data=replace(data, flip=chosen.data.flip))

    def _existing(self) -> TrainConfig | None:
        """Configuration of the run to resume, or None."""
        folder = RunConfig(out=self.early.out).folder(self.name)
        return stored_config(folder) if not self.early.fresh and is_run(folder) else None

    def _same_data(self, stored: TrainConfig) -> TrainConfig:
        """The stored configuration, with the place of its images if they have been moved.

        Raises `ValueError` if a run of that name was trained on others.
        """
        images = self.images
        if not images or whole(images) == whole(stored.data.path):
            return stored
        folder = RunConfig(out=self.early.out).folder(self.name)
        moved = replace(stored, data=replace(stored.data, path=whole(images)))
        is_gone = not is_there(stored.data.path) and is_there(images)
        if self.run is not None:  # which the images are compared with before it goes on
            return moved
        if is_gone and prepare_data(moved.data).fingerprint == trained_on(folder):
            return moved
        raise ValueError(
            f"there is a run of that name already, on {stored.data.path}; use --name or --out "
            "for another one, --fresh to set it aside, or go on with it: patchdiffusion train "
            f"{folder}" + f" --data.path {images}" * is_gone
        )


def data_of(run: Path, arguments: Sequence[str]) -> str:
    """The images of a run: those given by --data.path, else where they were.

    Raises `ValueError` if they are not there.
    """
    stored = stored_config(run)
    assert stored is not None
    images = parse_some(Early(), arguments).data.path
    path = images or stored.data.path
    if not is_there(path):
        raise ValueError(
            f"the images of {run} are not at {path}; if they have been moved, type patchdiffusion "
            f"train {run} --data.path FOLDER"
        )
    return path


def _check_recipe_comes_first(words: Sequence[str]) -> None:
    first, second = words
    if first in recipes.RECIPES:
        return
    if second in recipes.RECIPES:
        raise ValueError(f"a recipe comes before the images: type {second} {first}")
    if expanded(first).exists():
        raise ValueError(
            f"{first} and {second} are two sets of images; give one, or put all images in one "
            "folder, a class in each subfolder"
        )
    raise ValueError(unknown_subject(first, list(recipes.RECIPES)))
