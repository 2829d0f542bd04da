"""Published weights of DiT and the outputs of the published network."""

import json
from dataclasses import replace

import pytest
import torch
from commands import refuses
from golden import golden, weights_and_tensors
from safetensors import safe_open
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.interop.dit import dit_config, dit_name, load_dit_state_dict
from patchdiffusion.nets.dit import DiT, DiTConfig
from patchdiffusion.parameterisation import EpsDDPM
from patchdiffusion.patches import Region
from patchdiffusion.paths import DDPM

LITTLE = DiTConfig(
    channels=4, patch=(2, 2), width=16, depth=2, heads=2, num_classes=3, positions="sincos",
    embedding="late", learned_variance=True,
)  # fmt: skip


def test_reference_outputs() -> None:
    path = golden("dit-16-p2-labels")
    weights, t = weights_and_tensors(path)
    network = DiT(dit_config(weights, heads=4), seed=5)
    load_dit_state_dict(network, weights)
    with torch.no_grad():
        tokens = network.run(network.start(t["in/x"], t["in/t"], Cond(labels=t["in/y"])), Cond())
        found = network.finish(tokens, variance=True)
        short = network(t["in/x"], t["in/t"], Cond(labels=t["in/y"]))
        none = network(t["in/x"], t["in/t"], Cond())
    expected = t["out/prediction"]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(short, found[:, :4])
    null = t["in/y"] == 10
    assert null.any() and torch.equal(none[null], short[null])
    with safe_open(path, "pt") as stream:
        stated = json.loads(stream.metadata()["config"])
    config = network.config
    assert (config.width, config.depth) == (stated["hidden_size"], stated["depth"])
    assert config.patch == (stated["patch_size"],) * 2
    assert config.channels == stated["in_channels"]
    assert (config.num_classes, config.heads) == (stated["num_classes"], stated["num_heads"])
    assert config.learned_variance == stated["learn_sigma"]


def test_published_weights_denoise_by_the_steps_of_ddpm() -> None:
    """eps at the steps 0 and 999 of the file, by the noise levels of these steps."""
    weights, t = weights_and_tensors(golden("dit-16-p2-labels"))
    network = DiT(dit_config(weights, heads=4))
    load_dit_state_dict(network, weights)
    chosen = torch.tensor([i for i, step in enumerate(t["in/t"]) if step in (0, 999)])
    sigma = DDPM(table="linear", steps=1000).sigma(t["in/t"][chosen].double() / 999).float()
    scale = (1 + sigma**2).sqrt()[:, None, None, None]
    noisy = t["in/x"][chosen] * scale
    with torch.no_grad():
        cond = Cond(labels=t["in/y"][chosen])
        denoised = NetDenoiser(network, EpsDDPM())(noisy, sigma, cond)
    eps = t["out/prediction"][chosen, :4]
    expected = noisy - sigma[:, None, None, None] * eps
    assert len(chosen) == 2
    assert (denoised - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_table_of_a_crop_is_cut_out_of_that_of_the_canvas() -> None:
    weights, t = weights_and_tensors(golden("dit-16-p2-labels"))
    network = DiT(dit_config(weights, heads=4))
    x, noise = torch.zeros(1, 4, 6, 8), torch.zeros(1)
    pos = Region((16, 16), (4, 2)).pos(x)
    found = network.start(x, noise, Cond(pos=pos)).h
    found = found - network.get_parameter("stem.bias")
    table = t["weights/pos_embed"].unflatten(1, (8, 8))[:, 2:5, 1:5].flatten(1, 2)
    torch.testing.assert_close(found, table, atol=1e-5, rtol=0)


def exported(network: DiT) -> dict[str, Tensor]:
    """A network's weights in published names and layout."""
    out = {dit_name(name): value for name, value in network.state_dict().items()}
    d, p = network.config.width, network.config.patch
    out["x_embedder.proj.weight"] = out["x_embedder.proj.weight"].reshape(d, -1, *p)
    for leaf in ("weight", "bias"):
        value = out[f"final_layer.linear.{leaf}"].unflatten(0, (-1, 4))  # channels, pixels
        out[f"final_layer.linear.{leaf}"] = value.transpose(0, 1).flatten(0, 1)
    return out


@pytest.mark.parametrize("changes", [{}, {"num_classes": 0}, {"learned_variance": False}])
def test_there_and_back(changes: dict) -> None:
    config = replace(LITTLE, **changes)
    network, other = DiT(config), DiT(config, seed=9)
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            parameter.copy_(
                torch.linspace(-1, 1, parameter.numel()).sin().view_as(parameter) + index
            )
    weights = exported(network)
    assert dit_config(weights, heads=2) == config
    load_dit_state_dict(other, weights)
    for name, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_weights_that_do_not_fit_are_named() -> None:
    network = DiT(LITTLE)
    weights = exported(network)
    with refuses("x_embedder.proj.weight"):
        dit_config({})
    with refuses(16, "heads"):
        dit_config(weights)
    with refuses("pos_embed"):
        dit_config(weights | {"pos_embed": torch.zeros(1, 16, 16)}, heads=2)
    with refuses(12, 4):
        dit_config(weights | {"final_layer.linear.weight": torch.zeros(48, 16)}, heads=2)
    with refuses("t_embedder.mlp.0.weight"):
        load_dit_state_dict(network, {k: v for k, v in weights.items() if "mlp.0" not in k})
    with refuses("extra"):
        load_dit_state_dict(network, weights | {"extra": torch.zeros(1)})
    with refuses("registers.weight", "dit_config"):
        load_dit_state_dict(DiT(replace(LITTLE, registers=1)), weights)
