"""Arrays as a `Source`: .npy and .npz files, and arrays in memory."""

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from patchdiffusion.data.example import MAX_LABEL, Example
from patchdiffusion.data.frame import MIN_SIDE
from patchdiffusion.data.limits import check_members
from patchdiffusion.system.mapped import watch

_IMAGE_KEYS = ("images", "x", "arr_0")
_LABEL_KEYS = ("labels", "y")
_CHUNK = 256


@dataclass(frozen=True, eq=False)
class ArraySource:
    """A `Source` over one array [N, *S, C]."""

    name: str
    array: np.ndarray
    labels: np.ndarray | None
    span: tuple[float, float] | None
    stamp: str
    captions: np.ndarray | None = None
    """Texts [N]."""
    others: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Further arrays of the file by name, one entry per image: [N, ...]."""
    check: Callable[[], object] = bool
    """Called after an image is read; raises an error if the file was cut short."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The numbers from 0 to the largest label."""
        if self.labels is None:
            return ()
        return tuple(str(i) for i in range(int(self.labels.max()) + 1))

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Example:
        label = None if self.labels is None else int(self.labels[index])
        image = np.array(self.array[index])
        self.check()
        return Example(
            image,
            label,
            str(index),
            span=self.span,
            mode=str(self.array.dtype),
            caption=None if self.captions is None else str(self.captions[index]).strip() or None,
            columns={name: values[index] for name, values in self.others.items()},
        )


def array_source(path: Path) -> ArraySource:
    """Open an .npy file, or an .npz file of images (or x, arr_0) and labels (or y).

    An .npz file may also hold captions [N], which are texts, and other arrays [N, ...] for columns.

    Shapes: [N, H, W], [N, H, W, C] or [N, C, H, W], the channels being the axis below 8, and clips
    [N, T, H, W, C]. Types: bool, integers, and floats, which as pixels are taken as [0, 1] if all
    of them lie there, as [-1, 1] if all of them lie there, and else cannot be pixels. Raises
    `ValueError` for anything else.
    """
    try:
        # Only an .npy file is mapped; the arrays of an .npz file are read as a whole.
        _check_kind(path)
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        check = watch(loaded, path).check if isinstance(loaded, np.memmap) else bool
        if isinstance(loaded, np.ndarray):
            array, labels, others = loaded, None, {}
        else:
            with loaded:
                check_members(loaded.zip.infolist())
                others = _others(loaded)
                array = _pick(path, loaded, _IMAGE_KEYS)
                labels = _pick(path, loaded, _LABEL_KEYS) if _has(loaded, _LABEL_KEYS) else None
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # the reader of the header raises almost anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{path} is refused: {reason}") from error
    array = _layout(path, array)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path} is of type {array.dtype}; allowed are bool, integers and floats")
    others = {name: values for name, values in others.items() if len(values) == len(array)}
    texts = others.pop("captions", None)
    if texts is not None and (texts.ndim != 1 or texts.dtype.kind != "U"):
        raise ValueError(
            f"captions of {path} are {texts.dtype} {list(texts.shape)}; allowed are texts [N]"
        )
    status = os.stat(path)
    stamp = f"array {path.name} {status.st_size} {status.st_mtime_ns}"
    labels = None if labels is None else _checked(path, labels, len(array))
    return ArraySource(path.stem, array, labels, _span(array), stamp, texts, others, check)


def _check_kind(path: Path) -> None:
    """Raise `ValueError` for an .npy file of Python objects, which cannot be mapped."""
    with path.open("rb") as stream:
        if stream.read(6) != np.lib.format.MAGIC_PREFIX:
            return
        stream.seek(0)
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_2_0
            if version[0] > 1
            else (np.lib.format.read_array_header_1_0)
        )
        _, _, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError(
            "it holds Python objects, such as images of several sizes; save those as files, or as "
            "one array of numbers [N, H, W, C]"
        )


