"""What identifies a run (`TrainConfig`) and what does not (`RunConfig`)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from patchdiffusion.system.checks import positive
from patchdiffusion.train.classifying import ClassifierTask
from patchdiffusion.train.denoising import DenoiserTask
from patchdiffusion.train.settings import Settings

Task = DenoiserTask | ClassifierTask
"""What a run may train; each is a `task.TaskConfig`."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Everything that identifies a run: the same configuration and data give the same model."""

    task: Task = field(default_factory=DenoiserTask)
    """What is trained, and all that follows from it."""


FREE = (
    "name",
    "images",
    "micro_batch",
    "preview",
    "data.path",
    "objective.teacher",  # which is known by its digest
    "guard.max_skips",
    "guard.rollbacks",
    "ema.snapshots",
)
"""Fields that may differ when a run is resumed; all others make it another run."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How and where a run is carried out; no part of its identity."""

    out: Path | None = None
    """Folder of the run; the default is runs/NAME in the current folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    threads: int | None = None
    """CPU threads of each process; None leaves it to PyTorch (one per core)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the blocks of the network, once for each crop size; auto does so on CUDA."""
    shard: bool = False
    """Divide weights, moments and averages among the processes (FSDP2) instead of copying them."""
    deterministic: bool = False
    """On CUDA, only kernels that repeat to the last bit; 5 to 30 % slower."""
    fresh: bool = False
    """Set an existing run aside (it is renamed, not deleted) and start again."""
    start_from: Path | None = None
    """Run or model whose averaged weights a new run starts from."""
    max_hours: float | None = None
    """Save and stop after this time; the same command goes on."""
    save_minutes: float = 5.0
    """Time between checkpoints."""
    keep: int = 2
    """Newest checkpoints kept, at least 2."""
    keep_every: float | None = None
    """Also keep one checkpoint for good each time the clock has advanced by so much."""
    timeout_minutes: float = 5.0
    """How long a process may keep the others waiting; six times as long until the second step."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Further places for the numbers and pictures of log.jsonl."""
    auto_micro_batch: bool = False
    """Out of memory: go on with half the micro-batch, the same training in smaller parts."""
    allow_data_change: bool = False
    """Resume although the data set is not the one the run began with."""
    allow_config_change: bool = False
    """Resume although fields differ that make it another run; the change is recorded."""
    dry_run: bool = False
    """Say what would be done, with cost and disk space, and stop."""

    def __post_init__(self) -> None:
        positive(self, "timeout_minutes")
        for name in ("max_hours", "threads", "keep_every"):
            if getattr(self, name) is not None:
                positive(self, name)
        if not self.save_minutes >= 0:
            raise ValueError(f"save_minutes must be >= 0, not {self.save_minutes}")
        if self.keep < 2:
            raise ValueError(
                f"keep must be at least 2, not {self.keep}: "
                "a single checkpoint cannot survive a fault while it is replaced"
            )

    def folder(self, name: str) -> Path:
        """The folder of the run."""
        return self.out or Path("runs") / name
