"""The configuration that teaches a few-step model a concept from a few images."""

from dataclasses import replace
from pathlib import Path

from patchdiffusion.data.pack import Pack
from patchdiffusion.model import ModelConfig
from patchdiffusion.nets.adapters import LoRA
from patchdiffusion.plans import WHOLE
from patchdiffusion.recipes.adapting import check_same_data
from patchdiffusion.system import families
from patchdiffusion.system.files import expanded
from patchdiffusion.train.concept import ConceptTask
from patchdiffusion.train.config import TrainConfig
from patchdiffusion.train.optimizers import AdamW

STEPS = 750
"""Optimizer steps, of which the last third has the echo."""


def teaching(config: TrainConfig, model: ModelConfig, pack: Pack, path: Path) -> TrainConfig:
    """The configuration of a recipe, changed to teach the model of a folder a concept.

    Network, parameterisation, noise law and objective are those of the model. Raises `ValueError`
    for a model that makes no images in few steps or cannot learn further classes, and for images
    that do not fit it.
    """
    network = model.network
    if not model.objective.few_step:
        raise ValueError(
            f"{path} is no few-step model, which learns a concept by this; distill one by "
            f"patchdiffusion distill {path} --objective meanflow, or adapt it by patchdiffusion "
            f"adapt {path} IMAGES"
        )
    if not network.learns_concepts:
        raise ValueError(
            f"the network of {path} is {families.word(type(network))}, which cannot learn further "
            "classes; allowed are unet, dit and lego"
        )
    check_same_data(pack, model)
    before = model.classes or tuple(str(label) for label in range(network.num_classes))
    name = Path(config.data.path).name.split(".")[0] or "concept"
    while name in before:
        name += "'"
    teacher = str(expanded(path).resolve()) if model.objective.denoises else None
    return replace(
        config,
        network=replace(
            network, num_classes=network.num_classes + 1, concepts=network.concepts + 1
        ),
        precond=model.precond,
        noise=model.noise,
        objective=model.objective,
        conditioners=(),
        additions=(),
        task=ConceptTask(teacher=teacher, names=(*before, name), classless=model.unconditional),
        adapter=LoRA(concept=True),
        patches=WHOLE,
        optim=AdamW(lr=1e-3, role_lr=(("embedding", 10.0),)),
        preview=replace(
            config.preview, guidance=1.0, distance=0, grid=min(config.preview.grid, 16)
        ),
        label_dropout=0.0,
        clock="steps",
        images=STEPS,
        batch=8,
    )
