"""Lines of `train` and `doctor` about the data: images, classes, refused files, warnings."""

from collections.abc import Iterator

from patchdiffusion.data.pack import Pack
from patchdiffusion.data.space import shown
from patchdiffusion.data.store import kept_aside
from patchdiffusion.patches import size_name
from patchdiffusion.system.text import counted, printable

FEW = 1000
"""Number of training images below which a model is likely to copy them."""

_CLASSES = 8  # that are named
_NOTES = 8
_INDENT = " " * 10


def data_lines(pack: Pack, *, labels: bool = True) -> Iterator[str]:
    """Lines about the images of a pack, its classes, refused and ignored files, and warnings.

    `labels` is False if they are not used.
    """
    size = size_name(tuple(pack.pictures.shape[1:-1]))
    classes = _classes(pack) if labels else ""
    yield (
        f"data      {printable(pack.name)}: {counted(len(pack.train), 'image')} of {size}"
        f"{_channels(pack)}"
        f"{classes}, {len(pack.heldout):,} held out; pack {_place(pack)}"
    )
    report, where = pack.report, pack.path / "report.txt"
    notes = [str(note) for note in report.get("notes", ())]
    yield from (_INDENT + printable(note) for note in notes[:_NOTES])
    if len(notes) > _NOTES:
        more = counted(len(notes) - _NOTES, "more line", "more lines")
        yield f"{_INDENT}{more} of this kind in {where}"
    if bad := len(report.get("bad", ())):
        total = report.get("given", bad)
        first = report["bad"][0]
        text = printable(f"{first['key']}: {first['reason']}")
        listed = "patchdiffusion prepare lists them" if kept_aside(pack) else f"all in {where}"
        yield f"{_INDENT}refused {bad} of {counted(total, 'image')}, first {text}; {listed}"
    if ignored := report.get("ignored"):
        kinds = ", ".join(f"{kind} {count}" for kind, count in ignored.items())
        yield f"{_INDENT}ignored: {printable(kinds)}"
    for warning in report.get("warnings", ()):
        yield f"warning: {printable(str(warning))}"
    if len(pack.train) < FEW:
        images = counted(len(pack.train), "image is", "images are")
        yield f"warning: {images} few; expect copies of them"


def _place(pack: Pack) -> str:
    return "is not kept" if kept_aside(pack) else str(pack.path)


def _channels(pack: Pack) -> str:
    channels = pack.pictures.shape[-1]
    count = shown(channels, alpha=pack.space.alpha)
    if channels == count:
        return " with alpha" if channels == 4 else ""
    first = "the first is" if count == 1 else f"the first {count} are"
    return f" with {channels} channels ({first} shown in pictures)"


def _classes(pack: Pack) -> str:
    names, counts = pack.classes, pack.trained_counts
    if not names:
        return ""
    listed = [f"{printable(name)} {n}" for name, n in zip(names, counts, strict=True) if n]
    more = ", ..." if len(listed) > _CLASSES else ""
    return f", {counted(len(listed), 'class', 'classes')} ({', '.join(listed[:_CLASSES])}{more})"
