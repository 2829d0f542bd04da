"""Frozen text encoders: those of transformers, and the promises that hold for any."""

from pathlib import Path

import pytest
import torch
from commands import refuses
from encoders import LENGTH, little_encoder, look_alike, transformers, write_look_alike

from patchdiffusion.encoders.text import (
    CHUNK,
    TextEncoder,
    digest_of,
    facts_of,
    folder_of,
    text_encoder,
)

TEXTS = ["a red letter A", "", None, "blue B"]


def test_tokens_of_a_text_depend_on_that_text_alone(tmp_path: Path) -> None:
    encoder = look_alike(write_look_alike(tmp_path))
    context, mask = encoder(TEXTS)
    assert context.shape == (4, LENGTH, 5) and context.dtype == torch.float16
    assert mask.sum(1).tolist() == [4, 0, 0, 2]
    assert not context[~mask].any()  # what the encoder makes of padding is gone
    torch.testing.assert_close(context[mask].float().mean(1), torch.zeros(6), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        context[mask].float().std(1, correction=0), torch.ones(6), atol=1e-2, rtol=0
    )
    many, _ = encoder(["A"] * (CHUNK + 1) + TEXTS)
    assert torch.equal(many[-4:], context)


def test_the_digest_follows_files(tmp_path: Path) -> None:
    one, other = write_look_alike(tmp_path / "a"), write_look_alike(tmp_path / "b", seed=1)
    same = write_look_alike(tmp_path / "c")
    (same / "README.md").write_text("other words")
    assert digest_of(one) == digest_of(same) != digest_of(other)


def test_an_encoder_that_returns_something_else_is_refused(tmp_path: Path) -> None:
    wrong = TextEncoder("", 4, 3, lambda texts: (torch.zeros(len(texts), 3, 5), torch.ones(16, 3)))
    with refuses(CHUNK, 3, 4, 5):
        wrong(["a"])


def test_a_folder_without_an_encoder_is_refused(tmp_path: Path) -> None:
    with refuses(str(tmp_path / "none"), "does not exist"):
        folder_of(tmp_path / "none")
    with refuses(str(tmp_path), "safetensors"):
        folder_of(tmp_path)


@pytest.mark.parametrize("kind", ["clip", "bert", "t5"])
def test_encoders_of_transformers(tmp_path: Path, kind: str) -> None:
    """The tokens are the hidden states of the model, wherever they count."""
    package = transformers()
    folder = little_encoder(tmp_path / kind, kind)
    encoder = text_encoder(folder, length=LENGTH)
    context, mask = encoder(TEXTS)
    assert encoder.features == 16 and mask.sum(1).tolist() == [4, 0, 0, 2]
    model = {"clip": "CLIPTextModel", "bert": "BertModel", "t5": "T5EncoderModel"}[kind]
    model = getattr(package, model).from_pretrained(folder).eval()
    with torch.no_grad():  # of the words alone, without padding
        out = model(input_ids=torch.tensor([[2, 3, 5, 6]]), output_hidden_states=True)
    expected = torch.nn.functional.layer_norm(out.last_hidden_state[0], (16,))
    torch.testing.assert_close(context[0, :4].float(), expected, atol=3e-3, rtol=1e-2)
    earlier = text_encoder(folder, layer=1, length=LENGTH)
    expected = torch.nn.functional.layer_norm(out.hidden_states[1][0], (16,))
    torch.testing.assert_close(earlier(TEXTS)[0][0, :4].float(), expected, atol=3e-3, rtol=1e-2)
    assert earlier.digest == encoder.digest == facts_of(folder)[0]
    assert facts_of(folder)[1:] == (16, 4096 if kind == "t5" else 12)


def test_options_that_an_encoder_does_not_have_are_refused(tmp_path: Path) -> None:
    folder = little_encoder(tmp_path)
    with refuses(13, 12):
        text_encoder(folder, length=13)
    with refuses(7, 2, -3):
        text_encoder(folder, length=LENGTH, layer=7)
    (folder / "config.json").write_text("{}")
    with refuses(str(folder)):
        text_encoder(folder, length=LENGTH)


def test_a_folder_of_diffusers_has_both_parts(tmp_path: Path) -> None:
    plain = little_encoder(tmp_path / "plain")
    parts = tmp_path / "parts"
    for part in ("text_encoder", "tokenizer"):
        (parts / part).mkdir(parents=True)
        for file in plain.iterdir():
            if file.name.startswith("tokenizer") == (part == "tokenizer"):
                (parts / part / file.name).write_bytes(file.read_bytes())
    expected = text_encoder(plain, length=LENGTH)(TEXTS)[0]
    assert torch.equal(text_encoder(parts, length=LENGTH)(TEXTS)[0], expected)
