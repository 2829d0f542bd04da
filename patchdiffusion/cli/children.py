"""The few-step models that were distilled of a run, in the folders beside it."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from patchdiffusion.system.families import word
from patchdiffusion.system.files import expanded
from patchdiffusion.train.config import TrainConfig
from patchdiffusion.train.folder import stored_config
from patchdiffusion.train.report import read_log


def children(run: Path) -> Iterator[tuple[Path, TrainConfig]]:
    """Few-step runs beside a run whose teacher or start it was, by name."""
    parent = expanded(run).resolve()
    for folder in sorted(parent.parent.iterdir()):
        config = None
        with contextlib.suppress(OSError, ValueError):  # of another version, or being written
            config = stored_config(folder)
        if config is None or folder == parent or not config.objective.few_step:
            continue
        starts = [r.get("start_from") for r in read_log(folder) if r["kind"] == "start"]
        if str(parent) in (*map(str, config.objective.teachers), *starts):
            yield folder, config


def children_lines(run: Path, beside: Sequence[Path]) -> Iterator[str]:
    """Lines about the few-step models of a run, and the command that compares them."""
    runs = list(children(run))
    for folder, config in runs:
        steps = config.objective.jumps
        yield f"few steps {folder}, {word(type(config.objective))}, {steps} by default"
    there = {expanded(path).resolve() for path in beside}
    if missing := [str(folder) for folder, _ in runs if folder not in there]:
        yield (
            f"compare them by: patchdiffusion speed {run} --samples 1000 --beside "
            f"{' '.join(missing)}"
        )
