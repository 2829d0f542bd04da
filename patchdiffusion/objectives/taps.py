"""Terms of a loss that read activations of the network: the passes that are recorded for them."""

from dataclasses import replace

from torch import Tensor

from patchdiffusion.cond import Tape
from patchdiffusion.denoiser import Denoiser, NetDenoiser
from patchdiffusion.losses import Batch, LossOut, Objective
from patchdiffusion.nets.tapmaps import as_map
from patchdiffusion.objectives.base import Materials, Settings
from patchdiffusion.patches import Size
from patchdiffusion.rng import Draws
from patchdiffusion.system.families import word


def check_taps(name: str, config: Settings) -> None:
    """Raise `ValueError` for an objective whose first pass is not that of a denoiser."""
    if config.objective.few_step:
        raise ValueError(
            f"{name} reads the features of a denoiser in training, and "
            f"{word(type(config.objective))} trains a few-step model; use --objective denoising"
        )


def full_size(materials: Materials) -> Size:
    """The size of the largest crops of a run, of pixels of the data as they are."""
    if not materials.groups:
        return materials.images.canvas
    return max(group.size for group in materials.groups)


def recorded(
    objective: Objective,
    denoiser: Denoiser,
    batch: Batch,
    draws: Draws,
    names: tuple[str, ...],
    tokens: Size,
) -> tuple[LossOut, list[Tensor]]:
    """The result of an objective, and activations of its first pass as maps [B, D, *G].

    Raises `ValueError` for an objective that makes no such pass of this denoiser.
    """
    if not isinstance(denoiser, NetDenoiser):
        raise ValueError(f"taps are of networks, not of {type(denoiser).__name__}")
    tape = denoiser.tape
    if tape is None:
        tape = Tape()
        denoiser = denoiser.recording(tape)
    tape.want(*names)
    out = objective(denoiser, batch, draws)
    if missing := [name for name in names if name not in tape.activations]:
        raise ValueError(
            f"{type(objective).__name__} records no activation {missing[0]} of the network; use "
            "--objective denoising"
        )
    size = tuple(batch.images.shape[2:])
    return out, [as_map(tape.activations[name], size, tokens) for name in names]


def with_term(out: LossOut, name: str, weight: float, terms: Tensor) -> LossOut:
    """The result of an objective with a term [B], which is logged but not reported as loss."""
    return replace(
        out,
        per_sample=out.per_sample + weight * terms,
        scalars={**out.scalars, name: terms.detach().mean()},
        reported=out.per_sample if out.reported is None else out.reported,
    )
