"""Mixtures of experts: DiT-MoE, expert choice, balance over the whole batch, upcycling."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from commands import Capture, fails, refuses, works
from little import drawn
from PIL import Image
from safetensors.torch import load_file
from sameruns import check_resumed
from torch import Tensor

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets import dispatch, experts
from patchdiffusion.nets.base import initialize
from patchdiffusion.nets.count import MacCounter, count
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.ditsizes import SIZES
from patchdiffusion.nets.experts import (
    ExpertChoice,
    Experts,
    Mixture,
    MlpShape,
    TopK,
    balance_loss,
    place_features,
)
from patchdiffusion.nets.tokenblock import Routed
from patchdiffusion.system.device import compile_units
from patchdiffusion.train import loop
from patchdiffusion.train.report import read_log

DIT = DiTConfig(width=16, depth=2, heads=2, patch=(4, 4), num_classes=3, registers=1)
SHAPE = MlpShape(width=16, hidden=48, gated=True, axes=2)
BOTH = pytest.mark.parametrize("rule", [TopK(), ExpertChoice()], ids=["top-k", "choice"])


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Cond]:
    return drawn(batch, 3, 8, 12), torch.linspace(-1, 1, batch), Cond(labels=torch.arange(batch))


def mixture(rule: Mixture, shape: MlpShape = SHAPE) -> Experts:
    built = rule.mixture(shape)
    initialize(built, 0)
    tiny.randomize(built)
    return built


# ---- A layer ----


@pytest.mark.parametrize("top", [1, 2, 5])
@pytest.mark.parametrize("renormalize", [False, True])
def test_dispatch_is_the_dense_loop(top: int, renormalize: bool) -> None:
    """Every expert on every token, weighted by zero where it is not chosen; gradients, too."""
    layer = mixture(TopK(count=5, top=top, renormalize=renormalize))
    h = drawn(2, 7, 16).requires_grad_()
    places = place_features(drawn(2, 7, 2))
    out, routed = layer(h, places)
    assert (routed.chosen.sum(-1) == top).all()
    weights = routed.scores * routed.chosen
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    assert layer.shared is not None
    dense = layer.shared(h)
    for i, mlp in enumerate(layer.mlps):
        dense = dense + weights[..., i, None] * mlp(h)
    torch.testing.assert_close(out, dense)
    ours, theirs = (
        torch.autograd.grad(
            y.square().sum(), [h, *layer.parameters()], allow_unused=True, retain_graph=True
        )
        for y in (out, dense)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            a if a is not None else 0 * h, b if b is not None else 0 * h, rtol=1e-4, atol=1e-4
        )


def test_operators_of_a_graph_are_the_loop() -> None:
    x, weight = drawn(9, 4).requires_grad_(), drawn(3, 5, 4).requires_grad_()
    counts = torch.tensor([4, 0, 5])
    parts = [rows @ w.T for rows, w in zip(x.split([4, 0, 5]), weight, strict=True)]
    out = dispatch.grouped_linear(x, weight, counts)
    torch.testing.assert_close(out, torch.cat(parts))
    assert torch.autograd.gradcheck(
        lambda x, w: dispatch.grouped_linear(x, w, counts),
        (x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()),
    )
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), (x, weight)),
        torch.autograd.grad(torch.cat(parts).square().sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_experts_choose_equally_many_tokens_of_each_image() -> None:
    layer = mixture(ExpertChoice(count=4, top=1.5, shared=0))
    h = drawn(3, 8, 16)
    out, routed = layer(h)
    assert (routed.chosen.sum(1) == 3).all()  # 8 tokens * 1.5 / 4
    dense = sum(
        (routed.scores * routed.chosen)[..., i, None] * m(h) for i, m in enumerate(layer.mlps)
    )
    torch.testing.assert_close(out, dense)
    torch.testing.assert_close(layer(h[1:2])[0], out[1:2])  # images do not depend on each other


@BOTH
def test_the_order_of_experts_does_not_matter(rule: Mixture) -> None:
    rule = replace(rule, count=4)
    first, order = mixture(rule), [2, 0, 3, 1]
    second = rule.mixture(SHAPE)
    state = first.state_dict()
    renamed = {f"mlps.{new}.": f"mlps.{old}." for new, old in enumerate(order)}
    moved = {}
    for name, value in state.items():
        new = next((a + name.removeprefix(b) for a, b in renamed.items() if name.startswith(b)), "")
        moved[new or name] = value[order] if name in ("gate.weight", "at.weight") else value
    second.load_state_dict(moved)
    h, places = drawn(2, 9, 16), place_features(drawn(2, 9, 2))
    torch.testing.assert_close(first(h, places)[0], second(h, places)[0])


def test_the_gate_sees_the_place_on_the_canvas() -> None:
    """With it the same features have other experts elsewhere; without it they have not."""
    h = drawn(1, 1, 16).expand(1, 50, -1)
    places = place_features(torch.rand(1, 50, 2) * 2 - 1)
    for place, several in ((True, True), (False, False)):
        layer = mixture(TopK(count=6, top=1, place=place))
        if layer.at is not None:
            layer.at.weight.data *= 10
        _, routed = layer(h, places)
        assert (routed.chosen[0].any(0).sum() > 1) == several
    assert place_features(torch.ones(1, 2, 3), 2).shape == (1, 4, 15)
    assert not place_features(torch.ones(1, 2, 3), 2)[:, :2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_are_in_full_precision(dtype: torch.dtype) -> None:
    layer, h = mixture(TopK()), drawn(2, 6, 16)
    with torch.autocast("cpu", dtype):
        out, routed = layer(h)
    assert routed.scores.dtype == torch.float32
    torch.testing.assert_close(routed.scores, layer(h)[1].scores)
    torch.testing.assert_close(out.float(), layer(h)[0], rtol=0.1, atol=0.1)


# ---- Balance ----


def test_balance_is_the_weight_at_balance() -> None:
    scores = torch.full((2, 6, 3), 1 / 3)
    even = F.one_hot(torch.arange(12) % 3, 3).bool().view(2, 6, 3)
    assert float(balance_loss(Routed(scores, even), 0.01)) == pytest.approx(0.01)
    one = torch.tensor([1.0, 0, 0]).expand(2, 6, 3)
    assert float(balance_loss(Routed(one, one.bool()), 0.01)) == pytest.approx(0.03)


def test_shares_are_those_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over processes is the loss of the whole batch, and so are the gradients."""
    logits = drawn(4, 6, 5)
    scores = logits.softmax(-1)
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(2).indices, 1).bool()
    whole = balance_loss(Routed(scores, chosen), 1.0)
    total = chosen.flatten(0, 1).sum(0).float()
    monkeypatch.setattr(experts, "over_ranks", lambda counts: total)
    parts = [balance_loss(Routed(scores[i : i + 2], chosen[i : i + 2]), 1.0) for i in (0, 2)]
    assert float(sum(parts)) / 2 == pytest.approx(float(whole))
    monkeypatch.undo()
    alone = [balance_loss(Routed(scores[i : i + 2], chosen[i : i + 2]), 1.0) for i in (0, 2)]
    assert float(sum(alone)) / 2 != pytest.approx(float(whole), abs=1e-6)


