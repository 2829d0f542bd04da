"""Labels, splits and captions of images: from tables beside them, labels else from their folders.

Folders called train and val or test are splits, and the folders below them classes. Folders whose
names look like dates, numbered parts or cameras are classes only if `source` is "folders".
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Literal

from patchdiffusion.data.example import MAX_LABEL
from patchdiffusion.data.splits import HELD_OUT, TEST, TRAIN, are_splits, domain_of, split_of
from patchdiffusion.data.tables import LABEL_FILE, Cell, Names, Table, read_table
from patchdiffusion.system.text import counted, printable, same_form, share

LabelSource = Literal["auto", "folders", "off"]

_NAMED = 6  # classes, or folders, that a line names


@dataclass(frozen=True)
class Labels:
    """Label and split of each image, class names, and lines for the report."""

    labels: tuple[int | None, ...] | None = None
    classes: tuple[str, ...] = ()
    splits: tuple[str, ...] | None = None
    """train, val or test; None without splits."""
    notes: tuple[str, ...] = ()
    used: frozenset[str] = frozenset()
    """Names of the tables that are used for labels."""
    captions: Mapping[str, str] = field(default_factory=dict)
    """Captions of images in the tables."""
    captioned: frozenset[str] = frozenset()
    """Names of the tables that are used for captions."""


def natural(text: str) -> tuple[list[str | tuple[int, str]], str]:
    """A sort key by which img2 comes before img10, the same in any locale."""
    parts = re.split("([0-9]+)", text.casefold())
    return [_number(part) if i % 2 else part for i, part in enumerate(parts)], text


def _number(digits: str) -> tuple[int, str]:
    """Sort key of a whole number of any length."""
    short = digits.lstrip("0")
    return len(short), short


def some(names: Sequence[str]) -> str:
    """Text that lists a few of the names."""
    listed = ", ".join(printable(name) for name in names[:_NAMED])
    return f"{listed}, ..." if len(names) > _NAMED else listed


# ---- Folders ----


def folder_labels(keys: Sequence[str], source: LabelSource = "auto") -> Labels:
    """Labels by the first folder that differs, if every image lies in such a folder.

    With splits, the classes are those of the training images. `source` "folders" takes folders of
    any name as classes, and ignores splits.
    """
    folders = [same_form(key).split("/")[:-1] for key in keys]
    splits, note = (None, ()) if source == "folders" else _take_splits(folders)
    labeled = Labels() if source == "off" else _by_folder(folders, keys, splits, source)
    return replace(labeled, splits=splits, notes=(*note, *labeled.notes))


def _take_splits(folders: list[list[str]]) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Split of each image by a folder train, val or test, which is removed from its path."""
    start = _common(folders)
    for depth in (start, start + 1):
        names = sorted({parts[depth] for parts in folders if len(parts) > depth})
        if are_splits(names):
            break
    else:
        return None, ()
    strange: Counter[str] = Counter()
    splits: list[str] = []
    for parts in folders:
        name = parts.pop(depth) if len(parts) > depth else "no folder"
        if domain := domain_of(name):
            parts.insert(depth, domain)
        splits.append(split_of(name) or TRAIN)
        strange[name] += split_of(name) is None
    others = [name for name, count in strange.items() if count]
    rest = f"; {some(others)} counts as train" if others else ""
    return tuple(splits), (f"splits: the folders {some(names)} divide the images{rest}",)


def _common(folders: Sequence[list[str]]) -> int:
    """Number of outer folders that all images have in common."""
    levels = zip(*folders, strict=False)
    return sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))


def _by_folder(
    folders: Sequence[list[str]],
    keys: Sequence[str],
    splits: Sequence[str] | None,
    source: LabelSource,
) -> Labels:
    training = [parts for i, parts in enumerate(folders) if splits is None or splits[i] == TRAIN]
    depth = _common(training)
    loose = sum(len(parts) == depth for parts in training)
    if loose:
        images = share(loose, len(training), "image", "lies", "lie")
        mixed = f"no labels: {images} outside of the sub-folders"
        return Labels(notes=(mixed,) if loose < len(training) else ())
    classes = tuple(sorted({parts[depth] for parts in training}, key=natural))
    above = training[0][depth - 1] if depth else ""
    if source == "auto" and (kind := _no_classes(classes, above, keys)):
        look = f"no labels: the folders {some(classes)} look like {kind}"
        return Labels(notes=(f"{look}; --data.labels folders makes them classes",))
    index = {name: i for i, name in enumerate(classes)}
    heads = [parts[depth] if len(parts) > depth else "" for parts in folders]
    return Labels(tuple(index.get(head) for head in heads), classes)


