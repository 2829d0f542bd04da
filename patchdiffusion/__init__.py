"""Train diffusion models from scratch on your own images, on patches.

from patchdiffusion import auto, load, train

run = train(auto("photos"))
images = load(run).sample(16)
"""

from importlib.metadata import version

__version__ = version("patchdiffusion")

from patchdiffusion.cond import Cond, Position, Tape
from patchdiffusion.denoiser import Denoiser, NetDenoiser, PatchDenoiser, as_denoiser
from patchdiffusion.losses import Batch, DenoisingLoss, LossOut
from patchdiffusion.model import load_model
from patchdiffusion.nets.transformer import TransformerConfig
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
from patchdiffusion.recipes import auto
from patchdiffusion.sampling.driver import sample
from patchdiffusion.sampling.pipeline import Pipeline, SamplerConfig, load
from patchdiffusion.solvers import euler, heun
from patchdiffusion.solvers.schedules import karras
from patchdiffusion.system.png import enlarge, grid, save_png, to_uint8
from patchdiffusion.train.config import RunConfig, TrainConfig
from patchdiffusion.train.loop import train

__all__ = [
    "auto",
    "train",
    "load",
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
    "TransformerConfig",
    "UNetConfig",
    "load_model",
    "save_png",
    "grid",
    "enlarge",
    "to_uint8",
]
