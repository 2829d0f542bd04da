"""Train diffusion models from scratch on your own images, on patches.

from patchdiffusion import train

run = train("photos", images=20_000)
images = run.sample(16)

Names are imported when they are first used, so that the command line answers at once.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from patchdiffusion.api import Run, auto, edit, train
    from patchdiffusion.cond import Cond, Position, Tape
    from patchdiffusion.data.prepare import prepare
    from patchdiffusion.denoiser import Denoiser, NetDenoiser, PatchDenoiser, as_denoiser
    from patchdiffusion.losses import Batch, DenoisingLoss, LossOut
    from patchdiffusion.model import load_model
    from patchdiffusion.nets.adm import ADMConfig
    from patchdiffusion.nets.dit import DiTConfig
    from patchdiffusion.nets.edm2 import EDM2Config
    from patchdiffusion.nets.own import allow
    from patchdiffusion.nets.unet import SongUNet, UNetConfig
    from patchdiffusion.noise import LogNormal
    from patchdiffusion.objectives import ConsistencyConfig, MeanFlowConfig
    from patchdiffusion.parameterisation import EDM
    from patchdiffusion.patches import coordinates, crop, random_crop
    from patchdiffusion.plans import (
        ConstantPixels,
        Group,
        PatchPlan,
        Progressive,
        Stochastic,
        Stratified,
    )
    from patchdiffusion.sampling.driver import sample
    from patchdiffusion.sampling.pipeline import Pipeline, SamplerConfig, load
    from patchdiffusion.solvers import euler, heun
    from patchdiffusion.solvers.schedules import karras
    from patchdiffusion.system.png import enlarge, grid, save_png, to_uint8
    from patchdiffusion.train.callbacks import Event
    from patchdiffusion.train.config import RunConfig, TrainConfig

    __version__: str

__all__ = [
    "auto",
    "train",
    "edit",
    "Run",
    "Event",
    "allow",
    "load",
    "prepare",
    "sample",
    "TrainConfig",
    "RunConfig",
    "SamplerConfig",
    "Pipeline",
    "PatchPlan",
    "Stratified",
    "Stochastic",
    "Progressive",
    "ConstantPixels",
    "Group",
    "crop",
    "random_crop",
    "coordinates",
    "Cond",
    "Position",
    "Tape",
    "Denoiser",
    "NetDenoiser",
    "PatchDenoiser",
    "as_denoiser",
    "EDM",
    "LogNormal",
    "karras",
    "Batch",
    "DenoisingLoss",
    "LossOut",
    "ConsistencyConfig",
    "MeanFlowConfig",
    "euler",
    "heun",
    "SongUNet",
    "ADMConfig",
    "DiTConfig",
    "EDM2Config",
    "UNetConfig",
    "load_model",
    "save_png",
    "grid",
    "enlarge",
    "to_uint8",
]

_FILES = {
    "api": "Run auto edit train",
    "cond": "Cond Position Tape",
    "data.prepare": "prepare",
    "denoiser": "Denoiser NetDenoiser PatchDenoiser as_denoiser",
    "losses": "Batch DenoisingLoss LossOut",
    "model": "load_model",
    "nets.own": "allow",
    "nets.adm": "ADMConfig",
    "nets.dit": "DiTConfig",
    "nets.edm2": "EDM2Config",
    "nets.unet": "SongUNet UNetConfig",
    "noise": "LogNormal",
    "objectives": "ConsistencyConfig MeanFlowConfig",
    "parameterisation": "EDM",
    "patches": "coordinates crop random_crop",
    "plans": "ConstantPixels Group PatchPlan Progressive Stochastic Stratified",
    "sampling.driver": "sample",
    "sampling.pipeline": "Pipeline SamplerConfig load",
    "solvers": "euler heun",
    "solvers.schedules": "karras",
    "system.png": "enlarge grid save_png to_uint8",
    "train.callbacks": "Event",
    "train.config": "RunConfig TrainConfig",
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """Import a public name from its file."""
    if name == "__version__":
        from importlib.metadata import version

        value: object = version("patchdiffusion")
    elif name in _FILE_OF:
        value = getattr(import_module(f"patchdiffusion.{_FILE_OF[name]}"), name)
    else:
        raise AttributeError(f"module 'patchdiffusion' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps the function `train` when the folder `train` is imported, which would replace it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, ModuleType) and name in _FILE_OF):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
