"""Texts as a condition: bytes become tokens inside a network, and guidance away from a text."""

from dataclasses import replace

import pytest
import torch
from commands import refuses
from little import LITTLE, alive, drawn, inputs
from torch import Tensor

from patchdiffusion.cond import CONDITIONS, Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.guidance.cfg import CFG
from patchdiffusion.nets.adm import ADMConfig
from patchdiffusion.nets.base import Network, initialize
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.edm2 import EDM2Config
from patchdiffusion.nets.lego import LegoConfig
from patchdiffusion.nets.magnitude import MPReader
from patchdiffusion.nets.text import ByteText, MPTextTower, TextTower
from patchdiffusion.nets.unet import UNetConfig
from patchdiffusion.parameterisation import EDM
from patchdiffusion.system import families

TEXT = ByteText(width=8, depth=2, heads=2)
READING = replace(LITTLE, text=TEXT)
NETWORKS = [
    LITTLE,
    UNetConfig(base=8, mult=(1, 2), blocks=1, attention=(1,)),
    ADMConfig(base=8, mult=(1, 2), blocks=1, attention=(1,), head_width=8),
    EDM2Config(base=8, mult=(1, 2), blocks=1, attention=(1,), head_width=8),
    LegoConfig(regions=(4, 8), patches=(2, 2), depths=(1, 1), width=16, heads=2, canvas=(8, 8)),
]
each_network = pytest.mark.parametrize("config", NETWORKS, ids=lambda c: families.word(type(c)))
Reads = DiTConfig | UNetConfig | ADMConfig | EDM2Config | LegoConfig


def learned(config: Reads) -> Network:
    """A network none of whose parts is silent."""
    network = config.build()
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            scale = max(parameter[0].numel() if parameter.ndim > 1 else 4, 4) ** 0.5
            parameter.copy_(drawn(*parameter.shape, seed=index) / scale)
    return network


def tokens(*texts: str, length: int = 12) -> Tensor:
    rows = [list(text.encode().ljust(length, b"\0")) for text in texts]
    return torch.tensor(rows, dtype=torch.uint8)


def tower() -> TextTower | MPTextTower:
    built = TEXT.build()
    initialize(built, 0)
    return built


def test_bytes_behind_a_text_change_nothing() -> None:
    some = tower()
    context, mask = some(tokens("a red A", ""))
    assert mask.sum(1).tolist() == [8, 1] and context.shape == (2, 13, 8)
    longer, more = some(tokens("a red A", "", length=30))
    assert torch.equal(more[:, :13], mask) and not more[:, 13:].any()
    torch.testing.assert_close(longer[mask.nonzero(as_tuple=True)], context[mask])


@each_network
def test_what_a_mask_hides_is_not_seen(config: Reads) -> None:
    """The features of tokens that do not count may be anything, bit for bit."""
    (x, noise, _), network = inputs(LITTLE), learned(replace(config, context=8))
    context, mask = tower()(tokens("red", "a blue A"))
    other = torch.where(mask[..., None], context, drawn(*context.shape))
    with torch.no_grad():
        out = network(x, noise, Cond(context=context, context_mask=mask))
        assert torch.equal(network(x, noise, Cond(context=other, context_mask=mask)), out)
        assert not torch.allclose(network(x, noise, Cond()), out)


def test_attention_of_edm2_to_a_condition_keeps_the_magnitude() -> None:
    reader = MPReader(64, 2, 16)
    initialize(reader, 0)
    x, context = drawn(4, 64, 6, 6), drawn(4, 5, 16, seed=1)
    with torch.no_grad():
        assert torch.equal(reader(x, context, None), x)
        assert reader.proj.gain is not None
        reader.proj.gain.fill_(3.0)
        out = reader(x, context[:, :1], None)  # one token: its values have magnitude 1
    assert not torch.allclose(out, x, atol=0.1)
    assert out.square().mean().sqrt().item() == pytest.approx(1, abs=0.1)


@each_network
def test_a_network_with_a_text_starts_as_the_one_without(config: Reads) -> None:
    """Also its neutral parameters are exactly the new ones, so that weights of the other load."""
    plain, reading = config.build(), replace(config, text=TEXT).build()
    x, noise, _ = inputs(LITTLE)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            value = drawn(*parameter.shape, seed=len(name)) / 4
            parameter.copy_(value)
            reading.get_parameter(name).copy_(value)
        assert torch.equal(
            reading(x, noise, Cond(tokens=tokens("red", ""))), plain(x, noise, Cond())
        )
    new = {n for n, _ in reading.named_parameters()} - {n for n, _ in plain.named_parameters()}
    assert reading.neutral() - plain.neutral() == new
    assert set(reading.roles()) == {name for name, _ in reading.named_parameters()}