def memory_source(array: np.ndarray, name: str) -> ArraySource:
    """Source over an array in memory, of the shapes and types that `array_source` takes."""
    array = _layout(name, array)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} is of type {array.dtype}; allowed are bool, integers and floats")
    content = np.ascontiguousarray(array)
    digest = hashlib.sha256(f"{content.dtype} {content.shape}".encode())
    digest.update(content.data)
    return ArraySource(name, array, None, _span(array), f"array {name} {digest.hexdigest()}")


def _has(loaded: Mapping[str, np.ndarray], names: tuple[str, ...]) -> bool:
    return any(name in loaded for name in names)


def _pick(path: Path, loaded: Mapping[str, np.ndarray], names: tuple[str, ...]) -> np.ndarray:
    for name in names:
        if name in loaded:
            if not isinstance(array := loaded[name], np.ndarray):
                raise ValueError(f"{name} is no array")
            return array
    raise ValueError(f"it holds {', '.join(loaded) or 'nothing'}; allowed are {', '.join(names)}")


def _others(loaded: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays that are neither images nor labels; pickled ones are skipped."""
    arrays = {}
    for name in loaded:
        if name not in (*_IMAGE_KEYS, *_LABEL_KEYS):
            with contextlib.suppress(ValueError):
                values = loaded[name]
                if isinstance(values, np.ndarray) and values.ndim:
                    arrays[name] = values
    return arrays


def channels_last(image: np.ndarray) -> np.ndarray:
    """Image [C, H, W] as [H, W, C], if the first axis is below 8; other images unchanged."""
    if image.ndim == 3 and 0 < image.shape[0] < MIN_SIDE <= min(image.shape[1:]):
        return image.transpose(1, 2, 0)
    return image


def _layout(path: Path | str, array: np.ndarray) -> np.ndarray:
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim == 4 and len(array):
        _, a, b, c = array.shape
        if 0 < c < MIN_SIDE <= min(a, b):
            return array
        if 0 < a < MIN_SIDE <= min(b, c):
            return array.transpose(0, 2, 3, 1)
    if array.ndim == 5 and array.size and array.shape[4] < MIN_SIDE <= min(array.shape[2:4]):
        return array
    raise ValueError(
        f"{path} has the shape {list(array.shape)}; allowed are [N, H, W], [N, H, W, C], "
        f"[N, C, H, W] and [N, T, H, W, C] with sides of at least {MIN_SIDE} and fewer than "
        f"{MIN_SIDE} channels"
    )


def _span(array: np.ndarray) -> tuple[float, float] | None:
    if array.dtype.kind != "f":
        return None
    return span_of(array[start : start + _CHUNK] for start in range(0, len(array), _CHUNK))


def span_of(parts: Iterable[np.ndarray]) -> tuple[float, float] | None:
    """Span of float pixels: (0, 1) or (-1, 1), whichever holds all values; None if neither does."""
    low, high = np.inf, -np.inf
    for part in parts:
        finite = part[np.isfinite(part)]  # images with other values are refused one by one
        if finite.size:
            low, high = min(low, finite.min()), max(high, finite.max())
    if low >= -1e-4 and high <= 1 + 1e-4:
        return (0.0, 1.0)
    if low >= -1 - 1e-4 and high <= 1 + 1e-4:
        return (-1.0, 1.0)
    return None


def _checked(path: Path, labels: np.ndarray, count: int) -> np.ndarray:
    flat = labels.reshape(-1)
    if flat.size != count or labels.shape[0] != count or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels of {path} are {labels.dtype} {list(labels.shape)}; "
            f"allowed are integers [{count}]"
        )
    if flat.min() < 0 or flat.max() > MAX_LABEL:
        low, high = flat.min(), flat.max()
        raise ValueError(f"labels of {path} run from {low} to {high}; allowed are 0 to {MAX_LABEL}")
    return flat
