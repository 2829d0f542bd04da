"""Folders of packs: the default one in the cache, and that of an earlier preparation."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from patchdiffusion.data.example import Source
from patchdiffusion.data.frame import Plan
from patchdiffusion.data.options import Options
from patchdiffusion.data.pack import Pack
from patchdiffusion.system.files import cache_dir

_ASIDE: list[Path] = []
"""Temporary folder of new packs, in the context of `packs_aside`."""


@contextlib.contextmanager
def packs_aside() -> Iterator[None]:
    """Context in which new packs are written to a temporary folder, deleted at the end.

    Packs in the cache are used.
    """
    if _ASIDE:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="patchdiffusion-", ignore_cleanup_errors=True) as name:
        _ASIDE.append(Path(name))
        try:
            yield
        finally:
            _ASIDE.clear()


def kept_aside(pack: Pack) -> bool:
    """True if a pack lies in a temporary folder, which is deleted soon."""
    return pack.path.parent in _ASIDE


def packs_folder() -> Path:
    """Folder of packs in the cache."""
    return cache_dir() / "packs"


def shape_of(plan: Plan) -> tuple[int, ...]:
    """Shape of an image of the pack."""
    return (*plan.size, plan.channels)


def stamp_of(source: Source) -> str:
    """Text that changes when the source changes; empty if the source has none."""
    return str(getattr(source, "stamp", ""))


def _identity(source: Source, options: Options) -> str:
    parts = [stamp_of(source) or [source.name, len(source)], options.identity()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]


def find_pack(
    source: Source, options: Options, target: Path | None, *, verify: bool = False
) -> Pack | None:
    """The pack that was prepared from this source with these options, or None.

    With `verify` all of it must be intact. Raises `ValueError` if something else lies at the
    target.
    """
    if target is not None:
        check_target(target)
        candidates = [target]
    else:
        candidates = cached(_identity(source, options))
    for path in candidates:
        if not stamp_of(source) or not path.is_dir():
            continue
        try:
            pack = Pack.open(path)
            if verify:
                pack.verify()
        except (ValueError, OSError):
            continue  # damaged or of another version: made anew
        if pack.info.stamp == stamp_of(source) and pack.info.options == options.identity():
            return pack
    return None


def check_target(target: Path) -> None:
    """Raise `ValueError` unless a pack can be written to a folder, or replaced there."""
    if target.exists() and not (target / "pack.json").is_file():
        if not target.is_dir():
            raise ValueError(f"{target} is a file; allowed are a new folder and an older pack")
        if any(target.iterdir()):
            raise ValueError(f"{target} is not empty and not a pack; choose a new or empty folder")


def default_target(source: Source, plan: Plan, options: Options) -> Path:
    """Folder of a pack in the cache, by its name, shape, source and options."""
    shape = "x".join(map(str, shape_of(plan)))
    return in_cache(source.name, f"{shape}-{_identity(source, options)}")


def in_cache(name: str, ending: str) -> Path:
    """Folder of a pack in the cache, or aside, by the name of its source and an ending."""
    name = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[:40] or "data"
    return (_ASIDE or [packs_folder()])[0] / f"{name}-{ending}"


def cached(ending: str) -> list[Path]:
    """Folders of packs in the cache, or aside, with this ending."""
    return [p for root in (packs_folder(), *_ASIDE) for p in sorted(root.glob(f"*-{ending}"))]


def make_room(target: Path, needed: int) -> None:
    """Create the folder that will hold the pack; raises `OSError` if it cannot, or is too full."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(target.parent, os.W_OK):
            raise PermissionError(13, "Permission denied")
        free = shutil.disk_usage(target.parent).free
    except FileExistsError as error:
        raise OSError(f"the pack cannot be written to {target}: a file is in the way") from error
    except OSError as error:
        raise OSError(f"the pack cannot be written to {target}: {error.strerror}") from error
    if needed > free:
        raise OSError(f"the pack {target} needs {needed} bytes, but {free} are free there")
