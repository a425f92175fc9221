"""Files that libsndfile does not know, made and decoded by PyAV; without it, a reason of their own."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ttmray.audio import foreign
from ttmray.audio.io import decode, probe, resample
from ttmray.audio.limits import AudioLimits
from ttmray.corpus.catalogue import build_catalogue
from ttmray.corpus.config import CatalogueConfig
from ttmray.errors import ClipError

RATE = 44_100
LIMITS = AudioLimits(min_duration_s=1.0)
KINDS = {"m4a": ("ipod", "aac"), "aac": ("adts", "aac"), "wma": ("asf", "wmav2")}


def tone(seconds: float = 6.0, channels: int = 2) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return np.stack([0.4 * np.sin(2 * np.pi * (220 + 110 * c) * time) for c in range(channels)]).astype(np.float32)


def encoded(kind: str, wave: np.ndarray, rate: int = RATE) -> bytes:
    """A file of samples (channels, n) by PyAV."""
    av = pytest.importorskip("av", reason="PyAV is an extra: pip install 'ttmray[av]'")
    container, codec = KINDS[kind]
    sink = io.BytesIO()
    with av.open(sink, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, layout="stereo" if len(wave) == 2 else "mono")
        stream.bit_rate = 128_000
        for start in range(0, wave.shape[1], 1024):
            block = np.ascontiguousarray(wave[:, start : start + 1024])
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo" if len(wave) == 2 else "mono")
            frame.rate, frame.pts = rate, start
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return sink.getvalue()


def without_av(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "av" else spec(name, *a))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_encoded_comes_back_with_its_length_rate_and_sound(kind):
    wave = tone()
    audio, rate = decode(io.BytesIO(encoded(kind, wave)), LIMITS)
    assert rate == RATE
    assert audio.shape[0] == 2
    assert audio.dtype == np.float32
    assert abs(audio.shape[1] - wave.shape[1]) < 0.15 * RATE
    for channel, frequency in zip(audio, (220, 330), strict=True):
        spectrum = np.abs(np.fft.rfft(channel[RATE : 2 * RATE]))
        assert np.argmax(spectrum) == pytest.approx(frequency, abs=1)
        assert np.abs(channel[RATE : 2 * RATE]).max() == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("kind", ["m4a", "wma"])
def test_the_header_tells_the_length_without_decoding(kind):
    info = probe(io.BytesIO(encoded(kind, tone())))
    assert (info.sample_rate, info.channels) == (RATE, 2)
    assert info.duration_s == pytest.approx(6.0, abs=0.15)


def test_a_raw_stream_has_no_length_but_its_sound():
    with pytest.raises(ClipError) as caught:
        probe(io.BytesIO(encoded("aac", tone())))
    assert caught.value.reason == "unknown_length"


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"min_duration_s": 7.0}, "too_short"),
        ({"max_duration_s": 3.0}, "too_long"),
        ({"max_channels": 1}, "channels"),
        ({"min_sample_rate": 48_000}, "sample_rate"),
        ({"max_decoded_bytes": 100_000}, "decoded_size"),
        ({"max_peak": 0.1}, "too_loud"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_limits_are_those_of_every_other_file(kind, limits, reason):
    with pytest.raises(ClipError) as caught:
        decode(io.BytesIO(encoded(kind, tone())), AudioLimits(**{"min_duration_s": 1.0, **limits}))
    assert (caught.value.status, caught.value.reason) == ("rejected", reason)


@pytest.mark.parametrize("kind", ["m4a", "wma"])
def test_a_file_that_was_cut_fails_and_never_counts_as_a_shorter_song(kind):
    data = encoded(kind, tone(12.0))
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(ClipError) as caught:
            decode(io.BytesIO(data[: int(share * len(data))]), LIMITS)
        assert caught.value.status == "failed"
        assert caught.value.reason in ("truncated", "not_audio")


def test_noise_behind_a_right_beginning_is_a_failure_and_no_crash():
    draw = np.random.default_rng(0)
    for head in (b"\0\0\0\x20ftypM4A ", bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), b"\xff\xf1\x50\x80"):
        pytest.importorskip("av")
        with pytest.raises(ClipError) as caught:
            decode(io.BytesIO(head + draw.bytes(20_000)), LIMITS)
        assert caught.value.status == "failed"


def test_opus_needs_no_extra():
    sink = io.BytesIO()
    wave = resample(tone(channels=1), RATE, 48_000)
    soundfile.write(sink, wave.T, 48_000, format="OGG", subtype="OPUS")
    audio, rate = decode(sink, LIMITS)
    assert (rate, audio.shape) == (48_000, wave.shape)


def test_files_are_told_by_their_bytes():
    for data, what in ((b"\0\0\0\x1cftypisom" + bytes(8), "MP4"), (b"ID3\4" + bytes(20), ""), (b"", "")):
        assert foreign.kind(io.BytesIO(data)) == what
    assert foreign.kind(io.BytesIO(b"\xff\xfb\x90\x64" + bytes(20))) == "", "an MP3 is no AAC"
    assert foreign.kind(io.BytesIO(b"\xff\xf1\x50\x80" + bytes(20))) == "AAC"


def test_without_the_extra_every_such_file_is_a_track_that_fails_with_a_reason_that_says_what_to_do(
    tmp_path, monkeypatch
):
    without_av(monkeypatch)
    heads = {"a.m4a": b"\0\0\0\x20ftypM4A ", "b.wma": bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")}
    for name, head in heads.items():
        (tmp_path / name).write_bytes(head + bytes(4000))
    catalogue = build_catalogue(str(tmp_path), CatalogueConfig(captions=None))
    assert [track.path for track in catalogue.tracks] == list(heads), "a row each, and not one line in a list"
    assert catalogue.report["other_files"] == 0
    for track in catalogue.tracks:
        for read in (probe, lambda path: decode(path, LIMITS)):
            with pytest.raises(ClipError) as caught:
                read(tmp_path / track.path)
            assert (caught.value.status, caught.value.reason) == ("failed", "no_decoder")
            assert "ttmray[av]" in caught.value.message


def test_songs_of_all_kinds_become_clips(tmp_path: Path):
    for kind in KINDS:
        (tmp_path / f"song.{kind}").write_bytes(encoded(kind, tone()))
    for path in sorted(tmp_path.iterdir()):
        audio, _ = decode(path, AudioLimits(), path.name)
        assert audio.shape[1] > 5.8 * RATE
