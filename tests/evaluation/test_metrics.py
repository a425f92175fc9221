"""Metrics against closed forms, published numbers and simulations, and what bad embeddings get."""

import tracemalloc
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from scipy import linalg

from ttmray.errors import UserError
from ttmray.evaluation import metrics
from ttmray.evaluation.fad import Gaussian, _Samples, fad, fad_inf, frechet, half_distances, merge
from ttmray.evaluation.metrics import (
    KadReference,
    Metric,
    canonical_id,
    diversity,
    find_leaks,
    kad,
    near_duplicate_rate,
    nearest,
)

P = "clap-center-int16"


def rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    """(n, d) with unequal variances and a mean."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) * np.linspace(1, 0.2, d) + 0.3


def rotation(d: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def textbook(x: np.ndarray, y: np.ndarray) -> float:
    """FAD as most packages write it."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    shift = x.mean(axis=0) - y.mean(axis=0)
    return float(shift @ shift + np.trace(a) + np.trace(b) - 2 * np.trace(linalg.sqrtm(a @ b)).real)


def test_fad_of_the_golden_sets() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 8))
    y = 1.3 * rng.normal(size=(50, 8)) + 0.2
    assert fad(x, y, protocol=P, resamples=0).value == pytest.approx(1.5341706331, abs=1e-10)
    assert frechet(Gaussian.of(x, P), Gaussian.of(y, P)) == pytest.approx(1.5341706331, abs=1e-10)


def test_fad_equals_the_closed_form_of_commuting_covariances() -> None:
    rng = np.random.default_rng(1)
    axes = rotation(12)
    s, t = rng.uniform(0.1, 2, 12), rng.uniform(0.1, 2, 12)
    m, k = rng.normal(size=(2, 12))
    a = Gaussian(100, m, axes @ np.diag(s**2) @ axes.T, P)
    b = Gaussian(100, k, axes @ np.diag(t**2) @ axes.T, P)
    assert frechet(a, b) == pytest.approx(((m - k) ** 2).sum() + ((s - t) ** 2).sum(), rel=1e-12)


def test_fad_equals_the_closed_form_of_two_dimensions() -> None:
    """tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)) for 2 x 2 matrices that do not commute."""
    a = Gaussian(9, np.zeros(2), np.array([[2.0, 0.7], [0.7, 1.0]]), P)
    b = Gaussian(9, np.array([1.0, -2.0]), np.array([[0.5, -0.4], [-0.4, 3.0]]), P)
    product = a.cov @ b.cov
    cross = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    assert frechet(a, b) == pytest.approx(5 + 3 + 3.5 - 2 * cross, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(300, 200), (20, 200), (300, 25), (20, 25), (40, 41)])
def test_fad_equals_the_textbook_form_with_few_and_many_clips(n: int, m: int) -> None:
    x, y = rows(n, 40, 1), rows(m, 40, 2) @ rotation(40) * 1.2
    expected = textbook(x, y)
    a, b = Gaussian.of(x, P), Gaussian.of(y, P)
    assert frechet(a, b) == pytest.approx(expected, abs=1e-6)  # the textbook loses digits where rank is missing
    assert frechet(b, a) == pytest.approx(frechet(a, b), abs=1e-7)
    assert fad(x, y, protocol=P, resamples=0).value == pytest.approx(frechet(a, b), abs=1e-7)
    assert fad(x, b, protocol=P, resamples=0).value == pytest.approx(frechet(a, b), abs=1e-7)