_YEAR = r"(19|20)\d\d"
_DATE = rf"(photos from )?{_YEAR}([-_. ]?(0[1-9]|1[0-2])([-_. ]?\d\d)?([-_ .,].*)?)?"
_PART = (
    r"(train(ing)?|shards?|parts?|chunks?|batch(es)?|subsets?|archives?|volumes?|vol|disks?|folders?|dirs?|"
    r"img|imgs|images?|data|set)[-_. ]?\d+"
)
_CAMERA = r"\d{3}[a-z0-9_]{5}"


def _no_classes(names: Sequence[str], above: str, keys: Sequence[str]) -> str:
    """Kind of folders whose names are no classes (dates, parts, cameras), else ""."""
    low = [name.casefold() for name in names]

    def all_are(pattern: str) -> bool:
        return all(re.fullmatch(pattern, name) for name in low)

    if all_are(_DATE) or (re.fullmatch(_YEAR, above) and all_are(r"(0?[1-9]|1[0-2])([-_ ].*)?")):
        return "dates"
    if all_are(_PART) and len({re.sub(r"\d", "", name) for name in low}) == 1:
        return "parts of one set"
    if all_are(r"\d{5,}") and len({len(name) for name in low}) == 1:
        files = [key.rpartition("/")[2] for key in keys]  # numbered through, in shards
        return "parts of one set" if len(set(files)) == len(files) else ""
    camera = all_are(_CAMERA) and any(c.isalpha() for name in low for c in name)
    return "folders of a camera" if camera else ""


# ---- Tables ----


def find_labels(
    keys: Sequence[str],
    tables: Sequence[str],
    read: Callable[[str], bytes],
    source: LabelSource = "auto",
    members: Table | None = None,
) -> Labels:
    """Labels, splits and captions of images, from the tables that name them; or from their folders.

    `members` is a table that was read already. Raises `ValueError` for a `dataset.json` at the top
    that is of another form or misses images.
    """
    readable, notes = _readable(keys, tables, read, strict=source == "auto")
    if members is not None:
        readable.insert(0, members)
    captions: dict[str, str] = {}
    for table in reversed(readable):  # the first counts
        captions |= table.captions
    captioned = frozenset(table.name for table in readable if table.captions)
    if source != "auto":
        labeled = folder_labels(keys, source)
    else:
        labeled = _labeled(keys, readable)
        labeled = replace(labeled, notes=(*notes, *labeled.notes))
    return replace(labeled, captions=captions, captioned=captioned)


def _readable(
    keys: Sequence[str], tables: Sequence[str], read: Callable[[str], bytes], *, strict: bool
) -> tuple[list[Table], list[str]]:
    """Tables that name images, and notes about those that cannot be read."""
    names, readable, notes = Names(keys), [], []
    for name in sorted(tables, key=lambda name: (not name.endswith(LABEL_FILE), name)):
        try:
            table = read_table(name, read, names)
        except ValueError as error:
            if name == LABEL_FILE and strict:
                raise
            notes.append(f"{error}; it is ignored")
            continue
        if table is not None:
            readable.append(table)
    return readable, notes


def _labeled(keys: Sequence[str], readable: Sequence[Table]) -> Labels:
    """Labels and splits by tables, else by folders."""
    notes: list[str] = []
    by_folder = folder_labels(keys)
    exact = [table for table in readable if table.exact]
    for table in exact:
        _refuse_gaps(table, keys)
    chosen = exact or [table for table in readable if table.labels and table.column is not None]
    labeled = _by_tables(chosen, keys)
    if labeled is None:
        notes += [_unused(table) for table in readable if not table.captions]
        labeled = by_folder
    else:
        splits = [note for note in by_folder.notes if note.startswith("splits")]
        labeled = replace(labeled, splits=by_folder.splits, notes=(*splits, *labeled.notes))
    if rows := {key: kind for table in readable for key, kind in table.splits.items()}:
        splits = tuple(rows.get(key, TRAIN) for key in keys)
        if TRAIN in splits and {HELD_OUT, TEST} & set(splits):
            where = ", ".join(printable(table.name) for table in readable if table.splits)
            labeled = replace(
                labeled, splits=splits, notes=(*labeled.notes, f"splits: those of {where}")
            )
    return replace(labeled, notes=(*notes, *labeled.notes))


