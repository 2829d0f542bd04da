"""The table of what the tests of faults protect fits the package and those tests."""

import importlib
import types
from functools import reduce
from pathlib import Path

import pytest
from faults import protections
from faults.protections import Finder, Protection, all_tests, judge, rows_of, table

from patchdiffusion.train import guard

TABLE = table()


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: f"{entry.row}: {entry.promise}")
def test_an_entry_is_up_to_date(entry: Protection) -> None:
    """Its name and its tests exist, these belong to its row, and it changes something."""
    module = importlib.import_module(entry.module)
    *inside, last = f"patchdiffusion.{entry.name}".removeprefix(f"{entry.module}.").split(".")
    original = getattr(reduce(getattr, inside, module), last)
    assert getattr(protections.standins, entry.standin)(original) is not original
    assert entry.tests
    for test in entry.tests:
        assert test.split("[")[0] in all_tests() and entry.row in rows_of(test.split("[")[0])


def test_every_row_has_an_entry() -> None:
    rows = {row for test in all_tests() for row in rows_of(test)}
    assert len(rows) > 25
    assert rows == {entry.row for entry in TABLE}
    assert len({entry.promise for entry in TABLE}) == len(TABLE)


def test_taking_out() -> None:
    """A module has what takes the place of a name as soon as it can be imported."""
    folder = [str(Path(guard.__file__).parent)]
    finder = Finder(Protection("x1", "", "train.guard.Guard._decide", "nothing", ()))
    assert finder.find_spec("patchdiffusion.train.state", folder) is None
    spec = finder.find_spec(guard.__name__, folder)
    module = types.ModuleType(guard.__name__)
    spec.loader.exec_module(module)
    assert module.Guard is not guard.Guard and module.Guard._decide(None) is None
    with pytest.raises(AttributeError, match="no_such_name"):
        Protection("x1", "", "train.guard.no_such_name", "nothing", ()).take_out(module)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["PASSED {ordinary}", "FAILED tests/faults/test_a.py::test_b[c d] - x"], "FAILS as it"),
        (["PASSED {ordinary}", "PASSED tests/faults/test_a.py::test_b[c d]"], "STILL PASSES"),
        (["FAILED {ordinary} - x", "FAILED tests/faults/test_a.py::test_b - x"], "BREAKS"),
        (["PASSED {ordinary}", "ERROR tests/faults/test_a.py::test_b - x"], "CANNOT TELL"),
        (
            ["PASSED {ordinary}", "PASSED tests/a.py::test_b", "ERROR tests/a.py::test_b - x"],
            "FAILS as it",
        ),
        (["PASSED {ordinary}"], "CANNOT TELL"),
        ([".Fatal Python error: Bus error"], "FAILS as it"),
        (["Fatal Python error: Bus error"], "BREAKS what"),
    ],
)
def test_how_a_removal_is_judged(lines: list[str], expected: str) -> None:
    told = "\n".join(lines).format(ordinary=protections.ORDINARY)
    good, text = judge(told)
    assert text.startswith(expected) and good == (expected == "FAILS as it")
