"""Checks of the fields of records; every error is one line with the field and its value."""

import math
from dataclasses import fields, is_dataclass

MOST = 2.0**63
"""Largest number whose square is finite in float32, and that counts in 64 bits; a power of two."""


def positive(owner: object, *names: str) -> None:
    """Raise `ValueError` unless the named fields lie above 0 and below 2^63."""
    for name in names:
        value = getattr(owner, name)
        if MOST <= value < math.inf:
            raise ValueError(f"{name} must be less than 2^63, about 9.2e18, not {value}")
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, not {value}")


def fraction(owner: object, *names: str) -> None:
    """Raise `ValueError` unless the named fields lie in [0, 1]."""
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], not {value}")


def finite(record: object, where: str = "") -> None:
    """Raise `ValueError` unless all numbers of a record, and of records in it, are finite."""
    if isinstance(record, float) and not math.isfinite(record):
        raise ValueError(f"{where} must be finite, not {record}")
    if isinstance(record, tuple):
        for item in record:
            finite(item, where)
    elif is_dataclass(record):
        for name in (f.name for f in fields(record)):
            finite(getattr(record, name), f"{where}.{name}" if where else name)