def loads(training: Any) -> Tensor:
    """Shares of the experts of each block over several noise levels: [L, n]."""
    network, x = training.network, drawn(16, 3, 16, 16)
    tape = Tape(wants=network.expert_taps)
    with torch.no_grad():
        network(x, torch.linspace(-1, 1, 16), Cond(), tape=tape)
    return torch.stack([tape.activations[n].float().mean((0, 1)) for n in network.expert_taps])


def test_no_expert_starves_with_the_balance_loss(images: Path, tmp_path: Path) -> None:
    """From gates with which two of four experts have no token: one of the others is better."""
    shares = []
    for balance in (0.05, 0.0):
        rule = TopK(count=4, top=1, balance=balance, place=False)
        network = DiTConfig(width=16, depth=2, heads=2, experts=rule)
        config = tiny.config(images, steps=30, network=network)
        config = replace(config, optim=replace(config.optim, lr=3e-3))
        training = tiny.training(config, tmp_path)
        built: Any = training.network
        with torch.no_grad():
            for block in built.blocks:
                gate = block.experts.gate.weight
                gate[1] = -gate[0]
                gate[2:] = 0
        assert loads(training).min() == 0
        for _ in range(30):
            loop.one_step(training)
        shares.append(loads(training))
    assert shares[0].min() > 0.05 and shares[1].min() < 0.02, shares


