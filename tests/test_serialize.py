"""Dataclasses to JSON and back, strictly."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from commands import refuses

from patchdiffusion import TrainConfig
from patchdiffusion.noise import LogNormal, LogUniform, UniformTime
from patchdiffusion.system.serialize import decode, differences, encode, few
from patchdiffusion.train.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    side: int = 3
    share: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    flag: bool = False
    inner: Inner = field(default_factory=Inner)
    law: LogNormal | LogUniform | None = None
    mode: Literal["a", "b", 3] = "a"
    pair: tuple[int, float] = (1, 2.0)
    many: tuple[str, ...] = ()
    size: int | tuple[int, int] | None = None


FULL = Outer(
    name="\u00e4 \u2603",
    flag=True,
    inner=Inner(side=-7, share=1e-300),
    law=LogUniform(sigma_min=1 / 3),
    mode=3,
    pair=(0, 0.1),
    many=("x", ""),
    size=(2, 3),
)


@pytest.mark.parametrize("value", [Outer(name="n"), FULL, Outer(name="", size=4, law=LogNormal())])
def test_round_trip_through_text(value: Outer) -> None:
    assert decode(Outer, json.loads(json.dumps(encode(value)))) == value


def test_the_configurations_of_runs() -> None:
    assert decode(TrainConfig, json.loads(json.dumps(encode(TrainConfig())))) == TrainConfig()


def test_encoded_classes_carry_their_names() -> None:
    assert encode(FULL)["type"] == "Outer"
    assert encode(FULL)["law"] == {"type": "LogUniform", "sigma_min": 1 / 3, "sigma_max": 100.0}
    assert encode({"a": (1, [Inner()])})["a"][1][0] == {"type": "Inner", "side": 3, "share": 0.5}


def test_absent_keys_take_defaults() -> None:
    assert decode(Outer, {"name": "n", "inner": {"side": 9}}) == Outer(
        name="n", inner=Inner(side=9)
    )


def test_an_integer_may_stand_for_a_float_and_not_the_other_way_round() -> None:
    assert decode(Inner, {"share": 2}) == Inner(share=2.0)
    assert type(decode(Inner, {"share": 2}).share) is float
    with refuses("side", "int", "2.0"):
        decode(Inner, {"side": 2.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": 1}, "unknown key 'nmae'; allowed are name, flag, inner, law"),
        ({"inner": {"size": 1}}, "unknown key 'inner.size'; allowed are side, share"),
        ({"name": 3}, "name must be str, not 3"),
        ({"name": None}, "name must be str, not None"),
        ({"flag": 1}, "flag must be bool, not 1"),
        ({"inner": {"side": True}}, "inner.side must be int, not True"),
        ({"inner": {"side": "3"}}, "inner.side must be int, not '3'"),
        ({"inner": {"share": float("nan")}}, "inner.share must be float, not nan"),
        ({"inner": {"share": float("inf")}}, "inner.share must be float, not inf"),
        ({"inner": {"share": 10**400}}, "inner.share must be float, not 1000"),
        ({"inner": 3}, "inner must be an object, not 3"),
        ({"inner": None}, "inner must be an object, not None"),
        ({"inner": {"type": "Outer"}}, "inner must be Inner, not 'Outer'"),
        ({"law": {"type": "Evil"}}, "law has the type 'Evil'; allowed are LogNormal, LogUniform"),
        ({"law": {"mean": 0.0}}, "law has the type None"),
        ({"law": {"type": "LogNormal", "std": -1.0}}, "std in"),
        ({"law": {"type": ["LogNormal"]}}, "law has the type ['LogNormal']"),
        ({"mode": "c"}, "mode must be one of ('a', 'b', 3), not 'c'"),
        ({"mode": 3.0}, "mode must be one of ('a', 'b', 3), not 3.0"),
        ({"mode": []}, "mode must be one of ('a', 'b', 3), not []"),
        ({"pair": [1]}, "pair must have 2 entries, not [1]"),
        ({"pair": [1, 2.0, 3]}, "pair must have 2 entries"),
        ({"pair": "ab"}, "pair must be a list, not 'ab'"),
        ({"pair": ["x", 1.0]}, "pair[0] must be int, not 'x'"),
        ({"many": ["x", 1]}, "many[1] must be str, not 1"),
        ({"size": "big"}, "size must be int, not 'big'; or size must be a list, not 'big'"),
    ],
)  # fmt: skip
def test_errors_name_the_field_the_value_and_what_is_allowed(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        decode(Outer, {"name": "n", **change})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_only_objects_are_decoded(value: object) -> None:
    with refuses("Outer", "object"):
        decode(Outer, value)


def test_a_missing_field_is_named() -> None:
    with refuses("Outer", "name"):
        decode(Outer, {})


def test_another_type_is_refused() -> None:
    with refuses("Outer", "Inner"):
        decode(Outer, {"type": "Inner", "name": "n"})


def test_impossible_values_are_found_by_the_class_itself() -> None:
    data = encode(TrainConfig())
    data["optim"]["lr"] = -1.0
    with refuses("lr", "positive"):
        decode(TrainConfig, data)


def test_differences() -> None:
    assert differences(FULL, FULL) == []
    other = Outer(name="n", flag=True, inner=Inner(side=-7), law=LogNormal(), mode=3)
    found = differences(FULL, other)
    assert "inner.share: 1e-300 -> 0.5" in found
    assert "law: loguniform -> lognormal" in found
    assert [line.split(":")[0] for line in found] == [
        "name", "inner.share", "law", "pair", "many", "size",
    ]  # fmt: skip


def test_differences_of_another_member_are_its_word_and_what_is_not_default() -> None:
    found = differences(FULL, replace(FULL, law=LogNormal(std=2.0)))
    assert found == ["law: loguniform -> lognormal", "law.std: 1.2 -> 2.0"]
    narrow = replace(FULL, law=LogUniform(sigma_min=0.3))
    assert differences(narrow.law, UniformTime()) == [": loguniform -> uniform-time"]


def test_few_differences_are_short() -> None:
    assert few([]) == "" and few(["a: 1 -> 2", "b: 1 -> 2"]) == "a: 1 -> 2, b: 1 -> 2"
    text = few([f"field {i}: {'x' * 500} -> 2" for i in range(9)])
    assert text.endswith("and 3 more") and len(text) < 700


def test_paths_are_no_part_of_what_is_stored() -> None:
    """`RunConfig` holds paths and is never encoded; nothing of it may creep into a run."""
    assert not {"out", "device", "start_from"} & set(encode(TrainConfig()))
    assert RunConfig(out=Path("x")).out == Path("x")
