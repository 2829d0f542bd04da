"""What the pages say about the tests, the files and the command line is true."""

import re
from pathlib import Path

import pytest

from patchdiffusion.cli import COMMANDS, evaluation_table, techniques
from patchdiffusion.encoders.perceptual import Perceptual
from patchdiffusion.objectives import ConsistencyConfig
from patchdiffusion.solvers import Solver
from patchdiffusion.solvers.schedules import Schedule
from patchdiffusion.system import errors
from patchdiffusion.system.families import words
from patchdiffusion.train.autoencoding import AutoencoderTask
from patchdiffusion.train.concept import ConceptTask
from patchdiffusion.train.config import FREE, TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_defect_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "defects.md").read_text()
    file = ""
    found = 0
    for name, test in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", text):
        file = name or file
        if not (name or test):
            continue
        source = (ROOT / "tests" / file).read_text()
        assert not test or f"def {test}(" in source, f"{file}::{test}"
        found += 1
    assert found >= 25
    rows = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    for row in rows:
        last = row.rstrip("|").rsplit("|", 1)[1]
        assert "test" in last or "cannot arise" in last, row


def test_every_promise_of_the_reliability_page_is_a_test() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    files = (ROOT / "tests" / "faults").glob("test_*.py")
    tests = "\n".join(re.findall(r"def (test_\w+)", "\n".join(f.read_text() for f in files)))
    named = set(re.findall(r"`([a-z]\d_|two_hosts)`", text))
    assert len(named) > 30
    for name in named:
        assert re.search(rf"test_(\w+_)?{name}", tests), f"{name} is no test of tests/faults"


def test_the_exit_codes_are_the_same_everywhere() -> None:
    """The page and the module say the same."""
    page = (ROOT / "docs" / "reliability.md").read_text()
    said = re.findall(r"^\| (\d+) \| (.*) \|$", page, re.MULTILINE)
    assert said == re.findall(r"^\| (\d+) \| (.*) \|$", errors.__doc__ or "", re.MULTILINE)
    assert len(said) == 11


def test_pages_name_commands_that_exist() -> None:
    for page in PAGES:
        for command in re.findall(r"^patchdiffusion (\w+)", page.read_text(), flags=re.MULTILINE):
            assert command in COMMANDS, f"{page.name}: {command}"


def test_the_page_of_techniques_is_what_the_classes_say() -> None:
    text = (ROOT / "docs" / "techniques.md").read_text()
    assert text == techniques.page(), "python -m patchdiffusion.cli.techniques > docs/techniques.md"


def test_every_solver_and_schedule_has_its_place_in_the_page() -> None:
    text = (ROOT / "docs" / "solvers.md").read_text()
    for name in (*words(Solver), *words(Schedule)):
        assert f"`{name}`" in text, name


def test_every_measure_has_its_place_in_the_page() -> None:
    text = (ROOT / "docs" / "evaluate.md").read_text()
    for label in evaluation_table.RESULTS.values():
        assert label in text, label


def test_free_fields_exist() -> None:
    """In some configuration, of each type that a family has."""
    tasks = [AutoencoderTask(perceptual=kind()) for kind in words(Perceptual).values()]
    configs = [
        TrainConfig(objective=ConsistencyConfig()),
        *(TrainConfig(task=t) for t in (*tasks, ConceptTask())),
    ]
    missing = object()
    for path in FREE:
        values: list[object] = list(configs)
        for name in path.split("."):
            values = [getattr(value, name, missing) for value in values]
        assert any(value is not missing for value in values), path


def test_the_two_paths_name_files_that_exist() -> None:
    """Each file of a path is named once."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    for section in re.split(r"^## Path", page, flags=re.MULTILINE)[1:]:
        files = re.findall(r"^\| `([^`]+\.py)` \|", section, flags=re.MULTILINE)
        assert len(files) > 8 and len(set(files)) == len(files)
        assert not [f for f in files if not (ROOT / "patchdiffusion" / f).exists()]
