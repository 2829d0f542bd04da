"""What every network promises to the rest: one list of networks, the same tests for all."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from commands import refuses
from torch import Tensor, nn

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets import Network, base
from patchdiffusion.nets.adm import ADMConfig
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.edm2 import EDM2Config
from patchdiffusion.nets.lego import LegoConfig
from patchdiffusion.nets.legobody import TransformerBody
from patchdiffusion.nets.legounet import UNetBody
from patchdiffusion.nets.routing import Mask, Route, Sprint
from patchdiffusion.nets.topology import Features, UNet
from patchdiffusion.nets.unet import UNetConfig
from patchdiffusion.objectives.tangent import derivative
from patchdiffusion.rng import keys

UNET = UNetConfig(
    base=8, mult=(1, 2), blocks=1, attention=(1,), num_classes=4, augment_dim=3, jump=True
)
NCSN = replace(UNET, embedding="fourier", encoder="residual", filter=(1, 3, 3, 1), dropout=0.1)
ADM = ADMConfig(
    base=8,
    mult=(1, 2),
    blocks=1,
    attention=(1,),
    head_width=8,
    num_classes=4,
    augment_dim=3,
    jump=True,
)
EDM2 = EDM2Config(
    base=8,
    mult=(1, 2),
    blocks=1,
    attention=(1,),
    head_width=8,
    num_classes=4,
    augment_dim=3,
    jump=True,
    dropout=0.1,
)
DIT = DiTConfig(width=16, depth=2, heads=2, num_classes=4, augment_dim=3, jump=True)
MODERN = replace(
    DIT, depth=4, mlp="swiglu", norm="rms", qk_norm=True, positions="rope", embedding="late",
    modulation="lowrank", registers=2, value_residual=True, context=5, half_blocks=2,
)  # fmt: skip
LEGO = LegoConfig(
    regions=(4, 8), patches=(2, 4), depths=(1, 2), width=16, heads=2, num_classes=4, augment_dim=3,
    jump=True,
)  # fmt: skip
NETWORKS = {
    "unet": UNET,
    "ncsnpp": NCSN,
    "adm": ADM,
    "edm2": EDM2,
    "transformer": replace(DIT, dropout=0.1),
    "transformer, 1 axis": replace(DIT, patch=(2,)),
    "transformer, 3 axes": replace(DIT, patch=(1, 2, 4)),
    "transformer, route": replace(DIT, tokens=Route()),
    "transformer, mask": replace(DIT, tokens=Mask(mixer=1)),
    "transformer, sprint": replace(DIT, depth=3, tokens=Sprint(dense=1, drop=0.5)),
    "modern": replace(MODERN, dropout=0.1),
    "modern, 1 axis": replace(MODERN, patch=(2,), modulation="shared", learned_variance=True),
    "modern, 3 axes": replace(
        MODERN, patch=(1, 2, 4), width=24, half_blocks=0, value_residual=False
    ),
    "bricks": replace(LEGO, dropout=0.1),
    "bricks, 3 axes": replace(
        LEGO,
        dimensions=3,
        width=24,
        brick_dropout=0.5,
        body=TransformerBody(positions="rope", norm="rms", mlp="swiglu", qk_norm=True),
        embedding="early",
    ),
    "bricks, unet": replace(LEGO, body=UNetBody(base=8), dropout=0.1),
}

every_network = pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS.keys())


def alive(config: Network) -> base.Network:
    """A network none of whose parts is silent."""
    network = config.build()
    with torch.no_grad():
        for index, (name, parameter) in enumerate(network.named_parameters()):
            if name.endswith(".gain"):
                parameter.fill_(0.5)
            elif parameter.ndim > 1:
                g = torch.Generator().manual_seed(index)
                parameter.copy_(
                    torch.randn(parameter.shape, generator=g) / parameter[0].numel() ** 0.5
                )
    return network


def batch(config: Network, sides: tuple[int, ...] = (3, 8, 6)) -> tuple[Tensor, Tensor, Cond]:
    """Inputs with every field of the condition; of the sides, the last ones count."""
    n, sides = 3, sides[-config.axes :]
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(n, config.channels, *sides, generator=g), torch.randn(n, generator=g)
    cond = Cond(
        labels=torch.arange(n) % (config.num_classes + 1) - 1,
        augment=torch.randn(n, config.augment_dim, generator=g),
        jump=torch.rand(n, generator=g),
        pos=torch.rand(n, len(sides), *sides, generator=g) * 2 - 1,
        seed=keys(0, "network", 0, torch.arange(n)),
    )
    if "context" in config.reads:
        assert isinstance(config, DiTConfig)
        context = torch.randn(n, 4, config.context, generator=g)
        mask = torch.tensor([True, False, True, True]).repeat(n, 1)
        cond = replace(cond, context=context, context_mask=mask)
    return x, noise, cond


@every_network
@pytest.mark.parametrize("sides", [(3, 8, 6), (2, 7, 9), (1, 1, 1)])
def test_any_size(config: Network, sides: tuple[int, ...]) -> None:
    x, noise, cond = batch(config, sides)
    with torch.no_grad():
        out = alive(config)(x, noise, cond)
    assert out.shape == x.shape and out.dtype == x.dtype
    assert out.isfinite().all()


@every_network
def test_wrong_shapes_are_named(config: Network) -> None:
    network = config.build()
    x, noise, cond = batch(config)
    assert cond.pos is not None
    with refuses("x", 3):
        network(x[:, :2], noise, cond)
    with refuses(config.axes):
        network(x[None], noise, cond)
    with refuses("cond.pos"):
        network(x, noise, replace(cond, pos=cond.pos[..., :-1]))


@every_network
def test_the_start_is_a_function_of_the_seed(config: Network) -> None:
    before = torch.get_rng_state()
    a, b, c = (config.build(seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)
    out = config.build()(*batch(config))
    assert out.abs().max() < 1e-3


@every_network
def test_gradients_reach_every_parameter(config: Network) -> None:
    network = alive(config)
    network(*batch(config)).square().sum().backward()
    dead = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


@every_network
def test_forward_derivatives_are_differences(config: Network) -> None:
    """As MeanFlow asks for them: d/dh f(x + h v, noise + h)."""
    if not config.smooth_in_noise:
        pytest.skip("such noise features are not for derivatives")
    network = alive(config).double()
    x, noise, cond = batch(config)
    x, noise, v = x.double(), noise.double(), x.double().flip(-1)
    slope = derivative(lambda x, noise: network(x, noise, cond), (x, noise), (v, 1.0))
    with torch.no_grad():
        ahead, behind = (network(x + h * v, noise + h, cond) for h in (1e-3, -1e-3))
    torch.testing.assert_close(slope, (ahead - behind) / 2e-3, rtol=1e-3, atol=1e-3)


@every_network
def test_a_sample_does_not_see_its_batch(config: Network) -> None:
    network = alive(config)
    x, noise, cond = batch(config)
    with torch.no_grad():
        whole = network(x, noise, cond)
        one = network(x[1:2], noise[1:2], cond.take(slice(1, 2)))
    torch.testing.assert_close(one, whole[1:2], rtol=1e-4, atol=1e-4)


@every_network
def test_bfloat16_is_close(config: Network) -> None:
    network = alive(config)
    x, noise, cond = batch(config)
    with torch.no_grad():
        expected = network(x, noise, cond)
        with torch.autocast("cpu", torch.bfloat16):
            low = network(x, noise, cond)
    assert low.dtype == torch.bfloat16
    assert (low - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    ("name", "low"),
    [
        ("unet", True),
        ("ncsnpp", False),
        ("adm", True),
        ("edm2", True),
        ("transformer", True),
        ("transformer, 3 axes", False),
        ("transformer, route", True),
        ("transformer, sprint", False),
        ("modern", True),
        ("bricks", True),
        ("bricks, unet", False),
    ],
)
def test_compiles_as_one_graph(name: str, low: bool) -> None:
    config = NETWORKS[name]
    network = alive(config)
    compiled: nn.Module = torch.compile(network, fullgraph=True, dynamic=False)  # type: ignore[assignment]
    x, noise, cond = batch(config)
    with torch.no_grad():
        expected = network(x, noise, cond)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        out = compiled(x, noise, cond)
    assert (out - expected).abs().max() < (0.05 if low else 1e-4) * expected.abs().max()
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.gpu
@every_network
def test_no_host_synchronization(config: Network) -> None:
    network = alive(config).cuda()
    x, noise, cond = batch(config)
    x, noise, cond = x.cuda(), noise.cuda(), cond.to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            out = network(x, noise, cond)
        out.float().square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isfinite().all()


@every_network
def test_every_parameter_has_one_role(config: Network) -> None:
    network = config.build()
    roles = network.roles()
    assert list(roles) == [name for name, _ in network.named_parameters()]
    common = {"stem", "embedding", "modulation", "attention", "head"}
    assert common < set(roles.values()) <= set(get_args(base.Role))


def test_roles_of_a_unet() -> None:
    roles = UNET.build().roles()
    assert {name: roles[name] for name in (
        "embed.label.weight", "stem.coordinates.weight", "enc.0.0.conv0.weight",
        "enc.0.0.affine.bias", "enc.0.0.norm0.weight", "mid.0.attention.qkv.weight",
        "mid.0.attention.norm.bias", "out_norm.weight", "out_conv.weight",
    )} == {
        "embed.label.weight": "embedding", "stem.coordinates.weight": "stem",
        "enc.0.0.conv0.weight": "conv", "enc.0.0.affine.bias": "modulation",
        "enc.0.0.norm0.weight": "norm", "mid.0.attention.qkv.weight": "attention",
        "mid.0.attention.norm.bias": "norm", "out_norm.weight": "norm", "out_conv.weight": "head",
    }  # fmt: skip


def test_a_parameter_without_a_role_is_named() -> None:
    network = UNET.build()
    network.extra = torch.nn.Linear(2, 2)
    with refuses("extra.weight", "SongUNet"):
        network.roles()


@every_network
def test_what_is_neutral_adds_nothing(config: Network) -> None:
    """At its start, and whatever the others are: the network without it is the same function."""
    network, plain = alive(config), replace(config, jump=False)
    if isinstance(plain, DiTConfig):
        plain = replace(plain, context=0)
    plain = plain.build()
    start, neutral = config.build(), network.neutral()
    with torch.no_grad():
        for name in neutral:
            network.get_parameter(name).copy_(start.get_parameter(name))
    names = {name for name, _ in plain.named_parameters()}
    extra = {name for name, _ in network.named_parameters()} - names
    assert extra and extra <= neutral
    plain.load_state_dict({n: v for n, v in network.state_dict().items() if n not in extra})
    x, noise, cond = batch(config)
    with torch.no_grad():
        expected = plain(x, noise, replace(cond, context=None, context_mask=None))
        assert torch.equal(network(x, noise, cond), expected)
        assert expected.any()


@every_network
def test_taps_are_what_it_puts_on_the_tape(config: Network) -> None:
    network = config.build()
    tape = Tape(wants=network.taps)
    network(*batch(config), tape=tape)
    assert tuple(tape.activations) == network.taps
    assert set(network.exits.values()) < set(network.taps)
    others = len(network.exits) + 1  # a stem, or the output of each brick
    assert len(network.units()) == len(network.taps) - others


@every_network
def test_it_reads_what_it_says(config: Network) -> None:
    """A field of the condition changes the output exactly if it is in `reads`."""
    network = alive(config)
    x, noise, cond = batch(config)
    with torch.no_grad():
        expected = network(x, noise, cond)
        changed = {
            name
            for name in ("labels", "augment", "jump", "pos", "seed", "context", "context_mask")
            if not torch.equal(network(x, noise, replace(cond, **{name: None})), expected)
        }
    assert changed == config.reads


@pytest.mark.parametrize("config", [UNET, NCSN, ADM, EDM2])
def test_forward_is_encode_and_decode(config: UNetConfig | ADMConfig | EDM2Config) -> None:
    network = alive(config)
    assert isinstance(network, UNet)
    x, noise, cond = batch(config)
    with torch.no_grad():
        features = network.encode(x, noise, cond)
        assert isinstance(features, Features)
        assert torch.equal(network.decode(features, cond), network(x, noise, cond))
        other = features._replace(emb=network.embedding(noise + 1, cond))
        assert not torch.equal(network.decode(other, cond), network(x, noise, cond))
