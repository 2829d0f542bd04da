"""Region-adaptive sampling: some tokens are the dense ones, others go on straight, none starves."""

from dataclasses import replace

import pytest
import torch
from accelerated import CANVAS, LABELS, SIGMAS, calls_of, denoiser, noisy, solved, wrapped
from commands import refuses
from little import LITTLE, MODERN, alive, drawn
from torch.nn.attention import SDPBackend, sdpa_kernel

from patchdiffusion import Cond
from patchdiffusion.accel.base import spending
from patchdiffusion.accel.regions import RegionAdaptive, Regions, scores, select
from patchdiffusion.cond import Position
from patchdiffusion.denoiser import Denoiser, NetDenoiser
from patchdiffusion.guidance.auto import AutoGuidance
from patchdiffusion.guidance.base import Surroundings
from patchdiffusion.guidance.cfg import CFG, Unconditional
from patchdiffusion.nets.count import MacCounter
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.routing import Sprint
from patchdiffusion.nets.tokens import AttentionMemory, unfold
from patchdiffusion.parameterisation import EDM
from patchdiffusion.sampling.companions import Companions
from patchdiffusion.solvers import Churn, DPMpp2M, Euler, Heun, Method, UniPC

PLAIN = replace(LITTLE, patch=(2, 2), num_classes=2, channels=1)
NETS: dict[str, DiTConfig] = {
    "plain": PLAIN,
    "modern": replace(MODERN, patch=(2, 2), num_classes=2, channels=1),
    "sprint": replace(PLAIN, tokens=Sprint(dense=1)),
    "variance": replace(PLAIN, learned_variance=True),
}
SOLVERS = (Euler(), Heun(), Heun(churn=Churn(amount=8)), DPMpp2M(), UniPC())


def regions(net: Denoiser, **fields: object) -> RegionAdaptive:
    fields = {"start": 1, "resets": (), **fields}
    model = wrapped(net, Regions(**fields))  # pyright: ignore[reportArgumentType]
    assert isinstance(model, RegionAdaptive)
    return model


def transformer(name: str = "plain") -> NetDenoiser:
    return NetDenoiser(alive(NETS[name]).eval(), EDM())


