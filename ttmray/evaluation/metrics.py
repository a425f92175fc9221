"""Metrics of a set of clips, from embeddings alone: KAD, diversity, near-duplicates, leaks.

The Fréchet distances are in `ttmray.evaluation.fad`. Everything is float64 and says with how many clips, under which
protocol (model, crop, level: see `ttmray.models.protocol`) and with what uncertainty it was measured.

Intervals come from half-samples: the metric of random halves of the generated clips, drawn without replacement. A
half-sample mean scatters about the mean of all n clips with variance s^2/n, as a bootstrap mean does, but no clip
occurs twice; repeated clips look like a collapsed generator to FAD, KAD and diversity and push all of a bootstrap's
values to one side (Politis & Romano 1994, Ann. Statist. 22; Praestgaard & Wellner 1993, Ann. Probab. 21). The
reference set is held fixed, so an interval is about other clips from the same generator, not other references.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy import stats

from ttmray.errors import UserError
from ttmray.statistics import vendi_score

RESAMPLES = 500
CHUNK = 8192
"""Rows at a time: 32 MB of 512 dimensions in float64."""
KAD_SCALE = 100.0
"""The KAD toolkit prints 100 times the squared MMD, and so do we."""
KERNEL_ROWS = 1024
"""Rows of either side at a time: a block of KAD's kernel is 8 MB in float64."""
BANDWIDTH_ROWS = 2048
VENDI_RESAMPLES = 100
"""A singular value decomposition each."""
NEAR_DUPLICATE = 0.95
"""Cosine from which two clips count as the same. No standard exists: calibrate it on distinct training tracks."""


_CORPUS_PREFIX = re.compile(r"(?:jamendo[_-]\d\d[_-]|sdd[_-]|track_0*)(?=.)")
_EXCERPT = re.compile(r"(?:[.-](?:2min|low)|[_-]instrumental)(?:-[0-9a-f]{8}|-[0-9a-f]{16})?$")
"""What a copy of a track is called after its id; the hash is that of `track_ids` for names that are no safe ids."""


@dataclass(frozen=True)
class Metric:
    """One number of a table, with what a reader needs in order to trust it.

    Attributes:
        n_generated, n_reference: clips on either side; n_reference is 0 where there is no other side.
        dimension: of the embeddings.
        protocol: what made the embeddings.
        low, high: interval at `confidence`; None where there are too few clips for one.
        warnings: sentences for people, to be shown beside the value.
        details: further numbers, such as the bandwidth or the quality of a fit.
        interval: how `low` and `high` were made and what they are over, for people.
    """

    name: str
    value: float
    n_generated: int
    n_reference: int
    dimension: int
    protocol: str
    low: float | None
    high: float | None
    confidence: float
    warnings: tuple[str, ...] = ()
    details: Mapping[str, float] = field(default_factory=dict)
    interval: str = "half-samples of clips"


@dataclass(frozen=True)
class Leaks:
    """What a reference set shares with the training split.

    Attributes:
        by_id: `canonical_id` of tracks on both sides, sorted.
        by_embedding: (reference id, training id, cosine) of each reference clip whose nearest training clip is at
            the threshold or above, most similar first.
        ids_alike: whether any reference id has the form of a training id (digits, letters, signs). Where none has,
            that no id is on both sides says nothing.
    """

    by_id: tuple[str, ...]
    by_embedding: tuple[tuple[str, str, float], ...]
    ids_alike: bool = True


def checked(array: np.ndarray, what: str, at_least: int = 1, dimension: int | None = None) -> np.ndarray:
    """(n, d) embeddings as float64.

    Args:
        what: names the array in messages, e.g. "generated clips".
        dimension: what d must be.

    Raises:
        UserError: not two-dimensional, no numbers, too few rows, another dimension, NaN or infinity.
    """
    array = np.asarray(array)
    if array.ndim != 2 or array.shape[1] == 0 or array.dtype.kind not in "fiu":
        raise UserError(f"{what}: embeddings must be numbers of shape (n, d), not {array.dtype} {array.shape}.")
    if len(array) < at_least:
        raise UserError(f"{what}: {len(array)} embeddings, but at least {at_least} are needed.", "Add clips.")
    if dimension is not None and array.shape[1] != dimension:
        raise UserError(
            f"{what}: {array.shape[1]} dimensions, but the other side has {dimension}.",
            "Embed both sides with the same model.",
        )
    array = array.astype(np.float64, copy=False)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise UserError(
            f"{what}: {len(bad)} of {len(array)} embeddings hold NaN or infinity, first in row {bad[0]}.",
            "Look for silent or damaged audio and leave it out.",
        )
    return array


