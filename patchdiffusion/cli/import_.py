"""patchdiffusion import FILE --out MODEL"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from patchdiffusion.cli.flags import positional
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_run
from patchdiffusion.interop.checkpoints import read_published
from patchdiffusion.interop.diffusersfolder import imported_folder
from patchdiffusion.interop.kinds import Kind, Unsaid, imported
from patchdiffusion.interop.peft import CONFIG
from patchdiffusion.interop.peftadapter import import_peft
from patchdiffusion.interop.schedulers import sampler_of
from patchdiffusion.interop.singlefile import load_single, single_config
from patchdiffusion.model import ModelConfig, load_model, save_model
from patchdiffusion.nets import base
from patchdiffusion.patches import size_name
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.system import families
from patchdiffusion.system.files import check_place
from patchdiffusion.system.serialize import encode
from patchdiffusion.system.text import counted

NOTE = "imported.json"
"""File of a model with the source of its weights."""
SETTINGS = "train.json"
"""File of a model with the settings of a training that starts from it."""


@dataclass(frozen=True, kw_only=True)
class ImportArguments:
    """Turn a published checkpoint into a model, without executing anything in it.

    Files of EDM, EDM2, Patch Diffusion, LEGO and DiT are read: pickles, files of torch (.pt, .pth)
    and safetensors; and folders of diffusers: UNet2DModel, UNet2DConditionModel and
    DiTTransformer2DModel. The model samples as any other, and a training can start from it.
    """

    example: ClassVar[str] = "patchdiffusion import edm.pkl --out models/edm"

    file: Path = field(default=Path(), metadata=positional("FILE"))
    """File with the weights: .pkl, .pt, .pth or .safetensors; or a folder of diffusers."""
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
    base: Path | None = None
    """Run or model that a LoRA or DoRA of peft changes, whose folder is FILE."""


def main(arguments: Sequence[str]) -> None:
    """Read the checkpoint and write the model."""
    options = parse(ImportArguments(), arguments, "import")
    out = options.out or Path("models") / options.file.resolve().stem
    _check(options, out)
    if (options.file / CONFIG).is_file():
        _import_adapter(options, out)
        return
    if options.base is not None:
        raise ValueError(f"--base is for folders of peft, and {options.file} has no {CONFIG}")
    if options.file.is_dir():
        _import_folder(options, out)
    else:
        _import_file(options, out)
    print(f"train on  patchdiffusion train ./photos --config {out / SETTINGS} --start-from {out}")


def _import_file(options: ImportArguments, out: Path) -> None:
    if (single := single_config(options.file)) is not None:
        _import_single(options, out, single)
        return
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
    _save(out, config, network, facts)
    weights = ""
    if published.part:
        others = [part for part in published.parts if part != published.part]
        weights = published.part + (f" (also there: {', '.join(others[:10])})" if others else "")
    _tell(name, weights, published.digest, config, network)
    print(f"written to {out}")
    print(f"sample    patchdiffusion sample {out}")


def _import_single(options: ImportArguments, out: Path, config: ModelConfig) -> None:
    """Import a file of `export --to safetensors`, which has its configuration."""
    _refuse_details(options, "side")
    published = read_published(options.file)
    try:
        network = load_single(config, published.tensors)
    except ValueError as error:
        raise ValueError(f"{options.file}: {error}") from error
    facts = {"file": options.file.name, "sha256": published.digest, "kind": "patchdiffusion"}
    _save(out, config, network, facts)
    _tell("patchdiffusion", "", published.digest, config, network)
    print(f"written to {out}")
    print(f"sample    patchdiffusion sample {out}")


def _refuse_details(options: ImportArguments, *more: str) -> None:
    """Raise an error for details about files without a configuration."""
    for name in ("weights", "heads", "head_width", *more):
        if getattr(options, name) is not None:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is for other files, and {options.file} says it")
    if options.kind != "auto":
        raise ValueError(f"--kind is for other files, and {options.file} says it; leave it out")


def _import_folder(options: ImportArguments, out: Path) -> None:
    _refuse_details(options)
    with imported_folder(options.file, side=options.side) as source:
        facts = {
            "file": options.file.resolve().name,
            "sha256": source.digest,
            "kind": "diffusers",
            "class": source.kind,
            "scheduler": dict(source.scheduler),
        }
        _save(out, source.config, source.network, facts)
        _tell(source.kind, "", source.digest, source.config, source.network)
        flags = " ".join(_flags(sampler_of(source.scheduler, steps=50), SamplerConfig()))
    print(f"written to {out}")
    print(f"sample    patchdiffusion sample {out}")
    print(f"or, as its scheduler without noise does: patchdiffusion sample {out} {flags}")


def _import_adapter(options: ImportArguments, out: Path) -> None:
    """Import a folder of peft as an adapter of a model."""
    _refuse_details(options, "side")
    if options.base is None:
        raise ValueError(f"{options.file} changes a model; name it: --base RUN")
    check_run(options.base)
    count = import_peft(options.file, load_model(options.base), out)
    print(f"written to {out}, which changes {counted(count, 'layer')}")
    print(f"sample    patchdiffusion sample {options.base} --adapter {out}")


def _save(out: Path, config: ModelConfig, network: base.Network, facts: dict[str, Any]) -> None:
    state = network.state_dict()
    notes = {NOTE: facts, SETTINGS: _settings(config)}
    save_model(out, config, averaged=state, raw=state, notes=notes)


def _check(options: ImportArguments, out: Path) -> None:
    """Raise an error for a source that is missing or a place that is taken."""
    if not options.file.exists():
        raise ValueError(
            f"{options.file} is no file; give a .pkl, .pt, .pth or .safetensors file, or a folder "
            "of diffusers"
        )
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists, and nothing is overwritten; use another --out")
    for name in ("heads", "head_width", "side"):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= 2**16:
            raise ValueError(f"{name} is {value}; allowed are 1 to {2**16}")
    check_place(out.parent)


def _flags(record: Any, usual: Any, prefix: str = "--") -> Iterator[str]:
    """Flags that change one record into another."""
    for item in fields(record):
        name = prefix + item.name.replace("_", "-")
        value, before = getattr(record, item.name), getattr(usual, item.name)
        if value == before:
            continue
        if not is_dataclass(value):
            values = value if isinstance(value, tuple) else (value,)
            yield " ".join([name, *map(str, values)])
            continue
        if type(value) is not type(before):
            yield f"{name} {families.word(type(value))}"
            before = type(value)()
        yield from _flags(value, before, f"{name}.")


def _settings(config: ModelConfig) -> dict[str, Any]:
    """Fields of `TrainConfig` that the network of a new training must have."""
    table = encode(config)
    network = dict(table["network"])
    for name in ("channels", "num_classes"):  # of the data
        del network[name]
    return {"network": network, "precond": table["precond"], "noise": table["noise"]}


def _tell(kind: str, weights: str, digest: str, config: ModelConfig, network: base.Network) -> None:
    channels, classes = config.network.channels, config.num_classes
    lines = {"kind": kind, "network": families.word(type(config.network))}
    if weights:
        lines["weights"] = weights
    lines["parameters"] = f"{sum(p.numel() for p in network.parameters()):,}"
    lines["images"] = f"{size_name(config.canvas)}, {channels} channels"
    if config.space.described:
        lines["latents"] = config.space.described
    elif channels > 3:
        lines["images"] += "; latents, written as such: no decoder belongs to the file"
    lines["classes"] = f"{classes}" if classes else "none"
    lines["digest"] = f"sha256 {digest}"
    print("\n".join(f"{name:<12}{text}" for name, text in lines.items()))
