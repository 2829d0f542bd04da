"""Published weights of EDM2 and the outputs of its network."""

from dataclasses import replace

import pytest
import torch
from commands import refuses
from golden import golden, weights_and_tensors
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.interop.edm2 import (
    edm2_config,
    edm2_log_variance,
    edm2_name,
    load_edm2_state_dict,
)
from patchdiffusion.nets.edm2 import EDM2Config, MPUNet
from patchdiffusion.parameterisation import EDM

LITTLE = EDM2Config(
    base=8, mult=(2, 3), blocks=1, attention=(1,), head_width=8, num_classes=4, coordinates=False
)


def test_reference_outputs() -> None:
    weights, t = weights_and_tensors(golden("edm2-32-labels"))
    network = edm2_config(weights).build(seed=5)
    load_edm2_state_dict(network, weights)
    with torch.no_grad():
        cond = Cond(labels=t["in/labels"].argmax(1))
        found = NetDenoiser(network, EDM(sigma_data=0.5))(t["in/x"], t["in/sigma"], cond)
        log_variance = edm2_log_variance(weights)(t["in/sigma"])
    for out, name in ((found, "denoised"), (log_variance, "logvar")):
        expected = t[f"out/{name}"]
        assert (out - expected.reshape(out.shape)).abs().max() <= 1e-5 * expected.abs().max()
    config = replace(network.config, coordinates=True)
    located = config.build(seed=6)
    load_edm2_state_dict(located, weights)
    with torch.no_grad():
        x, noise = t["in/x"], t["in/sigma"].log() / 4
        assert torch.equal(located(x, noise, cond), network(x, noise, cond))


def exported(network: MPUNet, resolution: int) -> dict[str, Tensor]:
    """A network's weights in published names and layout."""
    out: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        if ".qkv." in name:
            split = value.reshape(3, -1, 8, *value.shape[1:])  # heads of 8 features
            value = split.movedim(0, 2).reshape(value.shape)
        if "fourier" in name:
            value = value * (2 * torch.pi)
        if name.endswith("gain"):
            value = value[0]
        out["unet." + edm2_name(name, resolution, network.config.levels)] = value
    return out


@pytest.fixture
def network() -> MPUNet:
    network = LITTLE.build()
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.manual_seed(index)))
    return network


def test_there_and_back(network: MPUNet) -> None:
    weights = exported(network, 16)
    config = replace(LITTLE, dropout=0.2)
    assert edm2_config(weights, dropout=0.2, head_width=8) == config
    other = LITTLE.build(seed=9)
    load_edm2_state_dict(other, weights)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-6, atol=0)


def test_weights_that_do_not_fit_are_named(network: MPUNet) -> None:
    weights = exported(network, 16)
    with refuses("emb_noise.weight"):
        load_edm2_state_dict(network, {k: v for k, v in weights.items() if "emb_noise" not in k})
    with refuses("EDM2"):
        load_edm2_state_dict(network, {"x": torch.zeros(1)})
    with refuses("logvar_linear.weight"):
        edm2_log_variance(weights)
    with refuses("embed.jump.weight"):
        load_edm2_state_dict(replace(LITTLE, jump=True).build(), weights)