@pytest.mark.parametrize("n", [10, 100])
def test_fad_is_zero_for_equal_sets_and_blind_to_rotation_order_and_shift(n: int) -> None:
    x, y, turn = rows(n, 24, 1), rows(60, 24, 2) * 1.4, rotation(24)
    shuffled = np.random.default_rng(0).permutation(x)
    assert fad(x, shuffled, protocol=P, resamples=0).value == pytest.approx(0, abs=1e-6)
    value = fad(x, y, protocol=P, resamples=0).value
    assert value > 0.1
    assert fad(x @ turn + 5, y @ turn + 5, protocol=P, resamples=0).value == pytest.approx(value, rel=1e-7)
    assert fad(y, x, protocol=P, resamples=0).value == pytest.approx(value, rel=1e-7)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_statistics_of_shards_merge_to_those_of_the_whole(sizes: list[int], seed: int) -> None:
    x = rows(sum(sizes) + 1, 5, seed) * 100 + 1000
    shards = np.split(x, np.cumsum(sizes))
    merged = merge(Gaussian.of(shard, P) for shard in shards)
    assert merged.n == len(x)
    np.testing.assert_allclose(merged.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(merged.cov, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-7)


def test_statistics_come_in_chunks_of_float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x = rows(1000, 6).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr("ttmray.evaluation.fad.CHUNK", 64)
    got = Gaussian.of(np.load(tmp_path / "x.npy", mmap_mode="r"), P)
    np.testing.assert_allclose(got.cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-12, atol=1e-15)


def test_reference_statistics_survive_a_file(tmp_path: Path) -> None:
    made = Gaussian.of(rows(50, 6), "protocol – ü")
    made.save(str(tmp_path / "sets" / "reference.safetensors"))
    read = Gaussian.load(str(tmp_path / "sets" / "reference.safetensors"))
    assert (read.n, read.protocol) == (50, "protocol – ü")
    np.testing.assert_array_equal(read.mean, made.mean)
    np.testing.assert_array_equal(read.cov, made.cov)


@pytest.mark.parametrize(
    "damage",
    [
        {"cov": np.eye(5)},
        {"cov": np.full((6, 6), np.nan)},
        {"cov": np.diag([1.0, 1, 1, 1, 1, -1])},
        {"cov": np.triu(np.ones((6, 6)))},
        {"mean": np.zeros((6, 1))},
        {"mean": np.zeros(6, dtype=np.float32)},
        {"n": np.array([0])},
        {"n": np.array([1, 2])},
        {"protocol": np.array([255], dtype=np.uint8)},
        {"mean": None},
    ],
)
def test_damaged_reference_files_are_refused_by_name(tmp_path: Path, damage: dict[str, np.ndarray | None]) -> None:
    path = tmp_path / "reference.safetensors"
    Gaussian.of(rows(50, 6), P).save(str(path))
    tensors = {key: value for key, value in (load_file(path) | damage).items() if value is not None}
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"reference\.safetensors"):
        Gaussian.load(str(path))


def test_files_that_are_no_statistics_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    path.write_bytes(b"RIFF....WAVE")
    with pytest.raises(UserError, match=r"reference\.safetensors"):
        Gaussian.load(str(path))
    with pytest.raises(UserError, match="not found"):
        Gaussian.load(str(tmp_path / "absent.safetensors"))


def test_fad_inf_is_unbiased_where_fad_is_not() -> None:
    """8 dimensions, a known shift, 60 clips: the mean over 60 generators' sets against the truth."""
    d, n, runs = 8, 60, 60
    reference = Gaussian(1_000_000, np.zeros(d), np.eye(d), P)
    truth = frechet(Gaussian(1_000_000, np.full(d, 0.1), 1.21 * np.eye(d), P), reference)
    sets = [0.1 + 1.1 * np.random.default_rng(seed).normal(size=(n, d)) for seed in range(runs)]
    plain = np.array([fad(x, reference, protocol=P, resamples=0).value for x in sets])
    extrapolated = [fad_inf(x, reference, protocol=P, resamples=0, seed=i) for i, x in enumerate(sets)]
    values = np.array([result.value for result in extrapolated])
    assert plain.mean() - truth > 10 * plain.std() / np.sqrt(runs)
    assert abs(values.mean() - truth) < 3 * values.std() / np.sqrt(runs)
    assert values.std() < 2 * plain.std()
    assert np.mean([result.details["r2"] for result in extrapolated]) > 0.95
    first = extrapolated[0].details
    assert extrapolated[0].value + first["slope"] / n == pytest.approx(first["fad"], rel=0.05)


