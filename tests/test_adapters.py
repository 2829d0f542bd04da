"""Adapters of frozen networks: nothing at first, exact sums and merges, published counts."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pytest
import torch
from commands import refuses
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.nets.adapters import (
    Adapter,
    AllWeights,
    BitFit,
    DiffFit,
    DiffScaler,
    DoRA,
    LoRA,
    label_names,
)
from patchdiffusion.nets.adm import ADMConfig
from patchdiffusion.nets.attached import Attached, attached_to, merged
from patchdiffusion.nets.base import Network, NetworkConfig
from patchdiffusion.nets.changes import Direction
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.edm2 import EDM2Config
from patchdiffusion.nets.lego import LegoConfig
from patchdiffusion.nets.unet import UNetConfig
from patchdiffusion.parameterisation import EDM

DIT = DiTConfig(width=16, depth=4, heads=2, patch=(4, 4), num_classes=3)
UNET = UNetConfig(base=8, mult=(1, 2), blocks=1, attention=(1,), num_classes=3)
NETWORKS: dict[str, NetworkConfig] = {
    "dit": DIT,
    "unet": UNET,
    "adm": ADMConfig(base=8, mult=(1, 2), blocks=1, attention=(1,), head_width=8, num_classes=3),
    "edm2": EDM2Config(base=8, mult=(1, 2), blocks=1, attention=(1,), head_width=8, num_classes=3),
    "lego": LegoConfig(width=16, heads=2, num_classes=3).for_canvas((16, 16)),
}
ADAPTERS: dict[str, Adapter] = {
    "bitfit": BitFit(),
    "difffit": DiffFit(),
    "lora": LoRA(rank=2),
    "dora": DoRA(rank=2, alpha=4.0),
    "diffscaler": DiffScaler(rank=2),
    "diffscaler without ReLU": DiffScaler(rank=2, relu=False),
}
SIGMA = torch.tensor([0.1, 1.0, 10.0])
COND = Cond(labels=torch.tensor([0, 2, -1]))


def built(config: NetworkConfig) -> Network:
    """A network whose layers all do something, also those that start at zero."""
    network = config.build(seed=1).eval()
    moved(network, 2)
    return network


@torch.no_grad()
def moved(module: torch.nn.Module, seed: int, size: float = 0.05) -> None:
    """Move all parameters by random steps."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def output(network: Network, sigma: Tensor = SIGMA, cond: Cond = COND) -> Tensor:
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return NetDenoiser(network, EDM())(x, sigma, cond)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("word", NETWORKS)
def test_nothing_changes_at_first_and_the_network_never(word: str, kind: str) -> None:
    network = built(NETWORKS[word])
    before, weights = output(network), copy.deepcopy(network.state_dict())
    ADAPTERS[kind].attach(network)
    assert torch.equal(output(network), before)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("adapters.") for name in trained)
    assert trained <= network.neutral() and set(network.roles()) >= trained
    moved(network.adapters or network, 4)
    assert not torch.equal(output(network), before)
    network.after_step(torch.ones(()))
    assert all(torch.equal(network.state_dict()[name], value) for name, value in weights.items())


@pytest.mark.parametrize("word", NETWORKS)
def test_every_change_has_a_gradient(word: str) -> None:
    network = built(NETWORKS[word])
    for adapter in (DiffFit(), DiffScaler(rank=2)):
        adapter.add(network, type(adapter).__name__, 1.0)
    attached = attached_to(network)
    assert attached is not None
    moved(attached, 4)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    NetDenoiser(network, EDM())(x, SIGMA, COND).square().sum().backward()
    without = [name for name, p in attached.named_parameters() if p.grad is None]
    assert not without
    assert all(p.grad is None for name, p in network.named_parameters() if "adapters" not in name)


MERGED = [k for k in ADAPTERS if k != "diffscaler"]


@pytest.mark.parametrize("kind", MERGED)
@pytest.mark.parametrize("word", [w for w in NETWORKS if w != "edm2"])
def test_merged_weights_compute_the_same(word: str, kind: str) -> None:
    network = built(NETWORKS[word])
    ADAPTERS[kind].add(network, "a", 0.7)
    ADAPTERS["lora"].add(network, "b", -0.3)
    moved(network.adapters or network, 4)
    plain = NETWORKS[word].build()
    plain.load_state_dict(merged(network))
    torch.testing.assert_close(output(plain), output(network), rtol=1e-4, atol=1e-5)


def test_what_no_weights_compute_is_not_merged() -> None:
    for config, adapter, reason in (
        (DIT, DiffScaler(rank=2), "same output"),
        (NETWORKS["edm2"], LoRA(rank=2), "normalizes"),
        (DIT, LoRA(rank=2, levels=(0.5, 80.0)), "noise levels"),
    ):
        network = adapter.attach(built(config))
        with refuses("cannot be merged", reason):
            merged(network)


def test_strengths_add_and_a_copy_has_its_own() -> None:
    network = built(DIT)
    before = output(network)
    LoRA(rank=2).add(network, "a", 1.0)
    moved(network.adapters or network, 4)
    whole = output(network)
    off = Cond(labels=COND.labels, adapters=torch.zeros(3, 1))
    assert torch.equal(output(network, cond=off), before)
    some = replace(off, adapters=torch.tensor([[0.0], [1.0], [0.0]]))
    mixed = output(network, cond=some)
    assert torch.equal(mixed[[0, 2]], before[[0, 2]])
    torch.testing.assert_close(mixed[1], whole[1])
    twin = copy.deepcopy(network)
    moved(twin.adapters or twin, 5)
    assert torch.equal(output(network), whole) and not torch.equal(output(twin), whole)


