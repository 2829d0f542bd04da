"""Splits of a data set (train, val, test) by the usual names of folders and columns."""

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
    """Split named by a folder such as `train`, `val2017` or `Test_Images`, or None."""
    low = name.strip().casefold().replace("hold-out", "holdout").replace("held-out", "heldout")
    low = low.replace("hold_out", "holdout").replace("held_out", "heldout")
    if domain := _DOMAIN.fullmatch(name):
        return _WORDS[domain[1]]
    found = re.fullmatch(rf"({'|'.join(sorted(_WORDS, key=len, reverse=True))}){_TAIL}", low)
    return _WORDS[found[1]] if found else None


def domain_of(name: str) -> str | None:
    """Domain of a folder such as `trainA` of data sets of two domains (CycleGAN): A, or None."""
    found = _DOMAIN.fullmatch(name)
    return found and found[2].upper()


def are_splits(names: Iterable[str]) -> bool:
    """True if sibling folders are splits of a data set: train, and val or test."""
    kinds = {split_of(name) for name in names}
    return TRAIN in kinds and bool(kinds & {HELD_OUT, TEST})