def test_half_samples_say_by_how_much_fad_is_too_high() -> None:
    d, n = 8, 200
    reference = Gaussian(1_000_000, np.zeros(d), np.eye(d), P)
    found = [
        fad(np.random.default_rng(seed).normal(size=(n, d)), reference, protocol=P, resamples=50) for seed in range(20)
    ]
    bias = np.mean([result.value for result in found])  # the truth is 0
    assert np.mean([result.details["bias"] for result in found]) == pytest.approx(bias, rel=0.15)


def test_fad_and_fad_inf_share_their_half_samples() -> None:
    x, y = rows(30, 6, 1), rows(50, 6, 2)
    alone = [metric(x, y, protocol=P, resamples=40, seed=3) for metric in (fad, fad_inf)]
    halves = half_distances(x, y, protocol=P, resamples=40, seed=3)
    assert len(halves) == 40
    shared = [metric(x, y, protocol=P, resamples=40, seed=3, halves=halves) for metric in (fad, fad_inf)]
    assert shared == alone
    wider = [metric(x, y, protocol=P, seed=3, halves=2 * halves) for metric in (fad, fad_inf)]
    for one, other in zip(wider, alone, strict=True):
        assert one.value == other.value
        assert one.high - one.low == pytest.approx(2 * (other.high - other.low))


def test_kad_of_one_distribution_is_zero_on_average() -> None:
    found = np.array(
        [kad(rows(40, 10, 2 * seed), rows(50, 10, 2 * seed + 1), protocol=P, resamples=0).value for seed in range(300)]
    )
    assert abs(found.mean()) < 3 * found.std() / np.sqrt(len(found))
    assert found.min() < 0


def test_kad_equals_its_definition_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rows(9, 4, 1) + 50, rows(7, 4, 2) + 50
    monkeypatch.setattr(metrics, "KERNEL_ROWS", 4)
    distances = [np.linalg.norm(y[i] - y[j]) for i in range(7) for j in range(i)]
    bandwidth = float(np.median(distances))

    def mean(a: np.ndarray, b: np.ndarray, same: bool) -> float:
        values = [
            np.exp(-((p - q) ** 2).sum() / (2 * bandwidth**2))
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not (same and i == j)
        ]
        return float(np.mean(values))

    expected = 100 * (mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False))
    got = kad(x, y, protocol=P)
    assert got.details["bandwidth"] == pytest.approx(bandwidth, rel=1e-12)
    assert got.value == pytest.approx(expected, rel=1e-10)
    assert kad(x, y, protocol=P, bandwidth=2 * bandwidth).value != pytest.approx(expected, rel=0.1)


def test_kad_of_a_large_reference_takes_little_memory() -> None:
    x, y = rows(20, 4, 1), rows(4000, 4, 2)
    tracemalloc.start()
    try:
        kad(x, y, protocol=P, bandwidth=1.0)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20  # all pairs of the reference are 122 MiB
    finally:
        tracemalloc.stop()


