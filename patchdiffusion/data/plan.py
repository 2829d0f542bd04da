"""Plan of a pack: space, size, channels and type, inferred from a sample of the images."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median

import numpy as np

from patchdiffusion.data.example import BadImage, Example, Source
from patchdiffusion.data.frame import (
    MAX_SIDE,
    MIN_SIDE,
    Frame,
    Plan,
    Size,
    Sizes,
    size_text,
    usable,
    with_channels,
)
from patchdiffusion.data.options import Options
from patchdiffusion.data.pixels import WHITE, PixelPlan, fit, is_gray, is_picture, to_uint8
from patchdiffusion.data.values import FLOAT, WHOLE, ValuePlan, to_values

_PROBED = 256
_PROBED_FOR_SPACE = 16


def make_plan(source: Source, options: Options) -> Plan:
    """Plan for the options; up to 256 images, evenly spaced, decide what these leave open.

    Raises `ValueError` for a resolution that would enlarge most of them absurdly.
    """
    _refuse_enlarging(source, options)
    if options.space == "values":
        return _value_plan(source, options, ())
    if options.space == "pixels" or options.range is not None:
        return _pixel_plan(source, options)
    probed = list(_probed(source, _PROBED_FOR_SPACE))
    kinds = [_kind(example) for example in probed]
    if 2 * sum(kind != "short" for kind in kinds) <= len(kinds):
        return _pixel_plan(source, options)
    note = "values in units of their own: not all of them fit into pixels"
    if all(_of_8_bits(example.image) for example in probed):
        note += "; all seen are whole numbers up to 255: --data.range 0 255 makes pixels of them"
    values = _value_plan(source, options, (note,))
    if "beyond" in kinds:
        return values
    return replace(_pixel_plan(source, options), otherwise=values)


def _refuse_enlarging(source: Source, options: Options) -> None:
    if options.resolution is None:
        return
    frame = Frame(options.resolution, options.fit)
    sizes = [i.shape[-3:-1] for i in _images(source, with_channels, _PROBED_FOR_SPACE)]
    factors = [frame.enlarges(width, height) for height, width in sizes]
    if factors and median(factors) > options.max_enlarge:
        height, width = sizes[len(sizes) // 2]
        fit = min(max(MIN_SIDE, int(median(min(size) for size in sizes))), MAX_SIDE)
        raise ValueError(
            f"resolution {size_text(options.resolution)} would enlarge the images of {source.name} "
            f"{median(factors):.3g} times, such as one of {width}x{height}; allowed are "
            f"{options.max_enlarge:g} times: use --data.resolution {fit}, or --data.max-enlarge"
        )


def _kind(example: Example) -> str:
    """Kind of values: short and long ones can be pixels, those beyond and useless ones cannot."""
    image = example.image
    if image.dtype in (np.bool_, np.uint8):
        return "short"
    if image.dtype == np.uint16:  # bands are measurements, and gray and color pictures
        planes = image.shape[-1] if image.ndim > 2 else 1
        return "short" if is_picture(planes, example.alpha) else "beyond"
    try:
        to_values(example)
    except BadImage:
        return "useless"
    try:
        to_uint8(example)
    except BadImage:
        return "beyond"
    return "long"


def _of_8_bits(image: np.ndarray) -> bool:
    """True if the values are those of 8-bit pixels, whatever their type."""
    if image.dtype == np.uint8:
        return True
    rounded = np.rint(image) if image.dtype.kind == "f" else image
    return bool((rounded == image).all() and image.min() >= 0 and image.max() <= 255)


def _value_plan(source: Source, options: Options, notes: tuple[str, ...]) -> ValuePlan:
    sizes, channels, types = Sizes(), [], set()
    for image in _images(source, to_values):
        sizes.probed.append(image.shape[:-1])
        channels.append(image.shape[-1])
        types.add(image.dtype.name)
    if options.resolution is None:
        size, why = sizes.infer()
        notes = (*notes, why)
    else:
        size = sizes.with_frames(options.resolution)
    planes = options.channels or max(channels, key=channels.count, default=1)
    frame = Frame(size, options.fit)
    return ValuePlan(frame, planes, FLOAT if FLOAT in types else WHOLE, notes)


def _pixel_plan(source: Source, options: Options) -> PixelPlan:
    size, channels = options.resolution, options.channels
    sizes, gray = Sizes(), True
    kinds: Counter[tuple[int, bool]] = Counter()
    """Counts by number of bands, 1 for all pictures, and alpha."""
    most = _PROBED if size is None or channels is None else _PROBED_FOR_SPACE
    for example in _probed(source, most):
        try:
            image = usable(example.key, to_uint8(_ranged(example, options), clip=True))
        except BadImage:
            continue
        planes = image.shape[-1]
        picture = is_picture(planes, example.alpha)
        kinds[1 if picture else planes, example.alpha] += 1
        sizes.probed.append(image.shape[:-1])
        if gray and channels is None and picture and planes > 1:
            gray = all(_small_gray(part, example.alpha) for part in _parts(image))
        if size is not None and not gray and kinds.total() >= _PROBED_FOR_SPACE:
            break
    notes: tuple[str, ...] = ()
    if size is None:
        size, why = sizes.infer()
        notes = (why,)
    else:
        size = sizes.with_frames(size)
    plan = PixelPlan(Frame(size, options.fit), 1, options.background, range=options.range)
    counts: Counter[int] = Counter()
    for (planes, _), count in kinds.items():
        counts[planes] += count
    bands = counts.most_common(1)[0][0] if counts else 1
    if channels is not None:
        alpha = channels == 4 and bands == 1
        return replace(plan, channels=channels, alpha=alpha, notes=notes)
    if bands != 1:
        return replace(plan, channels=bands, notes=notes)
    return replace(plan, channels=1 if gray else 3, refuse_color=gray, notes=notes)


def _ranged(example: Example, options: Options) -> Example:
    return example if options.range is None else replace(example, span=options.range)


def _parts(image: np.ndarray) -> np.ndarray:
    return image.reshape(-1, *image.shape[-3:])


def _small_gray(part: np.ndarray, alpha: bool) -> bool:
    """True if an image is gray, judged at a small size on white."""
    small = Frame((min(part.shape[0], 64), min(part.shape[1], 64)))
    return is_gray(fit(part, small, 3, WHITE, alpha=alpha))


def windows_each(source: Source, frame: Frame) -> float:
    """Number of windows of an image, the mean of some of them."""
    if frame.fit != "windows":
        return 1.0
    counts = []
    for image in _images(source, with_channels, _PROBED_FOR_SPACE):
        height, width = image.shape[-3:-1]
        with contextlib.suppress(BadImage):  # a strip that is refused
            counts.append(len(frame.windows("", width, height)))
    return sum(counts) / max(len(counts), 1)


def common_size(source: Source) -> Size | None:
    """Common height and width of up to 256 images, or None if they differ."""
    sizes = {image.shape[:-1] for image in _images(source, with_channels)}
    return sizes.pop() if len(sizes) == 1 else None


def _images(
    source: Source, read: Callable[[Example], np.ndarray], most: int = _PROBED
) -> Iterator[np.ndarray]:
    for example in _probed(source, most):
        try:
            yield usable(example.key, read(example))
        except BadImage:
            continue


def _probed(source: Source, most: int) -> Iterator[Example]:
    count = len(source)
    indices = range(count) if count <= most else np.linspace(0, count - 1, most).astype(int)
    for index in indices:
        try:
            yield source[int(index)]
        except BadImage:
            continue
