"""The folder of a run: creation, comparison with a configuration, and renaming."""

import shutil
from pathlib import Path

from patchdiffusion.system.files import free_name, read_json, write_json
from patchdiffusion.system.serialize import decode, differences, encode, few
from patchdiffusion.train.config import FREE, TrainConfig

CONFIG = "config.json"


def stored_config(folder: Path) -> TrainConfig | None:
    """Configuration of the run in a folder, or None if there is no run."""
    path = folder / CONFIG
    if not path.exists():
        return None
    stored = read_json(path)
    try:
        return decode(TrainConfig, stored)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def trained_on(folder: Path) -> str | None:
    """Fingerprint of the images that the model of a run was trained on, if it has one."""
    try:
        return str(read_json(folder / "model" / CONFIG)["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def name_aside(folder: Path) -> Path:
    """The first free NAME.old-1, NAME.old-2 ... for a run that makes room for another."""
    return free_name(folder, f"{folder.name}.old")


def changed_fields(stored: TrainConfig, config: TrainConfig) -> list[str]:
    """Fields that differ and make it another run, with both values."""
    return [
        line
        for line in differences(stored, config)
        if not any(line.startswith((f"{free}:", f"{free}.")) for free in FREE)
    ]


def is_same_run(folder: Path, config: TrainConfig, *, allow_change: bool = False) -> bool:
    """True if a folder already holds a run of this configuration; nothing is written.

    Raises `ValueError` if it holds other files, or another run, naming the fields that differ.
    """
    stored = stored_config(folder)
    if stored is None:
        # A process that was killed at once has left its lock and the beginning of this file.
        own = ("lock", f".{CONFIG}.")
        if folder.exists() and not all(f.name.startswith(own) for f in folder.iterdir()):
            raise ValueError(
                f"{folder} is not empty and holds no run; choose another folder with --out"
            )
        return False
    if not allow_change:
        refuse_changes(folder, changed_fields(stored, config))
    return True


def refuse_changes(folder: Path, changed: list[str]) -> None:
    """Raise `ValueError` that lists the changed fields, if there are any."""
    if changed:
        raise ValueError(
            f"{folder} holds a run with another configuration ({few(changed)}); "
            "use --out for another folder, --fresh to rename that run and start again, or "
            "--allow-config-change to resume it with the change"
        )


def write_config(folder: Path, config: TrainConfig) -> None:
    """Create the folder if needed, and write `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, encode(config))


def clear_unfinished(folder: Path) -> None:
    """Delete what a killed process has left of files that this one writes."""
    for name in (CONFIG, "run.json"):
        for file in folder.glob(f".{name}.*"):
            file.unlink(missing_ok=True)


def check_disk(
    folder: Path, parameters: int, keep: int, *, profiles: int = 0, snapshots: int = 0
) -> int:
    """Bytes of disk that a run still needs; raises `ValueError` if fewer are free."""
    # A checkpoint is weights, two moments and the averages; a model is weights and an average.
    copies = (4 + profiles) * (keep + 1) + 2 * 2 + profiles * snapshots
    present = sum(f.stat().st_size for f in folder.rglob("*.safetensors") if f.is_file())
    needed = max(4 * parameters * copies - present, 0) + 2**26
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"{folder} needs about {needed:,} bytes for checkpoints, and only {free:,} are free; "
            "choose another folder with --out"
        )
    return needed
