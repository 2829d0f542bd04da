"""Branches of several maps: exact decompositions, gates by instructions, new maps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import Capture, fails, refuses, works
from little import LITTLE, MODERN, alive
from tiny import randomize
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.nets.base import Network
from patchdiffusion.nets.control import ControlNet, branch_of
from patchdiffusion.nets.controlbranch import TokenBranch
from patchdiffusion.nets.controlmaps import Blur, Edges, Mask, Sketch
from patchdiffusion.nets.divcontrol import AddCondition, DivControl, DivertedBranch
from patchdiffusion.nets.diverted import (
    DivertedLinear,
    Gate,
    InstructionGate,
    Split,
    divided,
    embedded,
)
from patchdiffusion.nets.layers import Linear
from patchdiffusion.nets.unet import UNetConfig
from patchdiffusion.parameterisation import EDM

DIT = replace(LITTLE, patch=(4, 4), width=32)
SIGMA = torch.tensor([0.1, 1.0, 10.0])


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(shared: int, tailors: int, groups: int = 1, split: Split = "leading") -> Any:
    """A divided layer of random weights [24, 12], its gate, and the weights."""
    linear = Linear(12, 24)
    randomize(linear)
    gate = Gate()
    layer = DivertedLinear(linear, shared, tailors, gate, groups)
    layer.decompose(linear.weight, linear.bias, split)
    return layer, gate, linear


def controlled(adapter: DivControl, config: Any = DIT, *, moved: bool = True) -> Network:
    network = adapter.attach(alive(config).eval())
    adapter.started(network)
    if moved:  # only what is zero at first
        for name, parameter in branch_of(network).named_parameters():
            if name.startswith(("entry", "exits")):
                torch.nn.init.normal_(parameter, std=0.2)
    return network


def output(network: Network, cond: Cond) -> Tensor:
    return NetDenoiser(network, EDM())(drawn(3, 3, 16, 16), SIGMA, cond)


@pytest.mark.parametrize("split", ["leading", "interleaved"])
@pytest.mark.parametrize("groups", [1, 3])
def test_all_parts_are_the_matrix(groups: int, split: Split) -> None:
    rank = 8 if groups == 3 else 12
    layer, gate, linear = layer_of(rank // 2, rank - rank // 2, groups, split)
    x, gate.now = drawn(3, 5, 12), torch.ones(3, rank - rank // 2)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight(gate.now[0]), linear.weight, rtol=1e-5, atol=1e-5)


def test_parts_are_divided_by_their_values() -> None:
    layer, *_ = layer_of(4, 4)
    assert layer.shared[0].s.min() >= layer.tailors[0].s.max()
    assert [p.tolist() for p in divided([2, 2], "leading")] == [[0, 1], [2, 3]]
    assert [p.tolist() for p in divided([2, 2], "interleaved")] == [[0, 2], [1, 3]]
    assert [p.tolist() for p in divided([1, 3], "interleaved")] == [[0], [1, 2, 3]]


def test_gates_of_samples_are_those_of_a_loop() -> None:
    layer, gate, _ = layer_of(5, 3, groups=3)
    x, weights = drawn(4, 6, 12), drawn(4, 3, seed=5).sigmoid()
    gate.now = weights
    mixed = layer(x)
    for one, w, y in zip(x, weights, mixed, strict=True):
        dense = one @ layer.weight(w).T + layer.bias
        torch.testing.assert_close(y, dense, rtol=1e-5, atol=1e-6)


def test_a_gate_by_its_definition() -> None:
    gate = InstructionGate(64, 16, 10, 4)
    randomize(gate)
    weights = gate(drawn(5, 64))
    assert torch.equal((weights > 0).sum(1), torch.full((5,), 4))
    torch.testing.assert_close(weights.sum(1), torch.full((5,), 4.0))
    logits = gate.layer1(torch.nn.functional.silu(gate.layer0(drawn(5, 64))))
    for row, found in zip(logits, weights, strict=True):
        kept = row.sort(descending=True).indices[:4]
        expected = torch.zeros(10)
        expected[kept] = 4 * row[kept].exp() / row[kept].exp().sum()
        torch.testing.assert_close(found, expected)


def test_texts_are_like_by_their_words() -> None:
    edges, also, other = embedded(("edge map to image", "soft edges to image", "color to image"))
    assert edges @ also > 2 * edges @ other
    assert torch.equal(embedded(("Edge map",))[0], edges)
    assert edges.norm() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("config", [DIT, replace(MODERN, patch=(4, 4), width=32)])
def test_a_branch_of_all_parts_is_a_copy(config: Any) -> None:
    """One map, no tailors: the matrices are those of the network."""
    plain = ControlNet().attach(alive(config).eval())
    ControlNet().started(plain)
    one = controlled(DivControl(conditions=(Edges(),), shared=32, tailors=0), config)
    source, target = branch_of(one), branch_of(plain)
    assert isinstance(source, DivertedBranch) and isinstance(target, TokenBranch)
    for part in ("entry", "exits"):
        state = getattr(source, part).state_dict()
        getattr(target, part).load_state_dict(state)
    cond = Cond(control=drawn(3, 3, 16, 16, seed=5).sigmoid())
    torch.testing.assert_close(output(one, cond), output(plain, cond), rtol=1e-4, atol=1e-4)
    before = output(alive(config).eval(), Cond())
    assert torch.equal(output(controlled(DivControl(), config, moved=False), cond), before)


def test_each_sample_of_a_batch_has_its_map_and_gate() -> None:
    network = controlled(DivControl(conditions=(Edges(), Blur(), Mask())))
    branch = branch_of(network)
    assert isinstance(branch, DivertedBranch)
    maps, table = drawn(3, 9, 16, 16, seed=5).sigmoid(), branch.table
    mixed = output(network, Cond(control=maps, instruction=table))
    for i in range(3):
        own = maps[:, 3 * i : 3 * i + 3]
        told = branch.instructed(Cond(control=own), ("edges", "blur", "mask")[i])
        torch.testing.assert_close(output(network, told)[i], mixed[i], rtol=1e-5, atol=1e-5)
    first = output(network, Cond(control=maps[:, :3]))  # by default its first map
    torch.testing.assert_close(first[0], mixed[0], rtol=1e-5, atol=1e-5)
    numbers = {tuple(branch.chosen(maps, Cond(control=maps, seed=s))[0][:, 0, 0, 0].tolist())
               for s in torch.arange(60).split(3)}  # fmt: skip
    assert len(numbers) > 5


def test_parts_that_an_instruction_leaves_out_have_no_gradient() -> None:
    network = controlled(DivControl(conditions=(Edges(), Blur())))
    branch = branch_of(network)
    assert isinstance(branch, DivertedBranch) and branch.gate is not None
    gates = branch.gate(branch.table)
    assert not torch.equal(gates[0] > 0, gates[1] > 0)
    for word, gate in zip(("edges", "blur"), gates, strict=True):
        network.zero_grad()
        cond = branch.instructed(Cond(control=drawn(3, 3, 16, 16, seed=5).sigmoid()), word)
        output(network, cond).square().sum().backward()
        for path, layer in branch.divided.items():
            for group, factors in enumerate(layer.tailors or ()):
                u, s, v = (p.grad for p in factors.parameters())
                assert u is not None and s is not None and v is not None
                off, on = gate == 0, gate > 0
                assert not u[:, off].any() and not s[off].any() and not v[off].any(), path
                assert u[:, on].any() and v[on].any(), path
                shared = [p.grad for p in layer.shared[group].parameters()]
                assert all(g is not None and g.any() for g in shared), path


def test_a_new_map_changes_only_new_parts() -> None:
    base = DivControl(conditions=(Edges(), Blur()))
    network = controlled(base)
    grown = AddCondition(base=base, condition=Sketch(), tailors=2)
    new = grown.attach(alive(DIT).eval())
    state, former = new.state_dict(), network.state_dict()
    new.load_state_dict(former, strict=False)
    trained = {name: p for name, p in new.named_parameters() if p.requires_grad}
    assert trained and all(".new." in name for name in trained) and trained.keys() <= state.keys()
    assert not trained.keys() & former.keys() and state.keys() == trained.keys() | former.keys()
    branch = branch_of(new)
    assert isinstance(branch, DivertedBranch)
    cond = Cond(
        control=drawn(3, 3, 16, 16, seed=5).sigmoid(), instruction=branch.table.expand(3, -1)
    )
    assert torch.equal(output(new, cond), output(network, cond))  # zero-shot at first
    optimizer = torch.optim.Adam(trained.values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output(new, cond).square().sum().backward()
        optimizer.step()
    assert not torch.equal(output(new, cond), output(network, cond))
    assert all(torch.equal(new.state_dict()[name], value) for name, value in former.items())


def test_what_does_not_fit_is_refused() -> None:
    with refuses("adapter.shared", 32, 40):
        DivControl(shared=40, tailors=1).attach(alive(DIT))
    with refuses("active", 9, 4):
        DivControl(tailors=4, active=9).attach(alive(DIT))
    with refuses("conditions"):
        DivControl(conditions=())
    with refuses("instructions", 4, 1):
        DivControl(instructions=("a",))
    with refuses("tailors", 0):
        AddCondition(tailors=0)
    with refuses("transformer", "--adapter control"):
        DivControl().attach(UNetConfig(base=4, mult=(1, 2), blocks=1, attention=()).build())
    network = controlled(DivControl(conditions=(Edges(), Blur())))
    maps = drawn(3, 3, 16, 16).sigmoid()
    for wrong in (Cond(control=maps[:, :2]), Cond(control=maps, instruction=drawn(3, 2))):
        with refuses("cond"):
            output(network, wrong)


def test_commands(images: Path, tmp_path: Path, capsys: Capture) -> None:
    """A branch of three maps, a fourth one for it, and samples by each."""
    base = tmp_path / "base"
    network = replace(DIT, depth=2, patch=(4, 4))
    tiny.run(replace(tiny.config(images, steps=1), network=network), base)
    length = "--clock steps --images 2 --batch 4 --preview.samples 1 --preview.grid 3"
    length += " --preview.sample-steps 1 --preview.held-out 4 --device cpu --threads 1"
    div, more = tmp_path / "div", tmp_path / "more"
    maps = ("--adapter", "divcontrol", "--adapter.conditions", "edges", "blur", "mask")
    works(capsys, "adapt", base, images, *maps, "--out", div, *length.split())
    new = ("--adapter", "add-map", "--adapter.condition", "sketch", "--adapter.tailors", 2)
    works(capsys, "adapt", div, images, *new, "--out", more, *length.split())
    assert "is finished" in works(
        capsys, "adapt", div, images, *new, "--out", more, *length.split()
    )
    picture = images / "a" / "00.png"
    drawn = ("--count", 1, "--steps", 1, "--device", "cpu", "--image", picture)
    for name in ("edges", "mask"):
        works(capsys, "sample", div, *drawn, "--condition", name, "--out", tmp_path / name)
    words = (*drawn, "--instruction", "soft edges to image", "--out", tmp_path / "words")
    works(capsys, "sample", div, *words)
    works(capsys, "sample", base, *drawn, "--control", more, "--out", tmp_path / "sketch")
    assert "blur" in fails(capsys, "sample", div, *drawn, "--condition", "sketch")
    told = fails(capsys, "adapt", base, images, *new, "--out", tmp_path / "x", *length.split())
    assert "--adapter divcontrol" in told
