"""The configuration that adapts a trained model to other images."""

from dataclasses import replace

from patchdiffusion.data.pack import Pack
from patchdiffusion.model import ModelConfig
from patchdiffusion.nets.adapters import AdapterConfig
from patchdiffusion.train.config import TrainConfig

SHARE = 0.1
"""Length of an adaptation relative to that of a run from scratch."""


def adapting(
    config: TrainConfig, model: ModelConfig, pack: Pack, adapter: AdapterConfig
) -> TrainConfig:
    """The configuration of a recipe, changed to adapt a model to a pack by an adapter.

    Network, parameterisation, noise law and objective are those of the model. Raises `ValueError`
    for images that do not fit it.
    """
    check_same_data(pack, model)
    classes = 0
    if model.network.num_classes:
        classes = len(pack.classes)
        if not classes:
            raise ValueError(
                f"the model has classes, and {pack.name} has none; put the images into a folder of "
                "their own, the name of their class, inside of the one that is given"
            )
    others = bool(classes) and pack.classes != model.classes
    concepts = 0 if others else model.network.concepts
    config = replace(
        config,
        network=replace(model.network, num_classes=classes, concepts=concepts),
        precond=model.precond,
        noise=model.noise,
        objective=model.objective,
        conditioners=model.conditioners,
        images=round(config.images * SHARE),
    )
    return replace(adapter, classes=others).prefers(config)


def check_same_data(pack: Pack, model: ModelConfig) -> None:
    """Raise `ValueError` for images of another size or kind than those of the model."""
    if tuple(pack.images.shape[1:-1]) != model.canvas or pack.space.word != model.space.word:
        raise ValueError(
            f"{pack.name} has {pack.space.word} of {_size(pack)}, and the model was trained on "
            f"{model.space.word} of {'x'.join(map(str, model.canvas))}"
        )


def _size(pack: Pack) -> str:
    return "x".join(map(str, pack.images.shape[1:-1]))
