"""Objectives that are not plain denoising, and wrappers that change what one trains on."""

from patchdiffusion.objectives.consistency import ConsistencyConfig
from patchdiffusion.objectives.meanflow import MeanFlowConfig
from patchdiffusion.parameterisation import Parameterisation, Precond

FewStep = ConsistencyConfig | MeanFlowConfig
"""The objectives of few-step models."""


def parameterisation(objective: FewStep | None, precond: Parameterisation) -> Precond:
    """How the network of a model is preconditioned, by what it is trained for."""
    return precond if objective is None else objective.precond(precond)


def denoises(objective: FewStep | None) -> bool:
    """Whether a model trained for this is a denoiser, so that solvers work and errors tell."""
    return objective is None or objective.denoises
