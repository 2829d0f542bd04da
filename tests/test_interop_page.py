"""Every row of the tables of docs/interop.md with `import` or `export` is a command that works."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_interop_dit
import test_interop_edm2
import test_interop_lego
import torch
from commands import Capture, works
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors.torch import save_file
from test_diffusers_in import DDIM, change, folder_of, random_net
from test_export import DIT, SMALL_VAE, expected_of, inputs_of, model_of
from test_import import look_alike
from test_interop_edm import LITTLE, exported, random_network
from torch import Tensor, nn

from patchdiffusion.model import load_model
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.lego import LegoConfig
from patchdiffusion.parameterisation import EDM
from patchdiffusion.system import families

PAGE = Path(__file__).parents[1] / "docs" / "interop.md"
EDM_FILE, PT = Path("FILE.pkl"), Path("FILE.pt")
PUBLISHED = DiTConfig(patch=(4, 4), depth=1, heads=6, width=384, positions="sincos",
                      embedding="late", num_classes=2)  # fmt: skip
BRICKS = LegoConfig(regions=(4, 8), patches=(2, 4), depths=(1, 1), width=384, heads=6)

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning"),
]


def rows() -> Iterator[tuple[str, str, str]]:
    """Subject, command and other cell of every row with a command of `import` or `export`."""
    for line in PAGE.read_text().splitlines():
        found = re.search(r"`patchdiffusion ((?:import|export) [^`]*)`", line)
        if line.startswith("|") and found:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if "peft" not in found[1].lower():  # of tests/test_interop_rows.py
                yield cells[0], found[1], next(c for c in cells[1:] if found[1] not in c)


ROWS = list(rows())


def lit(network: nn.Module) -> Any:
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            generator = torch.Generator().manual_seed(index)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network


def table_of(side: int, width: int) -> Tensor:
    """The published table of positions."""
    steps = torch.arange(side * side)
    places = torch.stack([steps % side, steps // side], dim=1)[..., None]
    angles = places * 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)[None]


def dit_tensors(config: DiTConfig) -> dict[str, Tensor]:
    config = replace(config, patch=(2, 2))  # of which the helper knows the layout
    return {
        **test_interop_dit.exported(lit(config.build())),
        "pos_embed": table_of(4, config.width),
    }


def unet_folder(name: str = "UNET", kind: str = "UNet2DModel") -> None:
    folder_of(Path(name), random_net(kind), DDIM())


def latent_folder() -> None:
    vae = lit(AutoencoderKL(**SMALL_VAE))
    network = random_net("DiTTransformer2DModel", in_channels=4, out_channels=8)
    folder = folder_of(Path("LATENT"), network, DDIM())
    vae.save_pretrained(folder / "vae")
    change(folder / "model_index.json", vae=["diffusers", "AutoencoderKL"])


def unsized_folder() -> None:
    unet_folder()
    change(Path("UNET/unet/config.json"), sample_size=None)


def plain_run(capsys: Capture) -> None:
    unet_folder()
    works(capsys, "import", "UNET", "--out", "PLAIN")


def single_file() -> None:
    weights = {name: v for name, v in exported(random_network(LITTLE), 16).items()
               if "filter" not in name}  # fmt: skip
    save_file({name: value.contiguous() for name, value in weights.items()}, "FILE.safetensors")


LOOK_ALIKES: dict[str, Callable[[], object]] = {
    "EDM: DDPM++": lambda: look_alike(EDM_FILE, "EDMPrecond", exported(random_network(
        replace(LITTLE, coordinates=False)), 16)),
    "Patch Diffusion": lambda: look_alike(EDM_FILE, "Patch_EDMPrecond", exported(
        random_network(LITTLE), 16)),
    "EDM2": lambda: look_alike(EDM_FILE, "Precond", test_interop_edm2.exported(
        lit(replace(test_interop_edm2.LITTLE, head_width=8, mult=(8, 16)).build()), 16)),
    "LEGO": lambda: torch.save({"ema": test_interop_lego.exported(lit(BRICKS.build()))}, PT),
    "DiT": lambda: torch.save(dit_tensors(PUBLISHED), PT),
    "the same, of no published width": lambda: torch.save(
        dit_tensors(replace(PUBLISHED, width=32, heads=4)), PT),
    "the same tensors by name": single_file,
    "several weights": lambda: torch.save({"model": dit_tensors(PUBLISHED), "ema": {}}, PT),
    "`UNet2DModel`": unet_folder,
    "`UNet2DConditionModel`": lambda: unet_folder("TEXTUNET", "UNet2DConditionModel"),
    "`DiTTransformer2DModel`": lambda: folder_of(
        Path("DIT"), random_net("DiTTransformer2DModel"), DDIM()),
    "the same with `AutoencoderKL`": latent_folder,
    "without the size": unsized_folder,
}  # fmt: skip
"""What a command of `import` reads, by the start of the first cell."""


def test_every_row_is_run() -> None:
    assert len(ROWS) >= 18
    for subject, command, _ in ROWS:
        if command.startswith("import") and "`patchdiffusion import FILE.saf" not in subject:
            assert [name for name in LOOK_ALIKES if subject.startswith(name)], subject


IMPORTS = [row for row in ROWS if any(row[0].startswith(name) for name in LOOK_ALIKES)]


@pytest.mark.parametrize("row", IMPORTS, ids=lambda row: row[0][:30])
def test_import(
    row: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    name = max((name for name in LOOK_ALIKES if row[0].startswith(name)), key=len)
    LOOK_ALIKES[name]()
    works(capsys, *row[1].split())
    found = families.word(type(load_model("MODEL").config.network))
    words = re.findall(r"`(.*?)`", row[2]) if row[1].startswith("import") else []
    assert not words or found in words
    options = "--count 1 --steps 1 --solver euler --out images"
    works(capsys, "sample", "MODEL", *options.split())


EXPORTS = [row for row in ROWS if row[1].startswith("export")]


@pytest.mark.parametrize("row", EXPORTS, ids=lambda row: row[0][:20])
def test_export(
    row: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The result is opened as the last cell says, and is the same function."""
    _, command, then = row
    monkeypatch.chdir(tmp_path)
    if " PLAIN " in command:
        plain_run(capsys)
    run = Path("PLAIN" if " PLAIN " in command else "RUN")
    if run.name == "RUN":
        model_of(run, replace(DIT, num_classes=0), EDM())
    works(capsys, *command.split())
    model = load_model(run)
    inputs = inputs_of(model, 3, (8, 12))
    x, sigma = inputs["x"], inputs["sigma"]
    scope = {"torch": torch, "DiffusionPipeline": DiffusionPipeline, "x": x, "sigma": sigma}
    if "patchdiffusion import" in then:
        works(capsys, *re.sub(r"`(patchdiffusion )?", "", then).split())
        found = load_model("MODEL").denoiser(x, sigma)
    elif "onnxruntime" in then:
        scope["onnxruntime"] = pytest.importorskip("onnxruntime")
        session = eval(then.strip("`"), scope)
        feed = {name: value.numpy() for name, value in inputs.items()}
        found = torch.from_numpy(session.run(None, feed)[0])
    elif "Pipeline" in then:
        pipeline = eval(then.strip("`"), scope)
        assert len(pipeline(2, num_inference_steps=2).images) == 2
        return
    else:
        found = eval(then.strip("`"), scope)
    expected = expected_of(model, inputs)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
