"""Reading of files of torch and of pickled modules as tensors, without executing them.

Files of `torch.save` are zips of a pickle and storages, or, before torch 1.6, several pickles with
the storages after them. A pickled tensor that lies in neither has its storage as such a file within
bytes. Nothing is larger than the file: a storage must lie in it as a whole, and entries of a zip
must not be compressed.
"""

import io
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.interop.pickles import Budget, Persistent, Record, Reference, read_pickle

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_NUMPY = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"}
_MAGIC = 0x1950A86A20F9469CFC6C  # of files of torch that are no zip
_VERSION = 1001
_MOST_DIRECTORY = 2**24  # bytes of the list of entries of a zip
_DEEPEST = 16  # tensors within tensors


@dataclass
class Contents:
    """Value of a file, and the tensors in it, which are made when they are asked for."""

    value: Any
    budget: Budget
    size: int
    storages: Callable[[Persistent], Tensor]
    """Values of a storage outside the pickle."""
    _inner: dict[int, Tensor] = field(default_factory=dict)
    _tensors: dict[int, Tensor] = field(default_factory=dict)
    _made: int = 0

    def tensor(self, value: Any) -> Tensor | None:
        """The tensor or array that a value stands for; None for another value."""
        if id(value) not in self._tensors:
            made = self._make(value, 0)
            if made is None:
                return None
            self._tensors[id(value)] = made
        return self._tensors[id(value)]

    def _make(self, value: Any, depth: int) -> Tensor | None:
        if not isinstance(value, Record) or depth > _DEEPEST:
            return None
        name, args = value.reference.name, value.args
        if name == "_rebuild_parameter" and args:
            return self._make(args[0], depth + 1)
        if name in ("_rebuild_tensor", "_rebuild_tensor_v2") and len(args) >= 4:
            return self._strided(*args[:4])
        if name == "_rebuild_from_type_v2" and len(args) >= 3:
            function, _, inner, *_ = args
            if isinstance(function, Reference) and isinstance(inner, tuple):
                return self._make(Record(function, inner), depth + 1)
        if name == "_reconstruct" and value.reference.module.endswith("multiarray"):
            return self._array(value.state)
        return None

    def _strided(self, storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
        values = self._storage(storage)
        shape, strides = _sizes(shape), _sizes(strides)
        count = math.prod(shape)
        if len(shape) != len(strides) or not isinstance(offset, int) or offset < 0:
            raise ValueError(f"a tensor of shape {shape} has impossible strides or offset")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if count > len(values) or (count and last >= len(values)):
            raise ValueError(f"a tensor of shape {shape} is larger than its {len(values)} values")
        self._allow(count * values.element_size())
        if not count:
            return values.new_empty(shape)
        return values.as_strided(shape, strides, offset).clone(
            memory_format=torch.contiguous_format
        )

    def _allow(self, size: int) -> None:
        self._made += size
        if self._made > 2 * self.size + 2**20:
            raise ValueError("the tensors are together larger than twice the file")

    def _storage(self, storage: Any) -> Tensor:
        if isinstance(storage, Persistent):
            return self.storages(storage)
        is_file = isinstance(storage, Record) and storage.reference.name == "_load_from_bytes"
        if not is_file or len(storage.args) != 1 or not isinstance(storage.args[0], bytes):
            raise ValueError("a tensor has no storage that can be read")
        data = storage.args[0]
        if id(data) not in self._inner:
            inner = read_legacy(data, self.budget)
            if not isinstance(inner.value, Persistent):
                raise ValueError("a tensor has no storage that can be read")
            self._inner[id(data)] = inner.storages(inner.value)
        return self._inner[id(data)]

    def _array(self, state: Any) -> Tensor:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[4], bytes):
            raise ValueError("an array of numpy has another form than that of numbers")
        _, shape, dtype, fortran, data = state
        kind = dtype.args[0] if isinstance(dtype, Record) and dtype.args else None
        order = dtype.state[1] if isinstance(dtype, Record) and _is_state(dtype.state) else None
        if not isinstance(kind, str) or kind not in _NUMPY or order not in ("<", "|"):
            raise ValueError("an array of numpy is not of numbers in little-endian order")
        shape = _sizes(shape)
        values = np.frombuffer(data, dtype=f"<{kind}")
        if math.prod(shape) != len(values):
            raise ValueError(f"an array of shape {shape} has {len(values)} values")
        self._allow(len(data))
        return torch.from_numpy(values.reshape(shape, order="F" if fortran else "C").copy())


