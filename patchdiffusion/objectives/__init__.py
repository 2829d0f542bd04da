"""What a network is trained for: plain denoising, few-step models, and wrappers around both."""

from patchdiffusion.objectives.consistency import ConsistencyConfig
from patchdiffusion.objectives.contrast import ContrastConfig
from patchdiffusion.objectives.ctm import CTMConfig
from patchdiffusion.objectives.denoising import DenoisingConfig
from patchdiffusion.objectives.meanflow import MeanFlowConfig

ObjectiveUnion = DenoisingConfig | ConsistencyConfig | MeanFlowConfig | CTMConfig
"""Those that a run may be trained for and a model file may name."""

AdditionUnion = ContrastConfig
"""Those that a run may put on top of its objective."""
