"""Families of record types."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
from commands import refuses

from patchdiffusion.system import families


@dataclass(frozen=True)
class LongName:
    x: int = 0


@dataclass(frozen=True)
class OtherConfig:
    word: ClassVar[str] = "another"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "another-s": {"x": 1},
        "another-l/2": {"x": 5, "y": 2},
    }
    x: int = 0
    y: int = 1


@dataclass(frozen=True)
class Child(OtherConfig):
    """A member does not inherit the presets."""


@dataclass(frozen=True)
class Outsider:
    pass


Family = LongName | OtherConfig


@pytest.fixture
def outsider() -> Iterator[type]:
    yield families.add(Family, Outsider)
    families.remove(Family, Outsider)


def test_members_have_words() -> None:
    assert families.words(Family) == {"long-name": LongName, "another": OtherConfig}
    assert families.words(LongName) == {"long-name": LongName}
    assert families.members(Family | None) == (LongName, OtherConfig)


def test_a_member_from_outside(outsider: type) -> None:
    assert families.members(Family) == (LongName, OtherConfig, Outsider)
    assert families.choose(Family | None, "outsider", "field") is Outsider
    assert families.add(Family, Outsider) is Outsider  # a second time changes nothing
    assert len(families.members(Family)) == 3


def test_a_word_is_taken_once() -> None:
    @dataclass(frozen=True)
    class Thief:
        word: ClassVar[str] = "another"

    with refuses("another", "OtherConfig"):
        families.add(Family, Thief)


def test_presets_are_words_of_a_member_with_some_fields() -> None:
    assert list(families.presets(Family)) == ["another-s", "another-l/2"]
    assert families.presets(Child) == {}
    assert families.find(Family, "another-s") == (OtherConfig, {"x": 1})
    assert families.find(Family, "long-name") == (LongName, {})
    assert families.find(Family, "another-m") is None
    assert families.create(Family, "another-l/2", "field") == OtherConfig(x=5, y=2)
    assert families.create(Family, "another", "field") == OtherConfig()
    with refuses("field", "another-m", "long-name"):
        families.create(Family, "another-m", "field")

    @dataclass(frozen=True)
    class AnotherS:
        """Its word is that of a preset."""

    with refuses("another-s", "OtherConfig"):
        families.add(Family, AnotherS)


def test_an_unknown_word_is_told() -> None:
    with refuses("field", "x", "long-name", "another"):
        families.choose(Family, "x", "field")
    with pytest.raises(ValueError, match="a union of classes"):
        families.members(tuple[int, ...])
