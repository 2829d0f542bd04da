"""Settings of training on captions, on top of any recipe."""

from dataclasses import replace

from patchdiffusion.conditioners import ConditionerUnion
from patchdiffusion.conditioners.captions import CaptionBytes
from patchdiffusion.conditioners.encoded import CaptionTokens
from patchdiffusion.nets.text import ContextShape, NoText, Text
from patchdiffusion.system import families
from patchdiffusion.train.config import TrainConfig


def with_captions(config: TrainConfig, encoder: str) -> TrainConfig:
    """Configuration whose network reads captions, by the word or the path of a text encoder.

    A word such as bytes is one inside the network, trained with it; a path is a frozen one. What
    trains with the same encoder already is unchanged. Raises `ValueError` for a network that reads
    no texts, and for a path without an encoder.
    """
    there = [c for c in config.conditioners if c.reads_prompts]
    others = tuple(c for c in config.conditioners if not c.reads_prompts)
    network = config.network
    if not isinstance(network, ContextShape):
        word = families.word(type(network))
        raise ValueError(
            f"network {word} reads no captions; use --network unet, adm, edm2, dit or lego"
        )
    inside = {w: member for w, member in families.words(Text).items() if member is not NoText}
    if encoder in inside:
        if type(network.text) is inside[encoder] and there:
            return config
        return replace(
            config,
            network=replace(network, text=inside[encoder](), context=0),
            conditioners=(*others, CaptionBytes()),
        )
    try:
        frozen: ConditionerUnion = CaptionTokens.of(encoder)
    except ValueError as error:
        raise ValueError(f"--captions is {', '.join(inside)} or a text encoder; {error}") from error
    if any(isinstance(c, CaptionTokens) and c.path == frozen.path for c in there):
        return config
    return replace(
        config,
        network=replace(network, text=NoText(), context=frozen.features),
        conditioners=(*others, frozen),
    )