def half_samples(metric: Callable[[np.ndarray], float], n: int, resamples: int, seed: int) -> np.ndarray:
    """(resamples,) float64, `metric(rows)` of random halves of n clips; (0,) where a half would be less than two."""
    return np.array([metric(rows) for rows in _halves(n, resamples, seed)])


def half_interval(value: float, halves: np.ndarray, n: int, confidence: float) -> tuple[float | None, float | None]:
    """Interval about `value`, the metric of all n clips, from its `halves` (resamples,) of `half_samples`.

    Their mean is taken off, so that the bias of a small sample (which is larger in a half) does not
    enter. For degenerate statistics, such as KAD between equal distributions, the interval is too wide by up to
    sqrt(3), never too narrow.
    """
    _check_confidence(confidence)
    if len(halves) == 0:
        return None, None
    k = n // 2
    deviations = (halves - halves.mean()) * np.sqrt(k / (n - k))
    low, high = np.quantile(deviations, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(value - high), float(value - low)


class KadReference:
    """Reference clips of KAD, with what does not depend on the generated ones: made once for many systems.

    Args:
        reference: (m, d).

    Raises:
        UserError: bad embeddings.
    """

    def __init__(self, reference: np.ndarray) -> None:
        y = checked(reference, "reference clips", 2)
        self.center = y.mean(axis=0)  # squared distances by norms lose digits far from the origin
        self.rows = y - self.center
        self._sums: dict[float, float] = {}

    @cached_property
    def bandwidth(self) -> float:
        """Median distance between the clips."""
        return _median_distance(self.rows)

    def kernel_sum(self, bandwidth: float) -> float:
        """Sum of the kernel over all m * m pairs, once for each bandwidth."""
        if bandwidth not in self._sums:
            blocks = _kernel_blocks(self.rows, self.rows, bandwidth)
            self._sums[bandwidth] = sum(float(block.sum()) for _, _, block in blocks)
        return self._sums[bandwidth]


def kad(
    generated: np.ndarray,
    reference: np.ndarray | KadReference,
    *,
    protocol: str,
    bandwidth: float | None = None,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Metric:
    """Kernel Audio Distance: 100 x unbiased squared MMD with a Gaussian kernel (Chung et al. 2025, arXiv:2502.15602).

    Equal distributions give 0 on average at any N, so small negative values are right.

    Args:
        generated: (n, d).
        reference: (m, d), or what several systems share of it.
        bandwidth: of the kernel exp(-|x - y|^2 / (2 bandwidth^2)); None takes the median distance between reference
            clips (Gretton et al. 2012, JMLR 13), of at most 2,048 of them, so that it depends on nothing else.

    Raises:
        UserError: bad embeddings, or no positive bandwidth because reference clips are all the same.
    """
    x = checked(generated, "generated clips", 2)
    if not isinstance(reference, KadReference):
        reference = KadReference(reference)
    y = checked(reference.rows, "reference clips", 2, x.shape[1])
    x = x - reference.center
    if bandwidth is None:
        bandwidth = reference.bandwidth
    if not (np.isfinite(bandwidth) and bandwidth > 0):
        raise UserError(f"The kernel's bandwidth is {bandwidth:g}: most reference clips have the same embedding.")
    n, m = len(x), len(y)
    sets = np.ones((1, n))
    if halves := list(_halves(n, resamples, seed)):
        chosen = np.zeros((len(halves), n))
        np.put_along_axis(chosen, np.stack(halves), 1.0, axis=1)
        sets = np.concatenate([sets, chosen])
    within, nearness = np.zeros(len(sets)), np.zeros(n)
    for rows, columns, block in _kernel_blocks(x, x, bandwidth):
        within += ((sets[:, rows] @ block) * sets[:, columns]).sum(axis=1)
    for rows, _, block in _kernel_blocks(x, y, bandwidth):
        nearness[rows] += block.sum(axis=1) / m
    across, inside_reference = sets @ nearness, reference.kernel_sum(bandwidth)
    size = sets.sum(axis=1)  # k(x, x) = 1 for each
    values = (within - size) / (size * (size - 1)) - 2 * across / size + (inside_reference - m) / (m * (m - 1))
    values *= KAD_SCALE
    value = float(values[0])
    low, high = half_interval(value, values[1:], n, confidence)
    return Metric("kad", value, n, m, x.shape[1], protocol, low, high, confidence, details={"bandwidth": bandwidth})


def diversity(
    generated: np.ndarray,
    *,
    protocol: str,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Metric:
    """Mean cosine distance (1 - cosine) over all pairs of different clips, in [0, 2]; 0 when all are the same.

    Args:
        generated: (n, d).

    Raises:
        UserError: bad embeddings, fewer than two, or a zero vector.
    """
    x = _unit(checked(generated, "generated clips", 2), "generated clips")

    def mean_distance(rows: np.ndarray) -> float:  # pairs' cosines sum to |sum of unit vectors|^2 - n
        k = len(rows)
        total = x[rows].sum(axis=0)
        return float(1 - (total @ total - k) / (k * (k - 1)))

    n = len(x)
    value = mean_distance(np.arange(n))
    low, high = half_interval(value, half_samples(mean_distance, n, resamples, seed), n, confidence)
    return Metric("diversity", value, n, 0, x.shape[1], protocol, low, high, confidence)


def vendi(
    generated: np.ndarray,
    *,
    protocol: str,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Metric:
    """Vendi score (Friedman & Dieng 2023, TMLR): how many different clips there are in effect, from 1 to n.

    It grows with n, so only sets of equal size can be compared. Half-samples are taken on a logarithmic scale, because
    what scatters is its share, and at most `VENDI_RESAMPLES` of them.

    Args:
        generated: (n, d).

    Raises:
        UserError: bad embeddings, fewer than two, or a zero vector.
    """
    x = _unit(checked(generated, "generated clips", 2), "generated clips")
    n, value = len(x), vendi_score(x)
    halves = half_samples(lambda rows: vendi_score(x[rows]), n, min(resamples, VENDI_RESAMPLES), seed)
    low, high = half_interval(float(np.log(value)), np.log(halves), n, confidence)
    ends = (None if low is None else float(np.exp(low)), None if high is None else float(np.exp(high)))
    return Metric("vendi", value, n, 0, x.shape[1], protocol, *ends, confidence)


def cosine_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) 1 - cosine of row i of (n, d) with row i of (n, d).

    Raises:
        UserError: bad embeddings, other shapes, or a zero vector.
    """
    x = _unit(checked(a, "clips"), "clips")
    y = _unit(checked(b, "clips of the parent", len(x), x.shape[1]), "clips of the parent")
    return np.asarray(1 - (x * y).sum(axis=1))


def nearest(queries: np.ndarray, corpus: np.ndarray | Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray, int]:
    """Cosine to the most similar row of `corpus` and its index, both (n,), for each of n queries; rows of `corpus`.

    Args:
        corpus: (m, d), which may be memory-mapped, or such arrays one after the other; rows count through. Only
            `CHUNK` rows at a time are in float64.

    Raises:
        UserError: bad embeddings, zero vectors, or nothing in `corpus`.
    """
    q = _unit(checked(queries, "clips"), "clips")
    best, index, start = np.full(len(q), -np.inf), np.zeros(len(q), dtype=np.int64), 0
    for array in [corpus] if isinstance(corpus, np.ndarray) else corpus:
        for rows in _slices(len(array), CHUNK):
            what = f"corpus rows from {start}"
            part = _unit(checked(array[rows], what, dimension=q.shape[1]), what)
            cosines = q @ part.T
            top = cosines.argmax(axis=1)
            value = np.take_along_axis(cosines, top[:, None], axis=1)[:, 0]
            index = np.where(value > best, start + top, index)
            best = np.maximum(value, best)
            start += len(part)
    if start == 0:
        raise UserError("The corpus to search for near-duplicates is empty.", "Give its embeddings.")
    return best, index, start


def near_duplicate_rate(
    generated: np.ndarray,
    training: np.ndarray | Iterable[np.ndarray],
    *,
    protocol: str,
    threshold: float = NEAR_DUPLICATE,
    confidence: float = 0.95,
    training_clips: int | None = None,
) -> Metric:
    """Share of generated clips whose nearest training clip has a cosine of `threshold` or above.

    The interval is Wilson's (1927), which is sound at a rate of 0.

    Args:
        generated: (n, d).
        training: (m, d), or such arrays one after the other.
        training_clips: n_reference, where a clip has several rows, such as its mix and its instrumental; None counts
            the rows.
    """
    _check_threshold(threshold)
    _check_confidence(confidence)
    cosine, _, seen = nearest(generated, training)
    n, copies = len(cosine), int((cosine >= threshold).sum())
    interval = stats.binomtest(copies, n).proportion_ci(confidence, method="wilson")
    details = {"threshold": threshold, "copies": float(copies), "max_cosine": float(cosine.max())}
    dimension = np.shape(generated)[1]
    low, high = float(interval.low), float(interval.high)
    m = seen if training_clips is None else training_clips
    how = "Wilson's over clips"
    name, value = "near_duplicate_rate", copies / n
    return Metric(name, value, n, m, dimension, protocol, low, high, confidence, details=details, interval=how)


def find_leaks(
    reference_ids: Sequence[str],
    training_ids: Sequence[str],
    reference: np.ndarray,
    training: np.ndarray | Iterable[np.ndarray],
    threshold: float = NEAR_DUPLICATE,
) -> Leaks:
    """Tracks of a reference set that are in the training split, by their ids and by their sound.

    Args:
        reference_ids, training_ids: track id of each row; several clips may share one.
        reference, training: embeddings (n, d) and (m, d), the latter also in parts; see `nearest`.

    Raises:
        UserError: bad embeddings, or other numbers of ids than of rows.
    """
    _check_threshold(threshold)
    x = checked(reference, "reference clips")
    if len(x) != len(reference_ids):
        raise UserError(f"{len(reference_ids)} reference ids, but {len(x)} embeddings.")
    cosine, index, rows = nearest(x, training)
    if rows != len(training_ids):
        raise UserError(f"{len(training_ids)} training ids, but {rows} embeddings.")
    hits = np.flatnonzero(cosine >= threshold).tolist()
    near = [(reference_ids[i], training_ids[int(index[i])], float(cosine[i])) for i in hits]
    ours, theirs = set(map(canonical_id, reference_ids)), set(map(canonical_id, training_ids))
    alike = not {_form(one) for one in ours}.isdisjoint(_form(one) for one in theirs)
    return Leaks(tuple(sorted(ours & theirs)), tuple(sorted(near, key=lambda pair: -pair[2])), alike)


def canonical_id(track_id: str) -> str:
    """The id of a track as MTG-Jamendo has it, from its names in data sets that were made of it.

    `1004034-2min-0f3a2b1c` (the id of the file `1004034.2min.mp3`), `sdd_1004034.2min`, `jamendo_34_1004034`,
    `track_1004034` and `1004034_instrumental` are all `1004034`; other ids stay as they are.
    """
    prefix = _CORPUS_PREFIX.match(track_id)
    return _EXCERPT.sub("", track_id[prefix.end() :] if prefix else track_id)


def _form(name: str) -> frozenset[str]:
    return frozenset("0" if c.isdigit() else "a" if c.isalpha() else c for c in name)


def _halves(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for _ in range(resamples if n >= 4 else 0):
        yield rng.permutation(n)[: n // 2]


def _slices(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2 * (a @ b.T)
    return np.maximum(squares, 0, out=squares)


def _kernel_blocks(a: np.ndarray, b: np.ndarray, bandwidth: float) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Rows of a, rows of b, and the kernel between them, until all pairs are done."""
    for rows in _slices(len(a), KERNEL_ROWS):
        for columns in _slices(len(b), KERNEL_ROWS):
            yield rows, columns, np.exp(_squared_distances(a[rows], b[columns]) / (-2 * bandwidth**2))


def _median_distance(y: np.ndarray) -> float:
    if len(y) > BANDWIDTH_ROWS:
        y = y[np.random.default_rng(0).choice(len(y), BANDWIDTH_ROWS, replace=False)]
    return float(np.sqrt(np.median(_squared_distances(y, y)[np.triu_indices(len(y), 1)])))


def _unit(array: np.ndarray, what: str) -> np.ndarray:
    norm = np.linalg.norm(array, axis=1, keepdims=True)
    if not norm.all():
        raise UserError(
            f"{what}: row {int(norm.argmin())} is a zero vector, which has no cosine.",
            "Look for silent or damaged audio and leave it out.",
        )
    return array / norm


def _check_threshold(threshold: float) -> None:
    if not -1 <= threshold <= 1:
        raise UserError(f"threshold must be a cosine in [-1, 1], not {threshold}.")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise UserError(f"confidence must lie between 0 and 1, not {confidence}.")
