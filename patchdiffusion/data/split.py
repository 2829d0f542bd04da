"""Duplicate images, and images held out from training, as functions of the content."""

import hashlib
from collections.abc import Sequence

import numpy as np

MIN_IMAGES = 20
MAX_HELD_OUT = 1000
_SPREAD = np.uint64(0x9E3779B97F4A7C15)


def digest(content: bytes) -> int:
    """64-bit hash of a content or a name."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def repeats(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of images that repeat an earlier one, and of that one: int64 [R], int64 [R]."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    original = first[inverse]
    later = np.flatnonzero(original != np.arange(len(digests)))
    return later, original[later]


def _clusters(digests: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Cluster of each image, the same if images share their content or group: int64 [N]."""
    links = [np.unique(values, return_inverse=True)[1] for values in (digests, groups)]
    cluster = links[0]
    while True:
        before = cluster
        for link in links:
            lowest = np.full(link.max() + 1, len(link))
            np.minimum.at(lowest, link, cluster)
            cluster = lowest[link]
        if np.array_equal(before, cluster):
            return np.unique(cluster, return_inverse=True)[1]


def held_out(digests: np.ndarray, groups: np.ndarray, fraction: float) -> np.ndarray:
    """Indices of the held-out images, sorted int64; uint64 [N] digests of content and group.

    Whole clusters are taken in the order of their hash until `fraction` of the images (at most
    1,000) is reached, so a group or a set of exact duplicates is never divided, and images added
    later move few others. If all clusters are larger than that, the smallest is taken unless it is
    more than a fifth. Below 20 images nothing is held out.
    """
    count = len(digests)
    target = min(round(fraction * count), MAX_HELD_OUT) if count >= MIN_IMAGES else 0
    if target == 0:
        return np.zeros(0, dtype=np.int64)
    cluster = _clusters(digests, groups)
    sizes = np.bincount(cluster)
    lowest = np.full(len(sizes), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(lowest, cluster, groups)
    chosen = np.zeros(len(sizes), dtype=bool)
    # The least of several hashes is small; the product spreads it evenly again.
    for index in np.argsort(lowest * _SPREAD, kind="stable"):
        if sizes[index] <= target:
            chosen[index] = True
            target -= sizes[index]
        if target == 0:
            break
    if not chosen.any() and sizes.min() <= min(count // 5, MAX_HELD_OUT):
        chosen[np.argmin(sizes)] = True
    return np.flatnonzero(chosen[cluster])


def division(
    digests: np.ndarray, groups: np.ndarray, fraction: float, held_by_source: Sequence[bool | None]
) -> tuple[np.ndarray, int]:
    """Indices of held-out images: those held out by the source, else those of `held_out`.

    Images of the source's that repeat a training image or share its group are trained on instead,
    and counted, as a group or a set of exact duplicates is never divided. With a fraction of 0 no
    image is held out.
    """
    marked = np.array([bool(held) for held in held_by_source])
    if fraction == 0 or not marked.any() or marked.all():
        return held_out(digests, groups, fraction), 0
    cluster = _clusters(digests, groups)
    trained = np.zeros(cluster.max() + 1, dtype=bool)
    trained[cluster[~marked]] = True
    held = marked & ~trained[cluster]
    return np.flatnonzero(held), int(marked.sum() - held.sum())
