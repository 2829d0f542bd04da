"""Decode a data set once, into a pack that training reads."""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from patchdiffusion.data.columns import ColumnBase
from patchdiffusion.data.encode import encoded
from patchdiffusion.data.example import BadImage, Source
from patchdiffusion.data.frame import Fit, Plan, Replan
from patchdiffusion.data.latents import Latents
from patchdiffusion.data.mirror import measured, worth_mirroring
from patchdiffusion.data.options import (
    DataConfig,
    EncodeOptions,
    Options,
    SpaceName,
    check_options,
    count_workers,
)
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.plan import make_plan, windows_each
from patchdiffusion.data.ready import Ready, results
from patchdiffusion.data.report import Report, bad_lines, empty_classes, write_text
from patchdiffusion.data.rows import Rows, as_source
from patchdiffusion.data.source import Unlabeled, open_source
from patchdiffusion.data.split import MIN_IMAGES, division, repeats
from patchdiffusion.data.store import default_target, find_pack, make_room, shape_of, stamp_of
from patchdiffusion.data.stored import marked_used
from patchdiffusion.data.write import PackWriter, pack_writer
from patchdiffusion.encoders.autoencoder import Autoencoder, load_autoencoder
from patchdiffusion.system.device import pick_device
from patchdiffusion.system.files import expanded, folder_atomic, lock
from patchdiffusion.system.place import place
from patchdiffusion.system.progress import progress_bar
from patchdiffusion.system.text import counted

_PAIRS = 50
_BYTES_PER_IMAGE = 256  # names, labels and checksums, generously


def prepare(
    data: Source | Rows | Iterable[object] | Callable[[], Iterable[object]] | str | Path,
    out: str | Path | None = None,
    *,
    name: str = "images",
    classes: Sequence[str] = (),
    resolution: int | tuple[int, int] | None = None,
    channels: int | None = None,
    space: SpaceName = "auto",
    columns: Iterable[ColumnBase] = (),
    background: str | tuple[int, int, int] = "white",
    holdout: float = 0.05,
    max_bad: float | None = None,
    range: tuple[float, float] | None = None,
    fit: Fit = "crop",
    max_enlarge: float = 4.0,
    workers: int | None = None,
    progress: bool = True,
    verify: bool = False,
    autoencoder: str | Path | None = None,
    encoding: EncodeOptions | None = None,
) -> Pack:
    """Decode images into a pack at `out`, by default in `cache_dir()`, and open it.

    `data` is a path, an array, rows such as (image, label), a stream of them, or any other
    `Source`: see `open_source` and `as_source`, to which `name` and the names of the `classes` go.
    `resolution` is a side or (height, width); None is the common size up to 128, else the power
    of two below the median of the smaller side, at most 64. `channels` None is 1 if every image
    is gray, else 3; 4 keeps alpha. `space` "pixels" converts everything to 8 bits, "values" keeps
    16 bits and floats in their own units, and "auto" is "values" if most images are floats or wide
    integers and some of them cannot be pixels. `range` are the values that become 0 and 255,
    others are clipped; `fit` is "crop", "pad", "stretch" or "windows". `columns` are stored
    beside labels and captions, which are always stored if there are any. With an `autoencoder` (a
    run or model, a folder of diffusers, or a name on the hub) the pack holds its latents, by the
    options `encoding`; the pack of the pixels is in the cache. A fraction `holdout` of
    the images (at most 1,000) is held out from training, unless they are divided already. An
    existing pack of the same data and options is reused, with `verify` only if all of it is intact;
    another one at `out` is replaced. Images that cannot be used are listed in the report; raises
    `ValueError` if these are all images, or more than the fraction `max_bad` (0.1), and `OSError`
    if `out` cannot be written.
    """
    options = check_options(
        resolution,
        channels,
        space,
        columns,
        background,
        holdout,
        max_bad,
        range=range,
        fit=fit,
        max_enlarge=max_enlarge,
    )
    is_path = isinstance(data, str | Path)
    latents = None if autoencoder is None else _opened(autoencoder)
    source = open_source(data) if is_path else as_source(data, name, classes)
    workers = count_workers(workers, source)
    target = None if out is None else expanded(out)
    if latents is None:
        return _decoded(source, options, target, workers, max_bad, progress, verify)
    pack = _decoded(source, options, None, workers, max_bad, progress, verify)
    chosen = encoding or EncodeOptions()
    return encoded(pack, latents, chosen, target, progress=progress, verify=verify)


def _opened(autoencoder: str | Path) -> Autoencoder:
    return load_autoencoder(autoencoder, device=pick_device("auto"))