def test_systems_share_the_pairs_of_their_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, original = [], metrics._squared_distances

    def note(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        blocks.append((len(a), len(b)))
        return original(a, b)

    y, systems = rows(30, 6, 1), [rows(20, 6, seed) for seed in (2, 3)]
    alone = [kad(x, y, protocol=P, bandwidth=width) for x in systems for width in (None, 1.0)]
    monkeypatch.setattr(metrics, "_squared_distances", note)
    reference = KadReference(y)
    assert [kad(x, reference, protocol=P, bandwidth=width) for x in systems for width in (None, 1.0)] == alone
    assert blocks.count((30, 30)) == 3  # the median, and the sums of two bandwidths
    with pytest.raises(UserError, match="reference clips: 6 dimensions, but the other side has 5"):
        kad(rows(9, 5), reference, protocol=P)


def test_the_bandwidth_of_a_large_reference_is_repeatable() -> None:
    y = rows(metrics.BANDWIDTH_ROWS + 500, 6)
    found = {kad(rows(10, 6, seed), y, protocol=P, resamples=0).details["bandwidth"] for seed in range(3)}
    assert len(found) == 1
    assert found.pop() == pytest.approx(metrics._median_distance(y[: metrics.BANDWIDTH_ROWS]), rel=0.02)


def test_kad_grows_with_the_shift() -> None:
    y = rows(100, 10, 1)
    values = [kad(rows(60, 10, 2) + shift, y, protocol=P).value for shift in (0, 0.2, 0.5, 1)]
    assert values == sorted(values)
    assert values[-1] > 5 * values[1]


Draw = Callable[[np.random.Generator], np.ndarray]


@pytest.mark.parametrize(
    ("metric", "truth"),
    [
        (lambda x: fad_inf(x, REFERENCE, protocol=P, resamples=60), 3 * 0.5**2 + 5 * 0.0),
        (lambda x: fad(x, REFERENCE, protocol=P, resamples=100), None),
        (lambda x: kad(x, KAD_REFERENCE, protocol=P, resamples=100), None),
        (lambda x: diversity(x, protocol=P, resamples=100), None),
    ],
    ids=["fad_inf", "fad", "kad", "diversity"],
)
def test_intervals_cover_the_truth_about_as_often_as_they_say(
    metric: Callable[[np.ndarray], Metric], truth: float | None
) -> None:
    """150 sets of 50 clips. FAD-inf must cover the distance of the distributions, the others their own mean over
    sets of 50 (for the unbiased ones that is the truth as well)."""
    shift = np.array([0.5] * 3 + [0.0] * 5)
    found = [metric(shift + np.random.default_rng(seed).normal(size=(50, 8))) for seed in range(150)]
    aim = np.mean([result.value for result in found]) if truth is None else truth
    covered = np.mean([result.low <= aim <= result.high for result in found])  # type: ignore[operator]
    assert 0.88 <= covered <= 1.0
    widths = np.array([result.high - result.low for result in found])  # type: ignore[operator]
    assert widths.mean() < 2 * 4 * np.std([result.value for result in found])  # 95 % is about 4 standard errors


REFERENCE = Gaussian(1_000_000, np.zeros(8), np.eye(8), P)
KAD_REFERENCE = np.random.default_rng(99).normal(size=(200, 8))


def test_a_bootstrap_with_repeats_would_be_biased_and_half_samples_are_not() -> None:
    """Why intervals use half-samples: the diversity of clips drawn with replacement."""
    x = np.random.default_rng(0).normal(size=(40, 16))
    rng = np.random.default_rng(1)
    value = diversity(x, protocol=P).value
    repeated = np.mean([diversity(x[rng.integers(40, size=40)], protocol=P, resamples=0).value for _ in range(200)])
    half = np.mean([diversity(x[rng.permutation(40)[:20]], protocol=P, resamples=0).value for _ in range(200)])
    assert value - repeated == pytest.approx(value / 40, rel=0.2)
    assert abs(value - half) < value / 400


def test_results_carry_what_they_were_made_from_and_repeat_by_seed() -> None:
    x, y = rows(30, 6, 1), rows(50, 6, 2)
    for metric in (fad, fad_inf, kad):
        result = metric(x, y, protocol=P, seed=3)
        assert (result.name, result.n_generated, result.n_reference, result.dimension, result.protocol) == (
            metric.__name__,
            30,
            50,
            6,
            P,
        )
        assert result.low is not None
        assert result.high is not None
        assert result.low < result.value < result.high
        assert result == metric(x, y, protocol=P, seed=3)
        assert result.low != metric(x, y, protocol=P, seed=4).low
        assert result.warnings == ()
        with pytest.raises(FrozenInstanceError):
            result.value = 0.0  # type: ignore[misc]


def test_fewer_clips_than_dimensions_are_warned_about_with_the_bias() -> None:
    y = rows(80, 64, 1)
    result = fad(rows(30, 64, 2), y, protocol=P)
    assert len(result.warnings) == 1
    assert "30 generated clips are fewer than 64 dimensions" in result.warnings[0]
    assert f"{result.details['bias']:.3g} or more" in result.warnings[0]
    assert 0 < result.details["bias"] < result.value
    assert "only a part of the bias" in fad_inf(rows(30, 64, 2), y, protocol=P).warnings[0]
    assert "10 reference clips" in fad(rows(70, 64, 2), rows(10, 64, 3), protocol=P).warnings[0]


def test_three_clips_have_values_but_no_interval() -> None:
    for result in (fad(rows(3, 4), rows(9, 4, 1), protocol=P), kad(rows(3, 4), rows(9, 4, 1), protocol=P)):
        assert np.isfinite(result.value)
        assert (result.low, result.high) == (None, None)


def test_a_generator_that_repeats_one_clip_has_no_diversity_and_a_finite_fad() -> None:
    same = np.tile(rows(1, 5), (10, 1))
    assert diversity(same, protocol=P).value == pytest.approx(0, abs=1e-12)
    y = rows(50, 5, 1)
    shift = same[0] - y.mean(axis=0)
    expected = shift @ shift + np.trace(np.cov(y, rowvar=False))
    assert fad(same, y, protocol=P).value == pytest.approx(expected, rel=1e-6)
    assert frechet(Gaussian.of(same, P), Gaussian.of(y, P)) == pytest.approx(expected, rel=1e-6)
    assert _Samples(y, same, P).distance(np.arange(50)) == pytest.approx(expected, rel=1e-6)


def test_diversity_is_the_mean_over_pairs() -> None:
    x = rows(12, 5)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [1 - unit[i] @ unit[j] for i in range(12) for j in range(i)]
    assert diversity(x, protocol=P).value == pytest.approx(np.mean(pairs), rel=1e-12)


def test_the_nearest_training_clip_is_found_over_chunks_and_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK", 7)
    training, queries = rows(50, 6, 1).astype(np.float32), rows(9, 6, 2)
    unit, goal = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, training.astype(np.float64)))
    cosines = np.array([[q @ t for t in goal] for q in unit])
    for corpus in (training, np.array_split(training, 4), iter([training[:20], training[20:]])):
        cosine, index, n = nearest(queries, corpus)
        np.testing.assert_array_equal(index, cosines.argmax(axis=1))
        np.testing.assert_allclose(cosine, cosines.max(axis=1), rtol=1e-12)
        assert n == 50


