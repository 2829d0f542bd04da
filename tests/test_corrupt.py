"""Wrong labels and captions: their number, their law, and that every rank sees the same."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from captioned import joined, texts, with_bytes, with_words
from commands import refuses
from sameruns import check_resumed

from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.losses import DenoisingLoss
from patchdiffusion.objectives import ContrastConfig, CorruptionConfig
from patchdiffusion.objectives.base import Annotations, annotated
from patchdiffusion.train.setup import Training

__all__ = ["joined", "texts"]  # fixtures

SYMMETRIC = CorruptionConfig(share=0.3)
SWAP = CorruptionConfig(kind="swap", share=0.4)


def said(count: int = 5000) -> Annotations:
    """Images of classes of different frequency, of which some have no label and some are held."""
    classes = np.random.default_rng(0).choice(5, count, p=(0.5, 0.25, 0.15, 0.1, 0.0))
    labels = torch.from_numpy(classes)
    labels[::50] = -1
    captions = [None if i % 3 == 0 else f"text {i % 7}" for i in range(count)]
    train = torch.arange(count)[torch.arange(count) % 10 != 0]
    return Annotations(train=train, classes=tuple("abcde"), labels=labels, captions=captions)


def labels_of(given: Annotations) -> torch.Tensor:
    assert given.labels is not None
    return given.labels


# ---- The law ----


@pytest.mark.parametrize("share", [0.025, 0.075, 0.3, 1.0])
def test_exactly_the_share_gets_another_class_by_the_prior(share: float) -> None:
    """Nothing keeps its class by chance, so that the rate is not share (K - 1) / K."""
    given = said()
    old, new = labels_of(given), labels_of(replace(SYMMETRIC, share=share).annotate(given))
    changed = old != new
    labeled = given.train[old[given.train] >= 0]
    assert int(changed.sum()) == round(share * len(labeled))
    held = torch.ones_like(changed)
    held[labeled] = False
    assert not (changed & held).any() and (new[changed] >= 0).all()
    if share == 1.0:
        prior = torch.bincount(old[labeled], minlength=5) / len(labeled)
        for c in range(4):
            found = torch.bincount(new[changed & (old == c)], minlength=5).double()
            law = prior.double().clone()
            law[c] = 0
            error = (law / law.sum() * (1 - law / law.sum()) / found.sum()).sqrt()
            assert (abs(found / found.sum() - law / law.sum()) <= 4 * error).all()


def test_asymmetric_changes_stay_within_their_classes() -> None:
    given = said()
    config = CorruptionConfig(kind="asymmetric", share=0.5, classes=(1, 3))
    old, new = labels_of(given), labels_of(config.annotate(given))
    changed = old != new
    can = torch.isin(old[given.train], torch.tensor([1, 3]))
    assert int(changed.sum()) == round(0.5 * int(can.sum()))
    assert torch.equal(new[changed], 4 - old[changed])  # 1 becomes 3, and 3 becomes 1


def test_pairs_exchange_what_is_said_of_them() -> None:
    given = said()
    found = SWAP.annotate(given)
    old, new, sources = labels_of(given), labels_of(found), found.sources
    assert sources is not None
    other = (sources != torch.arange(len(sources))).nonzero()[:, 0]
    told = [i for i in given.train.tolist() if int(old[i]) >= 0 or given.captions[i]]
    assert len(other) == 2 * round(0.4 * len(told) / 2)
    assert torch.equal(sources[sources], torch.arange(len(sources)))
    assert torch.equal(new, old[sources])
    assert all(
        (int(old[i]), given.captions[i]) != (int(new[i]), given.captions[int(sources[i])])
        for i in other.tolist()
    )
    assert Counter(new.tolist()) == Counter(old.tolist())


def test_changes_are_those_of_the_seed_and_the_image() -> None:
    given = said()
    again = labels_of(SYMMETRIC.annotate(given))
    assert torch.equal(labels_of(SYMMETRIC.annotate(given)), again)
    assert not torch.equal(labels_of(replace(SYMMETRIC, seed=1).annotate(given)), again)
    shuffled = replace(given, train=given.train.flip(0))
    assert torch.equal(labels_of(SYMMETRIC.annotate(shuffled)), again)
    twice = annotated([SYMMETRIC, replace(SWAP, seed=2)], given)
    assert torch.equal(labels_of(twice), labels_of(replace(SWAP, seed=2).annotate(replace(
        given, labels=again))))  # fmt: skip


def test_the_neutral_share_changes_nothing() -> None:
    given = said()
    for config in (SYMMETRIC, SWAP, CorruptionConfig(kind="asymmetric", classes=(0, 1))):
        assert replace(config, share=0.0).annotate(given) is given
    assert ContrastConfig().annotate(given) is given
    loss = DenoisingLoss()
    assert SYMMETRIC.add(loss, None) is loss  # type: ignore[arg-type]


def test_what_cannot_be_corrupted_is_refused() -> None:
    given, plain = said(), replace(said(), labels=None, captions=[None] * 5000)
    for changes, parts in (
        ({"share": 1.5}, ("share", 1.5)),
        ({"kind": "other"}, ("kind", "other")),
        ({"kind": "asymmetric"}, ("classes", "asymmetric")),
        ({"classes": (1, 2)}, ("classes", "symmetric")),
        ({"kind": "asymmetric", "classes": (1, 1)}, ("classes", "at least 2")),
    ):
        with refuses(*parts):
            replace(SYMMETRIC, **changes)
    with refuses("labels", "symmetric"):
        SYMMETRIC.annotate(plain)
    with refuses("classes", 5):
        CorruptionConfig(kind="asymmetric", classes=(0, 5)).annotate(given)
    with refuses("pairs", "share"):
        SWAP.annotate(replace(plain, captions=["the same"] * 5000))
    with refuses("2 classes"):
        SYMMETRIC.annotate(replace(given, labels=torch.zeros(5000, dtype=torch.int64)))


# ---- In a run ----


def one_batch(training: Training) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, labels and tokens of the crops of the first step, after conditioners."""
    (group, *_) = training.plan.draw(seed=3, step=0)
    feed, module = training.stepper.feed, training.stepper.module
    batch, draws = feed.batch(group, step=0, position=0, first=0, chunk=range(group.count))
    batch = module.change(batch, draws)  # pyright: ignore[reportCallIssue]
    cond = batch.cond
    tokens = cond.tokens if cond.tokens is not None else cond.context
    assert cond.labels is not None and tokens is not None
    return batch.index, cond.labels, tokens


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_training_sees_the_changed_captions(kind: str, texts: Path, tmp_path: Path) -> None:
    """Also those of a frozen encoder, whose stored tokens remain those of the data."""
    config = tiny.config(texts)
    config = with_bytes(config) if kind == "bytes" else with_words(config, tmp_path / "encoder")
    corrupted = replace(config, additions=(replace(SWAP, share=1.0),))
    index, labels, tokens = one_batch(tiny.training(corrupted, tmp_path))
    own = one_batch(tiny.training(config, tmp_path))
    assert torch.equal(own[0], index)
    pack = prepare_data(config.data)
    given = Annotations(
        train=pack.train, classes=pack.classes, labels=pack.labels, captions=pack.captions
    )
    found = replace(SWAP, share=1.0).annotate(given)
    assert found.sources is not None and found.labels is not None
    assert torch.equal(labels, found.labels[index])
    for i in range(len(index)):
        text, former = (pack.captions[int(j)] for j in (found.sources[index[i]], index[i]))
        if text == former:
            assert torch.equal(tokens[i], own[2][i])
        elif kind == "bytes":
            told = bytes(tokens[i].tolist()).rstrip(b"\0").decode()
            assert told == (text or "")[:16]
        else:
            assert not torch.equal(tokens[i], own[2][i])


def test_a_corrupted_run_is_resumed_and_says_what_was_changed(images: Path, tmp_path: Path) -> None:
    config = tiny.config(images, additions=(SYMMETRIC,))
    run = check_resumed(config, tmp_path)
    pack = prepare_data(config.data)
    facts = json.loads((run / "model" / "corruption.json").read_text())
    assert len(facts["labels"]) == round(0.3 * len(pack.train))
    assert pack.labels is not None
    assert all(int(pack.labels[int(i)]) != new for i, new in facts["labels"].items())
    clean = tiny.run(replace(config, additions=()), tmp_path / "clean")
    neutral = replace(config, additions=(replace(SYMMETRIC, share=0.0),))
    none = tiny.run(neutral, tmp_path / "none")
    assert tiny.weights(none) == tiny.weights(clean) != tiny.weights(run)
