"""The built-in songs and the odd files beside them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ttmray.audio.io import AUDIO_EXTENSIONS, AudioLimits, decode
from ttmray.errors import ClipError
from ttmray.synth.songs import MANIFEST, MINOR, PEAK, SONGS, STEMS, compose, render, write_demo_songs


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
        assert 0.5 < np.abs(audio).max() < 1.0
        assert np.sqrt(np.mean(audio**2)) > 0.05
        total += song.seconds
        with soundfile.SoundFile(demo / song.path) as file:
            assert (file.title, file.artist) == (song.title, song.artist)
    assert total == pytest.approx(150)
    assert {Path(song.path).suffix for song in SONGS} == AUDIO_EXTENSIONS


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.mp3", "empty_file"),
        ("not_music.mp3", "not_audio"),
        ("truncated.mp3", "truncated"),
        ("three_seconds.wav", "too_short"),
        ("telephone_8khz.wav", "sample_rate"),
        ("surround_51.flac", "channels"),
    ],
)
def test_odd_files_are_refused_for_the_reason_they_were_made_for(demo, name, reason):
    with pytest.raises(ClipError) as caught:
        decode(demo / "odd" / name, AudioLimits())
    assert caught.value.reason == reason


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


@pytest.mark.parametrize("song", SONGS, ids=lambda song: song.title)
def test_notes_are_in_key_and_the_melody_rests_on_the_chord(song):
    bar = 240 / song.tempo
    scale = {(song.key + step) % 12 for step in song.scale}
    for note in compose(song):
        if note.stem == "drums":
            continue
        assert note.midi % 12 in scale
        if note.instrument == song.lead and note.gain == 0.3 and note.start % (bar / 2) < 1e-6:
            root = song.chords[int(note.start / bar + 1e-6) % len(song.chords)]
            triad = {(song.key + song.scale[(root + third) % 7]) % 12 for third in (0, 2, 4)}
            assert note.midi % 12 in triad


def test_stems_sum_to_the_mix_and_sound_where_the_notes_are():
    song = next(song for song in SONGS if song.lead == "voice")
    stems = render(song)
    assert tuple(stems) == STEMS
    assert np.abs(sum(stems.values())).max() == pytest.approx(PEAK, abs=1e-4)
    first_bar = round(240 / song.tempo * song.sample_rate)
    assert not stems["drums"][:, : first_bar - 1].any()
    assert not stems["vocals"][:, : first_bar - 1].any()
    assert all(np.sqrt(np.mean(stem[:, first_bar:] ** 2)) > 0.005 for stem in stems.values())


def test_the_bass_plays_the_root_of_the_first_chord():
    song = next(song for song in SONGS if song.scale is MINOR and song.drums)
    beat = round(30 / song.tempo * song.sample_rate)
    bass = render(song)["bass"][:, :beat].mean(axis=0)
    spectrum = np.abs(np.fft.rfft(bass * np.hanning(beat), 1 << 17))
    heard = np.argmax(spectrum) * song.sample_rate / (1 << 17)
    assert heard == pytest.approx(440 * 2 ** ((song.key - 69) / 12), rel=0.03)


def test_the_kick_of_a_house_pattern_falls_on_every_beat():
    song = next(song for song in SONGS if song.path == "lumen/night_drive.mp3")
    energy = render(song)["drums"].mean(axis=0) ** 2
    beat = 60 / song.tempo * song.sample_rate
    on, off = (
        np.mean([energy[int(k * beat + shift) :][: int(beat / 8)].sum() for k in range(4, 20)])
        for shift in (0, beat / 4)
    )
    assert on > 10 * off


def test_width_spreads_the_stereo_image():
    narrow, wide = (render(next(s for s in SONGS if s.title == title)) for title in ("First Light", "Slow Tide"))

    def side_share(stems) -> float:
        left, right = sum(stems.values())
        return float(np.mean((left - right) ** 2) / np.mean((left + right) ** 2))

    assert side_share(wide) > side_share(narrow) > 0


def test_encoded_songs_are_whole_files_in_memory(demo):
    data = (demo / "lumen/blue_hour.mp3").read_bytes()
    audio, rate = decode(io.BytesIO(data), AudioLimits())
    assert audio.shape == (1, 12 * rate)
