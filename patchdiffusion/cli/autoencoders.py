"""patchdiffusion evaluate RUN, of an autoencoder."""

import math
from pathlib import Path
from typing import Any

import torch

from patchdiffusion.cli.compared import like, trained_on
from patchdiffusion.cli.featuring import FeatureArguments, extractor_for
from patchdiffusion.cli.places import check_file, home, new_file
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.data.source import is_run
from patchdiffusion.metrics.autoencode import evaluated
from patchdiffusion.metrics.cards import data_card, features_card
from patchdiffusion.model import Model, load_model
from patchdiffusion.nets.base import Weights
from patchdiffusion.system.dist import Team
from patchdiffusion.system.files import write_json
from patchdiffusion.system.progress import progress_bar

AT_ONCE = 2**18
"""Pixels that are reconstructed together."""
ROWS = {
    "psnr": ("PSNR", "{:.2f} dB"),
    "ssim": ("SSIM", "{:.4f}"),
    "sharpness": ("sharpness", "{:.3f} of that of the images"),
    "kl": ("divergence of the posterior", "{:.4g} nats"),
    "rfid": ("Frechet distance (rFID)", "{:.4g}"),
    "rkid": ("kernel distance (rKID)", "{:.4g}"),
    "codes_used": ("codes used", "{:.1%}"),
    "perplexity": ("perplexity of codes", "{:.4g}"),
}


def autoencoder_at(path: Path, weights: Weights, device: torch.device) -> Model | None:
    """The model at a path if it is an autoencoder, else None."""
    if not path.is_dir() or not (is_run(path) or (path / "model.safetensors").exists()):
        return None
    try:
        model = load_model(path, weights=weights, device=device)
    except ValueError:  # told by those that need a model
        return None
    return model if model.config.head.kind == "autoencoder" else None


def evaluate(
    path: Path,
    model: Model,
    *,
    data: str | None,
    count: int,
    features: FeatureArguments,
    batch: int,
    save: Path | None,
) -> None:
    """Reconstruct held-out images, or `count` of other data; print a table, and write a file."""
    folder = home(path) / "evaluations"
    check_file(save or folder / "0001.json")
    pack = prepare_data(trained_on(path) if data is None else like(path, data))
    if model.config.space.word != pack.space.word:
        raise ValueError(
            f"{pack.name} holds {pack.space.word}, and the model reconstructs "
            f"{model.config.space.word}"
        )
    chosen = pack.some_held_out(count) if data is None else torch.arange(min(count, len(pack)))
    extract, reason = extractor_for(features, pack, model.device, Team())
    batch = min(batch, max(1, AT_ONCE // math.prod(pack.images.shape[1:-1])))
    with progress_bar(len(chosen), "image", name="reconstructed") as bar:
        result = evaluated(
            model.autoencoder, pack, chosen, extract=extract, batch=batch, progress=bar.update
        )
    card: dict[str, Any] = data_card(pack)
    card |= {"model": {"digest": model.digest, "equivalents": model.config.images}}
    if extract is not None:
        card |= features_card(extract, pack.pictures.shape[-1])
    missing = {"rFID, rKID": reason} if reason else {}
    result = {**result, "left_out": missing, "card": card}
    print("\n".join(table(result)))
    file = save or new_file(folder, ".json")
    write_json(file, result)
    print(f"written to {file}")


def table(result: dict[str, Any]) -> list[str]:
    """Lines of the results of an autoencoder."""
    lines = [f"{'reconstructed':<28}{result['images']:,} images"]
    lines += [
        f"{label:<28}{form.format(result[name])}"
        for name, (label, form) in ROWS.items()
        if name in result
    ]
    for name in ("mean", "std", "posterior_std"):
        values = " ".join(f"{value:.3g}" for value in result["latents"][name][:16])
        lines.append(f"{'latents, ' + name.replace('_', ' '):<28}{values}")
    return lines + [f"not measured: {name} ({why})" for name, why in result["left_out"].items()]
