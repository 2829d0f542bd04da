"""Checks of the fields of records; every error is one line with the field and its value."""

import math


def positive(owner: object, *names: str) -> None:
    """Raise `ValueError` unless the named fields lie above 0 and below 2^63."""
    for name in names:
        value = getattr(owner, name)
        if 2**63 <= value < math.inf:
            raise ValueError(f"{name} must be less than 2^63, about 9.2e18, not {value}")
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, not {value}")


def fraction(owner: object, *names: str) -> None:
    """Raise `ValueError` unless the named fields lie in [0, 1]."""
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], not {value}")
