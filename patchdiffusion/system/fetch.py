"""Download files, verified by their digest."""

import time
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

from patchdiffusion.system.files import cache_dir, sha256, write_atomic

TRIES = 3
WAIT = 2.0  # seconds before the second try, and twice as long before the third
TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 2**20


def fetch(url: str, *, digest: str, hint: str) -> Path:
    """Download a file, or return it from the cache.

    `digest` is its SHA-256. Raises `OSError` after three failures, with the reason
    and the `hint` how to do without a network.
    """
    path = cache_dir() / "downloads" / f"{digest[:8]}-{url.rsplit('/', 1)[1]}"
    if path.exists():
        _check(path, digest)
        return path
    for left in reversed(range(TRIES)):
        try:
            write_atomic(path, lambda temporary: _download(url, temporary, digest))
            break
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, HTTPError):
                error.close()
            if not left:
                raise OSError(f"{url} could not be fetched ({error}); {hint}") from error
            time.sleep(WAIT * (TRIES - left))
    return path


def _download(url: str, path: Path, digest: str) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, open(path, "wb") as file:
        expected = answer.headers.get("Content-Length")
        while block := answer.read(_CHUNK):
            file.write(block)
    size = path.stat().st_size
    if expected is not None and size != int(expected):
        raise OSError(f"the connection ended after {size:,} of {int(expected):,} bytes")
    _check(path, digest)


def _check(path: Path, digest: str) -> None:
    actual = sha256(path)
    if actual != digest:
        raise ValueError(
            f"{path} is damaged or another file: its SHA-256 is {actual}, not {digest}; delete it "
            "to have it fetched again"
        )
