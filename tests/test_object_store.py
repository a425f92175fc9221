"""Object stores that are busy, broken, silent or sparse of words."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from s3fs import S3FileSystem
from s3fs.core import S3File
from unruly_store import Store, serving

from ttmray import object_store
from ttmray.corpus.headers import read_header
from ttmray.errors import UserError
from ttmray.storage import Folder


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with serving() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(object_store, "_answered", set())
        S3FileSystem.clear_instance_cache()
        yield server
        S3FileSystem.clear_instance_cache()


FOLDER = Folder("s3://b/run")


def test_what_passes_by_itself_is_tried_again_where_the_clients_give_up(store: Store) -> None:
    store.answers = [503, 500, 429, 503, 502, 503, 503]
    FOLDER.write("a", b"1")
    assert store.objects == {"/b/run/a": b"1"}
    assert len(store.requests) == 8
    store.answers = [503] * 7
    assert FOLDER.read("a") == b"1"


def test_a_store_that_stays_broken_ends_in_one_message(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTMRAY_STORE_PATIENCE_S", "2")
    store.answers = [503] * 99
    started = time.monotonic()
    with pytest.raises(UserError, match=r"s3://b/run/a: the object store has failed for [12] s") as caught:
        FOLDER.write("a", b"1")
    assert "start the same command again" in caught.value.hint
    assert time.monotonic() - started < 20


def test_a_store_that_takes_a_request_and_never_answers_is_asked_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "READ_TIMEOUT_S", 1)
    FOLDER.write("a", b"1")
    store.answers = [-20, -20]
    started = time.monotonic()
    FOLDER.write("a", b"2")
    assert store.objects["/b/run/a"] == b"2"
    assert time.monotonic() - started < 19


def test_a_name_that_is_taken_is_no_error_where_the_refusal_has_no_body(store: Store) -> None:
    assert FOLDER.create("attempts/u.0", b"mine") is True
    assert FOLDER.create("attempts/u.0", b"theirs") is False
    assert store.objects == {"/b/run/attempts/u.0": b"mine"}


def test_a_conflict_of_two_conditional_writers_is_tried_again(store: Store) -> None:
    store.answers = [409]
    assert FOLDER.create("a", b"mine") is True
    store.answers = [409]
    assert FOLDER.create("a", b"theirs") is False


def test_a_small_file_is_one_request(store: Store) -> None:
    FOLDER.write("a", b"1")
    store.requests.clear()
    assert FOLDER.read("a", small=True) == b"1"
    assert store.requests == ["GET /b/run/a"]


def test_what_does_not_pass_is_said_at_once(store: Store) -> None:
    for status, words in ((404, "not found"), (403, "permission denied")):
        store.requests.clear()
        store.answers = [status]
        with pytest.raises(UserError, match=words):
            FOLDER.read("absent")
        assert len(store.requests) <= 2


def test_headers_are_read_without_the_songs(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (44100 * 60, 2))
    fetched = 0
    ranges = S3File._fetch_range

    def counted(self: S3File, start: int, end: int) -> bytes:
        nonlocal fetched
        fetched += end - start
        return ranges(self, start, end)

    monkeypatch.setattr(S3File, "_fetch_range", counted)
    for name in ("song.wav", "song.flac", "song.mp3", "song.ogg"):
        soundfile.write(tmp_path / name, noise[: 44100 * 5] if name.endswith("ogg") else noise, 44100)
        Folder(bucket).write(name, (tmp_path / name).read_bytes())
        fetched = 0
        header = read_header(Folder(bucket), name)
        assert not isinstance(header, Exception)
        assert header is not None
        assert header.sample_rate == 44100
        assert fetched <= 5 * 2**16
