"""The configuration that distills a trained model into one of few steps."""

from dataclasses import replace
from pathlib import Path

from patchdiffusion.nets.adapters import AllWeights
from patchdiffusion.objectives import ObjectiveUnion
from patchdiffusion.system import families
from patchdiffusion.train.config import TrainConfig
from patchdiffusion.train.denoising import DenoiserTask


def distilling() -> tuple[str, ...]:
    """Words of the objectives that learn from a trained model."""
    words = families.words(ObjectiveUnion)
    return tuple(word for word, member in words.items() if member.distillation is not None)


def distilled(config: TrainConfig, word: str, teacher: Path) -> TrainConfig:
    """The configuration of a run, changed to distill its model in a folder by an objective.

    Data, network, crops and optimizer are those of the run, with the learning rate and the length
    that suit the objective. Raises `ValueError` for an objective that learns from no model, and
    for a run that trains something else than a denoiser.
    """
    member = families.choose(ObjectiveUnion, word, "objective")
    suits = member.distillation
    if suits is None:
        raise ValueError(
            f"the objective {word} learns from no trained model; allowed are "
            f"{', '.join(distilling())}"
        )
    if not isinstance(config.task, DenoiserTask) or not config.objective.denoises:
        raise ValueError(
            f"{teacher} is no denoiser, which could be distilled: it was trained by "
            f"--task {families.word(type(config.task))} --objective "
            f"{families.word(type(config.objective))}"
        )
    preview = replace(config.preview, guidance=1.0)
    plain = replace(config, additions=(), adapter=AllWeights(), preview=preview)
    changed = member().taught(plain, teacher)
    return replace(
        changed,
        name=f"{teacher.name}-{word}",
        noise=config.noise if suits.law else changed.noise,
        optim=replace(config.optim, lr=config.optim.lr * suits.lr),
        images=round(config.images * suits.images),
    )


def starts_with(config: TrainConfig, teacher: TrainConfig) -> bool:
    """True if the weights of the teacher's network have the same meaning in a run."""
    ours, theirs = (c.objective.meaning(c.precond) for c in (config, teacher))
    return ours == theirs
