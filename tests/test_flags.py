"""Flags of records: words for members of families at any depth, and their fields."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from patchdiffusion.cli.flags import flat, positional
from patchdiffusion.cli.help import help_text
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.values import convert, metavar, shown
from patchdiffusion.system import families


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Always the same rate."""


@dataclass(frozen=True, kw_only=True)
class Falling:
    """Falls to zero."""

    by: float = 0.5
    """Share of the run over which it falls."""


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Steps along the gradient."""

    rate: float = 0.1
    """Size of a step."""
    schedule: Constant | Falling = field(default_factory=Constant)
    """How the rate changes."""


@dataclass(frozen=True, kw_only=True)
class Heavy:
    """Steps with momentum."""

    word: ClassVar[str] = "heavy-ball"
    rate: float = 0.2
    """Size of a step."""
    schedule: Constant | Falling = field(default_factory=Constant)
    """How the rate changes."""
    history: tuple[float, ...] = (0.9,)
    """Decay of each momentum."""

    def inherit(self, old: Plain, config: "Config") -> "Heavy":
        return replace(self, schedule=old.schedule)

    def prefers(self, config: "Config") -> "Config":
        return replace(config, optim=self, batch=config.optim.rate * 40)


@dataclass(frozen=True, kw_only=True)
class Blur:
    """A smoother image."""

    radius: int = 1
    """In pixels."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Two images at a time."""

    share: float = 0.5
    """Of the second one."""
    law: Constant | Falling | None = None
    """How the share changes; None keeps it."""


Term = Blur | Mix


