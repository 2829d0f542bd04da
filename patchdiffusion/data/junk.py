"""Files that look like data and are none: thumbnails, recycle bins, system folders, our own runs.

| ignored                                    | written by                                       |
|--------------------------------------------|--------------------------------------------------|
| names that begin with a dot, `__MACOSX`    | Unix, macOS (`.AppleDouble`, `._x.jpg`, `.Trash`) |
| `@eaDir`, `@tmp`, `#recycle`, `#snapshot`  | Synology                                         |
| `@Recycle`, `@Recently-Snapshot`           | QNAP                                             |
| `$RECYCLE.BIN`, `RECYCLER`, `Recycled`,    | Windows                                          |
| `System Volume Information`, `FOUND.000`   |                                                  |
| `Trash`, `lost+found`                      | Linux, cameras                                   |
| `thumbnails`, `thumbs`, `thumb`, `*.lrdata` | viewers and editors of photos                    |
| folders of runs of this program            | `patchdiffusion train` in the folder of the data |

Case does not matter. Only what lies below the folder that was given is looked at.
"""

import re
from pathlib import Path

from patchdiffusion.system.files import parse_json

HIDDEN = "hidden"
RUNS = "run"
_THUMBNAILS, _RECYCLED, _SYSTEM = "thumbnails", "recycle bin", "system folder"
_FOLDERS = {
    "__macosx": HIDDEN,
    "@eadir": _THUMBNAILS,
    "thumbnails": _THUMBNAILS,
    "thumbs": _THUMBNAILS,
    "thumb": _THUMBNAILS,
    "_thumbs": _THUMBNAILS,
    "#recycle": _RECYCLED,
    "@recycle": _RECYCLED,
    "$recycle.bin": _RECYCLED,
    "recycler": _RECYCLED,
    "recycled": _RECYCLED,
    "trash": _RECYCLED,
    "@tmp": _SYSTEM,
    "#snapshot": _SYSTEM,
    "@recently-snapshot": _SYSTEM,
    "system volume information": _SYSTEM,
    "lost+found": _SYSTEM,
}


def kind_of_junk(name: str, *, folder: bool) -> str | None:
    """Kind of a file or folder that holds no data, by its name, or None."""
    low = name.casefold()
    if name.startswith("."):
        return HIDDEN
    if not folder:
        return None
    if low.endswith(".lrdata"):
        return _THUMBNAILS
    return _SYSTEM if re.fullmatch(r"found\.\d{3}", low) else _FOLDERS.get(low)


def junk_in(path: str) -> tuple[str, str] | None:
    """Outermost part of a path `a/b/c.png` that holds no data, and its kind; or None."""
    parts = path.split("/")
    for depth, name in enumerate(parts, start=1):
        if kind := kind_of_junk(name, folder=depth < len(parts)):
            return "/".join(parts[:depth]), kind
    return None


def is_run(folder: Path) -> bool:
    """True if a folder belongs to a run; others may hold a `config.json`, too."""
    if (folder / "config.json").exists() and (folder / "log.jsonl").exists():
        return True  # even if it is damaged: its samples are not a data set
    if not (folder / "config.json").is_file():
        return False  # a pipe, for one, would never end
    try:
        return is_run_config((folder / "config.json").read_bytes())
    except OSError:
        return False


def is_run_config(content: bytes) -> bool:
    """True if the content of a file is the configuration of a run."""
    try:
        return parse_json(content).get("type") == "TrainConfig"
    except (ValueError, AttributeError):
        return False
