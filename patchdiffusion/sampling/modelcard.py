"""The card of a model on the hub, `README.md`, written from its run."""

import html
import json
import math
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from patchdiffusion.model import Model, ModelConfig
from patchdiffusion.patches import size_name
from patchdiffusion.system.files import read_json
from patchdiffusion.system.text import counted, printable

FILL_IN = "TO FILL IN"
GRID = "samples.png"
METRICS = "evaluation.json"
"""Name of the evaluation in the repository."""

RESULTS = {
    "frechet_distance": "Frechet distance",
    "kernel_distance": "kernel distance",
    "sliced_distance": "sliced distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "copy_rate": "copies",
    "seam_ratio": "seam ratio",
}
"""Results of an evaluation, by their names in its file, with those for people."""
_MOST_CLASSES = 100


def evaluation_of(model: Model, run: Path) -> dict[str, Any] | None:
    """Latest evaluation of these very weights in a run, or None."""
    files = sorted((run / "evaluations").glob("*.json"), reverse=True)
    for file in files:
        try:
            result = read_json(file)
            if result["card"]["model"]["digest"] == model.digest:
                return result
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def card(
    model: Model, name: str, run: Path, evaluation: Mapping[str, Any] | None, *, grid: bool
) -> str:
    """Text of the card of a model, to be found under `name`; `grid` if there is a picture."""
    config = model.config
    parts = [
        _front(config),
        f"# {_text(name.partition('/')[2])}\n",
        _about(config),
        *([f"![samples of this model]({GRID})\n"] if grid else []),
        _use(config, name),
        "## Training\n\n" + "\n".join(_facts(model, run)) + "\n",
        "## Evaluation\n\n" + "\n".join(_metrics(evaluation)) + "\n",
        _rights(),
    ]
    return "\n".join(parts)


def _front(config: ModelConfig) -> str:
    """Fields that the hub reads; JSON is YAML."""
    task = (
        "text-to-image" if "context" in config.network.reads else "unconditional-image-generation"
    )
    tags = ["patchdiffusion", "patch-diffusion", "diffusion", "pytorch", config.head.kind]
    fields: dict[str, Any] = {
        "license": "unknown",
        "library_name": "patchdiffusion",
        "tags": tags,
    }
    if config.head.kind == "denoiser":
        fields["pipeline_tag"] = task
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---", ""])


def _about(config: ModelConfig) -> str:
    size = size_name(config.canvas)
    channels = counted(config.network.channels, "channel")
    kind = {"denoiser": "diffusion model"}.get(config.head.kind, config.head.kind)
    article = "An" if kind[0] in "aeiou" else "A"
    trained = f", trained on {_text(config.data)}" if config.data else ""
    return (
        f"{article} {kind} of images of {size} with {channels}{trained} by "
        f"[patchdiffusion](https://pypi.org/project/patchdiffusion) "
        f"{version('patchdiffusion')}.\n"
    )


def _use(config: ModelConfig, name: str) -> str:
    if config.head.kind != "denoiser":
        code = f'from patchdiffusion import load_model\n\nmodel = load_model("{name}")'
        return f"## Use\n\n```python\n{code}\n```\n"
    classes = [config.classes[i] for i in config.trained_classes[:1]] if config.classes else []
    plain = [c for c in classes if re.fullmatch(r"[\w.-]+( [\w.-]+)*", c)]
    option = f' --classes "{plain[0]}"' if plain else ""
    return (
        "## Use\n\n```sh\n"
        f"pip install 'patchdiffusion[hub]'\npatchdiffusion sample {name} --count 16{option}\n"
        "```\n\n```python\n"
        f'from patchdiffusion import load\n\nimages = load("{name}").sample(16)\n'
        "```\n"
    )


def _facts(model: Model, run: Path) -> Iterator[str]:
    """Rows about data, network and training."""
    config = model.config
    yield "| | |"
    yield "|---|---|"
    yield f"| data | {_text(config.data) or FILL_IN} |"
    if config.fingerprint:
        yield f"| fingerprint of the data | `{config.fingerprint[:16]}` |"
    if config.counts:
        yield f"| training images with a class | {sum(config.counts):,} |"
    if config.classes:
        named = [_text(c) for c in config.classes[:_MOST_CLASSES]]
        counts = config.counts or (None,) * len(named)
        listed = (n if c is None else f"{n} ({c:,})" for n, c in zip(named, counts, strict=False))
        more = ", ..." if len(config.classes) > _MOST_CLASSES else ""
        yield f"| classes | {', '.join(listed)}{more} |"
    count = sum(value.numel() for value in model.network.parameters())
    yield f"| network | {type(config.network).__name__.removesuffix('Config')}, {count:,} weights |"
    yield f"| objective | {type(config.objective).__name__.removesuffix('Config')} |"
    yield f"| parameterisation | {type(config.precond).__name__} |"
    if config.images:
        yield f"| images seen | {config.images:,.0f} full-image equivalents |"
        yield f"| steps | {config.step:,} |"
    settings = _settings(run)
    for key, label in (("batch", "batch"), ("seed", "seed")):
        if isinstance(settings.get(key), int):
            yield f"| {label} | {settings[key]:,} |"
    optim = settings.get("optim")
    if isinstance(optim, dict) and isinstance(optim.get("lr"), float):
        yield f"| learning rate | {optim['lr']:g} |"
    yield f"| digest of the weights | `{model.digest}` |"


def _settings(run: Path) -> dict[str, Any]:
    try:
        facts = read_json(run / "config.json")
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _metrics(evaluation: Mapping[str, Any] | None) -> Iterator[str]:
    """Rows of an evaluation, with the settings on which they depend."""
    if evaluation is None:
        yield f"{FILL_IN}: these weights were not evaluated; `patchdiffusion evaluate RUN` does it."
        return
    card = evaluation["card"]
    yield "| metric | value |"
    yield "|---|---|"
    for name, label in (("held_out", "held-out loss"), ("loss", "loss")):
        if isinstance(held := evaluation.get(name), dict):
            images = counted(held["images"], "image")
            yield f"| {label} | {held['loss']:.4f} +- {held['standard_error']:.2g}, {images} |"
    if isinstance(bits := evaluation.get("bits"), dict):
        yield f"| bits per dimension | {bits['bits_per_dim']:.4f} |"
    for name, label in RESULTS.items():
        value = evaluation.get(name)
        if isinstance(value, float | int) and math.isfinite(value):
            yield f"| {label} | {value:.4g} |"
    yield ""
    facts: list[str] = []
    if "samples" in card and "reference" in card:
        facts.append(f"{card['samples']:,} samples against {card['reference']:,} images")
    if isinstance(extractor := card.get("extractor"), dict):
        facts.append(f"features of {_text(str(extractor.get('name')))}")
    facts.append(f"{card.get('date')}")
    yield f"{', '.join(facts)}; all settings are in [{METRICS}]({METRICS})."


def _rights() -> str:
    return (
        "## Licence and limits\n\n"
        "| | |\n|---|---|\n"
        f"| licence of the weights | {FILL_IN} (and `license` at the top of this file) |\n"
        f"| licence and source of the images | {FILL_IN} |\n"
        f"| people in the images, and their consent | {FILL_IN} |\n"
        f"| intended use, and what it should not be used for | {FILL_IN} |\n\n"
        "A model of few images may repeat some of them: see the row of copies above.\n"
    )


def _text(text: str) -> str:
    """Text of outside that cannot be taken for Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]|#!])", r"\\\1", html.escape(printable(text), quote=False))