# ---- The partial pass ----


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_some_tokens_with_memory_are_those_of_the_dense_pass(name: str) -> None:
    network, cond = alive(NETS[name]).eval(), Cond(labels=LABELS)
    x, noise = drawn(2, 1, 7, 12), torch.tensor([0.3, -0.2])
    memory = AttentionMemory()
    dense = network.some(x, noise, cond, memory=memory)
    whole = unfold(torch.nn.functional.pad(network(x, noise, cond), (0, 0, 0, 1)), (2, 2))
    inside = torch.arange(24)[:18]  # tokens without padding
    assert torch.equal(dense[:, inside], whole[:, inside])
    assert torch.equal(network.some(x, noise, cond), dense)
    order = torch.stack(
        [torch.randperm(24, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    )
    for index in (order, order[:, :5], order[:, :1]):
        expected = dense.gather(1, index[..., None].expand(-1, -1, dense.shape[-1]))
        some = network.some(x, noise, cond, index=index, memory=memory)
        torch.testing.assert_close(some, expected, atol=2e-5, rtol=1e-5)
    alone = network.some(x, noise, cond, index=order[:, :5])
    assert not torch.allclose(
        alone, dense.gather(1, order[:, :5, None].expand(-1, -1, 4)), atol=1e-4
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_all_tokens_are_the_network_bit_for_bit(solver: Method) -> None:
    net = transformer()
    exact = solved(net, solver)
    for fields in ({"ratio": 1.0}, {"start": 9}, {"resets": (1, 2, 3, 4, 5)}):
        assert torch.equal(solved(regions(net, **fields), solver), exact), fields
    assert not torch.equal(solved(regions(net), solver), exact)


# ---- Tokens that are left out ----


def test_tokens_that_are_left_out_go_on_along_their_slope() -> None:
    model, levels = regions(transformer()), tuple(SIGMAS.tolist())
    x, cond = noisy(), Cond(labels=LABELS)
    with torch.no_grad():
        before = None
        for i in range(4):
            denoised = model(x, levels[i], cond, position=Position(-1, i, 0, levels))
            slope = (x - denoised) / levels[i]
            memory = next(iter(model.memories._runs.values()))[()][1]
            if before is not None:
                assert memory.active is not None and memory.active.shape == (2, 12)
                mask = model._mask(memory.active, x).expand_as(x)
                assert int(mask.sum()) == 2 * 12 * 4
                torch.testing.assert_close(slope[~mask], before[~mask], atol=1e-5, rtol=1e-4)
                assert not torch.allclose(slope[mask], before[mask], atol=1e-4)
            before = slope
            x = x + (levels[i + 1] - levels[i]) * slope


@pytest.mark.parametrize("prefer", ["low", "high"])
@pytest.mark.parametrize("ratio", [0.5, 0.3, 0.1])
def test_no_token_starves(prefer: str, ratio: float) -> None:
    total = 24
    count = -(-int(ratio * total * 1000) // 1000)
    drops = torch.zeros(3, total, dtype=torch.int64)
    seen: list[torch.Tensor] = []
    for step in range(40):
        index = select(drawn(3, total, seed=step).abs(), drops, count, prefer, 1e6)  # type: ignore
        drops = (drops + 1).scatter_add(1, index, -torch.ones_like(index))
        seen.append(torch.zeros(3, total, dtype=torch.bool).scatter(1, index, True))
        assert int(drops.max() - drops.min()) <= 1
        window = 2 * -(-total // count) - 1  # first in one turn, last in the next
        assert step < window or torch.stack(seen[-window:]).any(0).all()


def test_scores_and_signs() -> None:
    movement = torch.zeros(1, 2, 2, 4)
    movement[:, 0, :, 2:] = 3.0  # the second token has (3, 0) at every pixel
    torch.testing.assert_close(scores(movement, (2, 2), "std"), torch.tensor([[0.0, 1.5]]))
    torch.testing.assert_close(scores(movement, (2, 2), "norm"), torch.tensor([[0.0, 3.0]]))
    gray = torch.tensor([1.0, 1.0, 0.0, 2.0]).reshape(1, 1, 1, 4)
    torch.testing.assert_close(scores(gray, (1, 2), "std"), torch.tensor([[0.0, 1.0]]))
    score, none = torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 3, dtype=torch.int64)
    assert select(score, none, 1, "low", 0.0).item() == 0
    assert select(score, none, 1, "high", 0.0).item() == 2
    starved = torch.tensor([[0, 9, 0]])
    for prefer in ("low", "high"):
        assert select(score, starved, 1, prefer, 1.0).item() == 1  # type: ignore


def test_steps_with_all_tokens() -> None:
    net = transformer()
    model = regions(net, start=2, resets=(4,))
    solved(model)
    spent = spending(model)
    assert spent is not None and spent.summary == "full in steps 0 1 4 of 6"
    levels = tuple(map(float, range(30, -1, -1)))
    around = Surroundings(CANVAS, (1.0, 30.0), Companions(), levels)
    default = Regions().wrap(net, around)
    assert isinstance(default, RegionAdaptive) and default.resets == {12, 20}


def replace_schedule(count: int):
    from patchdiffusion.guidance.base import Surroundings
    from patchdiffusion.sampling.companions import Companions

    return Surroundings(CANVAS, (0.1, 1.0), Companions(), tuple(range(count, -1, -1)))


# ---- Together with others ----


@pytest.mark.parametrize("solver", [Euler(), Heun()])
def test_guidance_in_one_batch_and_in_two_passes_are_equal(solver: Method) -> None:
    net = transformer()
    together = solved(CFG(regions(net), 3.0), solver)
    model = regions(net)
    apart = solved(AutoGuidance(model, Unconditional(model), 3.0), solver)
    torch.testing.assert_close(together, apart, atol=1e-3, rtol=1e-3)


def watching(model: RegionAdaptive) -> list[torch.Tensor]:
    """A list that is filled with the tokens of each step that computes some of them."""
    chosen, choose = [], model._choose

    def watched(memory, x, where) -> None:
        choose(memory, x, where)
        if memory.active is not None:
            chosen.append(memory.active)

    model._choose = watched
    return chosen


def test_both_halves_of_guidance_compute_the_same_tokens() -> None:
    model = regions(transformer())
    chosen = watching(model)
    solved(CFG(model, 3.0))
    halves = [index.chunk(2) for index in chosen]
    assert len(halves) == 5 and all(torch.equal(a, b) for a, b in halves)


def test_starvation_is_that_of_the_settings() -> None:
    """Half of the tokens in each step: with it all had their turn after three, without it not."""
    for starvation, all_of_them in ((1e6, True), (0.0, False)):
        model = regions(transformer(), starvation=starvation)
        chosen = watching(model)
        solved(model)
        seen = torch.cat(chosen[:3], dim=1)[0].unique()
        assert (len(seen) == 2 * chosen[0].shape[1]) == all_of_them


def test_every_trajectory_begins_anew_and_images_are_their_own() -> None:
    net = transformer()
    model = regions(net)
    for x in (noisy(2), noisy(3, seed=2), noisy(2)):
        assert torch.equal(solved(model, x=x), solved(regions(net), x=x))
    assert not model.memories._runs
    both = solved(model)
    one = solved(model, x=noisy()[:1])
    torch.testing.assert_close(both[:1], one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attend", [True, False])
def test_counted_operations_are_those_that_were_done(attend: bool) -> None:
    net = NetDenoiser(alive(replace(NETS["modern"], context=0)).eval(), EDM())
    model = regions(net, attend=attend)
    calls = calls_of(net.network.blocks[0])  # pyright: ignore
    with sdpa_kernel(SDPBackend.MATH), MacCounter() as counter:
        solved(CFG(model, 2.0))
    assert calls() == 6
    spent = spending(model)
    assert spent is not None and spent.macs == counter.macs and 0.4 < spent.share < 0.8
    assert (spent.evaluations, spent.full) == (24, 4)


def test_what_does_not_fit_is_refused() -> None:
    for fields, named in (
        ({"ratio": 0.0}, ("ratio", 0.0)),
        ({"start": -1}, ("start", -1)),
        ({"resets": (3, -1)}, ("resets", -1)),
        ({"starvation": -1.0}, ("starvation", -1.0)),
    ):
        with refuses(*named):
            Regions(**fields)  # pyright: ignore[reportArgumentType]
    for name in ("unet", "lego"):
        with refuses(name, "dit"):
            regions(denoiser(name))
    with refuses("half_blocks"):
        regions(NetDenoiser(replace(PLAIN, half_blocks=2).build(), EDM()))
    with refuses("accelerator.resets", 6):
        regions(transformer(), resets=(6,))
