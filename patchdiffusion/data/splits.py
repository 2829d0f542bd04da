"""Folders and columns that divide a data set: train, val and test, by their usual names."""

import re
from collections.abc import Iterable

TRAIN, HELD_OUT, TEST = "train", "val", "test"
_WORDS = {
    **dict.fromkeys(("train", "training", "trn"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "devel"), HELD_OUT),
    **dict.fromkeys(("holdout", "heldout", "eval", "evaluation"), HELD_OUT),
    **dict.fromkeys(("test", "testing", "tst"), TEST),
}
_TAIL = r"([-_ ]?(set|split|data|dataset|images?|imgs?|\d{1,4}))*"
_DOMAIN = re.compile("(train|val|test)([ABab])")


def split_of(name: str) -> str | None:
    """The split that a name such as `train`, `val2017` or `Test_Images` stands for, or None."""
    low = name.strip().casefold().replace("hold-out", "holdout").replace("held-out", "heldout")
    low = low.replace("hold_out", "holdout").replace("held_out", "heldout")
    if domain := _DOMAIN.fullmatch(name):
        return _WORDS[domain[1]]
    found = re.fullmatch(rf"({'|'.join(sorted(_WORDS, key=len, reverse=True))}){_TAIL}", low)
    return _WORDS[found[1]] if found else None


def domain_of(name: str) -> str | None:
    """The A of `trainA`, as sets of two domains (CycleGAN) have it, or None."""
    found = _DOMAIN.fullmatch(name)
    return found and found[2].upper()


def are_splits(names: Iterable[str]) -> bool:
    """Whether these folders beside each other divide a data set: train, and val or test."""
    kinds = {split_of(name) for name in names}
    return TRAIN in kinds and bool(kinds & {HELD_OUT, TEST})