def test_samples_of_a_batch_have_adapters_of_their_own() -> None:
    network = built(DIT)
    kinds = {"a": LoRA(rank=2), "b": DiffScaler(rank=3), "c": DoRA(rank=2)}
    for name, adapter in kinds.items():
        adapter.add(network, name, 1.0, seed=ord(name))
    moved(network.adapters or network, 4)
    attached = cast(Attached, network.adapters)
    mixed = output(network, cond=replace(COND, adapters=torch.eye(3)))
    for number, word in enumerate(kinds):
        attached.use({name: float(name == word) for name in kinds})
        alone = output(network)
        torch.testing.assert_close(mixed[number], alone[number], rtol=1e-6, atol=1e-6)


def test_differences_of_several_adapters_add_up() -> None:
    """Each is a difference from the layer as it was, whatever the others make of it."""
    network = built(DIT)
    for name in ("a", "b"):
        DiffScaler(rank=2).add(network, name, 1.0, seed=ord(name))
    attached = cast(Attached, network.adapters)
    moved(attached, 4)
    layer = cast(torch.nn.Linear, network.get_submodule("blocks.0.layer0"))
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        y = torch.nn.functional.linear(x, layer.weight, layer.bias)
        differences = []
        for strengths in ({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 1.0}):
            attached.use(strengths)
            differences.append(attached.changed("blocks/0/layer0", layer, x, y) - y)
    a, b, both = differences
    assert a.abs().max() > 0.01 and b.abs().max() > 0.01
    torch.testing.assert_close(both, a + b)


def test_dora_gives_the_weights_of_each_output_their_norm() -> None:
    network = built(DIT)
    DoRA(rank=2).add(network, "a", 1.0)
    attached = cast(Attached, network.adapters)
    moved(attached, 4)
    layer = cast(torch.nn.Linear, network.get_submodule("blocks.0.layer0"))
    change = cast(Direction, attached.change("a", "blocks.0.layer0"))
    weight, _ = change.merged(layer)
    assert change.magnitude.abs().max() > 0.01
    torch.testing.assert_close(
        weight.norm(dim=1), (1 + change.magnitude) * layer.weight.norm(dim=1)
    )


def test_an_adapter_acts_at_its_noise_levels() -> None:
    network = built(DIT)
    before = output(network)
    LoRA(rank=2, levels=(0.5, 10.0)).attach(network)
    moved(network.adapters or network, 4)
    after = output(network)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.equal(after[1], before[1])
    with refuses("noise levels", "leave its range out"):
        output(network, sigma=torch.rand(3, 1, 16, 16) + 0.1)
    norms = DiffFit(levels=(0.5, 10.0)).attach(built(UNET))
    moved(norms.adapters or norms, 4)
    with refuses("changes norms", "all of them the same"):
        output(norms)


COUNTS: dict[str, tuple[Callable[[int], BitFit], dict[int, int]]] = {
    "bitfit": (lambda k: BitFit(), {14: 607136}),
    "norms": (lambda k: BitFit(norms=True), {14: 738464}),
    "branches": (lambda k: DiffFit(scales="branches"), {14: 770720}),
    "all branches": (lambda k: DiffFit(scales="branches", depth="all"), {28: 802976}),
    "difffit": (lambda k: DiffFit(), {14: 835232}),
}


@pytest.mark.parametrize("kind", COUNTS)
def test_published_counts_of_difffit(kind: str) -> None:
    """DiT-XL/2 of 101 classes (2304.06648, table 2): .61, .77 ... .83 M parameters."""
    make, counts = COUNTS[kind]
    with torch.device("meta"):
        config = DiTConfig(
            **{"width": 1152, "depth": 28, "heads": 16, "patch": (2, 2), "channels": 4},
            num_classes=101,
            learned_variance=True,
            embedding="late",
        )
        network = config.build()
        make(0).attach(network)
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert count == next(iter(counts.values()))


def test_scales_that_stay_1_are_bitfit() -> None:
    networks = [built(DIT), built(DIT)]
    BitFit().attach(networks[0])
    DiffFit(norms=False).attach(networks[1])
    for network in networks:
        for name, parameter in network.named_parameters():
            if name.startswith("adapters.") and ".scales." not in name:
                with torch.no_grad():
                    parameter.fill_(0.01)
    assert torch.equal(output(networks[0]), output(networks[1]))


def test_parameters_of_other_classes_are_trained_as_a_whole() -> None:
    for config in NETWORKS.values():
        network = built(config)
        LoRA(rank=2, classes=True).attach(network)
        trained = {name for name, p in network.named_parameters() if p.requires_grad}
        assert (
            {n for n in trained if not n.startswith("adapters.")} == label_names(network) != set()
        )


def test_bad_settings_are_refused() -> None:
    for make, parts in (
        (lambda: LoRA(rank=0), ("rank", 0)),
        (lambda: LoRA(alpha=-1.0), ("alpha", -1.0)),
        (lambda: LoRA(roles=()), ("roles",)),
        (lambda: LoRA(levels=(3.0, 1.0)), ("levels", 3.0)),
        (lambda: AllWeights(levels=(1.0, 3.0)), ("levels",)),
        (lambda: BitFit(depth="half"), ("depth", "half")),  # pyright: ignore[reportArgumentType]
        (lambda: LoRA(rank=17).attach(built(DIT)), ("rank", 16, 17)),
    ):
        with refuses(*parts):
            make()
