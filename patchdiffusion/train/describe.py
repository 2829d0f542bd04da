"""The choices and costs of a run in a few lines, printed before it starts."""

from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

import torch

from patchdiffusion.data.mirror import mirror_line
from patchdiffusion.data.pack import CAPTIONS
from patchdiffusion.data.summary import data_lines
from patchdiffusion.objectives.base import Told, stages_of
from patchdiffusion.patches import size_name
from patchdiffusion.system import families
from patchdiffusion.system.text import counted, share
from patchdiffusion.train.folder import check_disk
from patchdiffusion.train.log import quantity
from patchdiffusion.train.preview import reads_captions
from patchdiffusion.train.setup import Training

MANY_TOKENS = 1024
"""Tokens of an image above which attention takes most of the time, and larger patches are advised.
"""


def describe(training: Training) -> None:
    """Print data, network, objective, plan and cost of a run.

    Raises `ValueError` if the disk is too full.
    """
    disk = check_disk(
        training.folder,
        training.parameters,
        training.run.keep,
        profiles=len(training.config.ema.profiles),
        snapshots=training.config.ema.snapshots,
    )
    labels = bool(training.config.task.classes(training.config, training.pack))
    for line in data_lines(training.pack, labels=labels):
        training.log.say(line)
    if texts := _texts(training):
        training.log.say(f"captions  {texts}")
    if training.config.data.augment.p == 0 and len(training.canvas) > 1:
        training.log.say(mirror_line(training.pack, training.config.data.flip))
    for name, text in (
        ("network", _network(training)),
        ("training", _training(training)),
        *(("", part.told) for part in stages_of(training.objective) if isinstance(part, Told)),
        ("patches", _patches(training)),
        ("optimizer", _optimizer(training)),
        ("previews", _previews(training)),
        ("length", _length(training, disk)),
    ):
        training.log.say(f"{name:<10}{text}")
    tokens = training.config.network.num_tokens(training.canvas)
    if rounding := training.plan.rounding:
        one = len(training.plan.groups) == 1
        fewer = (
            "--network.patch with smaller sides" if tokens else "--network.mult with fewer levels"
        )
        hint = f"; {fewer} allows smaller ones" if one else ""
        training.log.say(f"{'warning: ' if one else '          '}{rounding}{hint}")
    if tokens > MANY_TOKENS:
        training.log.say(
            f"warning: {tokens:,} tokens per image are many: attention costs with their square; "
            "--network.patch with larger sides makes them fewer"
        )


def _network(training: Training) -> str:
    team, shared = training.team, ""
    if team.size > 1:
        shared = f" each, {team.size} processes" + (", sharded" if training.run.shard else "")
    if training.run.shard_experts:
        shared += f" with {training.held_parameters / 1e6:.2f}M parameters each"
    network, cut = training.config.network, ""
    if tokens := network.num_tokens(training.canvas):
        cut = f"{counted(tokens, 'token')} of {size_name(network.token_size)} per image, "
    adapter, trained = training.config.adapter, ""
    if not adapter.trains_all:
        count = sum(p.numel() for p in training.network.parameters() if p.requires_grad)
        trained = f", {count:,} of them trained by the adapter {families.word(type(adapter))}"
    rest = training.training_share
    reduced = f", {rest:.2f} of it in training" if rest < 0.995 else ""
    return (
        f"{families.word(type(network))}, {cut}"
        f"{training.parameters / 1e6:.2f}M parameters{trained}, {training.macs / 1e9:.3g} GMAC per "
        f"image{reduced}; "
        f"{training.precision} on {training.device}, "
        f"{counted(torch.get_num_threads(), 'thread')}{shared}; "
        f"{training.engine['kernels']}"
    )


def _texts(training: Training) -> str:
    """Captions of the training images, and how they are used; "" if there are none."""
    pack, config = training.pack, training.config
    total = len(pack.train)
    if pack.arrays.get(CAPTIONS) is None:
        return ""
    texts = [text for i in pack.train.tolist() if (text := pack.captions[i])]
    has = share(len(texts), total, "image", "has one", "have one")
    if not reads_captions(config):
        return f"{has}, which are not used: --captions bytes trains on them"
    parts = [in_words(c) for c in config.conditioners if c.reads_prompts]
    without = total - len(texts)
    if without:
        parts.append(f"{counted(without, 'image')} without are trained without a text")
    cut = sum(c.cut(texts) for c in config.conditioners if c.reads_prompts)
    if cut:
        parts.append(f"{counted(cut, 'caption')} longer than that cut")
    return ", ".join([has, *parts])


def _training(training: Training) -> str:
    config = training.config
    task = families.word(type(config.task))
    parts = [
        f"{task} by {config.task.told()}".removesuffix(" by ")
        if config.task.own_loss
        else f"{task} by {in_words(config.objective)}",
        *(in_words(addition) for addition in config.additions),
        *(f"conditioned by {in_words(conditioner)}" for conditioner in config.conditioners),
    ]
    if config.network.makes == "denoiser":
        parts.append(f"{in_words(config.precond)}, noise {in_words(config.noise)}")
    if config.data.augment.p:
        parts.append(f"augmented with probability {config.data.augment.p:g}")
    named = ["labels"] * bool(config.network.num_classes) + ["texts"] * reads_captions(config)
    if named and config.label_dropout:
        parts.append(f"{config.label_dropout:.0%} of the {' and '.join(named)} dropped")
    return ", ".join(parts)


def _patches(training: Training) -> str:
    config, forecast = training.config, training.forecast
    word = families.word(type(config.patches))
    stages = training.plan.stages
    if len(stages) > 1:
        parts = []
        for start, kinds in stages:
            since = f" from {quantity(start * config.images)}" if start else ""
            parts.append(forecast.names(kinds) + since)
        sizes = ", then ".join(parts)
    else:
        sizes = " + ".join(group.name for group in training.plan.groups)
    cost = training.plan.cost(clock=config.clock).step
    return f"{word}: {sizes}; a step costs {cost:.2f} times one of whole images"


def _optimizer(training: Training) -> str:
    config, optim = training.config, training.config.optim
    return (
        f"{families.word(type(optim))}, learning rate {optim.lr:g} "
        f"({families.word(type(optim.schedule))}), batch {counted(config.batch, 'image')}"
    )


def _previews(training: Training) -> str:
    preview, count = training.config.preview, training.num_previews
    share = f"; {training.forecast.share(count):.0%} of the operations" * bool(
        training.forecast.preview
    )
    held_out = min(preview.held_out, len(training.pack.heldout))
    grid, held = counted(preview.grid, "image"), counted(held_out, "held-out image")
    return f"{count} of {grid}, and of {held}{share}"


def _length(training: Training, disk: float) -> str:
    config = training.config
    operations = training.forecast.left(0.0)
    return (
        f"{quantity(config.images)} {config.clock}, about {counted(training.total_steps, 'step')}, "
        f"{operations:.2g} operations; up to {disk / 1e9:.2g} GB of disk in {training.folder}"
    )


def in_words(record: Any) -> str:
    """Word of a member of a family with the fields that differ from their defaults."""
    word = families.word(type(record))
    changed = [
        f"{field.name.replace('_', ' ')} {_value(getattr(record, field.name))}"
        for field in fields(record)
        if getattr(record, field.name) != _default(field)
    ]
    return word + (f" ({', '.join(changed)})" if changed else "")


def _value(value: Any) -> str:
    if is_dataclass(value):
        return in_words(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default
