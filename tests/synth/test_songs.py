"""The built-in songs and the odd files beside them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ttmray.audio.io import AUDIO_EXTENSIONS, decode
from ttmray.audio.limits import AudioLimits
from ttmray.errors import ClipError
from ttmray.synth.faults import KINDS, true_quality
from ttmray.synth.measures import measure
from ttmray.synth.songs import MANIFEST, ODD, SONGS, TRUTH, write_demo_songs
from ttmray.synth.world import song as perform


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo_songs(folder)
    return folder


def test_good_songs_decode_with_the_length_rate_and_tags_they_were_given(demo):
    total = 0.0
    for song in SONGS:
        audio, rate = decode(demo / song.path, AudioLimits())
        assert (rate, audio.shape) == (
            song.sample_rate,
            (song.channels, round(song.seconds * song.sample_rate)),
        )
        assert 0.1 < np.abs(audio).max() < 1.0
        assert np.sqrt(np.mean(audio**2)) > 0.05
        total += song.seconds
        with soundfile.SoundFile(demo / song.path) as file:
            assert (file.title, file.artist) == (song.title, song.artist)
    assert total == pytest.approx(150)
    assert {Path(song.path).suffix for song in SONGS} == {".mp3", ".flac", ".wav", ".ogg"} <= AUDIO_EXTENSIONS


@pytest.mark.parametrize("path", [path for path, why in ODD.items() if why[1] not in ("silent", "duplicate")])
def test_odd_files_are_refused_for_the_reason_they_were_made_for(demo, path):
    with pytest.raises(ClipError) as caught:
        decode(demo / path, AudioLimits())
    assert (caught.value.status, caught.value.reason) == ODD[path]


def test_the_silent_track_is_silent_and_the_copy_is_a_copy(demo):
    assert not decode(demo / "odd/silence.flac", AudioLimits())[0].any()
    assert (demo / "odd/night_drive_copy.mp3").read_bytes() == (demo / "lumen/night_drive.mp3").read_bytes()


def test_captions_fit_the_files_but_for_one_on_each_side(demo):
    captions = {row["path"]: row["caption"] for row in json.loads((demo / "captions.json").read_bytes())}
    files = {path.relative_to(demo).as_posix() for path in demo.rglob("*") if path.suffix in AUDIO_EXTENSIONS}
    assert len(files - captions.keys()) == 1
    assert len(captions.keys() - files) == 1


def test_writing_again_touches_nothing(demo):
    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in demo.rglob("*") if path.is_file()}

    before = times()
    paths = write_demo_songs(demo)
    assert times() == before
    assert len(paths) == 16
    assert all(path.is_file() for path in paths)


def test_a_damaged_file_is_written_again_with_the_same_bytes(demo):
    digests = json.loads((demo / MANIFEST).read_bytes())["files"]
    damaged = demo / "kite/paper_kite.wav"
    good = damaged.read_bytes()
    damaged.write_bytes(good[:-1])
    write_demo_songs(demo)
    assert damaged.read_bytes() == good
    again = json.loads((demo / MANIFEST).read_bytes())["files"]
    assert {name for name in digests if again[name] != digests[name]} <= {"kite/rooftop.ogg"}


def test_another_seed_writes_other_songs_whatever_manifest_was_there(demo, tmp_path):
    (tmp_path / MANIFEST).write_text("[]")
    write_demo_songs(tmp_path, seed=1)
    manifest = json.loads((tmp_path / MANIFEST).read_bytes())
    digests = json.loads((demo / MANIFEST).read_bytes())["files"]
    assert manifest["seed"] == 1
    assert all(manifest["files"][song.path] != digests[song.path] for song in SONGS)


def test_the_truth_has_a_row_for_every_file_and_all_that_is_true_of_the_songs(demo):
    rows = {row["path"]: row for row in json.loads((demo / TRUTH).read_bytes())}
    files = {path.relative_to(demo).as_posix() for path in demo.rglob("*") if path.suffix in AUDIO_EXTENSIONS}
    assert rows.keys() == files
    assert {path: (rows[path]["status"], rows[path]["reason"]) for path in ODD} == ODD
    captions = {row["path"]: row["caption"] for row in json.loads((demo / "captions.json").read_bytes())}
    for song in SONGS:
        row = rows[song.path]
        assert row["status"] == "ok"
        assert (row["title"], row["seconds"]) == (song.title, song.seconds)
        assert {kind: row[f"fault_{kind}"] for kind in KINDS} == dict.fromkeys(KINDS, 0.0) | dict(song.faults)
        assert row["quality"] == true_quality(song.faults)
        assert row["tempo"] == song.told["tempo"]
        assert captions.get(song.path) == (row["caption"] if song.captioned else None)
    assert len({rows[song.path]["quality"] for song in SONGS}) >= 5
    assert len({kind for song in SONGS for kind in song.faults}) >= 6


def test_the_files_hold_the_pieces_that_the_truth_speaks_of(demo):
    for i, song in enumerate(SONGS[:3]):
        take = perform(0, i, seconds=song.seconds, faults=song.faults, **song.told)
        audio, rate = decode(demo / song.path, AudioLimits())
        frame = rate // 20
        loud, expected = (
            np.sqrt(np.mean(x.mean(axis=0)[: x.shape[1] // n * n].reshape(-1, n) ** 2, axis=1))
            for x, n in ((audio, frame), (take.mix, 2205))
        )
        assert np.corrcoef(loud[: len(expected)], expected[: len(loud)])[0, 1] > 0.98


def test_the_faults_can_be_measured_in_the_files(demo):
    def of(path: str):
        return measure(decode(demo / path, AudioLimits())[0])

    clean, clipped = of("north_harbour/first_light.flac"), of("lumen/Été à la plage (été 2).flac")
    assert clipped.flat > clean.flat + 1
    assert of("lumen/blue_hour.mp3").floor_high > clean.floor_high + 10


def test_encoded_songs_are_whole_files_in_memory(demo):
    data = (demo / "lumen/blue_hour.mp3").read_bytes()
    audio, rate = decode(io.BytesIO(data), AudioLimits())
    assert audio.shape == (1, 12 * rate)