@dataclass(frozen=True, kw_only=True)
class Config:
    """A configuration."""

    optim: Plain | Heavy = field(default_factory=Plain)
    """How weights move."""
    terms: tuple[Term, ...] = ()
    """What is added, in this order."""
    limit: Literal["auto"] | Falling = "auto"
    """A choice that is no record by default."""
    batch: float = 8.0
    """Images in a step."""
    mirror: bool = False
    """Left to right."""

    def __post_init__(self) -> None:
        if self.batch <= 0:
            raise ValueError(f"batch must be positive, not {self.batch}")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command."""

    place: Path | None = field(default=None, metadata=positional("[PLACE]", required=False))
    """Where it happens."""
    seed: int | None = None
    """Where randomness begins."""
    config: Config = field(default_factory=Config, metadata=flat("configuration"))


def parsed(line: str, start: Any = None) -> Any:
    return parse(Command() if start is None else start, line.split(), "toy")


def config(line: str, **start: Any) -> Config:
    return parsed(line, Command(config=Config(**start))).config


# ---- Words ----


def test_without_flags_nothing_changes() -> None:
    command = Command(seed=3)
    assert parsed("", command) == command


def test_a_word_chooses_and_fields_follow_in_any_order() -> None:
    expected = Config(optim=Heavy(rate=1.0, history=(0.5, 0.25)), batch=4.0)
    line = "--optim.rate 1 --optim.history 0.5 0.25 --optim heavy-ball"
    assert config(line) == config("--optim heavy-ball " + line) == expected


def test_a_word_at_any_depth() -> None:
    assert config("--optim.schedule falling --optim.schedule.by 1").optim == Plain(
        schedule=Falling(by=1.0)
    )
    assert config("--limit falling --limit.by 0.1").limit == Falling(by=0.1)
    assert config("--limit auto", limit=Falling()).limit == "auto"


def test_what_is_there_stays() -> None:
    heavy = Heavy(rate=5.0, history=())
    assert config("--optim heavy-ball", optim=heavy, batch=1.0) == Config(optim=heavy, batch=1.0)


def test_a_member_takes_over_and_brings_what_belongs_to_it() -> None:
    plain = Plain(rate=0.5, schedule=Falling(by=0.1))
    brought = config("--optim heavy-ball", optim=plain)
    assert brought == Config(optim=Heavy(schedule=Falling(by=0.1)), batch=20.0)
    assert config("--optim heavy-ball --batch 3", optim=plain).batch == 3.0


def test_several_members() -> None:
    line = "--terms mix blur --terms.mix.share 0.25 --terms.mix.law falling --terms.mix.law.by 1"
    terms = (Mix(share=0.25, law=Falling(by=1.0)), Blur())
    assert config(line).terms == terms
    assert config("--terms.mix.law none", terms=terms).terms == (Mix(share=0.25), Blur())
    assert config("--terms blur mix", terms=terms).terms == terms[::-1]
    assert config("--terms", terms=terms).terms == ()


@dataclass(frozen=True, kw_only=True)
class Outsider:
    """From another package."""

    inner: Constant | Falling = field(default_factory=Falling)
    """A family in it."""


@pytest.fixture
def outsider() -> Iterator[None]:
    for family in (Plain | Heavy, Term):
        families.add(family, Outsider)
    yield
    for family in (Plain | Heavy, Term):
        families.remove(family, Outsider)


@pytest.mark.usefixtures("outsider")
def test_members_from_outside() -> None:
    made = config("--optim outsider --optim.inner.by 0.25 --terms outsider")
    assert made.optim == Outsider(inner=Falling(by=0.25)) and made.terms == (Outsider(),)


# ---- Values ----


@pytest.mark.parametrize(
    ("hint", "words", "value"),
    [
        (int | None, "none", None),
        (str | None, "None", None),
        (float, "-1e3", -1000.0),
        (tuple[float, float] | None, "1 2", (1.0, 2.0)),
        (tuple[tuple[int, int], ...], "1 2 3 4", ((1, 2), (3, 4))),
        (tuple[int, ...], "", ()),
        (int | tuple[int, int], "3", 3),
        (int | tuple[int, int], "3 4", (3, 4)),
        (Literal["a", 1] | float, "1", 1),
        (Literal["a", 1] | float, "0.5", 0.5),
        (bool, "", True),
        (float, "10k", 10_000.0),
        (int, "1.5M", 1_500_000),
        (int, "1e3", 1000),
        (float, "2.3k", 2300.0),
        (int | tuple[int, int] | None, "64x96", (64, 96)),
        (tuple[float, ...], "1,.5 .25", (1.0, 0.5, 0.25)),
        (tuple[str, ...], "a,b 64x96", ("a,b", "64x96")),
    ],
)
def test_values(hint: Any, words: str, value: Any) -> None:
    assert convert(hint, words.split()) == value
    assert hint is bool or convert(hint, shown(value).split()) == value
    assert metavar(hint) or hint is bool


def test_forms_of_flags() -> None:
    assert config("--mirror --batch=2") == Config(mirror=True, batch=2.0)
    assert config("--no-mirror", mirror=True).mirror is False
    assert config("--batch 1 --batch 2").batch == 2.0
    assert parsed("here --seed -4") == Command(place=Path("here"), seed=-4)


def test_words_before_the_flags() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Two:
        first: str = field(default="", metadata=positional("FIRST"))
        """The first one."""
        rest: tuple[int, ...] = field(default=(), metadata=positional("[N ...]", required=False))
        """The others."""

    assert parse(Two(), ["a", "1", "2"], "two") == Two(first="a", rest=(1, 2))
    with pytest.raises(ValueError, match=r"FIRST is missing.*patchdiffusion two FIRST \[N ...\]"):
        parse(Two(), [], "two")


# ---- Errors name the field, the value and what is allowed ----


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--optim light", ("--optim", "'light'", "heavy-ball, plain")),
        ("--optim", ("--optim", "heavy-ball, plain")),
        ("--optim.mass 1", ("--optim.mass", "--optim.rate, --optim.schedule")),
        ("--terms blur haze", ("--terms", "'haze'", "blur, mix")),
        ("--terms mix mix", ("--terms", "'mix mix'", "once")),
        ("--limit 3", ("--limit", "'3'", "auto, falling")),
        ("--optim.rate x", ("--optim.rate", "'x'", "a number")),
        ("--optim.rate", ("--optim.rate", "nothing", "a number")),
        ("--seed 1 2", ("--seed", "'1 2'", "a whole number or none")),
        ("--optim.history 1", ("unknown flag --optim.history", "--optim heavy-ball")),
        ("--mirrored", ("unknown flag --mirrored", "--mirror")),
        ("--batch 0", ("batch", "0.0", "positive")),
        ("--no-mirror 3", ("--no-mirror", "no value")),
        ("one two", ("'two'", "patchdiffusion toy [PLACE]")),
    ],
)
def test_wrong_flags(line: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        parsed(line)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


# ---- Help ----


def test_the_help_lists_members_and_the_flags_of_the_chosen() -> None:
    text = help_text(parsed("--terms mix"), "patchdiffusion toy")
    for part in (r"plain +Steps along", r"heavy-ball +Steps with", "--optim.rate", "--terms.mix.l"):
        assert re.search(part, text)
    assert "--optim.history" not in text and "--terms.blur" not in text
