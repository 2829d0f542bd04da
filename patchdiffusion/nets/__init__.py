"""Networks: pure modules (x, noise, cond) -> output, independent of diffusion."""

from patchdiffusion.nets.adm import ADMConfig
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.unet import UNetConfig

Network = UNetConfig | DiTConfig | ADMConfig
"""The network configurations of `--network`; `UNetConfig().build(seed=0)` builds a network."""
