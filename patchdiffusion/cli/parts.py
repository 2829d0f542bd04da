"""Words on the command line for the parts of a run that are of one of several types.

`--precond flow` chooses the type, and with it what belongs to it; its fields are flags then.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, TypeVar

import tyro

from patchdiffusion import recipes
from patchdiffusion.cli.parse import parse_some
from patchdiffusion.noise import DDPMSteps, Law, LogitNormal, LogNormal, LogUniform, UniformTime
from patchdiffusion.parameterisation import (
    EDM,
    X0,
    EpsDDPM,
    EpsVP,
    FlowMatching,
    Parameterisation,
    TrigFlow,
    V,
    default_noise,
)
from patchdiffusion.train.config import TrainConfig
from patchdiffusion.weighting import (
    EDMWeight,
    EpsWeight,
    FlowWeight,
    LossWeight,
    MinSNRWeight,
    P2Weight,
    ScoreWeight,
    SoftMinSNRWeight,
    VWeight,
    X0Weight,
)

T = TypeVar("T")

PRECONDS: dict[str, Parameterisation] = {
    "edm": EDM(),
    "eps": EpsVP(),
    "ddpm": EpsDDPM(),
    "v": V(),
    "x0": X0(),
    "flow": FlowMatching(),
    "trigflow": TrigFlow(),
}
NOISES: dict[str, Law] = {
    "lognormal": LogNormal(),
    "logit-normal": LogitNormal(),
    "loguniform": LogUniform(),
    "uniform-time": UniformTime(),
    "ddpm-steps": DDPMSteps(),
}
WEIGHTINGS: dict[str, LossWeight | None] = {
    "natural": None,
    "edm": EDMWeight(),
    "x0": X0Weight(),
    "eps": EpsWeight(),
    "v": VWeight(),
    "flow": FlowWeight(),
    "score": ScoreWeight(),
    "min-snr": MinSNRWeight(),
    "soft-min-snr": SoftMinSNRWeight(),
    "p2": P2Weight(),
}


def _one_of(table: Mapping[str, object]) -> Any:
    return tyro.conf.arg(metavar="{" + ",".join(table) + "}")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Types of the parts below; by default those of the recipe, or of the run that goes on."""

    precond: Annotated[str | None, _one_of(PRECONDS)] = None
    """What the network predicts. Noise law and loss weight follow unless they are given, too."""
    noise: Annotated[str | None, _one_of(NOISES)] = None
    """Law of the noise levels in training."""
    weighting: Annotated[str | None, _one_of(WEIGHTINGS)] = None
    """Weight of the loss at each noise level."""
    objective: Annotated[str | None, _one_of(recipes.OBJECTIVES)] = None
    """What is trained: a denoiser, or a model that samples in a few steps."""


def choose(config: TrainConfig, flags: Sequence[str]) -> TrainConfig:
    """A configuration with the types that the flags name.

    A word for a type that is there already changes nothing, so that a command can be repeated.
    Raises `ValueError` for unknown words.
    """
    words = parse_some(Parts, flags, default=Parts())
    config = recipes.with_objective(config, words.objective)
    precond = _pick("precond", PRECONDS, words.precond, config.precond)
    noise, weighting = config.noise, config.weighting
    if type(precond) is not type(config.precond):
        precond, weighting = _like(precond, config.precond), None
        if default_noise(precond) != default_noise(config.precond):
            noise = default_noise(precond)
    noise = _pick("noise", NOISES, words.noise, noise, config.noise)
    weight = _pick("weighting", WEIGHTINGS, words.weighting, weighting)
    if weight is not weighting and weight is not None:
        weight = _like(_like(weight, config.precond), precond)
    return replace(config, precond=precond, noise=noise, weighting=weight)


def _pick(name: str, table: Mapping[str, T], word: str | None, *known: T) -> T:
    """The value that a word names, or the first one without a word."""
    if word is None:
        return known[0]
    if word not in table:
        raise ValueError(f"unknown {name} {word!r}, allowed: {', '.join(table)}")
    return _known(table[word], *known)


def _known(wanted: T, *known: T) -> T:
    """The first known value of the type that is wanted, or else what is wanted itself."""
    return next((value for value in known if type(value) is type(wanted)), wanted)


def _like(new: Any, old: object) -> Any:
    """The same with what an old part has under the same name, such as sigma_data."""
    names = [f.name for f in fields(new) if hasattr(old, f.name)]
    return replace(new, **{name: getattr(old, name) for name in names})
