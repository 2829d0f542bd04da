"""The table of what the tests of faults protect fits the package and those tests."""

import pytest
from faults import protections
from faults.protections import PACKAGE, Protection, all_tests, judge, rows_of, table

TABLE = table()


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: f"{entry.row}: {entry.promise}")
def test_an_entry_is_up_to_date(entry: Protection) -> None:
    """Its texts occur once, its tests exist and belong to its row, and Python is left."""
    assert entry.stale(all_tests()) == ""
    assert all(entry.row in rows_of(test.split("[")[0]) for test in entry.tests)
    for edit in entry.edits:
        text = (PACKAGE / edit.file).read_text().replace(edit.old, edit.new)
        assert text != (PACKAGE / edit.file).read_text()
        compile(text, edit.file, "exec")


def test_every_row_has_an_entry() -> None:
    rows = {row for test in all_tests() for row in rows_of(test)}
    assert len(rows) > 25
    assert rows == {entry.row for entry in TABLE}


def test_an_entry_that_is_out_of_date_is_told() -> None:
    (entry,) = [e for e in TABLE if e.promise == "digests are compared"]
    edit = protections.Edit(entry.edits[0].file, "no such text", "")
    wrong = Protection(entry.row, "", (edit,), entry.tests, 1.0)
    good, told = protections.verdict(wrong, all_tests())
    assert not good and "IS OUT OF DATE: train/checkpoint.py has 0 times 'no such text'" in told
    wrong = Protection(entry.row, "", entry.edits, ("test_r1_gone[1]",), 1.0)
    assert protections.verdict(wrong, all_tests())[1].endswith("there is no test_r1_gone[1]")


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
    ],
)
def test_how_a_removal_is_judged(lines: list[str], expected: str) -> None:
    told = "\n".join(lines).format(ordinary=protections.ORDINARY)
    good, text = judge(told)
    assert text.startswith(expected) and good == (expected == "FAILS as it")
