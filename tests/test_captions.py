"""Captions as a condition, from the files to samples: by bytes, and by a frozen encoder."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sameruns
import tiny
import torch
from captioned import FEW, SHORT, caption_of, joined, texts, with_bytes, with_words, write_captioned
from commands import Capture, fails, names, refuses, works

from patchdiffusion import Pipeline, TrainConfig, load
from patchdiffusion.cond import Cond
from patchdiffusion.conditioners.base import Wish
from patchdiffusion.conditioners.captions import CaptionBytes, byte_tokens
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.prepare import prepare, prepare_data
from patchdiffusion.guidance.cfg import ClassifierFree
from patchdiffusion.losses import Batch
from patchdiffusion.recipes.captions import with_captions
from patchdiffusion.rng import Draws
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.train import loop
from patchdiffusion.train.report import read_log
from patchdiffusion.train.setup import Training

__all__ = ["joined", "texts"]  # fixtures


@pytest.fixture(scope="module")
def run(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that reads bytes."""
    return tiny.run(with_bytes(tiny.config(texts)), tmp_path_factory.mktemp("runs") / "bytes")


Way = Callable[[TrainConfig, Path], TrainConfig]
WAYS: dict[str, Way] = {
    "bytes": lambda config, _: with_bytes(config),
    "frozen": lambda config, folder: with_words(config, folder / "encoder"),
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


# ---- Bytes ----


def test_texts_are_cut_between_characters() -> None:
    table = byte_tokens(["abc", None, "", "a\u20ac\u20ac", "e\u0301t"], 5)
    rows = [bytes(row.tolist()).rstrip(b"\0").decode() for row in table]
    assert rows == ["abc", "", "", "a\u20ac", "\u00e9t"]  # composed, as macOS does not write it
    assert table.dtype == torch.uint8 and table.shape == (5, 5)
    assert CaptionBytes(length=5).cut(["abcdef", None, "abcde"]) == 1
    with refuses("length", 0):
        CaptionBytes(length=0)


# ---- Training ----


def batches(training: Training) -> list[tuple[Batch, Draws]]:
    """A batch of each kind of crop."""
    kinds = enumerate(training.plan.groups)
    return [
        training.stepper.feed.batch(group, step=n, position=0, first=0, chunk=range(3))
        for n, group in kinds
    ]


@each_way
def test_a_text_goes_with_its_image(way: Way, texts: Path, tmp_path: Path) -> None:
    """Whatever the crop and whether it is mirrored: the text of its image, as it is sampled."""
    config = tiny.change(way(tiny.config(texts), tmp_path), {"data.flip": True})
    training = tiny.training(config, tmp_path / "run")
    pack, (conditioner,) = training.pack, training.config.conditioners
    for batch, draws in batches(training):
        assert batch.flip.any() or len(batch.index) < 4
        given = training.stepper.module.change(batch, draws).cond  # pyright: ignore[reportCallIssue]
        captions = tuple(pack.captions[i] for i in batch.index.tolist())
        wish = Wish(torch.arange(3), training.canvas, prompts=captions)
        made = conditioner.given(wish)
        if made.tokens is not None:
            assert torch.equal(given.tokens, made.tokens)
            continue
        assert made.context is not None and made.context_mask is not None
        length = given.context.shape[1]  # of the longest caption
        assert length == 4 and not made.context_mask[:, length:].any()
        assert torch.equal(given.context, made.context[:, :length])
        assert torch.equal(given.context_mask, made.context_mask[:, :length])


@each_way
def test_a_run_is_resumed_to_the_bit(way: Way, texts: Path, tmp_path: Path) -> None:
    sameruns.check_resumed(way(tiny.config(texts, steps=3), tmp_path), tmp_path)


def test_texts_change_what_is_learned(texts: Path, tmp_path: Path) -> None:
    """Images without one are trained without a text, and dropping is label dropout."""
    config = with_bytes(tiny.config(texts))
    training = tiny.training(config, tmp_path / "run")
    before = {n: p.detach().clone() for n, p in training.network.named_parameters()}
    for _ in range(3):
        loop.one_step(training)
    changed = {n for n, p in training.network.named_parameters() if not torch.equal(p, before[n])}
    assert {"text.blocks.0.layer1.bias", "readers.mid_0.proj_out.weight"} <= changed
    assert training.model_config.unconditional
    never = replace(config, label_dropout=0.0)
    assert not never.task.unconditional(never, training.pack)  # all images have a label
    never = replace(never, network=replace(never.network, num_classes=0))  # pyright: ignore[reportCallIssue]
    assert never.task.unconditional(never, training.pack)  # some have no text


def test_previews_have_texts_of_held_out_images(run: Path, texts: Path) -> None:
    pack = prepare_data(DataConfig(path=str(texts)))
    expected = [pack.captions[i] or "" for i in pack.heldout[:2].tolist()]
    (facts,) = [row for row in read_log(run) if row["kind"] == "preview"]
    assert facts["prompts"] == expected
    (grid,) = (run / "samples").glob("*.png")
    assert json.loads(caption_of(grid, "prompts") or "") == expected


def test_operations_of_texts_are_counted(texts: Path, tmp_path: Path) -> None:
    plain = tiny.training(tiny.config(texts), tmp_path / "a")
    short = tiny.training(with_bytes(tiny.config(texts)), tmp_path / "b")
    long = tiny.training(with_bytes(tiny.config(texts), length=64), tmp_path / "c")
    assert plain.macs < short.macs < long.macs


# ---- Sampling ----


def test_prompts_are_used_in_turn(run: Path) -> None:
    pipeline = load(run)
    some = pipeline.sample(4, prompts=["red", "blue"], classes=["a"], steps=2)
    for i, text in enumerate(["red", "blue", "red", "blue"]):
        alone = pipeline.sample(1, seed=i, prompts=text, classes=["a"], steps=2)
        np.testing.assert_allclose(alone[0].astype(int), some[i].astype(int), atol=1)
    empty = pipeline.sample(2, prompts=["", None], steps=2)
    assert np.array_equal(empty, pipeline.sample(2, steps=2))
    with refuses("prompts"):
        pipeline.sample(2, prompts=[], steps=2)


def alive(run: Path) -> Pipeline:
    """The model with noise for weights, so that texts matter."""
    pipeline = load(run)
    tiny.randomize(pipeline.model.network)
    return pipeline


def test_a_negative_text_is_what_guidance_leads_away_from(run: Path) -> None:
    pipeline = alive(run)

    def drawn(**settings: object) -> np.ndarray:
        return pipeline.sample(2, prompts="red", steps=2, **settings)  # pyright: ignore[reportArgumentType]

    plain = drawn(guidance=2.0)
    assert np.array_equal(drawn(guidance=2.0, negative=""), plain)
    away = drawn(guidance=2.0, negative="blurry")
    assert not np.array_equal(away, plain)
    assert np.array_equal(drawn(negative="blurry"), away)  # turns guidance on
    record = ClassifierFree(weight=2.0, negative="blurry")
    assert np.array_equal(drawn(guidance=record), away)
    assert not np.array_equal(drawn(guidance=replace(record, interval=(0.1, 1.0))), away)
    with refuses("negative", "blurry", "cfg", "none"):
        drawn(negative="blurry", guidance=1)
    with refuses("negative", "blurry", "autoguidance"):
        SamplerConfig().but(guidance="autoguidance", negative="blurry")


def test_models_without_texts_refuse_them(finished: Path) -> None:
    with refuses("prompts"):
        load(finished).sample(1, prompts="red")
    with refuses("negative", "blurry", "--captions"):
        load(finished).sample(1, negative="blurry")


def test_sample_writes_prompts(run: Path, tmp_path: Path, capsys: Capture) -> None:
    works(capsys, "sample", run, *FEW, "--prompt", "red", "\u00fcber", "--out", tmp_path / "a")
    written = [caption_of(f) for f in sorted((tmp_path / "a").glob("seed-*.png"))]
    assert written == ["red", "\u00fcber", "red"]
    assert json.loads(caption_of(tmp_path / "a" / "grid.png", "prompts") or "") == written[:2]
    lines = tmp_path / "lines.txt"
    lines.write_text("red\n\n\u00fcber\n")
    works(capsys, "sample", run, *FEW, "--prompts", lines, "--out", tmp_path / "b")
    assert tiny.digests(tmp_path / "a") == tiny.digests(tmp_path / "b")
    works(
        capsys, "sample", run, *FEW, "--prompt", "red", "--negative", "x", "--out", tmp_path / "c"
    )
    sampler = json.loads(caption_of(tmp_path / "c" / "grid.png", "sampler") or "")
    assert sampler["guidance"]["type"] == "ClassifierFree"
    assert sampler["guidance"]["negative"] == "x"


def test_samples_of_other_prompts_are_not_gone_on_with(
    run: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    works(capsys, "sample", run, *FEW, "--prompt", "red", "--out", out)
    (out / "unfinished.json").write_text(json.dumps({"prompts": ["blue"]}))
    assert "red" in fails(capsys, "sample", run, *FEW, "--prompt", "red", "--out", out)


def test_texts_that_cannot_be_used_are_one_line(
    run: Path, finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe")
    for given, parts in {
        ("--prompts", empty): ["--prompts", str(empty)],
        ("--prompts", binary): ["UTF-8", 0],
        ("--prompts", tmp_path / "none"): [str(tmp_path / "none")],
        ("--prompts", empty, "--prompt", "a"): ["--prompt", "--prompts"],
    }.items():
        assert names(fails(capsys, "sample", run, *FEW, *given), *parts)
    assert "without texts" in fails(capsys, "sample", finished, *FEW, "--prompt", "a")
    assert "captions" in fails(capsys, "sample", finished, *FEW, "--negative", "a")
    assert "--negative" in fails(capsys, "sample", run, "--negative-prompt", "a")


# ---- The command line of training ----


def test_captions_are_told_and_used_when_asked(
    texts: Path, tmp_path: Path, capsys: Capture
) -> None:
    told = works(capsys, "train", texts, *SHORT.split(), "--out", tmp_path / "plain")
    line = next(x for x in told.splitlines() if x.startswith("captions "))
    assert "--captions bytes" in line and "have one" in line
    flags = (*SHORT.split(), "--captions", "bytes", "--out", tmp_path / "run")
    more = ("--network.text.width", 8, "--network.text.depth", 1)
    more += ("--conditioners.caption-bytes.length", 10)
    told = works(capsys, "train", texts, *flags, *more)
    line = next(x for x in told.splitlines() if x.startswith("captions "))
    assert "without" in line and "cut" in line
    model = load(tmp_path / "run").model.config
    assert model.conditioners == (CaptionBytes(length=10),)
    assert model.network.reads >= {"tokens", "labels"}
    works(capsys, "train", texts, *flags, *more, "--images", "4")  # goes on with it
    assert tiny.history(tmp_path / "run")[-1][0] == 4
    told = works(capsys, "info", tmp_path / "run")
    assert "caption-bytes" in told and "tokens" in told


def test_any_network_that_reads_texts_takes_captions(
    texts: Path, tmp_path: Path, capsys: Capture
) -> None:
    small = "--network dit --network.width 16 --network.depth 1 --network.heads 2"
    small += " --network.text.width 8"
    few = " ".join(SHORT.split()[: SHORT.split().index("--network.base")])
    flags = (*few.split(), *small.split(), "--captions", "bytes", "--out", tmp_path / "dit")
    works(capsys, "train", texts, *flags)
    assert load(tmp_path / "dit").model.config.network.reads >= {"tokens"}
    wrong = ("train", texts, "--captions", "bytes", "--network", "lego", "--network.body", "unet")
    assert names(fails(capsys, *wrong), "body unet", "texts", "body transformer")
    wrong = ("train", "classifier", texts, "--captions", "bytes", "--dry-run")
    assert "captions" in fails(capsys, *wrong)


def test_captions_that_are_not_there_are_one_line(
    images: Path, texts: Path, tmp_path: Path, capsys: Capture
) -> None:
    told = fails(capsys, "train", images, "--captions", "bytes", "--out", tmp_path / "a")
    assert names(told, "captions", "captions.jsonl", "--captions")
    missing = tmp_path / "encoder"
    told = fails(capsys, "train", texts, "--captions", missing, "--out", tmp_path / "b")
    assert names(told, "bytes", str(missing), "does not exist")
    guided = ("--preview.guidance", 2, "--label-dropout", 0)
    every = write_captioned(tmp_path / "all", texts=("a",))
    flags = (*SHORT.split(), "--captions", "bytes", "--out", tmp_path / "c")
    told = fails(capsys, "train", every, *flags, *guided, "--network.num-classes", 0)
    assert names(told, "preview.guidance", "label_dropout")


def test_captions_of_a_table(tmp_path: Path) -> None:
    """The same texts in captions.jsonl are the same data; they are no names of classes."""
    one = write_captioned(tmp_path / "one" / "images")
    other = tmp_path / "other" / "images"
    shutil.copytree(one, other)
    lines = []
    for file in sorted(other.rglob("*.txt")):
        name = str(file.with_suffix(".png").relative_to(other))
        lines.append(json.dumps({"file_name": name, "text": file.read_text()}))
        file.unlink()
    (other / "captions.jsonl").write_text("\n".join(lines))
    packs = [prepare(folder, folder.parent / "pack", progress=False) for folder in (one, other)]
    assert packs[0].fingerprint == packs[1].fingerprint and packs[0].classes == ("a", "b")


def test_a_recipe_with_captions_is_the_same_twice(texts: Path) -> None:
    config = tiny.config(texts)
    once = with_captions(config, "bytes")
    assert with_captions(once, "bytes") == once
    assert Cond().tokens is None