def _decoded(
    source: Source,
    options: Options,
    target: Path | None,
    workers: int,
    max_bad: float | None,
    progress: bool,
    verify: bool,
) -> Pack:
    """The pack of the images as such."""
    pack = find_pack(source, options, target, verify=verify)
    if pack is not None:
        return _accepted(pack, max_bad)
    if len(source) == 0:
        raise ValueError(f"{source.name} holds no images")
    with warnings.catch_warnings():
        # Pillow warns of odd metadata and of large images; the report is the place for that.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        plan = make_plan(source, options)
        target_folder = target or default_target(source, plan, options)
        bytes_each = math.prod(shape_of(plan)) * np.dtype(plan.dtype).itemsize + _BYTES_PER_IMAGE
        count = math.ceil(len(source) * windows_each(source, plan.frame))
        make_room(target_folder, count * bytes_each)
        guard = target_folder.with_name(target_folder.name + ".lock")
        waiting = print if progress else None
        with lock(guard, target_folder, patience=float("inf"), waiting=waiting):
            # By the process that was waited for.
            pack = find_pack(source, options, target, verify=verify)
            if pack is not None:
                return _accepted(pack, max_bad)
            while True:
                try:
                    return _make(source, plan, options, target_folder, workers, progress)
                except Replan as other:
                    plan = other.plan
                    target_folder = target or default_target(source, plan, options)


def prepare_data(data: DataConfig) -> Pack:
    """Prepare the images of a configuration, or open the pack that was prepared before.

    A pack is used as it is, unless another resolution or number of channels is asked for. With an
    autoencoder the result are latents, also of mirrored images if `data.flip` asks for these, or
    if the default recipe would.
    """
    source = open_source(data.path, data.labels, data.fields)
    images = source.source if isinstance(source, Unlabeled) else source
    if isinstance(images, Pack) and isinstance(images.space, Latents):
        return _latents_of(images, images.space, data)
    if data.autoencoder is None:
        if data.encoding(mirrored=False) != EncodeOptions():
            raise ValueError(
                f"data.variants is {data.variants} and data.statistics {data.statistics}, which "
                "are of latents; name an --autoencoder"
            )
        return _prepared(source, data)
    autoencoder = _opened(data.autoencoder)
    pack = _prepared(source, data)
    options = data.encoding(mirrored=data.flip or worth_mirroring(pack))
    return encoded(pack, autoencoder, options, progress=place().is_main)


def _latents_of(pack: Pack, space: Latents, data: DataConfig) -> Pack:
    """A pack of latents, if it is what is asked for; else `ValueError`."""
    plain = DataConfig(path=data.path)
    allowed: dict[str, tuple[object, ...]] = {
        "resolution": (space.size, *(space.size[:1] if len(set(space.size)) == 1 else ())),
        "channels": (space.planes,),
        "variants": (space.variants,),
        "statistics": ("channel" if space.shape[1:] == (1, 1) else "position",),
        "space": ("pixels",),
        "columns": (),
        "range": (),
        "fields": (),
    }
    for name, values in allowed.items():
        if (value := getattr(data, name)) not in (getattr(plain, name), *values):
            raise ValueError(
                f"data.{name} is {value}, and {data.path} holds latents that are used as they are; "
                f"leave out --data.{name}, or give the images themselves"
            )
    if data.labels == "off":
        raise ValueError(
            f"{data.path} holds latents with the labels that they have; leave out --data.labels, "
            "and set --network.num-classes 0"
        )
    if (
        data.autoencoder is not None
        and (digest := _opened(data.autoencoder).digest) != space.digest
    ):
        raise ValueError(
            f"{data.path} holds latents of the autoencoder {space.digest}, and {data.autoencoder} "
            f"has the weights {digest}; leave --autoencoder out, or give the images themselves"
        )
    return marked_used(pack)


def _prepared(source: Source, data: DataConfig) -> Pack:
    """The pack of the images as such, or a pack that is used as it is."""
    if isinstance(source, Pack):
        _, *size, channels = source.pictures.shape
        sizes = (None, tuple(size), *(size[:1] if len(set(size)) == 1 else ()))
        fits = data.resolution in sizes and data.channels in (None, channels)
        fits = fits and data.range is None
        columns = {filled.column for filled in source.columns}
        spaces = ("auto", source.space.pictured.word)
        if fits and columns.issuperset(data.columns) and data.space in spaces:
            return marked_used(source)
    return prepare(
        source,
        resolution=data.resolution,
        channels=data.channels,
        space=data.space,
        columns=data.columns,
        range=data.range,
        fit=data.fit,
        max_enlarge=data.max_enlarge,
        progress=place().is_main,
    )