def _refuse_gaps(table: Table, keys: Sequence[str]) -> None:
    """Raise `ValueError` if a `dataset.json` with labels lacks images of its folder."""
    folder = table.name.rpartition("/")[0]
    below = [key for key in keys if not folder or key.startswith(f"{folder}/")]
    missing = [key for key in below if key not in table.labels]
    if missing and (table.labels or table.unknown):
        raise ValueError(
            f"{printable(table.name)} gives no label for {len(missing)} of "
            f"{counted(len(below), 'image')}, "
            f"the first is {missing[0]!r}; use --data.labels off to ignore labels"
        )


def _by_tables(tables: Sequence[Table], keys: Sequence[str]) -> Labels | None:
    """Labels from tables, or None if too few images have one."""
    if not tables:
        return None
    cells: dict[str, Cell] = {}
    for table in reversed(tables):  # the first counts
        cells |= table.labels
    labeled_cells = {key: cell for key, cell in cells.items() if cell is not None}
    exact = tables[0].exact
    if not exact and 2 * len(labeled_cells) < len(keys):
        return None
    where = ", ".join(printable(table.name) for table in tables)
    used = frozenset(table.name for table in tables)
    if not labeled_cells:
        return Labels(notes=(f"no labels: {where} gives none",), used=used)
    cells_used = [labeled_cells[key] for key in keys if key in labeled_cells]
    classes, number = classes_of(set(cells_used), len(cells_used), tables[0])
    if classes is None:
        return None
    labels = tuple(
        number[cell] if (cell := labeled_cells.get(key)) is not None else None for key in keys
    )
    notes = [f"labels: those of {where}"]
    if not exact and tables[0].column is not None:
        notes = [f"labels: column {printable(tables[0].column)} of {where}"]
    if len(labeled_cells) < len(keys):
        without = len(keys) - len(labeled_cells)
        notes.append(f"{share(without, len(keys), 'image', 'has', 'have')} no label there")
    for table in tables:
        if table.unknown:
            count, first = len(table.unknown), table.unknown[0]
            missing = counted(count, "image that does", "images that do")
            notes.append(
                f"{printable(table.name)} names {missing} not exist, the first is {first!r}"
            )
    return Labels(labels, classes, None, tuple(notes), used)


def classes_of(
    distinct: set[Cell], count: int, table: Table
) -> tuple[tuple[str, ...] | None, dict[Cell, int]]:
    """Class names and the index of each label, or None if the labels cannot be classes.

    `count` is the number of images that have one. Numbers are class indices, in tables other than
    `dataset.json` only if they leave few gaps.
    """
    exact = table.exact
    if not table.named and len(distinct) == count:  # names or numbers of images
        return None, {}
    if all(isinstance(c, int) or re.fullmatch(r"\d{1,9}(\.0+)?", str(c)) for c in distinct):
        numbers: dict[Cell, int] = {
            c: int(str(c).partition(".")[0]) for c in distinct if c is not None
        }
        largest = max(numbers.values())
        if exact and largest > MAX_LABEL:
            raise ValueError(f"{LABEL_FILE} has the label {largest} > {MAX_LABEL}")
        if exact or 0 <= min(numbers.values()) <= largest <= 2 * len(distinct) + 8:
            return tuple(str(i) for i in range(largest + 1)), numbers
    texts = {c: str(c) for c in distinct}
    measured = all(re.fullmatch(r"-?\d*\.\d+(e[-+]?\d+)?", t.lower()) for t in texts.values())
    many = len(distinct) > 20 and 2 * len(distinct) > count
    if not exact and (measured or many):
        return None, {}
    classes = tuple(sorted(set(texts.values()), key=natural))
    index = {name: i for i, name in enumerate(classes)}
    return classes, {c: index[text] for c, text in texts.items()}


def _unused(table: Table) -> str:
    """Reason why a table that names images gives no labels."""
    name = printable(table.name)
    if table.column is None:
        return f"{name} names images, but none of its columns is called label or class"
    return f"{name} names images, but its column {printable(table.column)} is not used for labels"
