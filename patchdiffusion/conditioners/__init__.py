"""Conditioners: conditions made from the images in training, and from what is wished for later."""

from patchdiffusion.conditioners.reconstruction import Reconstruction

ConditionerUnion = Reconstruction
"""The conditioners of `--conditioners` and of model files."""
