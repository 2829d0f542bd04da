"""patchdiffusion packs [--remove NAME ...] [--unused-days N]"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from patchdiffusion.cli.parse import parse
from patchdiffusion.data.store import packs_folder
from patchdiffusion.data.stored import StoredPack, find_packs, in_use, remove_pack, stored_packs
from patchdiffusion.patches import size_name
from patchdiffusion.system.text import counted


@dataclass(frozen=True, kw_only=True)
class PacksArguments:
    """List the prepared images in the cache, or remove some of them.

    A pack is made again when its images are used again. One that a process has open is never
    removed.
    """

    example: ClassVar[str] = "patchdiffusion packs --unused-days 30"

    remove: tuple[str, ...] = ()
    """Names of packs to remove, or their beginnings."""
    unused_days: float | None = None
    """Remove packs that were not used for this many days, of those named if there are any."""

    def __post_init__(self) -> None:
        if self.unused_days is not None and not self.unused_days >= 0:
            raise ValueError(f"unused_days is {self.unused_days}; allowed is 0 or more")


def main(arguments: Sequence[str]) -> None:
    """List packs, or remove selected ones that are not in use."""
    options = parse(PacksArguments(), arguments, "packs")
    if not options.remove and options.unused_days is None:
        _show(stored_packs())
        return
    chosen = find_packs(options.remove) if options.remove else stored_packs()
    if options.unused_days is not None:
        chosen = [pack for pack in chosen if pack.days >= options.unused_days]
    freed, removed = 0, 0
    for pack in chosen:
        try:
            remove_pack(pack)
        except ValueError:
            print(f"kept      {pack.path.name}: it is in use")
            continue
        print(f"removed   {pack.path.name}, {_megabytes(pack)}")
        freed, removed = freed + pack.bytes, removed + 1
    print(f"{counted(removed, 'pack')} removed, {freed / 1e6:,.1f} MB")


def _show(packs: Sequence[StoredPack]) -> None:
    for pack in packs:
        what = "unfinished, or of another version"
        if pack.shape is not None:
            images = counted(pack.shape[0], "image")
            what = f"{images} of {size_name(pack.shape[1:-1])}x{pack.shape[-1]}"
        day = time.strftime("%Y-%m-%d", time.localtime(pack.used))
        note = ", in use" if in_use(pack.path) else ""
        print(f"{pack.path.name}\n          {what}, {_megabytes(pack)}, used {day}{note}")
    total = sum(pack.bytes for pack in packs) / 1e6
    print(f"{counted(len(packs), 'pack')}, {total:,.1f} MB in {packs_folder()}")


def _megabytes(pack: StoredPack) -> str:
    return f"{pack.bytes / 1e6:,.1f} MB"
