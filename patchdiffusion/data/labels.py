"""Class labels of image files, from their folders or from a `dataset.json` as EDM writes it."""

import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from patchdiffusion.data.example import MAX_LABEL
from patchdiffusion.system.files import parse_json

LABEL_FILE = "dataset.json"

Labels = tuple[tuple[int, ...] | None, tuple[str, ...], tuple[str, ...]]
"""Label of each image or None, class names, lines for the report."""


def natural(text: str) -> tuple[list[str | int], str]:
    """A sort key by which img2 comes before img10, the same in any locale."""
    parts = re.split("([0-9]+)", text.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], text


def folder_labels(keys: tuple[str, ...]) -> Labels:
    """Labels by the first folder that differs, if every image lies in such a folder."""
    folders = [key.split("/")[:-1] for key in keys]
    levels = zip(*folders, strict=False)
    depth = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    loose = sum(len(parts) == depth for parts in folders)
    if loose:
        mixed = f"no labels: {loose} of {len(keys)} images lie outside of the sub-folders"
        return None, (), (mixed,) if loose < len(keys) else ()
    heads = [parts[depth] for parts in folders]
    classes = tuple(sorted(set(heads), key=natural))
    index = {head: i for i, head in enumerate(classes)}
    return tuple(index[head] for head in heads), classes, ()


def _pairs(path: Path, content: bytes) -> Iterator[tuple[str, int]]:
    rule = '{"labels": [["name.png", 3], ...]} or {"labels": null}'
    try:
        rows = parse_json(content)["labels"] or []
        for key, label in rows:
            if not isinstance(key, str):
                raise TypeError(f"{key!r} is not the name of an image")
            if isinstance(label, bool) or not isinstance(label, int) or label < 0:
                raise ValueError(f"the label of {key!r} is {label!r}, not an integer from 0")
            yield key, label
    except (ValueError, TypeError, KeyError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{LABEL_FILE} of {path} is not of the form {rule} ({problem})") from error


def edm_labels(path: Path, content: bytes, keys: tuple[str, ...]) -> Labels:
    """Labels of a `dataset.json`; raises `ValueError` for another form or an unlabeled image."""
    table = dict(_pairs(path, content))
    if not table:
        return None, (), ()
    missing = [key for key in keys if key not in table]
    if missing:
        raise ValueError(
            f"{LABEL_FILE} of {path} gives no label for {len(missing)} of {len(keys)} images, "
            f"the first is {missing[0]!r}"
        )
    labels = tuple(table[key] for key in keys)
    if max(labels) > MAX_LABEL:
        raise ValueError(f"{LABEL_FILE} of {path} has the label {max(labels)} > {MAX_LABEL}")
    classes = tuple(str(i) for i in range(max(labels) + 1))
    absent = sorted(table.keys() - set(keys))
    if not absent:
        return labels, classes, ()
    missing = f"{len(absent)} images that do not exist, the first is {absent[0]!r}"
    return labels, classes, (f"{LABEL_FILE} names {missing}",)