def read_legacy(data: bytes, budget: Budget) -> Contents:
    """Contents of a file of torch that is no zip: three pickles of facts, its value, its keys."""
    stream = io.BytesIO(data)
    if read_pickle(stream, budget) != _MAGIC or read_pickle(stream, budget) != _VERSION:
        raise ValueError("it is no file of torch of a known version")
    system = read_pickle(stream, budget)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("its numbers are not in little-endian order")
    outside: list[Persistent] = []
    value = read_pickle(stream, budget, outside)
    keys = read_pickle(stream, budget)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("the list of its storages is damaged")
    known = {stored.key: stored for stored in map(_Stored.of, outside)}
    places: dict[str, int] = {}
    place = stream.tell()
    for key in keys:  # each a number of values, then these
        if key not in known or key in places or place + 8 > len(data):
            raise ValueError(f"the storage {key[:50]!r} is not in the file as its list says")
        if int.from_bytes(data[place : place + 8], "little") != known[key].count:
            raise ValueError(f"the storage {key[:50]!r} has another size than its list says")
        places[key] = place + 8
        place += 8 + known[key].size
    whole = memoryview(data)

    def content(stored: _Stored) -> memoryview:
        if stored.key not in places:
            raise ValueError(f"the storage {stored.key[:50]!r} is missing")
        return whole[places[stored.key] : places[stored.key] + stored.size]

    return Contents(value, budget, len(data), _Storages(content))


def read_zip(stream: io.BufferedReader, size: int, budget: Budget) -> Contents:
    """Contents of a file of torch that is a zip, of so many bytes."""
    try:
        _check_directory(stream, size)
        archive = zipfile.ZipFile(stream)
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it is a zip without a data.pkl, and no file of torch")
        folder = pickles[0].removesuffix("data.pkl")
        left = size

        def content(name: str) -> bytes:
            nonlocal left
            info = entries.get(folder + name)
            if info is None:
                raise ValueError(f"{name} is missing in the zip")
            left -= info.file_size
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or left < 0:
                raise ValueError(f"{name} is compressed, encrypted, or overlaps another entry")
            try:
                return archive.read(info)
            except _ZIP_ERRORS as error:
                raise ValueError(f"{name} is damaged in the zip: {error}") from None

        if folder + "byteorder" in entries and content("byteorder").strip() != b"little":
            raise ValueError("its numbers are not in little-endian order")
        value = read_pickle(io.BytesIO(content("data.pkl")), budget, [])
    except _ZIP_ERRORS as error:
        raise ValueError(f"damaged zip: {error}") from None
    storages = _Storages(lambda stored: memoryview(content(f"data/{stored.key}")))
    return Contents(value, budget, size, storages)


_ZIP_ERRORS = (
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    OSError,
    UnicodeDecodeError,
)


def _check_directory(stream: io.BufferedReader, size: int) -> None:
    """Raise `ValueError` for a list of entries that takes much memory."""
    stream.seek(max(0, size - 2**17))
    tail = stream.read()
    end, wide = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    sizes = [struct.unpack_from("<I", tail, end + 12)[0]] if end >= 0 else []
    if wide >= 0 and sizes == [0xFFFFFFFF]:
        sizes = [struct.unpack_from("<Q", tail, wide + 40)[0]]
    if not sizes or sizes[0] > _MOST_DIRECTORY:
        raise ValueError("damaged zip: it has no list of entries, or a huge one")


@dataclass(frozen=True)
class _Stored:
    """Identifier of a storage."""

    key: str
    dtype: torch.dtype
    count: int

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.count * self.dtype.itemsize

    @classmethod
    def of(cls, outside: Persistent) -> "_Stored":
        """The storage of an identifier: kind, class, key, device, number of values."""
        if not isinstance(outside.id, tuple) or len(outside.id) not in (5, 6):
            raise ValueError("a storage has an unknown identifier")
        kind, reference, key, _, count, *view = outside.id
        if kind != "storage" or not isinstance(key, str) or any(v is not None for v in view):
            raise ValueError("a storage has an unknown identifier")
        dtype = _DTYPES.get(reference.name) if isinstance(reference, Reference) else None
        if dtype is None or not isinstance(count, int) or not 0 <= count < 2**48:
            raise ValueError(f"the storage {key[:50]!r} has an unknown type or size")
        return cls(key, dtype, count)


class _Storages:
    """Values of storages, of which each is read once."""

    def __init__(self, content: Callable[[_Stored], memoryview]) -> None:
        self.content = content
        self.read: dict[str, tuple[_Stored, Tensor]] = {}

    def __call__(self, outside: Persistent) -> Tensor:
        stored = _Stored.of(outside)
        if stored.key not in self.read:
            data = self.content(stored)
            if len(data) != stored.size:
                raise ValueError(
                    f"the storage {stored.key[:50]!r} has {len(data)} bytes, not {stored.size}"
                )
            copy = bytearray(data)
            values = torch.frombuffer(copy, dtype=stored.dtype) if copy else torch.empty(0)
            self.read[stored.key] = (stored, values)
        known, values = self.read[stored.key]
        if known != stored:
            raise ValueError(f"the storage {stored.key[:50]!r} has two types or sizes")
        return values


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > 8:
        raise ValueError("the shape of a tensor is no tuple of up to 8 numbers")
    if not all(isinstance(n, int) and 0 <= n < 2**48 for n in value):
        raise ValueError("the shape of a tensor has entries that are no sizes")
    return value


def _is_state(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) >= 2


def mapping(value: Any) -> Mapping[Any, Any] | None:
    """Items of a dict, or of a record of one of its subclasses; None for another value."""
    if isinstance(value, dict):
        return value
    return value.items if isinstance(value, Record) and value.items else None
