"""Limits of what compressed files may unpack to, checked before anything is unpacked."""

import zipfile

MAX_BYTES = 2**30
"""Of one image file."""
PLAIN_BYTES = 2**29
"""Bytes up to which the ratio of compression is not limited."""
MOST_TIMES = 100


def bomb(size: int, packed: int) -> str:
    """Reason why so many bytes must not be unpacked from so few, or ""."""
    if size > PLAIN_BYTES and size > MOST_TIMES * packed:
        return f"{packed:,} bytes would unpack to {size:,}; allowed are {MOST_TIMES} times as many"
    return ""


def check_members(members: list[zipfile.ZipInfo]) -> None:
    """Raise `ValueError` unless members of a zip may be unpacked together."""
    for info in members:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # Other methods are unpacked by `zipfile` without any limit.
            raise ValueError(f"{info.filename} is not compressed by deflate, the only one allowed")
    if reason := bomb(sum(m.file_size for m in members), sum(m.compress_size for m in members)):
        raise ValueError(reason)


def member_content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Unpack a member, no further than the size it is said to have.

    Raises `ValueError` for too much of it, and what `zipfile` raises for a damaged one.
    """
    if info.file_size > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    check_members([info])
    with archive.open(info) as stream:
        return stream.read(max(info.file_size, 1))  # without a number it reads all there is
