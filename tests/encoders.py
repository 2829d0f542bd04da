"""Text encoders for tests: little ones of transformers, and one that needs no package."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from patchdiffusion.encoders.text import TextEncoder, digest_of

WORDS = ("a", "red", "blue", "letter", "A", "B", "blurry")
LENGTH = 6


def transformers() -> Any:
    """The package, or the test is skipped."""
    return pytest.importorskip("transformers", reason="transformers is not installed")


def little_encoder(folder: Path, kind: str = "clip") -> Path:
    """A text encoder of random weights, with a tokenizer of a few words."""
    package = transformers()
    tokens = pytest.importorskip("tokenizers")
    names = {"[PAD]": 0, "[UNK]": 1} | {word: i + 2 for i, word in enumerate(WORDS)}
    raw = tokens.Tokenizer(tokens.models.WordLevel(names, unk_token="[UNK]"))
    raw.pre_tokenizer = tokens.pre_tokenizers.Whitespace()
    tokenizer = package.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]"
    )
    shape = {"vocab_size": len(names), "hidden_size": 16, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 12}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "clip":
            config = package.CLIPTextConfig(**shape, bos_token_id=1, eos_token_id=0)
            model = package.CLIPTextModel(config)
        elif kind == "t5":
            config = package.T5Config(
                vocab_size=len(names), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
            )
            model = package.T5EncoderModel(config)
        else:
            model = package.BertModel(package.BertConfig(**shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def look_alike(folder: Path, *, length: int = LENGTH) -> TextEncoder:
    """An encoder of words in a folder with a table, which has the interface of a real one."""
    table = torch.tensor(json.loads((folder / "table.json").read_text()))  # [words, D]

    def function(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        hidden = torch.full((len(texts), length, table.shape[1]), 7.0)
        mask = torch.zeros(len(texts), length, dtype=torch.bool)
        for row, text in enumerate(texts):
            for place, word in enumerate(text.split()[:length]):
                number = WORDS.index(word) if word in WORDS else len(WORDS)
                hidden[row, place] = table[number] + 0.1 * place
                mask[row, place] = True
        return hidden, mask

    return TextEncoder(digest_of(folder), table.shape[1], length, function)


def write_look_alike(folder: Path, *, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(len(WORDS) + 1, 5, generator=generator).tolist()
    (folder / "table.json").write_text(json.dumps(table))
    return folder
