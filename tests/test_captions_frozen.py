"""Captions by a frozen text encoder: computed once, and the same encoder when it is sampled."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from captioned import FEW, SHORT, WordTokens, joined, texts, with_words, write_captioned
from commands import Capture, fails, names, refuses, works
from encoders import WORDS, little_encoder, look_alike, write_look_alike

from patchdiffusion import load
from patchdiffusion.conditioners.encoded import _opened
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.metrics.evaluate import Evaluation
from patchdiffusion.metrics.options import EvaluationConfig
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.train.report import read_log

__all__ = ["joined", "texts"]  # fixtures


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    """A run with a frozen encoder, on data of its own."""
    write_captioned(tmp_path / "images", count=41)  # another number than that of other tests
    _opened.cache_clear()
    config = with_words(tiny.config(tmp_path / "images"), tmp_path / "encoder")
    return tiny.run(config, tmp_path / "run")


def test_tokens_are_computed_once(tmp_path: Path) -> None:
    """They lie in the pack, equal texts once."""
    images = write_captioned(tmp_path / "images", count=30)  # of no other test
    config = with_words(tiny.config(images), tmp_path / "encoder")
    WordTokens.opened.clear()
    for _ in range(2):
        tiny.training(config, tmp_path / "run")
        assert len(WordTokens.opened) == 1
    pack = prepare_data(config.data)
    (folder,) = pack.path.glob("text-*[!k]")
    spans, rows = np.load(folder / "spans.npy"), np.load(folder / "rows.npy")
    assert len(spans) == 5 and rows.max() == 4 and len(rows) == len(pack)
    assert (folder / "tokens.bin").stat().st_size == spans[-1, 1] * 5 * 2
    (folder / "tokens.bin").write_bytes(b"")  # damaged: made again
    tiny.training(config, tmp_path / "run")
    assert len(WordTokens.opened) == 2


def test_another_encoder_is_refused(frozen: Path, tmp_path: Path, capsys: Capture) -> None:
    pipeline = load(frozen)
    expected = pipeline.sample(2, prompts="a red letter A", steps=2)
    encoder = tmp_path / "encoder"
    write_look_alike(encoder, seed=1)
    digest = look_alike(encoder).digest
    _opened.cache_clear()  # as in another process
    told = fails(capsys, "sample", frozen, *FEW, "--prompt", "a red letter A")
    assert names(told, str(encoder), digest)
    write_look_alike(encoder)
    _opened.cache_clear()
    assert np.array_equal(load(frozen).sample(2, prompts="a red letter A", steps=2), expected)
    shutil.rmtree(encoder)
    _opened.cache_clear()
    assert str(encoder) in fails(capsys, "sample", frozen, *FEW, "--prompt", "a")
    works(capsys, "sample", frozen, *FEW)  # without a text it is not needed


def test_features_that_do_not_fit_are_refused(texts: Path, tmp_path: Path) -> None:
    config = with_words(tiny.config(texts), tmp_path / "encoder")
    network = replace(config.network, context=7)  # pyright: ignore[reportCallIssue]
    with refuses("network.context", 5, 7):
        tiny.training(replace(config, network=network), tmp_path / "run")
    with refuses("caption-tokens", "--captions"):
        replace(config, network=replace(network, context=0))  # pyright: ignore[reportCallIssue]


def test_evaluation_has_texts_of_the_data(frozen: Path, tmp_path: Path) -> None:
    """Held-out losses are those of the preview; an image gives its label and its text."""
    pipeline, pack = load(frozen), prepare_data(DataConfig(path=str(tmp_path / "images")))
    config = EvaluationConfig(samples=6, held_out=2, sampler=SamplerConfig(steps=1))
    evaluation = Evaluation(pack, config, None, missing="none")
    (preview,) = [row for row in read_log(frozen) if row["kind"] == "preview"]
    loss = evaluation.of_model(pipeline)["held_out"]["loss"]
    assert loss == pytest.approx(preview["held_out"]["loss"], rel=1e-6)
    prompts, labels = evaluation.prompts(pipeline, range(6)), evaluation.labels(pipeline)
    assert prompts is not None and labels is not None and pack.labels is not None
    pairs = set(zip(pack.captions, pack.labels.tolist(), strict=True))
    assert set(zip(prompts, labels, strict=True)) <= pairs
    assert "captions" in evaluation.card(pipeline)


def test_real_encoders_are_named_by_their_folder(
    texts: Path, tmp_path: Path, capsys: Capture
) -> None:
    """From the command line to samples, with a little CLIP."""
    folder = little_encoder(tmp_path / "clip")
    flags = (*SHORT.split(), "--captions", folder, "--conditioners.caption-tokens.length", 8)
    long = (*flags[:-1], 13)
    assert names(fails(capsys, "train", texts, *long, "--out", tmp_path / "x"), 13, 12)
    works(capsys, "train", texts, *flags, "--out", tmp_path / "run")
    works(capsys, "train", tmp_path / "run", "--images", "4")
    (conditioner,) = load(tmp_path / "run").model.config.conditioners
    assert conditioner.fills == ("context", "context_mask")
    works(capsys, "sample", tmp_path / "run", *FEW, "--prompt", " ".join(WORDS[:4]))