def test_copies_of_training_clips_are_counted_whatever_their_length() -> None:
    training = rows(40, 32, 1) - 0.3
    generated = np.concatenate([training[[3, 8]] * 2, rows(18, 32, 2) - 0.3])
    result = near_duplicate_rate(generated, training, protocol=P, threshold=0.99)
    assert result.value == 0.1
    assert (result.n_generated, result.n_reference) == (20, 40)
    assert near_duplicate_rate(generated, training, protocol=P, training_clips=20).n_reference == 20
    assert result.details["copies"] == 2
    assert result.details["max_cosine"] == pytest.approx(1)
    assert (result.low, result.high) == pytest.approx((0.0278665, 0.3010336), abs=1e-6)  # Wilson for 2 of 20
    none = near_duplicate_rate(generated[2:], training, protocol=P, threshold=0.99)
    assert (none.value, none.low) == (0, 0)
    assert 0.1 < none.high < 0.25  # type: ignore[operator]


def test_leaks_are_found_by_id_and_by_sound() -> None:
    training, reference = rows(30, 32, 1) - 0.3, rows(6, 32, 2) - 0.3
    reference[4] = training[17] + 0.01 * reference[4]
    reference_ids = ["r0", "r1", "t5", "r3", "r4", "r5"]
    training_ids = [f"t{i // 2}" for i in range(30)]  # two clips of each track
    found = find_leaks(reference_ids, training_ids, reference, [training[:11], training[11:]])
    assert found.by_id == ("t5",)
    assert [pair[:2] for pair in found.by_embedding] == [("r4", "t8")]
    assert found.by_embedding[0][2] > 0.99
    with pytest.raises(UserError, match="29 training ids, but 30 embeddings"):
        find_leaks(reference_ids, training_ids[1:], reference, training)
    with pytest.raises(UserError, match="5 reference ids, but 6 embeddings"):
        find_leaks(reference_ids[1:], training_ids, reference, training)


