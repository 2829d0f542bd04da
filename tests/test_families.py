"""Families of record types."""

from collections.abc import Iterator
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


def test_an_unknown_word_is_told() -> None:
    with refuses("field", "x", "long-name", "another"):
        families.choose(Family, "x", "field")
    with pytest.raises(ValueError, match="a union of classes"):
        families.members(tuple[int, ...])
