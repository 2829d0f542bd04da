"""Networks: pure modules (x, noise, cond) -> output, independent of diffusion."""

from patchdiffusion.nets.adm import ADMConfig
from patchdiffusion.nets.autoencoder import KLConfig
from patchdiffusion.nets.diffusers import DiffusersConfig
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.edm2 import EDM2Config
from patchdiffusion.nets.lego import LegoConfig
from patchdiffusion.nets.quantize import VQConfig
from patchdiffusion.nets.unet import UNetConfig
from patchdiffusion.nets.vae import VAEConfig

Network = (
    UNetConfig
    | DiTConfig
    | ADMConfig
    | EDM2Config
    | LegoConfig
    | DiffusersConfig
    | KLConfig
    | VQConfig
    | VAEConfig
)
"""The network configurations of `--network`; `UNetConfig().build(seed=0)` builds a network."""
