"""Networks: pure modules (x, noise, cond) -> output that know nothing of diffusion."""

from patchdiffusion.nets.transformer import TransformerConfig
from patchdiffusion.nets.unet import UNetConfig

Network = UNetConfig | TransformerConfig
"""Configurations of networks; each builds its own: `UNetConfig().build(seed=0)`."""
