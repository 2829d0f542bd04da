"""Plan of a pack: space, size, channels and type, inferred from a sample of the images."""

from collections.abc import Callable, Iterator

import numpy as np

from patchdiffusion.data.example import BadImage, Example, Source
from patchdiffusion.data.frame import Plan, Size, Sizes, usable, with_channels
from patchdiffusion.data.options import Options
from patchdiffusion.data.pixels import PixelPlan, fit, is_gray, to_uint8
from patchdiffusion.data.values import FLOAT, WHOLE, ValuePlan, to_values

_PROBED = 256
_PROBED_FOR_SPACE = 16
_LARGE = 5 * 10**8  # bytes of a pack
_MAGNIFIED = 4  # times the side of an image


def make_plan(source: Source, options: Options) -> Plan:
    """Plan for the options; up to 256 images, evenly spaced, decide what these leave open."""
    if options.space == "values":
        return _value_plan(source, options, ())
    if options.space == "auto" and _are_measured(source):
        note = "values in units of their own: not all of them fit into pixels"
        return _value_plan(source, options, (note,))
    return _pixel_plan(source, options)


def _are_measured(source: Source) -> bool:
    """Whether most images are floats or long integers, and some of them cannot be pixels."""
    kinds = [_kind(example) for example in _probed(source, _PROBED_FOR_SPACE)]
    return 2 * sum(kind != "short" for kind in kinds) > len(kinds) and "beyond" in kinds


def _kind(example: Example) -> str:
    if example.image.dtype in (np.bool_, np.uint8, np.uint16):
        return "short"
    try:
        to_values(example)
    except BadImage:
        return "useless"
    try:
        to_uint8(example)
    except BadImage:
        return "beyond"
    return "long"


def _value_plan(source: Source, options: Options, notes: tuple[str, ...]) -> ValuePlan:
    sizes, channels, types = Sizes(), [], set()
    for image in _images(source, to_values):
        sizes.probed.append(image.shape[:-1])
        channels.append(image.shape[-1])
        types.add(image.dtype.name)
    size, why = sizes.infer() if options.resolution is None else (options.resolution, None)
    notes = notes if why is None else (*notes, why)
    planes = options.channels or max(channels, key=channels.count, default=1)
    return ValuePlan(size, planes, FLOAT if FLOAT in types else WHOLE, notes)


def _pixel_plan(source: Source, options: Options) -> PixelPlan:
    size, channels = options.resolution, options.channels
    if size is not None and channels is not None:
        return PixelPlan(size, channels, options.background)
    sizes = Sizes()
    gray = True
    planes = 1
    for image in _images(source, to_uint8):
        if size is not None and sizes.probed and not gray:
            break
        sizes.probed.append(image.shape[:-1])
        planes = image.shape[-1]
        if gray and channels is None and planes in (3, 4):
            gray = all(map(_small_gray(options), image.reshape(-1, *image.shape[-3:])))
    notes: tuple[str, ...] = ()
    if size is None:
        size, why = sizes.infer()
        notes = (why,)
    if channels is not None:
        return PixelPlan(size, channels, options.background, notes=notes)
    if planes not in (1, 3, 4):
        return PixelPlan(size, planes, options.background, notes=notes)
    return PixelPlan(size, 1 if gray else 3, options.background, refuse_color=gray, notes=notes)


def _small_gray(options: Options) -> Callable[[np.ndarray], bool]:
    def judge(frame: np.ndarray) -> bool:
        small = (min(frame.shape[0], 64), min(frame.shape[1], 64))
        return is_gray(fit(frame, small, 3, options.background)[0])

    return judge


def common_size(source: Source) -> Size | None:
    """Common height and width of up to 256 images, or None if they differ."""
    sizes = {image.shape[:-1] for image in _images(source, with_channels)}
    return sizes.pop() if len(sizes) == 1 else None


def refuse_enlargement(source: Source, size: Size, needed: int) -> None:
    """Raise `ValueError` for a large pack of images that are enlarged several times."""
    if needed < _LARGE:
        return
    sides = sorted(min(image.shape[-3:-1]) for image in _images(source, with_channels))
    wanted = min(size[-2:])
    usual = sides[len(sides) // 2] if sides else wanted
    if wanted >= _MAGNIFIED * usual:
        raise ValueError(
            f"resolution {wanted} would enlarge images of about {usual} pixels "
            f"{wanted / usual:.1f} times, into a pack of {needed / 1e9:.1f} GB; use a resolution "
            f"of {usual} or less, at most {_MAGNIFIED * usual - 1}"
        )


def _images(source: Source, read: Callable[[Example], np.ndarray]) -> Iterator[np.ndarray]:
    for example in _probed(source, _PROBED):
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
