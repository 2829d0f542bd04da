"""Published checkpoints as tensors by name: safetensors, files of torch, and pickled modules.

Nothing of a file is executed, see `pickles`. A module lies in a pickle as its state, in which
`_parameters`, `_buffers` and `_modules` hold tensors and inner modules; EDM and its relatives wrap
this state together with the source code of the class, which is not looked at, and with the
keywords of its constructor.
"""

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from patchdiffusion.interop.pickles import Budget, Record, Reference, read_pickle
from patchdiffusion.interop.torchfiles import Contents, mapping, read_legacy, read_zip
from patchdiffusion.system.trust import open_regular

USUAL = ("ema", "model_ema", "ema_model", "net_ema", "model", "net", "state_dict", "module")
"""Names of weights in a checkpoint, those that are taken first in front."""
_WRAPPERS = ("module.", "_orig_mod.")
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # first pickle of a file of old torch
_DEEPEST = 64
_MOST_MODULES = 50_000
_TENSORS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_from_type_v2")
Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Published:
    """Weights of a published checkpoint."""

    tensors: dict[str, Tensor]
    digest: str
    """Hex SHA-256 digest of the file."""
    part: str = ""
    """Name of these weights in the file, such as ema."""
    parts: tuple[str, ...] = ()
    """Names of all weights in the file."""
    kind: str = ""
    """Name of the pickled class."""
    keywords: Mapping[str, Scalar] | None = None
    """Keywords of its constructor that are numbers or texts."""


def read_published(path: str | os.PathLike[str], *, weights: str | None = None) -> Published:
    """Read the weights of a checkpoint, by default those of an average if there are any.

    Raises `ValueError` in one line that names the file, for one that is damaged, of an unknown
    format, or without such weights.
    """
    path = Path(path)
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(16)
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            if start[8:9] == b"{":
                return Published(_safe(stream.read(), weights), digest)
            contents = _contents(stream, start, size)
            part, value, parts = _chosen(contents, weights)
            tensors, kind, keywords = _weights(contents, value)
        return Published(_unwrapped(tensors), digest, part, parts, kind, keywords)
    except (ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def _safe(data: bytes, weights: str | None) -> dict[str, Tensor]:
    if weights is not None:
        raise ValueError(f"weights is {weights}, and a safetensors file has no parts")
    try:
        return _unwrapped(load(data))
    except (SafetensorError, RuntimeError, KeyError, MemoryError) as error:
        raise ValueError(f"damaged safetensors file: {error}") from None


def _contents(stream: io.BufferedReader, start: bytes, size: int) -> Contents:
    budget = Budget()
    if start.startswith(b"PK\x03\x04"):
        return read_zip(stream, size, budget)
    if start.startswith(_LEGACY[: len(start)]):
        return read_legacy(stream.read(), budget)
    if start[:1] != b"\x80":
        raise ValueError("it is no safetensors file, file of torch, or pickle")
    value = read_pickle(io.BytesIO(stream.read()), budget)
    return Contents(value, budget, size, _no_storage)


def _no_storage(_: object) -> Tensor:
    raise ValueError("a tensor has no storage that can be read")


def _chosen(contents: Contents, weights: str | None) -> tuple[str, Any, tuple[str, ...]]:
    """Name and value of the weights to read, and the names of all weights."""
    root = contents.value
    if _holds_weights(root):
        if weights is not None:
            raise ValueError(f"weights is {weights}, and this file has no parts")
        return "", root, ()
    items = mapping(root) or {}
    found = {key: value for key, value in items.items() if _holds_weights(value)}
    names = tuple(str(key)[:50] for key in found)
    if not found:
        holds = ", ".join(str(key)[:50] for key in list(items)[:10]) or "no tensors"
        raise ValueError(f"it holds no weights of a network, but {holds}")
    chosen = weights or next((name for name in USUAL if name in found), None)
    if chosen is None and len(found) == 1:
        chosen = next(iter(found))
    if chosen not in found:
        wrong = "several weights" if weights is None else f"no weights {weights}"
        raise ValueError(f"it holds {wrong}; allowed for --weights: {', '.join(names[:20])}")
    return str(chosen), found[chosen], names


def _holds_weights(value: Any) -> bool:
    if _state(value) is not None:
        return True
    return any(_is_tensor(item) for item in (mapping(value) or {}).values())


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Record) and value.reference.name in _TENSORS


def _state(value: Any) -> Mapping[Any, Any] | None:
    """State of a pickled module; None for another value."""
    if not isinstance(value, Record):
        return None
    meta = _meta(value)
    state = value.state if meta is None else meta.get("state")
    if isinstance(state, tuple) and len(state) == 2:  # of a class with slots
        state = state[0]
    items = mapping(state)
    return items if items is not None and {"_parameters", "_modules"} <= set(items) else None


def _meta(record: Record) -> Mapping[Any, Any] | None:
    """Facts about an object that was pickled with its source code; None for others."""
    if record.reference.name != "_reconstruct_persistent_obj" or len(record.args) != 1:
        return None
    return mapping(record.args[0])


def _weights(
    contents: Contents, value: Any
) -> tuple[dict[str, Tensor], str, dict[str, Scalar] | None]:
    """Tensors by name, name of the class, keywords of its constructor."""
    state = _state(value)
    if state is None:
        named = iter((mapping(value) or {}).items())
        return _made(contents, ((name, item) for name, item in named if _is_tensor(item))), "", None
    keywords = mapping(state.get("_init_kwargs")) or {}
    plain = {
        key: item
        for key, item in keywords.items()
        if isinstance(key, str) and (item is None or isinstance(item, str | int | float))
    }
    return _made(contents, _walk(value, "", 0, [_MOST_MODULES])), _class(value), plain


def _class(value: Record) -> str:
    meta = _meta(value)
    if meta is not None:
        name = meta.get("class_name")
        return name[:100] if isinstance(name, str) else ""
    first = value.args[0] if value.args else None  # of copyreg._reconstructor
    return first.name if isinstance(first, Reference) else value.reference.name


def _walk(value: Any, prefix: str, depth: int, left: list[int]) -> Iterator[tuple[str, Any]]:
    """Names and values of the tensors in a pickled module."""
    state = _state(value)
    if state is None:
        raise ValueError(f"{prefix[:200] or 'the network'} is no pickled module")
    left[0] -= 1
    if depth > _DEEPEST or left[0] < 0:
        raise ValueError("its modules are nested too deeply, or too many")
    for kind in ("_parameters", "_buffers"):
        for name, item in (mapping(state.get(kind)) or {}).items():
            if item is not None:
                yield f"{prefix}{name}", item
    for name, inner in (mapping(state["_modules"]) or {}).items():
        if inner is not None:
            yield from _walk(inner, f"{prefix}{name}.", depth + 1, left)


def _made(contents: Contents, items: Iterator[tuple[Any, Any]]) -> dict[str, Tensor]:
    tensors = {}
    for name, item in items:
        if not isinstance(name, str) or len(name) > 1000:
            raise ValueError("the name of a tensor is no text, or too long")
        try:
            tensor = contents.tensor(item)
        except ValueError as error:
            raise ValueError(f"{name[:200]}: {error}") from None
        if tensor is None:
            raise ValueError(f"{name[:200]} is no tensor of a type that is read")
        tensors[name] = tensor
    return tensors


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that DistributedDataParallel or torch.compile gave to all names."""
    for prefix in _WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors
