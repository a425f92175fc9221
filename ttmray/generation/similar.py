"""The most similar other clip of every clip of a pool."""

import math
from collections.abc import Mapping

import numpy as np

BLOCK = 1024
"""Rows of one product of matrices."""
COMPARED = 20_000
"""Of more clips than this not every pair is compared."""
NEAR = 16
"""Groups in which a clip of a larger pool is looked for."""


def most_similar(vectors: Mapping[str, np.ndarray]) -> dict[str, tuple[float, str]]:
    """Highest cosine of every vector (d,) with another one, and the key of that one; empty for fewer than two.

    Cosines are rounded to 6 digits, and of equal ones the first key in order wins: sums of another library or number of
    threads would otherwise show in the index.

    All pairs of n vectors are n squared products. Of more than `COMPARED` vectors each is therefore compared with those
    of its `NEAR` nearest groups out of the square root of n: copies are found as before, and of clips that resemble
    nothing much the second nearest may be named.
    """
    keys = sorted(vectors)
    if len(keys) < 2:
        return {}
    matrix = np.stack([vectors[key] for key in keys]).astype(np.float32)
    cosine, other = _all_pairs(matrix) if len(keys) <= COMPARED else _near_pairs(matrix)
    return {key: (float(cosine[i]), keys[other[i]]) for i, key in enumerate(keys)}


def _unit(matrix: np.ndarray) -> np.ndarray:
    """Rows (n, d) as float64 of length 1."""
    rows = matrix.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _all_pairs(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine (n,) and position (n,) of the row that is nearest to each of n rows."""
    cosine, other = np.full(len(matrix), -2.0), np.full(len(matrix), -1)
    _compare(matrix, np.arange(len(matrix)), np.arange(len(matrix)), cosine, other)
    return cosine, other


def _compare(matrix: np.ndarray, rows: np.ndarray, group: np.ndarray, cosine: np.ndarray, other: np.ndarray) -> None:
    """Compare some rows with those of a group, and note in `cosine` and `other` what is nearer than what is there.

    Args:
        rows, group: positions, (n,) and (m,), the latter ascending; a row is not compared with itself.
    """
    units = _unit(matrix[group])
    for start in range(0, len(rows), BLOCK):  # a product of matrices is many times faster than one for each vector
        part = rows[start : start + BLOCK]
        cosines = np.round(_unit(matrix[part]) @ units.T, 6)
        cosines[part[:, None] == group] = -2.0
        which = cosines.argmax(axis=1)
        best, which = cosines[np.arange(len(part)), which], group[which]
        better = (best > cosine[part]) | ((best == cosine[part]) & (which < other[part]))
        cosine[part] = np.where(better, best, cosine[part])
        other[part] = np.where(better, which, other[part])


def _near_pairs(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `_all_pairs`, but among the rows of near groups. A row is in the group of the centre that it is nearest to;
    centres are rows, evenly spread over all."""
    count = math.isqrt(len(matrix))
    centres = _unit(matrix[np.arange(count) * len(matrix) // count])
    near = np.empty((len(matrix), min(NEAR, count)), np.int64)
    for start in range(0, len(matrix), BLOCK):
        cosines = np.round(_unit(matrix[start : start + BLOCK]) @ centres.T, 6)
        near[start : start + BLOCK] = np.argsort(-cosines, axis=1, kind="stable")[:, : near.shape[1]]
    members = np.argsort(near[:, 0], kind="stable")
    ends = np.cumsum(np.bincount(near[:, 0], minlength=count))
    groups = np.split(members, ends[:-1])
    cosine, other = np.full(len(matrix), -2.0), np.full(len(matrix), -1)
    for column in near.T:
        asking = np.argsort(column, kind="stable")
        askers = np.split(asking, np.cumsum(np.bincount(column, minlength=count))[:-1])
        for rows, group in zip(askers, groups, strict=True):
            if len(rows) and len(group):
                _compare(matrix, rows, group, cosine, other)
    # whose groups hold nobody else
    _compare(matrix, np.flatnonzero(other < 0), np.arange(len(matrix)), cosine, other)
    return cosine, other
