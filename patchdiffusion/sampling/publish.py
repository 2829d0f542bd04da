"""Models on the hub: pushed with a card, without paths, secrets or images of the data.

The files are those of a model folder: `config.json` and `model.safetensors`.
"""

import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from patchdiffusion.model import Model
from patchdiffusion.sampling.modelcard import GRID, METRICS, card, evaluation_of
from patchdiffusion.system.files import (
    SEAL,
    link_or_copy,
    read_json,
    sealed,
    sha256,
    unsealed,
    write_bytes,
    write_json,
)
from patchdiffusion.system.hub import FORM, hub_name, upload

CONFIG = "config.json"
_RAW = "raw.safetensors"
_TEXTS = (".json", ".md", ".txt")
_SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{20,}|(?<![A-Za-z])sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_PATH = re.compile(r"[/~].*|[A-Za-z]:[\\/].*|\\\\.*|file:.*", re.DOTALL)
_NO_PATHS = ("classes",)
"""Fields that hold names of another kind, which may look like paths."""


def push(model: Model, name: str, *, private: bool = False, raw: bool = False) -> str:
    """Push a model to the hub as user/name; returns the address.

    The card is written from the run that the model lies in. `raw` adds the raw weights, beside the
    averaged ones. Paths in the configuration are cut to their last part. Raises `ValueError` in one
    line for another form of name, for a file with a secret, and if the hub refuses.
    """
    target = hub_name(name)
    if target is None or target.folder:
        raise ValueError(f"{name!r} is no name on the hub; allowed is {FORM}, and no path")
    with tempfile.TemporaryDirectory(prefix="patchdiffusion-") as folder:
        stage(model, name.partition("@")[0], Path(folder), raw=raw)
        message = f"Weights {model.digest}"
        return upload(target, Path(folder), private=private, message=message)


def stage(model: Model, name: str, folder: Path, *, raw: bool = False) -> None:
    """Write the files that are pushed to an empty folder."""
    if model.folder is None or model.weights != "averaged":
        raise ValueError("a model is pushed from its folder, with its averaged weights")
    if model.adapters:
        named = ", ".join(name for name, *_ in model.adapters)
        raise ValueError(
            f"the model is changed by adapters, {named}; make a model of both by "
            "patchdiffusion merge, and push that"
        )
    source, run = model.folder, _run_of(model.folder)
    facts = read_json(source / CONFIG)
    for file in ("model.safetensors", *([_RAW] if raw else []), *_carried(facts)):
        if not (source / file).is_file():
            raise ValueError(f"{source} has no {file}, which cannot be pushed")
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(source / file, folder / file)
    digests = dict(facts["sha256"])
    for file in folder.rglob("*.json"):
        _clean(file)
        digests[file.relative_to(folder).as_posix()] = sha256(file)
    plain = {**_without_paths(unsealed(facts)), "sha256": digests}
    write_json(folder / CONFIG, sealed(plain))
    evaluation = evaluation_of(model, run)
    if evaluation is not None:
        evaluation = _without_paths(evaluation)
        write_json(folder / METRICS, evaluation)
    grid = _grid(run, folder / GRID)
    plain_config = replace(model.config, data=_without_paths(model.config.data))
    text = card(replace(model, config=plain_config), name, run, evaluation, grid=grid)
    write_bytes(folder / "README.md", text.encode("utf-8", "backslashreplace"))
    _refuse_secrets(folder)


def _run_of(folder: Path) -> Path:
    """Run of a model folder, or the folder itself."""
    return folder.parent if (folder.parent / "log.jsonl").exists() else folder


def _carried(facts: dict[str, Any]) -> Iterator[str]:
    """Files that a model needs beside its weights."""
    weights = ("model.safetensors", _RAW)
    return (name for name in facts["sha256"] if name not in weights)


def _grid(run: Path, target: Path) -> bool:
    """Write the last preview of a run, without the texts in the file; False if there is none."""
    pictures = sorted((run / "samples").glob("*.png"))
    if not pictures:
        return False
    with Image.open(pictures[-1]) as image:
        image.load()
        Image.frombytes(image.mode, image.size, image.tobytes()).save(target, "PNG")
    return True


def _clean(file: Path) -> None:
    """Cut paths in a file of JSON, whose seal is renewed."""
    facts = read_json(file)
    plain = _without_paths(facts)
    if plain != facts:
        is_sealed = isinstance(plain, dict) and plain.pop(SEAL, None) is not None
        write_json(file, sealed(plain) if is_sealed else plain)


def _without_paths(value: Any) -> Any:
    """JSON values with absolute paths cut to their last part."""
    if isinstance(value, dict):
        return {k: v if k in _NO_PATHS else _without_paths(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_paths(v) for v in value]
    if isinstance(value, str) and _PATH.fullmatch(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def _refuse_secrets(folder: Path) -> None:
    """Raise `ValueError` if a text holds what looks like a key to an account."""
    for file in folder.rglob("*"):
        if file.suffix in _TEXTS and (found := _SECRETS.search(file.read_text("utf-8", "replace"))):
            raise ValueError(
                f"{file.name} holds what looks like a secret, {found[0][:6]}...; nothing was pushed"
            )
