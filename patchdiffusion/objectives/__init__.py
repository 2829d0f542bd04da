"""Training objectives: denoising, few-step models, and additions to both."""

from patchdiffusion.objectives.align import AlignConfig
from patchdiffusion.objectives.boot import BootConfig
from patchdiffusion.objectives.bricks import BricksConfig
from patchdiffusion.objectives.consistency import ConsistencyConfig
from patchdiffusion.objectives.contrast import ContrastConfig
from patchdiffusion.objectives.corrupt import CorruptionConfig
from patchdiffusion.objectives.ctm import CTMConfig
from patchdiffusion.objectives.denoising import DenoisingConfig
from patchdiffusion.objectives.layersync import LayerSyncConfig
from patchdiffusion.objectives.meanflow import MeanFlowConfig
from patchdiffusion.objectives.mmd import MMDConfig
from patchdiffusion.objectives.patchforcing import PatchForcingConfig
from patchdiffusion.objectives.progressive import ProgressiveConfig
from patchdiffusion.objectives.selfdistill import SelfDistillationConfig
from patchdiffusion.objectives.selfflow import SelfFlowConfig

ObjectiveUnion = (
    DenoisingConfig
    | ConsistencyConfig
    | MeanFlowConfig
    | CTMConfig
    | PatchForcingConfig
    | SelfFlowConfig
    | BricksConfig
    | BootConfig
    | MMDConfig
    | ProgressiveConfig
)
"""The objectives of `--objective` and of model files."""

AdditionUnion = (
    ContrastConfig | CorruptionConfig | SelfDistillationConfig | AlignConfig | LayerSyncConfig
)
"""The additions of `--additions`."""
