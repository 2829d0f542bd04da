"""Networks in parts: outer around inner blocks, encoder before decoder; full passes are exact."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from commands import refuses
from little import LITTLE, MODERN, alive, drawn
from tiny import randomize

from patchdiffusion import Cond
from patchdiffusion.nets.adm import ADMConfig
from patchdiffusion.nets.base import Network, NetworkConfig
from patchdiffusion.nets.cuts import Cut, Cuttable, Encoder
from patchdiffusion.nets.edm2 import EDM2Config
from patchdiffusion.nets.lego import LegoConfig
from patchdiffusion.nets.routing import Route, Sprint
from patchdiffusion.nets.unet import UNetConfig

SIZE = (11, 14)  # odd sides: up-sampling needs the sizes of the encoder
SMALL: dict[str, Any] = {
    "base": 4,
    "mult": (1, 2, 2),
    "blocks": 2,
    "attention": (1,),
    "num_classes": 2,
}
HEADED: dict[str, Any] = {**SMALL, "base": 8, "head_width": 8}
UNETS: dict[str, NetworkConfig] = {
    "ddpm++": UNetConfig(**SMALL),
    "ncsn++": UNetConfig(**SMALL, embedding="fourier", encoder="residual", filter=(1, 3, 3, 1)),
    "context": UNetConfig(**SMALL, context=3),
    "picture": UNetConfig(**SMALL, image_channels=2, extra_dim=3),
    "adm": ADMConfig(**HEADED),
    "edm2": EDM2Config(**HEADED),
}
TRANSFORMERS: dict[str, NetworkConfig] = {
    "dit": replace(LITTLE, num_classes=2, patch=(4, 4)),
    "modern": replace(MODERN, num_classes=2, patch=(4, 4)),
    "pixel": replace(LITTLE, num_classes=2, patch=(4, 4), bottleneck=8, positions="rope"),
    "half": replace(MODERN, num_classes=2, patch=(2, 2), half_blocks=2),
    "route": replace(LITTLE, num_classes=2, patch=(4, 4), tokens=Route()),
    "sprint": replace(MODERN, num_classes=2, patch=(4, 4), tokens=Sprint(dense=1)),
}
LEGO = LegoConfig(
    width=16, heads=2, regions=(4, 8, 0), depths=(1, 1, 2), num_classes=2, canvas=(16, 16)
)


def built(config: NetworkConfig) -> Network:
    if config in TRANSFORMERS.values():
        return alive(config).eval()  # pyright: ignore[reportArgumentType]
    network = config.build()
    randomize(network)
    return network.eval()


def inputs(network: Network, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Cond]:
    reads, size = network.config.reads, (16, 16) if network.config == LEGO else SIZE
    cond = Cond(
        labels=torch.tensor([0, 1]),
        image=drawn(2, 2, *size, seed=5) if "image" in reads else None,
        extra=drawn(2, 3, seed=6) if "extra" in reads else None,
        context=drawn(2, 4, 3, seed=7) if "context" in reads else None,
    )
    return drawn(2, 3, *size, seed=seed), torch.tensor([0.3, -0.5]) + seed, cond


def cuts(network: Network) -> list[Cut]:
    """All cuts of a network."""
    assert isinstance(network, Cuttable)
    found = []
    for first in range(12):
        for last in [None] if hasattr(network, "dec") else range(12):
            try:
                found.append(network.cut(first, last))
            except ValueError:
                continue
    return found


@pytest.mark.parametrize("name", [*UNETS, *TRANSFORMERS, "lego"])
@torch.no_grad()
def test_a_pass_in_parts_is_the_pass_at_every_cut(name: str) -> None:
    network = built({**UNETS, **TRANSFORMERS, "lego": LEGO}[name])
    assert isinstance(network, Cuttable)
    x, noise, cond = inputs(network)
    expected, other = network(x, noise, cond), inputs(network, 1)
    found = cuts(network)
    counts = {"half": 2, "route": 2, "sprint": 3, "lego": 5}
    assert len(found) == (9 if name in UNETS else counts.get(name, 6))
    assert network.cut() in found
    for cut in found:
        passage = network.opened(x, noise, cond, cut)
        output, kept = passage.full()
        assert torch.equal(output, expected), cut
        same = network.opened(x, noise, cond, cut).reuse(kept)
        torch.testing.assert_close(same, expected, atol=2e-5, rtol=1e-5)
        if name in UNETS:
            assert torch.equal(same, expected), cut
        # Other inputs meet old features: neither of the two passes.
        mixed = network.opened(*other, cut).reuse(kept)
        assert not torch.allclose(mixed, expected, atol=1e-5)
        assert not torch.equal(mixed, network(*other))


@pytest.mark.parametrize("name", [*UNETS, *TRANSFORMERS])
@torch.no_grad()
def test_decoding_its_own_encoding_is_the_pass(name: str) -> None:
    network = built({**UNETS, **TRANSFORMERS}[name])
    assert isinstance(network, Encoder)
    x, noise, cond = inputs(network)
    encoding = network.encoded(x, noise, cond, network.encoder_blocks())
    expected = network(x, noise, cond)
    assert torch.equal(encoding.decode(noise, cond), expected)
    later = torch.tensor([1.5, 0.1])
    twice = cond.cat(cond)
    both = encoding.decode(torch.cat([noise, later]), twice)
    torch.testing.assert_close(both[:2], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[2:], encoding.decode(later, cond), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(both[2:], expected, atol=1e-4)


def test_usual_cuts() -> None:
    assert built(UNETS["adm"]).cut() == Cut(2)  # pyright: ignore
    assert built(UNETS["adm"]).encoder_blocks() == 8  # pyright: ignore
    assert built(TRANSFORMERS["dit"]).cut() == Cut(1, 1)  # pyright: ignore
    assert built(TRANSFORMERS["dit"]).encoder_blocks() == 3  # pyright: ignore
    assert built(TRANSFORMERS["half"]).encoder_blocks() == 1  # pyright: ignore
    assert built(LEGO).cut() == Cut(2, 0)  # pyright: ignore
    published = replace(LITTLE, depth=28).build()
    assert (published.cut(), published.encoder_blocks()) == (Cut(7, 7), 18)


def test_cuts_that_leave_nothing() -> None:
    dit, half = built(TRANSFORMERS["dit"]), built(TRANSFORMERS["half"])
    unet, lego = built(UNETS["ddpm++"]), built(LEGO)
    for network, arguments, told in (
        (dit, (4, None), ("first", 4)),
        (dit, (0, None), ("first", 0)),
        (dit, (2, 2), ("last", 2)),
        (half, (2, 0), ("first", "last", 2)),
        (unet, (9, None), ("first", 9)),
        (unet, (1, 1), ("last", 1)),
        (lego, (0, 0), ("first", "last", 3)),
    ):
        with refuses(*told):
            network.cut(*arguments)  # pyright: ignore
    with refuses("blocks", 4):
        dit.encoder_blocks(4)  # pyright: ignore
    with refuses("blocks", 2):
        unet.encoder_blocks(2)  # pyright: ignore
    with refuses("single block"):
        replace(LITTLE, depth=1).build().cut()
