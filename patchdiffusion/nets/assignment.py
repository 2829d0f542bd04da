"""The assignment problem: one column for each row at the least total cost."""

import numpy as np


def assign(cost: np.ndarray) -> np.ndarray:
    """Columns int64 [N] of the rows of a cost matrix [N, N], of least total cost.

    The Hungarian method by shortest augmenting paths with potentials (Jonker & Volgenant, 1987):
    O(N^3). Raises `ValueError` for a matrix that is not square or not finite.
    """
    cost = np.asarray(cost, dtype=np.float64)
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or not np.isfinite(cost).all():
        raise ValueError(f"costs must be a square matrix of finite numbers, not {cost.shape}")
    n = len(cost)
    rows, columns = np.zeros(n), np.zeros(n)  # potentials: cost - rows - columns >= 0
    owner = np.full(n, -1)  # row of each column
    for row in range(n):
        _augment(cost, row, owner, rows, columns)
    result = np.empty(n, dtype=np.int64)
    result[owner] = np.arange(n)
    return result


def _augment(
    cost: np.ndarray, row: int, owner: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> None:
    """Give one more row a column: the end of the shortest path over reduced costs (Dijkstra)."""
    n = len(cost)
    distance, before = np.full(n, np.inf), np.full(n, -1)  # to columns, and the column before
    done = np.zeros(n, dtype=bool)
    current, column, length = row, -1, 0.0
    while True:
        reduced = length + cost[current] - rows[current] - columns
        nearer = ~done & (reduced < distance)
        distance[nearer], before[nearer] = reduced[nearer], column
        column = int(np.where(done, np.inf, distance).argmin())
        length, done[column] = distance[column], True
        if owner[column] < 0:
            break
        current = owner[column]
    inner = np.flatnonzero(done & (owner >= 0))
    rows[row] += length
    rows[owner[inner]] += length - distance[inner]
    columns[inner] -= length - distance[inner]
    while column >= 0:  # shift the rows along the path
        previous = before[column]
        owner[column] = row if previous < 0 else owner[previous]
        column = previous
