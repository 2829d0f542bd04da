"""Checks of the fields of records; every error is one line with the field and its value."""


def positive(owner: object, *names: str) -> None:
    """Raise `ValueError` unless the named fields lie above 0 and below 2^63."""
    for name in names:
        value = getattr(owner, name)
        if not 0 < value < 2**63:
            raise ValueError(f"{name} must be positive and finite, not {value}")


def fraction(owner: object, *names: str) -> None:
    """Raise `ValueError` unless the named fields lie in [0, 1]."""
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], not {value}")
