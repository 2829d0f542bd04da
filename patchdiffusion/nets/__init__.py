"""Networks: pure modules (x, noise, cond) -> output, independent of diffusion."""

from patchdiffusion.nets.adm import ADMConfig
from patchdiffusion.nets.transformer import TransformerConfig
from patchdiffusion.nets.unet import UNetConfig

Network = UNetConfig | TransformerConfig | ADMConfig
"""The network configurations of `--network`; `UNetConfig().build(seed=0)` builds a network."""
