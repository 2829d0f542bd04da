"""Published weights and the outputs of the published networks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import refuses
from golden import golden, weights_and_tensors
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser, PatchDenoiser
from patchdiffusion.interop.edm import adm_config, edm_config, edm_name, load_edm_state_dict
from patchdiffusion.nets.adm import ADMConfig, DhariwalUNet
from patchdiffusion.nets.attention import Attention
from patchdiffusion.nets.unet import SongUNet, UNetConfig
from patchdiffusion.parameterisation import EDM
from patchdiffusion.solvers import heun, solve
from patchdiffusion.solvers.schedules import karras

LITTLE = UNetConfig(base=8, mult=(1, 2), blocks=1, attention=(1,), num_classes=4, augment_dim=3)
NCSN = replace(LITTLE, embedding="fourier", encoder="residual", filter=(1, 3, 3, 1))
ADM = ADMConfig(
    base=8, mult=(2, 3), blocks=1, attention=(1,), head_width=8, num_classes=4, augment_dim=3
)
CASES = [
    "ddpmpp-patch-64-full",
    "ddpmpp-patch-64-crop16x32",
    "ddpmpp-32-labels-augment",
    "ncsnpp-32-labels",
    "adm-patch-latent-32-labels",
]


def published(path: Path) -> tuple[NetDenoiser, dict[str, Tensor]]:
    weights, tensors = weights_and_tensors(path)
    config = adm_config(weights) if "model.out_conv.weight" in weights else edm_config(weights)
    network = config.build(seed=5)
    load_edm_state_dict(network, weights)
    return NetDenoiser(network, EDM(sigma_data=0.5)), tensors


@pytest.mark.parametrize("name", CASES)
def test_reference_outputs(name: str) -> None:
    path = golden(name)
    denoiser, t = published(path)
    labels = t["in/labels"].argmax(dim=1) if "in/labels" in t else None
    if labels is not None:
        labels = torch.where(t["in/labels"].sum(dim=1) > 0, labels, -1)
    cond = Cond(labels=labels, augment=t.get("in/augment_labels"), pos=t.get("in/pos"))
    with torch.no_grad():
        found = denoiser(t["in/x"], t["in/sigma"], cond)
    expected = t["out/denoised"]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    with safe_open(path, "pt") as stream:
        stated = json.loads(stream.metadata()["config"])
    config = denoiser.network.config
    assert isinstance(config, UNetConfig | ADMConfig)
    assert (config.base, list(config.mult)) == (stated["model_channels"], stated["channel_mult"])
    assert (config.blocks, config.num_classes) == (stated["num_blocks"], stated["label_dim"])
    assert config.coordinates == stated["coords"]
    if isinstance(config, UNetConfig):
        kinds = (stated["embedding_type"], stated["encoder_type"])
        assert (config.embedding, config.encoder) == kinds


@pytest.mark.parametrize("part", ["full", "region"])
def test_reference_samples(part: str) -> None:
    denoiser, _ = published(golden("ddpmpp-patch-64-full"))
    t = load_file(golden("ddpmpp-patch-64-heun18"))
    corner = (0, 0) if part == "full" else (40, 16)
    whole = PatchDenoiser(denoiser, canvas=(64, 64), corner=corner)
    sigmas = karras(18, sigma_min=0.002, sigma_max=80, rho=7)
    x = t[f"{part}/noise"].double() * sigmas[0]
    found, expected = solve(heun, whole, x, sigmas), t[f"{part}/heun18"]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def exported(network: SongUNet | DhariwalUNet, resolution: int) -> dict[str, Tensor]:
    """A network's weights in published names and layout, coordinates concatenated."""
    out: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        if ".qkv." in name:
            attention = network.get_submodule(name.rpartition(".qkv")[0])
            assert isinstance(attention, Attention)
            split = value.reshape(3, attention.num_heads, -1, *value.shape[1:])
            value = split.movedim(0, 2).reshape(value.shape)
        key = "model." + edm_name(name, resolution, network.config.levels)
        if isinstance(network, DhariwalUNet):
            key = key.replace(f"dec.{resolution}x{resolution}_aux_", "out_")
        out[key] = torch.cat([out[key], value], dim=1) if key in out else value
    out["model.enc.8x8_down.conv0.resample_filter"] = torch.ones(
        1, 1, *[len(getattr(network.config, "filter", (1, 1)))] * 2
    )
    return out


def random_network(config: UNetConfig | ADMConfig) -> SongUNet | DhariwalUNet:
    network = config.build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize("start", [LITTLE, NCSN, ADM])
@pytest.mark.parametrize("coordinates", [False, True])
def test_there_and_back(start: UNetConfig | ADMConfig, coordinates: bool) -> None:
    config = replace(start, coordinates=coordinates, dropout=0.3)
    network = random_network(config)
    weights = exported(network, 16)
    if isinstance(start, ADMConfig):
        assert adm_config(weights, dropout=0.3, head_width=8) == config
    else:
        assert edm_config(weights, dropout=0.3) == config
    other = config.build(seed=9)
    load_edm_state_dict(other, weights)
    for name, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_weights_without_coordinates_start_them_at_zero() -> None:
    plain = random_network(replace(NCSN, coordinates=False))
    network = random_network(NCSN)
    load_edm_state_dict(network, exported(plain, 16))
    x, noise = torch.randn(2, 3, 8, 8), torch.randn(2)
    with torch.no_grad():
        assert torch.equal(network(x, noise, Cond()), plain(x, noise, Cond()))


def test_weights_that_do_not_fit_are_named_and_change_nothing() -> None:
    network = random_network(LITTLE)
    weights = exported(network, 16)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    lost = {k: v for k, v in weights.items() if "map_layer0" not in k}
    with refuses("map_layer0.weight", "map_layer0.bias"):
        load_edm_state_dict(network, lost)
    with refuses("model_extra"):
        load_edm_state_dict(network, weights | {"model_extra": torch.zeros(1)})
    with refuses("map_layer0.weight", "1, 2"):
        load_edm_state_dict(network, weights | {"model.map_layer0.weight": torch.zeros(1, 2)})
    with refuses("enc.16x16_conv.weight", "8, 5, 3, 3"):
        load_edm_state_dict(replace(LITTLE, coordinates=False).build(), weights)
    with refuses("missing"):
        load_edm_state_dict(replace(LITTLE, blocks=2).build(), weights)
    with refuses("EDM"):
        load_edm_state_dict(network, {"x": torch.zeros(1)})
    assert all(torch.equal(v, before[n]) for n, v in network.state_dict().items())


def test_other_networks_are_refused() -> None:
    weights = exported(random_network(LITTLE), 16)
    adm = {k.replace("aux_conv", "out_conv"): v for k, v in weights.items()}
    with refuses("DDPM"):
        edm_config(adm)
    wide = weights | {"model.enc.16x16_conv.weight": torch.zeros(8, 4, 3, 3)}
    with refuses(4, 3):
        edm_config(wide)
    with refuses("nonsense"):
        edm_name("nonsense", 16, 2)
