"""Conditioners: conditions made from the images in training, and from what is wished for later."""

from patchdiffusion.conditioners.base import ConditionerConfig

ConditionerUnion = ConditionerConfig
"""The conditioners of `--conditioners` and of model files."""
