"""Conditioners: conditions made from the images in training, and from what is wished for later."""

from patchdiffusion.conditioners.captions import CaptionBytes
from patchdiffusion.conditioners.encoded import CaptionTokens
from patchdiffusion.conditioners.reconstruction import Reconstruction

ConditionerUnion = CaptionBytes | CaptionTokens | Reconstruction
"""The conditioners of `--conditioners` and of model files."""