def _bad(x: np.ndarray, row: int, value: float) -> np.ndarray:
    x = x.copy()
    x[row, 1] = value
    return x


@pytest.mark.parametrize("metric", [fad, kad])
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (rows(1, 5), rows(9, 5), "generated clips: 1 embeddings, but at least 2"),
        (rows(9, 5), rows(1, 5), "reference clips: 1 embeddings, but at least 2"),
        (rows(9, 5)[:0], rows(9, 5), "generated clips: 0 embeddings"),
        (_bad(rows(9, 5), 4, np.nan), rows(9, 5), "generated clips: 1 of 9 embeddings hold NaN.*row 4"),
        (rows(9, 5), _bad(rows(9, 5), 2, np.inf), "reference clips: 1 of 9 embeddings hold NaN.*row 2"),
        (rows(9, 5), rows(9, 6), "reference clips: 6 dimensions, but the other side has 5"),
        (rows(9, 5)[0], rows(9, 5), r"generated clips: .*shape \(n, d\)"),
        (np.array([["a", "b"]] * 3), rows(9, 5), "must be numbers"),
    ],
)
def test_bad_embeddings_are_named(metric: Callable[..., Metric], x: np.ndarray, y: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        metric(x, y, protocol=P)


def test_statistics_of_other_protocols_or_dimensions_are_not_mixed() -> None:
    a, other, wide = Gaussian.of(rows(9, 5), P), Gaussian.of(rows(9, 5), "mert"), Gaussian.of(rows(9, 6), P)
    for b in (other, wide):
        with pytest.raises(UserError, match="cannot be put together"):
            merge([a, b])
        with pytest.raises(UserError, match="cannot be put together"):
            frechet(a, b)
        with pytest.raises(UserError, match="The reference was made under"):
            fad(rows(9, 5), b, protocol=P)
    with pytest.raises(UserError, match="at least two"):
        frechet(a, Gaussian.of(rows(1, 5), P))
    with pytest.raises(UserError, match="at least two"):
        fad(rows(9, 5), Gaussian.of(rows(1, 5), P), protocol=P)
    with pytest.raises(UserError, match="no statistics"):
        merge([])
    with pytest.raises(UserError, match="at least 8"):
        fad_inf(rows(7, 5), a, protocol=P)
    with pytest.raises(UserError, match="NaN"):
        Gaussian.of(_bad(rows(9, 5), 1, np.nan), P)


def test_bad_settings_are_named() -> None:
    x = rows(9, 5)
    with pytest.raises(UserError, match="bandwidth is 0"):
        kad(x, np.tile(x[:1], (9, 1)), protocol=P)
    with pytest.raises(UserError, match="confidence"):
        fad(x, x, protocol=P, confidence=95)
    with pytest.raises(UserError, match="confidence"):
        near_duplicate_rate(x, x, protocol=P, confidence=95)
    with pytest.raises(UserError, match="threshold"):
        near_duplicate_rate(x, x, protocol=P, threshold=95)
    with pytest.raises(UserError, match=r"corpus .* near-duplicates is empty"):
        near_duplicate_rate(x, [], protocol=P)
    with pytest.raises(UserError, match="zero vector"):
        diversity(np.zeros((3, 5)), protocol=P)


@pytest.mark.parametrize(
    ("name", "track"),
    [
        ("1004034", "1004034"),
        ("1004034.2min", "1004034"),
        ("1004034-2min-0f3a2b1c", "1004034"),
        ("1004034-low-0f3a2b1c0f3a2b1c", "1004034"),
        ("sdd_1004034.2min", "1004034"),
        ("jamendo_34_1004034", "1004034"),
        ("track_0001004", "1004"),
        ("1004034_instrumental", "1004034"),
        ("track_", "track_"),
        ("my-song-2", "my-song-2"),
    ],
)
def test_names_of_one_jamendo_track_have_one_id(name, track):
    assert canonical_id(name) == track
