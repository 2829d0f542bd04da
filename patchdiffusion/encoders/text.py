"""Frozen text encoders: texts -> the hidden states of their tokens, by transformers or your own.

Hidden states are normalized for each token (layer norm without parameters) and rounded to float16,
so that those of any encoder have unit variance and are the same whether they are stored or not.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchdiffusion.system.files import expanded, sha256
from patchdiffusion.system.optional import require

CHUNK = 16
"""Texts per evaluation, always as many: the hidden states of a text do not depend on others."""
_WEIGHTS = (".safetensors", ".bin")
_FILES = (*_WEIGHTS, ".json", ".txt", ".model")
_TOWERS = {
    "clip": "CLIPTextModel",
    "siglip": "SiglipTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
}
"""Classes of transformers for models that have more than an encoder of texts."""

Function = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""Texts -> hidden states [B, T, D] and which tokens count, bool [B, T]."""


@dataclass(frozen=True)
class TextEncoder:
    """A frozen text encoder with its tokenizer."""

    digest: str
    """Changes with weights and tokenizer."""
    features: int
    """Features of a token, D."""
    length: int
    """Number of tokens that a text is filled up to, or cut at, T."""
    function: Function

    @torch.no_grad()
    def __call__(self, texts: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Tokens of texts: float16 [B, T, D] and which of them count, bool [B, T], on the CPU.

        None and empty texts have no tokens. Raises `ValueError` if the function returns something
        else than it should.
        """
        context = torch.zeros(len(texts), self.length, self.features, dtype=torch.float16)
        mask = torch.zeros(len(texts), self.length, dtype=torch.bool)
        at = [i for i, text in enumerate(texts) if text]
        for start in range(0, len(at), CHUNK):
            some = at[start : start + CHUNK]
            filled = [*(texts[i] or "" for i in some), *[""] * (CHUNK - len(some))]
            hidden, where = self.function(filled)
            shape = (CHUNK, self.length, self.features)
            if hidden.shape != shape or where.shape != shape[:2]:
                raise ValueError(
                    f"a text encoder must return {list(shape)} and {list(shape[:2])}, not "
                    f"{list(hidden.shape)} and {list(where.shape)}"
                )
            hidden = F.layer_norm(hidden.float(), hidden.shape[-1:]).to("cpu", torch.float16)
            where = where.to("cpu", torch.bool)
            first = (~where).to(torch.uint8).argsort(dim=1, stable=True)  # those that count
            where = where.gather(1, first)
            hidden = hidden.gather(1, first[..., None].expand_as(hidden))
            mask[some] = where[: len(some)]
            context[some] = (hidden * where[..., None])[: len(some)]
        return context, mask


def text_encoder(
    path: str | Path, *, layer: int = -1, length: int = 77, device: torch.device | str = "cpu"
) -> TextEncoder:
    """Load a text encoder of transformers from a folder, or by its name on the hub.

    `layer` is the number of the hidden states, -1 those after the last layer and its norm; `length`
    that of tokens. A folder of diffusers with text_encoder and tokenizer works, too. Raises
    `ValueError` in one line for a folder that holds none, and `ImportError` without transformers.
    """
    folder = folder_of(path)
    transformers = require("transformers", extra="features")
    weights, vocabulary = _parts(folder)
    config = _config(transformers, folder)
    most = _most(config)
    if not 1 <= length <= most:
        raise ValueError(f"the text encoder {path} reads 1 to {most} tokens, not {length}")
    tokenizer = _loaded(folder, lambda: transformers.AutoTokenizer.from_pretrained(vocabulary))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = _loaded(folder, lambda: _model(transformers, weights))
    model = model.to(device).eval().requires_grad_(False)

    def function(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"padding": "max_length", "truncation": True}
        inputs = tokenizer(list(texts), max_length=length, return_tensors="pt", **options)
        ids, mask = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
        wanted = layer != -1
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=wanted)
        return (out.hidden_states[layer] if wanted else out.last_hidden_state), mask.bool()

    layers = getattr(config, "num_hidden_layers", None)
    if layers is not None and not -layers - 1 <= layer <= layers:
        raise ValueError(
            f"the text encoder {path} has layers {-layers - 1} to {layers}, not {layer}"
        )
    return TextEncoder(digest_of(folder), config.hidden_size, length, function)


def facts_of(path: str | Path) -> tuple[str, int, int]:
    """Digest, features and most tokens of an encoder at a path, without loading its weights."""
    folder = folder_of(path)
    config = _config(require("transformers", extra="features"), folder)
    return digest_of(folder), config.hidden_size, _most(config)


def _most(config: Any) -> int:
    """Most tokens of a text; encoders of relative positions have no limit of their own."""
    return getattr(config, "max_position_embeddings", None) or 4096


def whole_name(path: str | Path) -> str:
    """Absolute path of a folder; names on the hub unchanged."""
    folder = expanded(path)
    return str(folder.resolve()) if folder.exists() else str(path)


def digest_of(folder: Path) -> str:
    """Digest of the weights and tokenizer in a folder: 16 hexadecimal digits."""
    content = hashlib.sha256()
    for part in dict.fromkeys(_parts(folder)):
        files = sorted(f for f in part.iterdir() if f.suffix in _FILES and f.is_file())
        for file in files:
            content.update(f"{part.name if part != folder else ''}/{file.name}".encode())
            content.update(sha256(file).encode())
    return content.hexdigest()[:16]


def folder_of(path: str | Path) -> Path:
    """Folder of a text encoder: at a path, or of a name on the hub, which is fetched once.

    Raises `ValueError` if it is neither here nor can be fetched, or holds no weights.
    """
    folder = expanded(path)
    if not folder.exists() and _is_name(str(path)):
        folder = _fetched(str(path))
    if not folder.is_dir():
        raise ValueError(
            f"the text encoder {path} does not exist; allowed are a folder of transformers, and "
            "user/name on the Hugging Face hub"
        )
    weights, _ = _parts(folder)
    if not any(file.suffix in _WEIGHTS for file in weights.iterdir()):
        raise ValueError(
            f"{folder} holds no text encoder: there are no weights in {' or '.join(_WEIGHTS)}"
        )
    return folder.resolve()


def _is_name(path: str) -> bool:
    parts = path.split("/")
    return len(parts) == 2 and all(part and not part.startswith((".", "~")) for part in parts)


def _parts(folder: Path) -> tuple[Path, Path]:
    """Folders of the weights and of the tokenizer."""
    if (folder / "text_encoder").is_dir() and (folder / "tokenizer").is_dir():
        return folder / "text_encoder", folder / "tokenizer"
    return folder, folder


def _fetched(name: str) -> Path:
    hub = require("huggingface_hub", extra="hub")
    only: dict[str, Any] = {"allow_patterns": ["*.safetensors", "*.json", "*.txt", "*.model"]}
    try:
        return Path(hub.snapshot_download(name, local_files_only=True, **only))
    except Exception:  # not there: the hub has many kinds of errors for it
        pass
    try:
        return Path(hub.snapshot_download(name, **only))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the text encoder {name} is not a folder, and could not be fetched from the hub: "
            f"{reason}"
        ) from error


def _config(transformers: Any, folder: Path) -> Any:
    weights, _ = _parts(folder)
    config = _loaded(folder, lambda: transformers.AutoConfig.from_pretrained(weights))
    return getattr(config, "text_config", config)


def _model(transformers: Any, folder: Path) -> Any:
    kind = transformers.AutoConfig.from_pretrained(folder).model_type
    name = _TOWERS.get(kind.removesuffix("_text_model"), "AutoModel")
    return getattr(transformers, name).from_pretrained(folder)


def _loaded(folder: Path, load: Callable[[], Any]) -> Any:
    """Result of a function of transformers; `ValueError` in one line if it fails."""
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder} holds no text encoder of transformers: {reason}") from error
