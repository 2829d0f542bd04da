"""Normalization and escaping of texts from outside, such as file names."""

import unicodedata


def same_form(name: str) -> str:
    """A name in composed Unicode (NFC): macOS writes the letters of names decomposed (NFD)."""
    return unicodedata.normalize("NFC", name)


def printable(text: str) -> str:
    """The text with everything escaped that is no printable character.

    Names of files may hold line breaks, sequences that terminals obey, and bytes of another
    encoding, which Python keeps as lone surrogates.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def storable(text: str) -> str:
    """The text with bytes of another encoding escaped, so that any file can hold it as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun: 1 image, 2 images, 1,000 images; `many` if it does not end in s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def share(number: int, total: int, noun: str, one: str, many: str) -> str:
    """A number out of all with the verb that follows: 1 of 9 images is, 2 of 9 images are."""
    return f"{number:,} of {counted(total, noun)} {one if number == 1 else many}"