# ---- A network ----


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("kind", [TopK, ExpertChoice])
def test_one_expert_is_the_network_itself(mlp: str, kind: type[Mixture]) -> None:
    config = replace(DIT, mlp=mlp)
    plain = config.build()
    tiny.randomize(plain)
    one = replace(config, experts=kind(count=1, top=1, size=1, shared=0)).build()
    one.load_state_dict(dict(one.adopted(plain.state_dict())))
    assert torch.equal(plain(*inputs()), one(*inputs()))


@pytest.mark.parametrize("where", ["all", "deep"])
def test_copies_of_an_mlp_compute_what_it_does(where: str) -> None:
    plain = DIT.build()
    tiny.randomize(plain)
    rule = TopK(size=1, renormalize=True, where=where)  # pyright: ignore[reportArgumentType]
    routed: Any = replace(DIT, experts=rule).build()
    routed.load_state_dict(dict(routed.adopted(plain.state_dict())))
    torch.testing.assert_close(routed(*inputs()), plain(*inputs()), rtol=1e-5, atol=1e-6)
    gates = [b.experts.gate.weight for b in routed.blocks if b.experts is not None]
    assert len(gates) == (2 if where == "all" else 1)
    assert all(g.std().item() == pytest.approx(0.02, rel=0.01) for g in gates)
    # With those that are trained already nothing changes.
    tiny.randomize(routed)
    assert {k: id(v) for k, v in routed.adopted(routed.state_dict()).items()}.keys() == dict(
        routed.state_dict()
    ).keys()


@BOTH
def test_operations_and_active_parameters_are_counted(rule: Mixture) -> None:
    network = replace(DIT, width=64, experts=rule).build()
    x, noise, cond = drawn(1, 3, 16, 16), torch.zeros(1), Cond()
    with torch.no_grad(), MacCounter() as counter:
        network(x, noise, cond)
    size, plain = count(network, 16), count(replace(DIT, width=64).build(), 16)
    assert counter.macs == pytest.approx(size.macs, rel=0.02)
    assert size.macs == pytest.approx(plain.macs, rel=0.05)
    hidden = rule.hidden(256)
    assert size.idle == 2 * 6 * (64 * hidden + hidden + hidden * 64 + 64)
    assert "M active" in str(size) and "active" not in str(plain)


@pytest.mark.parametrize(
    ("name", "total", "active"), [("dit-moe-s/2", 199, 71), ("dit-moe-b/2", 795, 286)]
)
def test_published_sizes(name: str, total: float, active: float) -> None:
    """Table 2 of arXiv 2407.11633, million parameters."""
    with torch.device("meta"):
        network = DiTConfig(**SIZES[name], channels=4, num_classes=1000).build()
        size = count(network, 32)
    assert size.params / 1e6 == pytest.approx(total, rel=0.01)
    assert size.active / 1e6 == pytest.approx(active, rel=0.02)


@BOTH
def test_training_and_evaluation_are_the_same(rule: Mixture) -> None:
    network = replace(DIT, experts=rule).build()
    tiny.randomize(network)
    x, noise, cond = inputs()
    expected = network(x, noise, cond)
    network.eval()
    found = network(x.requires_grad_(), noise, cond)
    torch.testing.assert_close(found, expected)
    found.sum().backward()  # guidance needs it
    assert x.grad is not None and all(p.grad is not None for p in network.parameters())