@each_network
def test_texts_are_told_apart_and_their_encoder_learns(config: Reads) -> None:
    (x, noise, _), network = inputs(LITTLE), learned(replace(config, text=TEXT))
    out = network(x, noise, Cond(tokens=tokens("a red A", "a red B")))
    other = network(x, noise, Cond(tokens=tokens("a red A", "a B red")))
    torch.testing.assert_close(out[0], other[0])
    assert not torch.allclose(out[1], other[1])
    out.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    network.zero_grad()
    network(x, noise, Cond()).square().sum().backward()  # no texts: other processes may have some
    assert all(p.grad is not None for p in network.parameters())


@each_network
def test_dropped_is_empty(config: Reads) -> None:
    """A dropped text is an empty one, and no text at all, bit for bit."""
    (x, noise, _), network = inputs(LITTLE), learned(replace(config, text=TEXT))
    given = Cond(tokens=tokens("red", "blue"))
    with torch.no_grad():
        empty = network(x, noise, Cond(tokens=tokens("", "")))
        assert torch.equal(network(x, noise, given.without(*CONDITIONS)), empty)
        mixed = network(x, noise, given.without(*CONDITIONS, where=torch.tensor([True, False])))
        assert torch.equal(mixed[:1], empty[:1])
        torch.testing.assert_close(network(x, noise, Cond()), empty)


@pytest.mark.parametrize("precise", [True, False])
def test_a_context_is_dropped_with_its_mask(precise: bool) -> None:
    network, (x, noise, cond) = (
        alive(replace(LITTLE, context=3)),
        inputs(replace(LITTLE, context=3)),
    )
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    given = replace(cond, context_mask=mask if precise else None)
    none = given.without(*CONDITIONS)
    with torch.no_grad():
        out = network(x, noise, none)
        masked = Cond(context=drawn(2, 4, 3), context_mask=mask & False)
        if precise:
            assert torch.equal(network(x, noise, masked), out)
        torch.testing.assert_close(out, network(x, noise, Cond()))


def test_fields_that_do_not_fit_are_named() -> None:
    with refuses("context", 3, "network.text", 8):
        replace(LITTLE, context=3, text=TEXT)
    with refuses("width", 6, 4):
        ByteText(width=6)
    with refuses("depth", 0):
        ByteText(depth=0)
    network, (x, noise, _) = READING.build(), inputs(READING)
    with refuses("cond.tokens", 2):
        network(x, noise, Cond(tokens=tokens("red")))
    assert READING.reads == LITTLE.reads | {"tokens"}


def test_another_network_takes_over_the_text() -> None:
    wider = DiTConfig(width=32).inherit(READING, None)
    assert wider.text == TEXT and wider.width == 32
    assert DiTConfig(context=5).inherit(READING, None).text == DiTConfig().text


# ---- Guidance away from a text ----


def guided(negative: Cond | None, weight: float = 3.0, interval=None) -> CFG:
    denoiser = NetDenoiser(alive(replace(READING, num_classes=2)), EDM())
    return CFG(denoiser, weight, negative=negative, interval=interval)


def test_away_from_an_empty_text_is_plain_guidance() -> None:
    x, cond = drawn(2, 3, 8, 12), Cond(labels=torch.tensor([0, 1]), tokens=tokens("red", "blue"))
    with torch.no_grad():
        plain = guided(None)(x, 1.0, cond)
        assert torch.equal(guided(Cond(tokens=tokens("")))(x, 1.0, cond), plain)
        assert not torch.allclose(guided(Cond(tokens=tokens("dim")))(x, 1.0, cond), plain)


def test_guidance_leads_away_from_the_text() -> None:
    """D_neg + w (D_cond - D_neg), the label dropped; and no more than that within an interval."""
    x, cond = drawn(2, 3, 8, 12), Cond(labels=torch.tensor([0, 1]), tokens=tokens("red", "blue"))
    sampler = guided(Cond(tokens=tokens("dim")), interval=(0.5, 2.0))
    with torch.no_grad():
        plain = sampler.inner[0](x, 1.0, cond)
        away = sampler.inner[0](
            x, 1.0, Cond(labels=torch.tensor([-1, -1]), tokens=tokens("dim", "dim"))
        )
        torch.testing.assert_close(sampler(x, 1.0, cond), away + 3.0 * (plain - away))
        outside = sampler.inner[0](x, 3.0, cond)
        assert torch.equal(sampler(x, 3.0, cond), outside)
        levels = torch.tensor([1.0, 3.0])
        both = sampler(x, levels, cond)
        torch.testing.assert_close(both, torch.stack([sampler(x, 1.0, cond)[0], outside[1]]))
        assert torch.equal(guided(Cond(tokens=tokens("dim")), 1.0)(x, 1.0, cond), plain)


def test_a_negative_text_needs_no_positive_one() -> None:
    x = drawn(2, 3, 8, 12)
    sampler = guided(Cond(tokens=tokens("dim")))
    with torch.no_grad():
        out = sampler(x, 1.0, Cond(labels=torch.tensor([0, 1])))
        empty = Cond(labels=torch.tensor([0, 1]), tokens=tokens("", ""))
        assert torch.equal(sampler(x, 1.0, empty), out)