def _writer(
    folder: Path, plan: Plan, columns: Sequence[ColumnBase]
) -> AbstractContextManager[PackWriter]:
    return pack_writer(folder, shape_of(plan), plan.dtype, columns, alpha=plan.alpha)


def _make(
    source: Source,
    plan: Plan,
    options: Options,
    target: Path,
    workers: int,
    progress: bool,
) -> Pack:
    report = Report(ignored=dict(getattr(source, "ignored", {})))
    report.notes = [*plan.notes, *getattr(source, "notes", ())]
    complaints = target.with_name(target.name + ".bad.txt")
    bar = progress_bar(len(source), "image", name=source.name, disable=not progress)
    with bar, folder_atomic(target) as folder:
        given: list[bool | None] = []
        with _writer(folder, plan, options.columns) as writer:
            for several in results(source, plan, options.columns, workers):
                bar.update()
                report.count_file(sum(isinstance(r, BadImage) or r.first for r in several))
                for result in several:
                    if isinstance(result, BadImage):
                        report.bad.append((result.key, result.reason))
                    elif why := writer.misfit(result.values):
                        report.bad += [(result.picture, why)] * result.first
                    else:
                        _count(report, result)
                        given.append(result.held_out)
                        writer.add(result.fitted.image, result.values, result.key, result.group)
        if error := _too_many(report.bad, report.total, options.max_bad, complaints, source.name):
            write_text(complaints, "\n".join(bad_lines(report.bad)) + "\n")
            raise ValueError(error)
        digests = np.array(writer.digests, dtype=np.uint64)
        groups = np.array(writer.groups, dtype=np.uint64)
        held, copies = division(digests, groups, options.holdout, given)
        if copies:
            report.warnings.append(
                counted(copies, "image to be held out repeats", "images to be held out repeat")
                + " images of training: trained on instead"
            )
        if options.holdout and not len(held) and len(digests) >= MIN_IMAGES:
            report.notes.append(
                "no image is held out: copies, and pages or windows of one file, stay together, "
                "and are more than the share"
            )
        info = writer.finish(
            name=source.name,
            classes=tuple(source.classes),
            heldout=held,
            stamp=stamp_of(source),
            options=options.identity(),
        )
        report.columns = {c.column.name: c.count for c in writer.columns if c.count}
        report.notes += report.findings.notes()
        report.notes[:0] = report.counts(plan.frame.fit)
        report.warnings += report.findings.warnings(writer.levels)
        made = Pack.open(folder)
        report.warnings += empty_classes(made)
        report.mirror = measured(made)._asdict()
        later, earlier = repeats(digests)
        report.duplicates = len(later)
        report.duplicate_pairs = _names(folder / "keys.jsonl", later[:_PAIRS], earlier[:_PAIRS])
        report.write(folder, info)
    complaints.unlink(missing_ok=True)
    return marked_used(Pack.open(target))


def _count(report: Report, result: Ready) -> None:
    report.windows += 1
    if result.first:
        report.sizes[result.fitted.size] += 1
        report.findings.add(result.fitted, result.mode)
        report.left_out += [(result.picture, why) for why in result.complaints]


def _accepted(pack: Pack, max_bad: float | None) -> Pack:
    """An existing pack, marked as used; a limit of unusable images holds for it if it is given."""
    if max_bad is not None:
        report, listed = pack.report, pack.path / "report.txt"
        bad = [(str(entry["key"]), str(entry["reason"])) for entry in report.get("bad", ())]
        if error := _too_many(bad, report.get("given", 0), max_bad, listed, pack.info.name):
            raise ValueError(error)
    return marked_used(pack)


def _too_many(
    bad: Sequence[tuple[str, str]], total: int, max_bad: float, listed: Path, name: str
) -> str:
    """Error message if too many images are unusable, else ""; `listed` is the file of all."""
    if not bad or (len(bad) < total and len(bad) <= max_bad * total):
        return ""
    key, reason = bad[0]
    return (
        f"{len(bad)} of {counted(total, 'image')} of {name} cannot be used (allowed are "
        f"{max_bad:.0%}); the first is {key}: {reason}; the list is in {listed}; "
        "patchdiffusion prepare --max-bad allows more"
    )


def _names(keys: Path, later: np.ndarray, earlier: np.ndarray) -> list[tuple[str, str]]:
    numbers = {int(i) for i in (*later, *earlier)}
    with open(keys, encoding="ascii") as lines:
        names = {i: str(json.loads(line)[0]) for i, line in enumerate(lines) if i in numbers}
    return [(names[int(a)], names[int(b)]) for a, b in zip(later, earlier, strict=True)]