@pytest.mark.slow
@BOTH
def test_compiled_blocks_are_the_same(rule: Mixture) -> None:
    """Without a break of the graph."""
    network = replace(DIT, experts=rule, mlp="swiglu").build()
    tiny.randomize(network)
    with torch.no_grad():
        expected = network(*inputs())
        compile_units(network.units(), backend="aot_eager")
        torch.testing.assert_close(network(*inputs()), expected, rtol=1e-4, atol=1e-5)


# ---- Runs ----


@BOTH
def test_resumed_it_is_the_same_run(rule: Mixture, images: Path, tmp_path: Path) -> None:
    four: Any = replace(rule, count=4)
    network = DiTConfig(width=16, depth=2, heads=2, num_classes=2, experts=four)
    straight = check_resumed(tiny.config(images, network=network, precision="bf16"), tmp_path)
    shown = [r for r in read_log(straight) if r["kind"] == "preview"][-1]
    assert 0 <= shown["least_load"] <= 1 and shown["bits_of_noise"] >= 0
    with Image.open(straight / "samples" / shown["charts"][0]) as picture:
        assert min(picture.size) > 50


@pytest.mark.slow
@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["replicas", "shards"])
def test_two_processes_train_as_one(shard: list[str], images: Path, tmp_path: Path) -> None:
    """With balance over the tokens of both, and the prior of Switch-DiT."""
    flags = f"-m patchdiffusion train {images} --network dit --network.width 16 --network.depth 2 "
    flags += "--network.heads 2 --network.experts top-k --network.task-routing switch --device cpu "
    flags += "--network.task-routing.tasks 20 --clock steps --images 3 --batch 4 --threads 1 "
    flags += "--precision fp32 --preview.grid 2 --preview.sample-steps 1 --out"
    two = "-m torch.distributed.run --nproc-per-node 2 --master-port 0 --standalone"
    runs = {"one": flags, "two": f"{two} {flags}"}
    for name, words in runs.items():
        told = [*words.split(), str(tmp_path / name), *(shard if name == "two" else [])]
        subprocess.run([sys.executable, *told], check=True, capture_output=True)
    one, other = (load_file(tmp_path / name / "model" / "raw.safetensors") for name in runs)
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5)


def test_a_dense_run_is_a_start(images: Path, tmp_path: Path, capsys: Capture) -> None:
    network = DiTConfig(width=16, depth=2, heads=2, num_classes=2)
    tiny.run(tiny.config(images, steps=2, network=network), tmp_path / "dense")
    flags = f"--start-from {tmp_path / 'dense'} --network dit --network.width 16 "
    flags += (
        "--network.depth 2 --network.heads 2 --clock steps --images 1 --batch 2 --preview.grid 1 "
    )
    flags += "--preview.sample-steps 1 --device cpu --network.experts top-k "
    flags += "--network.experts.renormalize --network.experts.size"
    out = tmp_path / "run"
    works(capsys, "train", images, *flags.split(), 1, "--out", out)
    assert "experts" in works(capsys, "report", out) or (out / "report.html").exists()
    page = (out / "report.html").read_text()
    assert "<h2>Experts</h2>" in page
    told = fails(capsys, "train", images, *flags.split(), 0.5, "--out", tmp_path / "other")
    assert "whose network differs" in told


def test_what_cannot_be() -> None:
    with refuses("top must lie in (0, 8]", "number of experts", "9"):
        TopK(top=9)
    with refuses("whole number", "1.5"):
        TopK(top=1.5)
    with refuses("count must lie in [1, 1024]", "0"):
        TopK(count=0)
    with refuses("balance must be >= 0", "-1"):
        TopK(balance=-1)
    with refuses("experts must have hidden features", "64"):
        DiTConfig(width=16, heads=2, experts=TopK(shared=1000))
    network = replace(DIT, experts=ExpertChoice()).build()
    with refuses("network.experts choice", "left"):
        network.check_some()
