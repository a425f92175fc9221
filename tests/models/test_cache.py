"""The embedding cache: same numbers with and without, whatever happens to its files."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttmray.errors import UserError
from ttmray.models.cache import EmbeddingCache, audio_key

MB = 1_000_000


def embedding(seed: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def key(seed: int) -> str:
    return audio_key(embedding(seed), 48_000, "protocol", "model")


class Encoder:
    """Makes `embedding(seed)` and remembers which positions it was asked for."""

    def __init__(self, seeds: list[int], size: int = 16) -> None:
        self.seeds, self.size, self.asked = seeds, size, []

    def __call__(self, positions: list[int]) -> list[np.ndarray]:
        self.asked.append(positions)
        return [embedding(self.seeds[i], self.size) for i in positions]


def never(positions: list[int]) -> list[np.ndarray]:
    raise AssertionError(f"asked for {positions}")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_everything_that_decides_an_embedding_is_in_its_key():
    wave = embedding(0)
    keys = [
        audio_key(wave, 48_000, "protocol", "model"),
        audio_key(np.nextafter(wave, np.float32(9)), 48_000, "protocol", "model"),
        audio_key(wave.reshape(2, 8), 48_000, "protocol", "model"),
        audio_key(wave, 24_000, "protocol", "model"),
        audio_key(wave, 48_000, "other", "model"),
        audio_key(wave, 48_000, "protocol", "other"),
        audio_key(wave, 48_000, "protocolmodel", ""),
    ]
    assert len(set(keys)) == len(keys)
    assert audio_key(np.repeat(wave, 2)[::2], 48_000, "protocol", "model") == keys[0]


def test_a_key_of_double_precision_audio_is_refused():
    with pytest.raises(ValueError, match="float32"):
        audio_key(np.zeros(4), 48_000, "protocol", "model")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=5), st.sampled_from([400, 2_000, MB]))
def test_results_are_identical_with_and_without_the_cache(tmp_path_factory, calls, max_bytes):
    cache = EmbeddingCache(tmp_path_factory.mktemp("cache"), max_bytes)
    for seeds in calls:
        got = cache.get_or_make([key(s) for s in seeds], Encoder(seeds))
        assert [g.tobytes() for g in got] == [embedding(s).tobytes() for s in seeds]


def test_only_misses_are_made_in_one_call_and_in_order(tmp_path):
    EmbeddingCache(tmp_path, MB).get_or_make([key(1), key(3)], Encoder([1, 3]))
    encoder = Encoder([4, 1, 0, 3, 4, 2, 9, 8, 7, 6])
    got = EmbeddingCache(tmp_path, MB).get_or_make([key(s) for s in encoder.seeds], encoder)
    assert encoder.asked == [[0, 2, 5, 6, 7, 8, 9]]
    np.testing.assert_array_equal(got, [embedding(s) for s in encoder.seeds])


def test_hits_call_nothing_and_can_be_changed_freely(tmp_path):
    cache = EmbeddingCache(tmp_path, MB)
    cache.get_or_make([key(1)], Encoder([1]))[0][:] = 0
    first, second = cache.get_or_make([key(1), key(1)], never)
    first[:] = 0
    np.testing.assert_array_equal(second, embedding(1))


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 3, 4)])
def test_arrays_of_any_shape_come_back_with_it(tmp_path, shape):
    cache = EmbeddingCache(tmp_path, MB)
    value = np.full(shape, 1 / 3, np.float32, order="F")
    cache.get_or_make([key(0)], lambda _: [value])
    (back,) = cache.get_or_make([key(0)], never)
    assert back.shape == shape
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, value)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip_a_bit(data: bytes) -> bytes:
    return data[:150] + bytes([data[150] ^ 1]) + data[151:]


@pytest.mark.parametrize("damage", [cut, flip_a_bit, lambda data: b"", lambda data: data + b"\0"])
def test_damaged_entries_are_made_again_and_replaced(tmp_path, damage: Callable[[bytes], bytes]):
    cache = EmbeddingCache(tmp_path, MB)
    cache.get_or_make([key(1)], Encoder([1]))
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    encoder = Encoder([1])
    np.testing.assert_array_equal(cache.get_or_make([key(1)], encoder), [embedding(1)])
    assert encoder.asked == [[0]]
    assert path.read_bytes() == whole


def test_an_entry_under_another_ones_name_is_not_believed(tmp_path):
    cache = EmbeddingCache(tmp_path, MB)
    cache.get_or_make([key(1), key(2)], Encoder([1, 2]))
    first = next(path for path in files(tmp_path) if path.stem == key(1))
    second = next(path for path in files(tmp_path) if path.stem == key(2))
    second.write_bytes(first.read_bytes())
    np.testing.assert_array_equal(cache.get_or_make([key(2)], Encoder([2])), [embedding(2)])


def test_numpy_reads_the_files_without_pickle(tmp_path):
    EmbeddingCache(tmp_path, MB).get_or_make([key(1)], Encoder([1]))
    (path,) = files(tmp_path)
    assert path.parent.name == path.name[:2]
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), embedding(1))


def test_the_least_recently_used_entries_go_first(tmp_path):
    one = 4 * 1000 + 160  # bytes of an entry of 1000 numbers: header and check included
    cache = EmbeddingCache(tmp_path, 10 * one)
    for age, seed in enumerate(range(10)):
        cache.get_or_make([key(seed)], Encoder([seed], 1000))
        path = next(path for path in files(tmp_path) if path.stem == key(seed))
        os.utime(path, ns=(age, age))
    cache.get_or_make([key(0)], never)  # used now, though written first
    cache.get_or_make([key(10)], Encoder([10], 1000))
    left = {path.stem for path in files(tmp_path)}
    assert key(0) in left
    assert key(10) in left
    assert key(1) not in left
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 10 * one


def test_an_embedding_larger_than_the_bound_is_still_returned(tmp_path):
    got = EmbeddingCache(tmp_path, 100).get_or_make([key(1)], Encoder([1], 1000))
    np.testing.assert_array_equal(got, [embedding(1, 1000)])
    assert files(tmp_path) == []


def test_files_that_vanish_during_eviction_do_no_harm(tmp_path, monkeypatch):
    cache = EmbeddingCache(tmp_path, 1000)
    unlink = os.unlink

    def twice(path):
        unlink(path)
        unlink(path)

    monkeypatch.setattr(os, "unlink", twice)
    for seed in range(20):
        np.testing.assert_array_equal(cache.get_or_make([key(seed)], Encoder([seed])), [embedding(seed)])


def use_the_cache(folder: str, max_bytes: int, start: int, failures: multiprocessing.Queue) -> None:
    cache = EmbeddingCache(folder, max_bytes)
    for round_ in range(30):
        seeds = [(start + round_ + i) % 12 for i in range(4)]
        got = cache.get_or_make([key(s) for s in seeds], Encoder(seeds, 200))
        if any(g.tobytes() != embedding(s, 200).tobytes() for g, s in zip(got, seeds, strict=True)):
            failures.put((start, round_))


@pytest.mark.parametrize("max_bytes", [5_000, MB])
def test_concurrent_processes_always_get_the_right_numbers(tmp_path, max_bytes):
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    workers = [
        context.Process(target=use_the_cache, args=(str(tmp_path), max_bytes, start, failures)) for start in (0, 3, 6)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert failures.empty()
    total = sum(path.stat().st_size for path in files(tmp_path))
    assert total <= max_bytes * (1 + 3 / 16)
    if max_bytes == MB:
        EmbeddingCache(tmp_path, max_bytes).get_or_make([key(s) for s in range(12)], never)


def test_what_is_not_a_key_never_becomes_a_path(tmp_path):
    cache = EmbeddingCache(tmp_path / "cache", MB)
    for name in ("../../etc/passwd", "", key(0).upper(), key(0) + "0"):
        with pytest.raises(ValueError, match="key"):
            cache.get_or_make([name], never)


def test_embeddings_of_another_type_are_refused_and_not_kept(tmp_path):
    cache = EmbeddingCache(tmp_path, MB)
    with pytest.raises(ValueError, match="float32"):
        cache.get_or_make([key(0)], lambda _: [np.zeros(3)])
    assert files(tmp_path) == []


def test_an_object_store_is_refused():
    with pytest.raises(UserError, match="local folder"):
        EmbeddingCache("s3://bucket/cache", MB)
