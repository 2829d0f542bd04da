"""Branches that control a frozen network: nothing at first, then what their equations say."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from commands import refuses
from little import LITTLE, MODERN, alive
from tiny import randomize
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.nets.adapters import LoRA, layers
from patchdiffusion.nets.adm import ADMConfig
from patchdiffusion.nets.attached import merged
from patchdiffusion.nets.base import Network, NetworkConfig
from patchdiffusion.nets.control import ControlNet, branch_of
from patchdiffusion.nets.controlbranch import EncoderBranch, TokenBranch, fitted
from patchdiffusion.nets.controlmaps import Blur, Color, Edges, Mask, Sketch, otsu
from patchdiffusion.nets.count import count
from patchdiffusion.nets.cuts import Cuttable, Encoder
from patchdiffusion.nets.edm2 import EDM2Config
from patchdiffusion.nets.lego import LegoConfig
from patchdiffusion.nets.routing import Route
from patchdiffusion.nets.tokens import unfold
from patchdiffusion.nets.unet import UNetConfig
from patchdiffusion.parameterisation import EDM

SMALL: dict[str, Any] = {"base": 8, "mult": (1, 2), "blocks": 1, "attention": (1,)}
UNETS: dict[str, NetworkConfig] = {
    "unet": UNetConfig(**SMALL, num_classes=2),
    "ncsn++": UNetConfig(**SMALL, embedding="fourier", encoder="residual", filter=(1, 3, 3, 1)),
    "adm": ADMConfig(**SMALL, head_width=8),
    "edm2": EDM2Config(**SMALL, head_width=8),
}
TRANSFORMERS: dict[str, NetworkConfig] = {
    "dit": replace(LITTLE, patch=(4, 4), num_classes=2),
    "modern": replace(MODERN, patch=(4, 4), registers=2),
    "pixel": replace(LITTLE, patch=(4, 4), bottleneck=8, positions="rope"),
    "half": replace(MODERN, depth=6, patch=(2, 2), half_blocks=2),
    "route": replace(LITTLE, patch=(4, 4), tokens=Route()),
}
NETWORKS = UNETS | TRANSFORMERS
SIGMA = torch.tensor([0.1, 1.0, 10.0])


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CONTROL = drawn(3, 3, 16, 16, seed=5).sigmoid()
COND = Cond(labels=torch.tensor([0, 1, -1]), control=CONTROL)


def built(config: NetworkConfig) -> Network:
    """A network whose layers all do something."""
    if config in TRANSFORMERS.values():
        return alive(config).eval()  # pyright: ignore[reportArgumentType]
    network = config.build()
    randomize(network)
    return network.eval()


def controlled(config: NetworkConfig, *, moved: bool = True) -> Network:
    """A network with a branch of random weights, or of those that training starts from."""
    adapter = ControlNet()
    network = adapter.attach(built(config))
    adapter.started(network)
    if moved:
        randomize(branch_of(network), seed=7, scale=0.1)
    return network


@torch.no_grad()
def output(network: Network, cond: Cond = COND) -> Tensor:
    return NetDenoiser(network, EDM())(drawn(3, 3, 16, 16), SIGMA, cond)


@pytest.mark.parametrize("word", NETWORKS)
def test_nothing_changes_at_first(word: str) -> None:
    before = output(built(NETWORKS[word]))
    network = controlled(NETWORKS[word], moved=False)
    assert torch.equal(output(network), before)
    branch, state = branch_of(network), network.state_dict()
    assert branch.copies()
    assert all(torch.equal(value, state[name]) for name, value in branch.copies().items())
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {n for n in dict(network.named_parameters()) if n.startswith("adapters.")}
    assert trained <= network.neutral() and set(network.roles()) >= trained


@pytest.mark.parametrize("word", NETWORKS)
def test_a_map_has_an_effect_and_none_has_none(word: str) -> None:
    plain, network = output(built(NETWORKS[word])), controlled(NETWORKS[word])
    assert not torch.equal(output(network), plain)
    assert torch.equal(output(network, replace(COND, control=None)), plain)
    other = replace(COND, control=CONTROL.flip(3))
    assert not torch.equal(output(network, other), output(network))
    weak = replace(COND, adapters=torch.tensor([[1.0], [0.0], [1.0]]))
    torch.testing.assert_close(output(network, weak)[1], plain[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output(network, weak)[2], output(network)[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("word", NETWORKS)
def test_all_of_a_branch_is_trained_and_the_network_is_not(word: str) -> None:
    network = controlled(NETWORKS[word]).train()
    cond = replace(COND, seed=torch.arange(3))
    NetDenoiser(network, EDM())(drawn(3, 3, 16, 16), SIGMA, cond).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == name.startswith("adapters."), name


def test_a_transformer_by_its_equations() -> None:
    """The features of each block, by calling its parts one by one."""
    network: Any = controlled(TRANSFORMERS["dit"])
    branch = branch_of(network)
    assert isinstance(branch, TokenBranch) and len(branch.blocks) == len(network.blocks) // 2
    x, noise, control = drawn(3, 3, 16, 16), drawn(3), CONTROL
    with torch.no_grad():
        plain = network.start(x, noise, replace(COND, control=None))
        places = plain.h - network.stem(unfold(x, (4, 4)))
        h = network.blocks[0](plain.h, plain.emb).h
        c = h + branch.entry(branch.stem(unfold(2 * control - 1, (4, 4))) + places)
        for i, block in enumerate(network.blocks[1:]):
            if i < len(branch.blocks):
                c = branch.blocks[i](c, plain.emb).h
                h = h + branch.exits[i](c)
            h = block(h, plain.emb).h
        expected = network.finish(plain._replace(h=h))
        torch.testing.assert_close(network(x, noise, COND), expected, rtol=1e-5, atol=1e-5)


def test_a_unet_by_its_equations() -> None:
    """Skips and middle of a second encoder are added to those of the first."""
    network: Any = controlled(UNETS["unet"])
    branch = branch_of(network)
    assert isinstance(branch, EncoderBranch)
    x, noise, plain = drawn(3, 3, 16, 16), drawn(3), replace(COND, control=None)
    with torch.no_grad():
        first, copy = network.encode(x, noise, plain), branch.network
        begun, side = copy._begun(x, noise, plain, None)
        h = begun.h + branch.hint(2 * CONTROL - 1, COND).h
        second, _ = copy._descend(begun._replace(h=h, skips=(h,)), side, plain, None)
        second = copy._middle(second, plain, None)
        pairs = zip(first.skips, second.skips, branch.exits[:-1], strict=True)
        skips = tuple(a + leave(b) for a, b, leave in pairs)
        h = first.h + branch.exits[-1](second.h)
        expected = network.decode(first._replace(h=h, skips=skips), plain)
        torch.testing.assert_close(network(x, noise, COND), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("word", [w for w in NETWORKS if w not in ("half", "route")])
def test_networks_in_parts_are_the_same(word: str) -> None:
    network = controlled(NETWORKS[word])
    assert isinstance(network, Cuttable) and isinstance(network, Encoder)
    x, noise = drawn(3, 3, 16, 16), drawn(3)
    with torch.no_grad():
        whole = network(x, noise, COND)
        passage = network.opened(x, noise, COND, network.cut())
        out, kept = passage.full()
        assert torch.equal(out, whole)
        torch.testing.assert_close(passage.reuse(kept), whole, rtol=1e-5, atol=1e-5)
        encoding = network.encoded(x, noise, COND, network.encoder_blocks())
        assert torch.equal(encoding.decode(noise, COND), whole)
        twice = encoding.decode(noise.repeat(2), COND.cat(COND))
        torch.testing.assert_close(twice, whole.repeat(2, 1, 1, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("word", ["unet", "dit"])
def test_several_branches_each_with_its_map(word: str) -> None:
    network = built(NETWORKS[word])
    for name in "ab":
        ControlNet().add(network, name, 1.0)
        randomize(branch_of(network, name), seed=ord(name), scale=0.1)
    control = CONTROL
    both = replace(COND, control=torch.cat([control, control.flip(2)], dim=1))
    on = both
    off = replace(both, adapters=torch.tensor([[1.0, 0.0]] * 3))
    one = built(NETWORKS[word])
    ControlNet().add(one, "a", 1.0)
    branch_of(one, "a").load_state_dict(branch_of(network, "a").state_dict())
    torch.testing.assert_close(output(network, off), output(one), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(output(network, on), output(network, off))
    with refuses("cond.control", 6):
        output(network, replace(COND, control=control[:, :1]))


def test_other_adapters_leave_a_branch_alone() -> None:
    network = controlled(TRANSFORMERS["dit"])
    own = {path for path, *_ in layers(network)}
    assert own == {path for path, *_ in layers(built(TRANSFORMERS["dit"]))}
    LoRA(rank=2).add(network, "more", 1.0)
    assert torch.equal(output(network), output(controlled(TRANSFORMERS["dit"])))


def test_its_operations_count() -> None:
    for config in (UNETS["unet"], TRANSFORMERS["dit"]):
        plain, network = built(config), controlled(config)
        more = count(network, 16).macs / count(plain, 16).macs
        assert 1.2 < more < 2


def test_what_does_not_fit_is_refused() -> None:
    dit = TRANSFORMERS["dit"]
    with refuses("blocks", 0, 3):
        ControlNet(blocks=9).attach(built(dit))
    with refuses("blocks", 0, 2):
        ControlNet(blocks=2).attach(built(UNETS["unet"]))
    with refuses("Lego", "branch"):
        ControlNet().attach(LegoConfig(width=16, heads=2).for_canvas((16, 16)).build())
    with refuses("cannot be merged", "branch"):
        merged(controlled(dit))
    network = controlled(dit)
    for wrong in (drawn(3, 2, 16, 16), drawn(2, 3, 16, 16), drawn(3, 3)):
        with refuses("cond.control"):
            output(network, replace(COND, control=wrong))


# ---- Maps ----


def test_maps_of_simple_pictures() -> None:
    flat = torch.full((1, 3, 16, 16), 0.25)
    square = torch.zeros(1, 1, 16, 16)
    square[..., 4:9, 3:12] = 0.8
    assert Edges()(flat).abs().max() < 1e-6 and Sketch()(flat).abs().max() < 1e-6
    torch.testing.assert_close(Blur()(flat), flat)
    torch.testing.assert_close(Color(cell=1)(flat), flat)
    step = (torch.arange(16) > 7).float().expand(1, 1, 16, 16)
    edges = Edges(sigma=0.05)(step)
    torch.testing.assert_close(edges[0, 0, 5], torch.eye(16)[7] + torch.eye(16)[8])
    torch.testing.assert_close(Edges(sigma=0.05)(step.mT), edges.mT)
    assert torch.equal(Mask()(square), (square > 0).float())
    assert torch.equal(Mask()(1 - square), (square > 0).float())
    lines = Sketch()(1 - square)
    assert lines[0, 0, 6, 6] >= 0 and lines[0, 0, 0, 15] < 1e-6 and lines.max() > 0.5
    cells = Color(cell=8)(drawn(1, 3, 12, 16).sigmoid())
    assert torch.equal(cells[..., :8, :8], cells[..., :1, :1].expand(1, 3, 8, 8))
    for kind in (Edges(), Sketch(), Blur(), Color(), Mask()):
        out = kind(drawn(2, 1, 12, 16).sigmoid())
        assert out.shape == (2, kind.colors, 12, 16) and out.min() >= 0 and out.max() <= 1


def test_a_threshold_by_trying_all() -> None:
    values = (drawn(1, 200).sigmoid() * 255).round() / 255
    spreads = []
    for t in range(255):
        low = values[values * 255 <= t + 0.5]
        high = values[values * 255 > t + 0.5]
        parts = [len(p) * ((p.mean() - values.mean()) ** 2).item() for p in (low, high) if len(p)]
        spreads.append(sum(parts))
    best = max(spreads)
    assert spreads[round(otsu(values).item() * 255 - 0.5)] == pytest.approx(best, rel=1e-4)


def test_wrong_numbers_of_maps_are_refused() -> None:
    for kind, name in ((Edges, "sigma"), (Blur, "sigma"), (Sketch, "gain"), (Color, "cell")):
        with refuses(name, 0):
            kind(**{name: 0})


def test_maps_for_other_channels() -> None:
    x = drawn(2, 3, 4, 4)
    assert torch.equal(fitted(x, 3), x)
    assert torch.equal(fitted(x, 1), x.mean(1, keepdim=True))
    assert torch.equal(fitted(x, 5)[:, 3:], x[:, :2])
