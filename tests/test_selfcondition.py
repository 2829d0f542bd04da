"""Features that condition later blocks (DDAE++): nothing at the start, and only later blocks."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import Capture, fails, names, refuses
from oracles import keys
from sameruns import check_micro_batches, check_resumed
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets.adm import ADMConfig
from patchdiffusion.nets.base import Network, NetworkConfig
from patchdiffusion.nets.cuts import Cuttable, Encoder
from patchdiffusion.nets.dit import DiT, DiTConfig
from patchdiffusion.nets.edm2 import EDM2Config
from patchdiffusion.nets.routing import Mask, Route, Sprint
from patchdiffusion.nets.selfcondition import FeatureSelfConditioning, PooledFeatures, place
from patchdiffusion.patches import Region

SELF = FeatureSelfConditioning()
DIT = DiTConfig(width=16, depth=4, heads=2, patch=(2, 2), num_classes=3)
NETWORKS: dict[str, NetworkConfig] = {
    "unet": replace(tiny.NETWORK, num_classes=3),
    "adm": ADMConfig(base=16, mult=(1, 2), attention=(), head_width=16, num_classes=3),
    "edm2": EDM2Config(base=16, mult=(1, 2), attention=(), head_width=16, num_classes=3),
    "dit": DIT,
    "shared": replace(DIT, modulation="shared", registers=2, value_residual=True),
    "half": replace(DIT, half_blocks=2),
    "route": replace(DIT, tokens=Route()),
    "sprint": replace(DIT, tokens=Sprint(dense=1)),
    "mask": replace(DIT, tokens=Mask(mixer=1)),
}
X, NOISE = rng.normal(keys(3), (3, 8, 8)), torch.linspace(-1, 1, 3)
COND = Cond(labels=torch.tensor([0, 2, -1]), seed=keys(3, "seed"))


def both(config: NetworkConfig) -> tuple[Network, Network]:
    """A network whose weights are all random, and one with self-conditioning that starts as it."""
    plain = config.build(seed=1)
    with_features = replace(config, self_condition=SELF).build(seed=1)  # pyright: ignore[reportCallIssue]
    tiny.randomize(plain)
    missing, unexpected = with_features.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and set(missing) <= with_features.neutral()
    return plain, with_features


def awake(network: Network) -> None:
    """Give the layers behind the features weights that count."""
    for name, p in network.named_parameters():
        if name.startswith("summary"):
            p.data = rng.normal(keys(len(p), name), tuple(p.shape[1:])).reshape(p.shape) * 0.5


@pytest.mark.parametrize("name", NETWORKS)
def test_it_starts_as_the_network_without_it(name: str) -> None:
    """Outputs are equal to the bit, gradients but for the order of sums; new layers have some."""
    plain, with_features = both(NETWORKS[name])
    outputs = [network(X, NOISE, COND) for network in (plain, with_features)]
    assert torch.equal(*outputs)
    for out in outputs:
        out.square().sum().backward()
    other = dict(with_features.named_parameters())
    for key, p in plain.named_parameters():
        expected, found = p.grad, other[key].grad
        assert (expected is None) == (found is None)
        if expected is not None and found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    grad = other["summary.layer1.weight"].grad
    assert grad is not None and grad.any()
    added = sum(p.numel() for k, p in other.items() if k.startswith("summary"))
    assert added == sum(p.numel() for p in with_features.parameters()) - sum(
        p.numel() for p in plain.parameters()
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_only_blocks_behind_the_features_change(name: str) -> None:
    plain, with_features = both(NETWORKS[name])
    awake(with_features)
    tapes = []
    for network in (plain, with_features):
        tapes.append(Tape(network.taps))
        network(X, NOISE, COND, tape=tapes[-1])
    same = [torch.equal(tapes[0].activations[tap], tapes[1].activations[tap]) for tap in plain.taps]
    last = plain.taps.index("mid.1" if "mid.1" in plain.taps else "blocks.1")
    assert all(same[: last + 1]) and not any(same[last + 1 :])


def test_a_summary_is_cached_with_the_features() -> None:
    """Blocks that are run in parts, or decoded later, are conditioned on what came before."""
    _, network = both(DIT)
    awake(network)
    assert isinstance(network, DiT)
    whole = network(X, NOISE, COND)
    tokens = network.run(network.start(X, NOISE, COND), COND, 0, 3)
    assert torch.equal(network.finish(network.run(tokens, COND, 3)), whole)
    index = torch.arange(16).expand(3, -1)
    some = network.run(tokens.select(index), COND, 3)
    torch.testing.assert_close(network.finish(tokens.scatter(index, some)), whole)
    _, unet = both(NETWORKS["unet"])
    awake(unet)
    features = unet.encode(X, NOISE, COND)  # pyright: ignore[reportCallIssue]
    assert torch.equal(unet.decode(features, COND), unet(X, NOISE, COND))  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("name", ["unet", "dit", "shared"])
def test_what_is_kept_between_steps_has_the_summary(name: str) -> None:
    """Parts that are computed at the same input are the whole, with what was kept or encoded."""
    _, network = both(NETWORKS[name])
    awake(network)
    assert isinstance(network, Cuttable) and isinstance(network, Encoder)
    cond = replace(COND, seed=None)
    whole = network(X, NOISE, cond)
    passage = network.opened(X, NOISE, cond, network.cut())
    out, kept = passage.full()
    assert torch.equal(out, whole)
    torch.testing.assert_close(passage.reuse(kept), whole)
    blocks = network.encoder_blocks()
    encoding = network.encoded(X, NOISE, cond, blocks)
    torch.testing.assert_close(encoding.decode(NOISE, cond), whole)
    twice = encoding.decode(NOISE.repeat(2), cond.cat(cond))
    torch.testing.assert_close(twice, whole.repeat(2, 1, 1, 1))


def test_features_are_pooled_whatever_their_order_and_crops_know_their_place() -> None:
    module = PooledFeatures(8, 6, 2, 8, True)
    tiny.randomize(module)
    h, pos = rng.normal(keys(2), (16, 8)), torch.rand(2, 16, 2, generator=torch.manual_seed(0))
    order = torch.randperm(16, generator=torch.manual_seed(1))
    torch.testing.assert_close(module(h[:, order], pos[:, order]), module(h, pos))
    assert not torch.allclose(module(h, pos / 2), module(h, pos))

    def placed(size: tuple[int, int], corner: tuple[int, int]) -> Tensor:
        pos = Region((64, 64), corner).pos(torch.zeros(1, 3, *size))
        return place(pos.flatten(2).mT)[0]

    torch.testing.assert_close(placed((64, 64), (0, 0)), torch.zeros(4))
    left = placed((64, 32), (0, 0))  # x first
    torch.testing.assert_close(left, torch.tensor([-32 / 63, 0, -1.0233, 0]), rtol=0, atol=1e-3)


def test_each_pass_has_its_own_summary() -> None:
    """Guidance evaluates with and without a class; neither pass sees the features of the other."""
    _, network = both(DIT)
    awake(network)
    alone = network(X[:1], NOISE[:1], COND.take(slice(0, 1)))
    torch.testing.assert_close(network(X, NOISE, COND)[:1], alone)


def test_a_map_of_noise_levels_is_scaled_token_by_token() -> None:
    _, network = both(DIT)
    awake(network)
    levels = NOISE.view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    torch.testing.assert_close(network(X, levels, COND), network(X, NOISE, COND))


def test_wrong_values_are_refused(images: Path, capsys: Capture) -> None:
    with refuses("block", 1, 3, 4):
        replace(DIT, self_condition=replace(SELF, block=4))
    with refuses("block", 0, 2):
        replace(tiny.NETWORK, self_condition=replace(SELF, block=2))
    with refuses("block", 1):
        replace(DIT, depth=1, self_condition=SELF)
    with refuses("hidden", -1):
        replace(SELF, hidden=-1)
    flags = ["--network", "lego", "--network.self-condition", "features"]
    assert names(fails(capsys, "train", images, *flags), "self-condition")


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_a_run_is_resumed_to_the_bit(name: str, images: Path, tmp_path: Path) -> None:
    network = replace(NETWORKS[name], num_classes=2, self_condition=SELF)  # pyright: ignore[reportCallIssue]
    config = tiny.config(images, network=network)
    check_resumed(config, tmp_path)
    check_micro_batches(config, tmp_path)


@pytest.mark.slow
def test_it_compiles() -> None:
    _, network = both(DIT)
    awake(network)
    compiled = torch.compile(network, fullgraph=True)
    torch.testing.assert_close(compiled(X, NOISE, replace(COND, seed=None)),
                               network(X, NOISE, replace(COND, seed=None)),
                               rtol=1e-4, atol=1e-4)  # fmt: skip
