"""Parts of training in pairs: each trains or is refused in one line, neutral ones do nothing."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
STRIDE = 29
"""Of the pairs that are tried by default, a prime number."""


@pytest.fixture(scope="module")
def combinations() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import combinations  # pyright: ignore[reportMissingImports]

        yield combinations


def test_a_sample_of_pairs_trains_or_is_refused(combinations: ModuleType, tmp_path: Path) -> None:
    data = combinations.write_images(tmp_path / "images")
    for one, other in list(combinations.pairs())[::STRIDE]:
        assert "\n" not in combinations.outcome(one, other, data)


@pytest.mark.parametrize("word", ["contrast", "corrupt", "self-distill", "perturb"])
def test_a_neutral_part_is_none(word: str, combinations: ModuleType, tmp_path: Path) -> None:
    data = combinations.write_images(tmp_path / "images")
    plain = combinations.Part("patches", "multigrid", "--patches multigrid")
    neutral = combinations.Part("neutral", word, combinations.NEUTRAL[word])
    flags = [combinations.flags_of(*parts) for parts in ((plain,), (plain, neutral))]
    losses = [combinations.trained(f, data) for f in flags]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("word", ["contrast", "corrupt", "self-distill", "perturb"])
def test_a_neutral_part_is_none_beside_any_other(
    word: str, combinations: ModuleType, tmp_path: Path
) -> None:
    data = combinations.write_images(tmp_path / "images")
    neutral = combinations.Part("neutral", word, combinations.NEUTRAL[word])
    found = combinations.parts()
    for part in (*found["network"], *found["objective"], *found["patches"]):
        try:
            both = combinations.trained(combinations.flags_of(part, neutral), data)
        except ValueError as error:  # a part is refused whatever its weight
            assert "\n" not in str(error)
            continue
        assert both == combinations.trained(combinations.flags_of(part), data), part


@pytest.mark.slow
def test_the_page_is_what_was_tried(combinations: ModuleType) -> None:
    told = "\n".join(combinations.page()) + "\n"
    assert told == (ROOT / "docs" / "combinations.md").read_text()
