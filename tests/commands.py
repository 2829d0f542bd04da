"""Commands that work or fail, and errors by what they name: a field, its value, what is allowed."""

import contextlib
import re
from collections.abc import Iterator

import pytest

from patchdiffusion import cli

Capture = pytest.CaptureFixture[str]


def names(told: str, *parts: object) -> bool:
    """True if an error is one line that has each of these as a word; how it says so is free."""
    words = (rf"(?<!\w){re.escape(str(part))}(?!\w)" for part in parts)
    return "\n" not in told and all(re.search(word, told) for word in words)


@contextlib.contextmanager
def refuses(*parts: object, error: type[Exception] = ValueError) -> Iterator[None]:
    """What is inside must raise an error that names these."""
    with pytest.raises(error) as caught:
        yield
    assert names(str(caught.value), *parts), str(caught.value)


def fails(capsys: Capture, *arguments: object, code: int = 2) -> str:
    """Run a command that must fail with one line, which is returned."""
    capsys.readouterr()
    assert cli.main([str(a) for a in arguments]) == code
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if line.startswith("patchdiffusion: error: ")]
    # Progress bars and a line about a pack that is used again may stand before.
    assert len(told) == 1 and lines[-1] == told[0], lines
    assert not any(noise in told[0] for noise in ("---", "\u2500", "helptext", "Error parsing"))
    return told[0].removeprefix("patchdiffusion: error: ")


def works(capsys: Capture, *arguments: object) -> str:
    capsys.readouterr()
    assert cli.main([str(a) for a in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out
