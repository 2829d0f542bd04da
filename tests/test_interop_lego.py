"""Published weights of LEGO bricks and the outputs of the published network."""

import json
from dataclasses import replace

import pytest
import torch
from commands import refuses
from golden import golden, weights_and_tensors
from little import drawn
from safetensors import safe_open
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.interop.lego import lego_config, lego_name, load_lego_state_dict
from patchdiffusion.nets.lego import Lego, LegoConfig
from patchdiffusion.parameterisation import EDM

LITTLE = LegoConfig(
    channels=4, regions=(4, 8), patches=(2, 4), depths=(1, 2), width=16, heads=2, num_classes=3
)


def test_reference_outputs() -> None:
    path = golden("lego-pg-16-labels")
    weights, t = weights_and_tensors(path)
    network = lego_config(weights, heads=4).build(seed=5)
    load_lego_state_dict(network, weights)
    has_label = t["in/labels"].any(1)
    labels = torch.where(has_label, t["in/labels"].argmax(1), -1)
    sigma, precond = t["in/sigma"], EDM(sigma_data=0.5)
    with torch.no_grad():
        inner, noise, cond, _ = NetDenoiser(network, precond).scaled(
            t["in/x"], sigma, Cond(labels=labels)
        )
        outputs = network.run(inner, noise, cond)
        denoised = NetDenoiser(network, precond)(t["in/x"], sigma, cond)
    for k, found in enumerate([*outputs, denoised], 1):
        expected = t["out/denoised" if k > len(outputs) else f"out/F_brick{k}"]
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), k
    with safe_open(path, "pt") as stream:
        stated = json.loads(stream.metadata()["config"])
    config = network.config
    assert list(config.regions) == stated["regions"]
    assert list(config.patches) == stated["patch_sizes"]
    assert list(config.depths) == stated["depths"]
    assert (config.width, config.heads) == (stated["hidden"], stated["heads"])
    assert config.num_classes == stated["label_dim"]


def exported(network: Lego) -> dict[str, Tensor]:
    """A network's weights in published names and layout."""
    config, state = network.config, network.state_dict()
    out = {lego_name(name): value for name, value in state.items()}
    label = "y_embedder.embedding_table"
    if config.num_classes:
        table = state["embed.label.weight"]
        out |= {f"{label}.weight": (table[:-1] - table[-1]).mT, f"{label}.bias": table[-1]}
    for k, (region, patch) in enumerate(zip(config.regions, config.patches, strict=True)):
        stem = f"bricks.{k}.body.stem"
        kinds = ["below"] * (k > 0) + ["image", "coordinates"]
        parts = [state[f"{stem}.{kind}.weight"].unflatten(1, (-1, patch, patch)) for kind in kinds]
        parts[-1] = parts[-1].flip(1)
        out[f"model.{k}.x_embedder.proj.weight"] = torch.cat(parts, dim=1)
        for leaf in ("weight", "bias"):
            value = out[f"model.{k}.final_layer.linear.{leaf}"].unflatten(0, (-1, patch**2))
            out[f"model.{k}.final_layer.linear.{leaf}"] = value.transpose(0, 1).flatten(0, 1)
        side = region // patch
        steps = torch.arange(side * side)
        angles = torch.stack([steps % side, steps // side], dim=1)[..., None] * (
            10000.0 ** -(torch.arange(config.width // 4) / (config.width // 4))
        )
        table = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
        out[f"model.{k}.pos_embed"] = table[None]
    return out


@pytest.mark.parametrize("classes", [0, 3])
def test_there_and_back(classes: int) -> None:
    config = replace(LITTLE, num_classes=classes)
    network, other = config.build(), config.build(seed=9)
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=index))
    weights = exported(network)
    assert lego_config(weights, heads=2) == config
    load_lego_state_dict(other, {f"model.{name}": value for name, value in weights.items()})
    for name, value in network.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, atol=1e-6, rtol=0)


def test_weights_that_do_not_fit_are_named() -> None:
    network = LITTLE.build()
    weights = exported(network)
    with refuses("model.0.x_embedder.proj.weight"):
        lego_config({})
    with refuses(16, "heads"):
        lego_config(weights)
    with refuses("model.1.pos_embed"):
        lego_config({n: v for n, v in weights.items() if n != "model.1.pos_embed"}, heads=2)
    with refuses("model.1.pos_embed"):
        lego_config(weights | {"model.1.pos_embed": torch.zeros(1, 4, 16)}, heads=2)
    with refuses("t_embedder.mlp.0.weight"):
        load_lego_state_dict(network, {k: v for k, v in weights.items() if "mlp.0" not in k})
    with refuses("bricks.0.body.blocks.0.attention.q_norm.weight", "lego_config"):
        body = replace(LITTLE.body, qk_norm=True)
        load_lego_state_dict(replace(LITTLE, body=body).build(), weights)
