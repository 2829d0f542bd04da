"""Configuration that identifies a run (`TrainConfig`), and how it is executed (`RunConfig`)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from patchdiffusion.system.checks import positive
from patchdiffusion.train.autoencoding import AutoencoderTask
from patchdiffusion.train.classifying import ClassifierTask
from patchdiffusion.train.concept import ConceptTask
from patchdiffusion.train.denoising import DenoiserTask
from patchdiffusion.train.settings import Settings

Task = DenoiserTask | ClassifierTask | AutoencoderTask | ConceptTask
"""Tasks that a run may train; each is a `task.TaskConfig`."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Configuration that identifies a run: with the same data it gives the same model."""

    task: Task = field(default_factory=DenoiserTask)
    """Kind of model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network.masks and (parts := self.task.not_counting(self)):
            raise ValueError(
                f"{parts[0]} counts all pixels in its loss, and network.tokens leaves out those of "
                "the tokens it drops; use --network.tokens route, or --objective denoising"
            )


FREE = (
    "name",
    "images",
    "micro_batch",
    "preview",
    "data.path",
    "data.autoencoder",  # identified by its digest, as a part of the data
    "data.max_enlarge",
    "objective.teacher",  # identified by its digest, as those below
    "task.teacher",
    "task.perceptual.model",
    "task.perceptual.vgg",
    "task.perceptual.linear",
    "guard.max_skips",
    "guard.rollbacks",
    "ema.snapshots",
)
"""Fields that may differ when a run is resumed; a change of any other makes it another run."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Execution of a run: folder, device, checkpoints and processes; no part of its identity."""

    out: Path | None = None
    """Folder of the run; by default ./runs/NAME."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto is CUDA if available."""
    threads: int | None = None
    """CPU threads of each process; None leaves it to PyTorch (one per core)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the blocks of the network, once for each crop size; auto compiles on CUDA."""
    shard: bool = False
    """Shard weights, moments and averages over the processes (FSDP2)."""
    shard_experts: bool = False
    """Divide the experts of --network.experts among the processes, to which tokens travel; the rest
    is on every one."""
    deterministic: bool = False
    """Use only deterministic CUDA kernels; 5 to 30 % slower."""
    fresh: bool = False
    """Rename the folder of an existing run and start again."""
    start_from: Path | None = None
    """Run or model whose averaged weights a new run starts from."""
    max_hours: float | None = None
    """Save and stop after this time; the same command resumes."""
    save_minutes: float = 5.0
    """Minutes between checkpoints."""
    keep: int = 2
    """Number of newest checkpoints to keep, at least 2."""
    keep_every: float | None = None
    """Also keep one checkpoint each time the clock has advanced by this much."""
    timeout_minutes: float = 5.0
    """Time that a process waits for others before it fails; 6 times as long for the first steps."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that get a copy of the log and the samples."""
    auto_micro_batch: bool = False
    """Halve the micro-batch and go on when memory runs out; the training stays the same."""
    allow_data_change: bool = False
    """Resume with a data set that differs from that of the run."""
    allow_config_change: bool = False
    """Resume with changed fields that would make it another run; the change is recorded."""
    dry_run: bool = False
    """Refuse what the command would refuse, print duration, memory and disk space, and stop."""

    def __post_init__(self) -> None:
        positive(self, "timeout_minutes")
        for name in ("max_hours", "threads", "keep_every"):
            if getattr(self, name) is not None:
                positive(self, name)
        if self.shard and self.shard_experts:
            raise ValueError("shard and shard_experts exclude each other: give one of them")
        if self.shard_experts and self.compile == "on":
            raise ValueError(
                "compile on is not supported with shard_experts, since compiled blocks cannot wait "
                "for other processes; leave out --compile"
            )
        if not self.save_minutes >= 0:
            raise ValueError(f"save_minutes must be >= 0, not {self.save_minutes}")
        if self.keep < 2:
            raise ValueError(
                f"keep must be at least 2, not {self.keep}; "
                "a single checkpoint could be lost while it is replaced"
            )

    def folder(self, name: str) -> Path:
        """Folder of the run."""
        return Path(self.out or Path("runs") / name)  # which may be a text, from Python
