"""Conditions, the tape, and where a solver stands."""

from dataclasses import fields, replace

import pytest
import torch
from commands import refuses
from torch.utils import _pytree as pytree

from patchdiffusion.cond import Cond, Position, Tape


def full(batch: int = 3) -> Cond:
    """A condition with every field given, all values different."""
    count = torch.arange(batch)
    return Cond(
        labels=count,
        context=count[:, None, None] + torch.rand(batch, 2, 5, generator=torch.Generator()),
        context_mask=torch.tensor([True, False]).expand(batch, 2),
        tokens=torch.tensor([65, 66, 0], dtype=torch.uint8).expand(batch, 3),
        context_pos=torch.linspace(-2, 2, batch * 4).reshape(batch, 2, 2),
        pos=torch.linspace(-1, 1, batch * 2 * 4 * 6).reshape(batch, 2, 4, 6),
        image=torch.linspace(0, 1, batch * 4 * 6).reshape(batch, 1, 4, 6),
        augment=torch.linspace(2, 3, batch * 9).reshape(batch, 9),
        extra=torch.linspace(3, 4, batch * 7).reshape(batch, 7),
        percentile=torch.linspace(0, 1, batch),
        jump=torch.linspace(4, 5, batch),
        adapters=torch.linspace(5, 6, batch * 2).reshape(batch, 2),
        control=torch.linspace(0, 1, batch * 3 * 4 * 6).reshape(batch, 3, 4, 6),
        instruction=torch.linspace(6, 7, batch * 5).reshape(batch, 5),
        seed=count + 77,
    )


def same(a: Cond, b: Cond) -> bool:
    for f in fields(Cond):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if (x is None) != (y is None) or (x is not None and not torch.equal(x, y)):
            return False
    return True


def test_full_gives_every_field() -> None:
    assert all(getattr(full(), f.name) is not None for f in fields(Cond))


@pytest.mark.parametrize("cond", [full(), Cond(), Cond(labels=torch.tensor([1, 2]))])
def test_pytree_round_trip(cond: Cond) -> None:
    leaves, spec = pytree.tree_flatten(cond)
    assert same(pytree.tree_unflatten(leaves, spec), cond)
    doubled = pytree.tree_map_only(torch.Tensor, lambda x: x * 2, cond)
    assert same(doubled, cond.map(lambda x: x * 2))


def test_pytree_inside_a_function_transform() -> None:
    def total(cond: Cond) -> torch.Tensor:
        assert cond.extra is not None
        return cond.extra.square().sum()

    given = Cond(extra=torch.ones(2, 3))
    assert torch.equal(torch.func.grad(total)(given).extra, 2 * torch.ones(2, 3))


def test_fields_are_dropped_by_name() -> None:
    cond, null = full(), full().without("labels", "context", "pos")
    assert null.labels is not None and null.labels.tolist() == [-1, -1, -1]
    assert null.context is not None and not null.context.any()
    assert null.pos is None
    assert same(replace(null, labels=cond.labels, context=cond.context, pos=cond.pos), cond)
    assert cond.labels is not None and cond.labels.tolist() == [0, 1, 2]  # the original is intact
    assert same(Cond().without("labels", "pos"), Cond())
    with refuses("label", "labels"):
        cond.without("label")
    assert cond.gives("labels", "pos") and null.gives("pos", "labels") and not null.gives("pos")


def test_fields_are_dropped_for_some_samples() -> None:
    some = torch.tensor([True, False, True])
    for name in (
        "labels",
        "context",
        "context_mask",
        "tokens",
        "image",
        "augment",
        "extra",
        "jump",
    ):
        mixed = full().without(name, where=some)
        assert same(mixed.take(some), full().without(name).take(some))
        assert same(mixed.take(~some), full().take(~some))
    with refuses("pos"):
        full().without("pos", where=some)


def test_cat_then_take_gives_the_parts_back() -> None:
    a, b = full(3), full(2)
    joined = a.cat(b)
    assert same(joined.take(slice(0, 3)), a)
    assert same(joined.take(torch.tensor([3, 4])), b)
    assert same(Cond().cat(Cond()), Cond())


def test_cat_names_the_field_that_does_not_match() -> None:
    with refuses("extra"):
        Cond(labels=torch.tensor([1]), extra=torch.ones(1, 2)).cat(Cond(labels=torch.tensor([1])))
    with refuses("pos"):
        Cond().cat(Cond(pos=torch.ones(1, 2, 3, 3)))


def test_to_moves_every_field() -> None:
    moved = full().to("meta")
    assert all(getattr(moved, f.name).device.type == "meta" for f in fields(Cond))
    assert same(full().to("cpu"), full())


def test_tape_keeps_only_what_is_wanted() -> None:
    tape = Tape(wants=("a", "block/b"))
    tape.put("a", torch.ones(1))
    tape.put("not wanted", torch.ones(1))
    with tape.scope("block") as inner:
        inner.put("a", torch.zeros(1))
        inner.put("b", torch.full((1,), 2.0))
        inner.loss("balance", torch.tensor(3.0))
    tape.put("b", torch.ones(1))
    assert {k: v.item() for k, v in tape.activations.items()} == {"a": 1.0, "block/b": 2.0}
    assert {k: v.item() for k, v in tape.losses.items()} == {"block/balance": 3.0}


def test_tape_refuses_duplicates_even_of_what_nobody_wants() -> None:
    tape = Tape()
    tape.put("a", torch.ones(1))
    with refuses("activation", "a"):
        tape.put("a", torch.ones(1))
    tape.loss("x", torch.ones(()))
    with refuses("loss", "x"):
        tape.loss("x", torch.ones(()))
    with tape.scope("s"):
        tape.put("a", torch.ones(1))
        with refuses("s/a"):
            tape.put("a", torch.ones(1))


def test_tape_scopes_nest_and_end_after_an_error() -> None:
    tape = Tape(wants=("a/b/x", "y"))
    with pytest.raises(RuntimeError), tape.scope("a"), tape.scope("b"):
        tape.put("x", torch.ones(1))
        raise RuntimeError
    tape.put("y", torch.ones(1))
    assert set(tape.activations) == {"a/b/x", "y"}


def test_step_is_a_value() -> None:
    """Caches key on parts of it, so equal positions must be equal and hashable."""
    a, b = (
        Position(run=0, index=1, stage=0, sigmas=(2.0, 1.0, 0.0), slot=("cfg",)) for _ in range(2)
    )
    assert a == b and hash(a) == hash(b)
    assert Position(run=0, index=1, stage=1, sigmas=(2.0, 1.0, 0.0), slot=("cfg",)) != a
