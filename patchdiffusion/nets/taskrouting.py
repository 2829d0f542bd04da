"""The rules of `--network.task-routing`: which features blocks see at which noise level."""

from patchdiffusion.nets.channelmask import ChannelMasks
from patchdiffusion.nets.gates import NoTaskRouting
from patchdiffusion.nets.switch import SwitchGating

TaskRouting = NoTaskRouting | ChannelMasks | SwitchGating
"""Rules for the features that blocks see at a noise level."""
