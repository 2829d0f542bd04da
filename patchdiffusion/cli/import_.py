"""patchdiffusion import FILE --out MODEL"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from patchdiffusion.cli.flags import positional
from patchdiffusion.cli.parse import parse
from patchdiffusion.interop.checkpoints import Published, read_published
from patchdiffusion.interop.kinds import Kind, Unsaid, imported
from patchdiffusion.model import ModelConfig, save_model
from patchdiffusion.nets import base
from patchdiffusion.patches import size_name
from patchdiffusion.system import families
from patchdiffusion.system.files import check_place
from patchdiffusion.system.serialize import encode

NOTE = "imported.json"
"""File of a model with the source of its weights."""
SETTINGS = "train.json"
"""File of a model with the settings of a training that starts from it."""


@dataclass(frozen=True, kw_only=True)
class ImportArguments:
    """Turn a published checkpoint into a model, without executing anything in it.

    Files of EDM, EDM2, Patch Diffusion, LEGO and DiT are read: pickles, files of torch (.pt, .pth)
    and safetensors. The model samples as any other, and a training can start from it.
    """

    example: ClassVar[str] = "patchdiffusion import edm.pkl --out models/edm"

    file: Path = field(default=Path(), metadata=positional("FILE"))
    """File with the weights: .pkl, .pt, .pth or .safetensors."""
    out: Path | None = None
    """Folder to write the model to, which must not exist; the default is models/NAME."""
    kind: Literal["auto", "edm", "edm2", "patch-diffusion", "lego", "dit"] = "auto"
    """Kind of network; auto tells it by the names of the tensors."""
    weights: str | None = None
    """Weights of a file that has several, such as ema or model; the default is an average."""
    heads: int | None = None
    """Attention heads of a transformer of no published width."""
    head_width: int | None = None
    """Features of an attention head of ADM and EDM2; the default is that of the file, or 64."""
    side: int | None = None
    """Height and width of the images, for a file that does not say it."""


def main(arguments: Sequence[str]) -> None:
    """Read the checkpoint and write the model."""
    options = parse(ImportArguments(), arguments, "import")
    out = options.out or Path("models") / options.file.stem
    _check(options, out)
    published = read_published(options.file, weights=options.weights)
    kind: Kind | None = None if options.kind == "auto" else options.kind
    unsaid = Unsaid(heads=options.heads, head_width=options.head_width, side=options.side)
    try:
        name, config, network = imported(
            published, kind=kind, unsaid=unsaid, data=options.file.stem
        )
    except ValueError as error:
        raise ValueError(f"{options.file}: {error}") from error
    facts = {
        "file": options.file.name,
        "sha256": published.digest,
        "kind": name,
        "weights": published.part,
        "class": published.kind,
    }
    state = network.state_dict()
    notes = {NOTE: facts, SETTINGS: _settings(config)}
    save_model(out, config, averaged=state, raw=state, notes=notes)
    _tell(name, published, config, network)
    print(f"written to {out}")
    print(f"sample    patchdiffusion sample {out}")
    print(f"train on  patchdiffusion train ./photos --config {out / SETTINGS} --start-from {out}")


def _check(options: ImportArguments, out: Path) -> None:
    """Raise an error for a file that is missing or a place that is taken."""
    if not options.file.is_file():
        wrong = "is a folder" if options.file.is_dir() else "is no file"
        raise ValueError(f"{options.file} {wrong}; give a .pkl, .pt, .pth or .safetensors file")
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists, and nothing is overwritten; use another --out")
    for name in ("heads", "head_width", "side"):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= 2**16:
            raise ValueError(f"{name} is {value}; allowed are 1 to {2**16}")
    check_place(out.parent)


def _settings(config: ModelConfig) -> dict[str, Any]:
    """Fields of `TrainConfig` that the network of a new training must have."""
    table = encode(config)
    network = dict(table["network"])
    for name in ("channels", "num_classes"):  # of the data
        del network[name]
    return {"network": network, "precond": table["precond"], "noise": table["noise"]}


def _tell(kind: str, published: Published, config: ModelConfig, network: base.Network) -> None:
    channels, classes = config.network.channels, config.num_classes
    lines = {"kind": kind, "network": families.word(type(config.network))}
    if published.part:
        others = [part for part in published.parts if part != published.part]
        more = f" (also there: {', '.join(others[:10])})" if others else ""
        lines["weights"] = f"{published.part}{more}"
    lines["parameters"] = f"{sum(p.numel() for p in network.parameters()):,}"
    lines["images"] = f"{size_name(config.canvas)}, {channels} channels"
    if channels > 3:
        lines["images"] += "; latents, written as such: no decoder belongs to the file"
    lines["classes"] = f"{classes}" if classes else "none"
    lines["digest"] = f"sha256 {published.digest}"
    print("\n".join(f"{name:<12}{text}" for name, text in lines.items()))
