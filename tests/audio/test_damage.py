"""Files that were cut, joined, damaged or never finished: read whole, or said not to be."""

import contextlib
import io
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from ttmray.audio import mpeg
from ttmray.audio.containers import flac_streams, ogg_streams
from ttmray.audio.io import decode, probe
from ttmray.audio.limits import AudioLimits
from ttmray.errors import ClipError

RATE = 44100
LIMITS = AudioLimits(min_duration_s=0.5)
RANDOM = np.random.default_rng(7).bytes(200_000)
ID3V1 = b"TAG" + b"x" * 125
READ, FAILED = "read", "failed"


def song(seconds: float, pitch: float = 440.0, rate: int = RATE, channels: int = 2) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    loudness = 0.3 + 0.2 * np.sin(2 * np.pi * 1.7 * t)
    rows = [loudness * np.sin(2 * np.pi * pitch * (1 + i / 2) * t) for i in range(channels)]
    noise = np.random.default_rng(int(pitch)).normal(0, 0.02, (channels, t.size))
    return (np.stack(rows) + noise).astype(np.float32)


def file_of(wave: np.ndarray, format: str, rate: int = RATE, subtype: str | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave.T, rate, format=format, subtype=subtype, **options)
    return file.getvalue()


def mp3(wave: np.ndarray, rate: int = RATE, *, header: bool = True, variable: bool = False) -> bytes:
    mode, level = ("VARIABLE", 0.3) if variable else ("CONSTANT", 0.5)
    content = file_of(wave, "MP3", rate, bitrate_mode=mode, compression_level=level)
    (piece,) = mpeg.walk(content).pieces
    assert piece.header is not None
    return content if header else content[piece.header[1] :]


def id3v2(size: int, footer: bool = False) -> bytes:
    sizes = bytes([size >> 21 & 127, size >> 14 & 127, size >> 7 & 127, size & 127])
    end = b"3DI\x04\0\x10" + sizes if footer else b""
    return b"ID3\x04\0" + (b"\x10" if footer else b"\0") + sizes + b"\x01" * size + end


def ape(header: bool) -> bytes:
    item = struct.pack("<II", 3000, 0) + b"Comment\0" + b"\xff\xfb" * 1500
    size = len(item) + 32
    start = b"APETAGEX" + struct.pack("<IIII", 2000, size, 1, 0xA0000000) + bytes(8)
    end = b"APETAGEX" + struct.pack("<IIII", 2000, size, 1, 0x80000000 if header else 0) + bytes(8)
    return (start if header else b"") + item + end


def lyrics() -> bytes:
    text = b"LYRICSBEGININD0000211LYR00300" + b"la " * 100
    return text + b"%06dLYRICS200" % len(text)


A, B = song(8.0), song(4.0, 660.0)
MP3S = {
    "constant": mp3(A),
    "variable": mp3(A, variable=True),
    "constant, no header": mp3(A, header=False),
    "variable, no header": mp3(A, header=False, variable=True),
    "mono": mp3(A[:1]),
    "22 kHz, no header": mp3(song(8.0, rate=22050), 22050, header=False),
}
UNHURT: dict[str, Callable[[bytes], bytes]] = {
    "ID3v1 behind": lambda d: d + ID3V1,
    "APE and ID3v1 behind": lambda d: d + ape(True) + ID3V1,
    "APE without header behind": lambda d: d + ape(False),
    "Lyrics3 and ID3v1 behind": lambda d: d + lyrics() + ID3V1,
    "zeros behind": lambda d: d + bytes(len(d)),
    "zeros in front": lambda d: bytes(1000) + d,
    "a gap behind ID3v2": lambda d: id3v2(500) + bytes(700) + d,
    "two ID3v2 tags": lambda d: id3v2(500) + id3v2(300) + d,
    "ID3v2.4 with a footer": lambda d: id3v2(500, footer=True) + d,
    "a large ID3v2": lambda d: id3v2(300_000) + d,
    "APE in front": lambda d: ape(True) + d,
}


def both_ways(content: bytes, path: Path, limits: AudioLimits = LIMITS) -> tuple[np.ndarray, int]:
    """Decoded by name, which must be the same as from memory."""
    path.write_bytes(content)
    audio, rate = decode(path, limits)
    again, again_rate = decode(io.BytesIO(content), limits)
    assert again_rate == rate
    np.testing.assert_array_equal(audio, again)
    return audio, rate


def error_of(content: bytes, limits: AudioLimits = LIMITS) -> ClipError:
    with pytest.raises(ClipError) as raised:
        decode(io.BytesIO(content), limits)
    return raised.value


def likeness(audio: np.ndarray, of: np.ndarray) -> float:
    """Largest correlation of the middle second of `of` with `audio`, 1 where it is in there."""
    middle = of[0, of.shape[1] // 2 :][:RATE]
    spectrum = np.fft.rfft(audio[0], 2 * audio.shape[1]) * np.conj(np.fft.rfft(middle, 2 * audio.shape[1]))
    products = np.fft.irfft(spectrum)[: audio.shape[1] - len(middle)]
    windows = np.cumsum(np.concatenate([[0.0], np.square(audio[0], dtype=np.float64)]))
    norms = np.sqrt(windows[len(middle) :][: len(products)] - windows[: len(products)])
    return float((products / (norms * np.linalg.norm(middle) + 1e-9)).max())


@pytest.mark.parametrize("kind", MP3S)
@pytest.mark.parametrize("change", UNHURT)
def test_tags_zeros_and_gaps_around_an_mp3_are_neither_sound_nor_damage(kind: str, change: str, tmp_path: Path) -> None:
    content = UNHURT[change](MP3S[kind])
    audio, rate = both_ways(content, tmp_path / "song.mp3")
    assert audio.shape[1] / rate == pytest.approx(8.0, abs=0.1)
    assert probe(io.BytesIO(content)).duration_s == pytest.approx(8.0, abs=0.1)


@pytest.mark.parametrize("kind", MP3S)
def test_an_undamaged_mp3_keeps_the_samples_of_the_bare_decoder(kind: str) -> None:
    content = MP3S[kind]
    bare, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    audio, _ = decode(io.BytesIO(content), LIMITS)
    if "variable, no" in kind:  # of which the bare decoder leaves out the end
        assert audio.shape[1] == pytest.approx(8 * rate, abs=0.1 * rate)
    else:
        np.testing.assert_array_equal(audio, bare.T)


@pytest.mark.parametrize("first", MP3S)
@pytest.mark.parametrize(
    "second",
    [
        mp3(B),
        mp3(B, header=False),
        mp3(B[:1]),
        mp3(B[:1], header=False),
        mp3(song(4.0, 660.0, 48000), 48000, header=False),
        id3v2(400) + mp3(B, variable=True),
    ],
    ids=["stereo", "stereo, no header", "mono", "mono, no header", "48 kHz", "tagged"],
)
def test_joined_mp3s_are_read_to_the_end_of_the_last(first: str, second: bytes, tmp_path: Path) -> None:
    content = MP3S[first] + second
    audio, rate = both_ways(content, tmp_path / "song.mp3")
    assert audio.shape[1] / rate == pytest.approx(12.0, abs=0.15)
    if rate == RATE:
        assert likeness(audio[:, : 8 * RATE], A) > 0.95
        assert likeness(audio[:, 8 * RATE :], B) > 0.95


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("frames", [0, None, 100])
def test_an_mp3_whose_header_has_no_count_or_too_small_a_one_is_read_whole(frames: int | None, variable: bool) -> None:
    content = bytearray(mp3(A, variable=variable))
    place = content.find(b"Xing") if variable else content.find(b"Info")
    if frames is None:
        content[place + 7] &= 0xFE
    else:
        content[place + 8 : place + 12] = frames.to_bytes(4, "big")
    audio, rate = decode(io.BytesIO(bytes(content)), LIMITS)
    assert audio.shape[1] / rate == pytest.approx(8.0, abs=0.1)
    assert np.abs(audio[:, :200]).max() < 0.5  # the header frame itself is no sound
    assert probe(io.BytesIO(bytes(content))).frames > 0


def test_an_mp3_whose_header_promises_more_than_there_is_names_both_lengths() -> None:
    content = bytearray(mp3(A))
    place = content.find(b"Info")
    content[place + 8 : place + 12] = (1000).to_bytes(4, "big")
    error = error_of(bytes(content))
    assert (error.status, error.reason) == ("failed", "truncated")
    assert "8." in error.message
    assert "26.12 s" in error.message


@pytest.mark.parametrize("kind", [kind for kind in MP3S if "no header" not in kind])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.96])
def test_a_cut_mp3_with_a_header_is_truncated(kind: str, share: float) -> None:
    content = MP3S[kind]
    assert error_of(content[: int(share * len(content))]).reason == "truncated"


@pytest.mark.parametrize("kind", MP3S)
@pytest.mark.parametrize("filling", ["zeros", "random", "nothing"])
def test_damage_inside_an_mp3_is_passed_over_only_where_it_is_short(kind: str, filling: str) -> None:
    content, middle = MP3S[kind], len(MP3S[kind]) // 2

    def damaged(length: int) -> bytes:
        put = {"zeros": bytes(length), "random": RANDOM[:length], "nothing": b""}[filling]
        return content[:middle] + put + content[middle + length :]

    audio, rate = decode(io.BytesIO(damaged(100)), LIMITS)
    assert audio.shape[1] / rate == pytest.approx(8.0, abs=0.2)
    # what was taken out of a file without header leaves no trace but a broken frame
    if filling != "nothing" or "no header" not in kind:
        error = error_of(damaged(len(content) // 5))
        assert error.reason in ("truncated", "length_mismatch")
        assert "s" in error.message


@pytest.mark.parametrize("kind", MP3S)
def test_an_mp3_with_much_that_is_neither_sound_nor_tag_is_a_mismatch(kind: str) -> None:
    error = error_of(MP3S[kind] + RANDOM[:100_000])
    assert error.reason == "length_mismatch"
    assert "100000 of" in error.message


def test_a_silent_start_does_not_make_a_song_long() -> None:
    # frames of silence are a tenth as long, and a decoder that guesses from the first ones sees a tenfold length
    wave = np.concatenate([np.zeros((2, 10 * RATE), np.float32), song(10.0)], axis=1)
    content = mp3(wave, header=False, variable=True)
    with soundfile.SoundFile(io.BytesIO(content)) as guess:
        assert guess.frames > 30 * RATE
    limits = AudioLimits(max_duration_s=21.0)
    audio, _ = decode(io.BytesIO(content), limits)
    assert audio.shape[1] / RATE == pytest.approx(20.0, abs=0.1)
    assert probe(io.BytesIO(content)).duration_s == pytest.approx(20.0, abs=0.1)
    assert error_of(content, AudioLimits(max_duration_s=19.0)).reason == "too_long"


def test_free_format_frames_are_counted() -> None:
    content = bytearray(mp3(song(8.0, rate=48000), 48000, header=False))
    position = 0
    while (frame := mpeg._Frames(bytes(content)).at(position)) and position < len(content):
        content[position + 2] &= 0x0F
        position += frame[0]
        if position + 4 > len(content):
            break
    audio, rate = decode(io.BytesIO(bytes(content)), LIMITS)
    assert (audio.shape[1] / rate, rate) == (pytest.approx(8.0, abs=0.1), 48000)


def flac_total(content: bytes, frames: int) -> bytes:
    fields = int.from_bytes(content[18:26], "big")
    return content[:18] + ((fields >> 36 << 36) | frames).to_bytes(8, "big") + content[26:]


FLAC_A, FLAC_B = file_of(A, "FLAC", subtype="PCM_16"), file_of(B, "FLAC", subtype="PCM_16")
FLAC_MONO_48 = file_of(song(4.0, 660.0, 48000, 1), "FLAC", 48000, "PCM_24")


@pytest.mark.parametrize(
    ("content", "seconds"),
    [
        (flac_total(FLAC_A, 0), 8.0),
        (flac_total(FLAC_A, 2 * RATE), 8.0),
        (flac_total(FLAC_A, 9 * RATE), FAILED),
        (flac_total(FLAC_A, 0)[: len(FLAC_A) // 2], FAILED),
        (FLAC_A + FLAC_B, 12.0),
        (FLAC_A + FLAC_A, 16.0),
        (FLAC_A + FLAC_MONO_48, 12.0),
        (flac_total(FLAC_A, 0) + flac_total(FLAC_B, RATE), 12.0),
        (FLAC_A + ID3V1, 8.0),
        (FLAC_A + bytes(100_000), 8.0),
        (id3v2(500) + FLAC_A, 8.0),
        (bytes(1000) + FLAC_A, 8.0),
        (FLAC_A + RANDOM, FAILED),
        (FLAC_A[: len(FLAC_A) // 2], FAILED),
        (FLAC_A[:-100], FAILED),
        (FLAC_A[:300_000] + RANDOM[:5000] + FLAC_A[305_000:], FAILED),
        (FLAC_A[:300_000] + FLAC_A[305_000:], FAILED),
    ],
    ids=[
        "no total",
        "total too small",
        "total too large",
        "no total, cut",
        "joined",
        "joined with itself",
        "joined with another rate",
        "joined with wrong totals",
        "ID3v1 behind",
        "zeros behind",
        "ID3v2 in front",
        "zeros in front",
        "random bytes behind",
        "cut",
        "cut at the end",
        "random bytes inside",
        "bytes missing inside",
    ],
)
def test_a_flac_is_read_whole_or_fails(content: bytes, seconds: float | str, tmp_path: Path) -> None:
    if seconds == FAILED:
        assert error_of(content).reason in ("truncated", "length_mismatch")
        return
    audio, rate = both_ways(content, tmp_path / "song.flac")
    assert audio.shape[1] / rate == pytest.approx(seconds, abs=1e-4)
    assert likeness(audio[:, : 8 * RATE], A) > 0.99
    if seconds == 12.0:
        assert likeness(audio[:, 8 * RATE :], B) > 0.95


OGG_A, OGG_B = file_of(A, "OGG", subtype="VORBIS"), file_of(B, "OGG", subtype="VORBIS")


@pytest.mark.parametrize(
    ("content", "seconds"),
    [
        (OGG_A, 8.0),
        (OGG_A + OGG_B, 12.0),
        (OGG_A + file_of(B[:1], "OGG", subtype="VORBIS"), 12.0),
        (file_of(song(8.0, rate=48000), "OGG", 48000, "OPUS"), 8.0),
        (OGG_A + ID3V1, 8.0),
        (OGG_A + bytes(100_000), 8.0),
        (bytes(1000) + OGG_A, 8.0),
        (OGG_A + RANDOM, FAILED),
        (OGG_A[: len(OGG_A) // 2], FAILED),
        (OGG_A[: OGG_A.rfind(b"OggS")], FAILED),
        (OGG_A[:30_000] + RANDOM[:500] + OGG_A[30_500:], FAILED),
        (OGG_A[:30_000] + OGG_A[45_000:], FAILED),
    ],
    ids=[
        "whole",
        "chained",
        "chained with mono",
        "opus",
        "ID3v1 behind",
        "zeros behind",
        "zeros in front",
        "random bytes behind",
        "cut",
        "cut between pages",
        "random bytes inside",
        "bytes missing inside",
    ],
)
def test_an_ogg_is_read_whole_or_fails(content: bytes, seconds: float | str, tmp_path: Path) -> None:
    if seconds == FAILED:
        assert error_of(content).reason in ("truncated", "length_mismatch")
        return
    audio, rate = both_ways(content, tmp_path / "song.ogg")
    assert audio.shape[1] / rate == pytest.approx(seconds, abs=0.01)


CHUNKED = {
    "WAV": file_of(A, "WAV", subtype="PCM_16"),
    "float WAV": file_of(A, "WAV", subtype="FLOAT"),
    "WAVEX": file_of(A, "WAVEX", subtype="PCM_24"),
    "RF64": file_of(A, "RF64", subtype="PCM_16"),
    "W64": file_of(A, "W64", subtype="PCM_16"),
    "AIFF": file_of(A, "AIFF", subtype="PCM_16"),
    "AU": file_of(A, "AU", subtype="PCM_16"),
    "CAF": file_of(A, "CAF", subtype="PCM_16"),
    "ADPCM": file_of(A, "WAV", subtype="IMA_ADPCM"),
}


@pytest.mark.parametrize("kind", CHUNKED)
def test_chunked_files_are_read_whole_and_seen_when_they_are_cut(kind: str, tmp_path: Path) -> None:
    content = CHUNKED[kind]
    whole, _ = both_ways(content, tmp_path / "song.wav")
    assert whole.shape[1] / RATE == pytest.approx(8.0, abs=0.05)
    for share in (0.02, 0.5, 0.97):
        error = error_of(content[: int(share * len(content))], AudioLimits(min_duration_s=0.0))
        assert (error.status, error.reason) == ("failed", "truncated"), share
    for behind in (ID3V1, id3v2(600), bytes(100_000)):
        tagged, _ = both_ways(content + behind, tmp_path / "song.wav")
        np.testing.assert_array_equal(tagged, whole)
    assert error_of(content + RANDOM).reason == "length_mismatch"


@pytest.mark.parametrize("kind", ["WAV", "float WAV", "WAVEX", "ADPCM"])
def test_a_wav_that_was_never_closed_is_read_to_its_end_and_one_with_a_wrong_size_fails(kind: str) -> None:
    content = CHUNKED[kind]
    place = content.index(b"data") + 4
    audio, _ = decode(io.BytesIO(content[:place] + bytes(4) + content[place + 4 :]), LIMITS)
    np.testing.assert_array_equal(audio, decode(io.BytesIO(content), LIMITS)[0])
    half = int.from_bytes(content[place : place + 4], "little") // 4096 // 2 * 4096
    error = error_of(content[:place] + half.to_bytes(4, "little") + content[place + 4 :])
    assert error.reason == "length_mismatch"


def test_an_empty_wav_is_short_and_not_damaged() -> None:
    assert error_of(file_of(A[:, :0], "WAV", subtype="PCM_16")).reason == "too_short"


def test_other_formats_are_refused_because_their_length_cannot_be_checked() -> None:
    assert error_of(file_of(A[:1], "VOC", subtype="PCM_16")).reason == "unsupported_format"


@pytest.mark.parametrize(
    ("scale", "reason"), [(1.0, ""), (8.0, ""), (32768.0, "too_loud"), (1e30, "too_loud"), (3e38, "too_loud")]
)
def test_levels_that_no_music_has_are_rejected_with_the_number(scale: float, reason: str) -> None:
    content = file_of(A * np.float32(scale), "WAV", subtype="FLOAT")
    if not reason:
        assert np.abs(decode(io.BytesIO(content), LIMITS)[0]).max() > 0.3 * scale
        return
    error = error_of(content)
    assert (error.status, error.reason) == ("rejected", reason)
    assert "dBFS" in error.message
    assert ("16-bit" in error.message) == (scale == 32768.0)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=200),
            st.sampled_from([b"\xff\xfb\x90\x64", b"ID3\x04\0\0\0\0\x02\x01", b"TAG", b"APETAGEX", b"OggS", b"fLaC"]),
            st.sampled_from([b"LYRICSBEGIN", b"\xff\xfb\x00\x64", bytes(100), b"fLaC\0\0\0\x22", b"RIFF", b"FORM"]),
            st.sampled_from(list(MP3S.values())).map(lambda content: content[:3000]),
        ),
        max_size=12,
    )
)
def test_no_bytes_bring_the_readers_to_a_halt(parts: list[bytes]) -> None:
    content = b"".join(parts)
    for piece in mpeg.walk(content).pieces:
        assert piece.frames > 0
        assert piece.file(content)
    flac_streams(content)
    ogg_streams(content)
    with contextlib.suppress(ClipError):
        decode(io.BytesIO(content), AudioLimits(min_duration_s=0.0, min_sample_rate=1))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(sorted(MP3S)), min_size=1, max_size=4), st.data())
def test_every_frame_of_joined_files_is_counted(kinds: list[str], data: st.DataObject) -> None:
    tags = [data.draw(st.sampled_from([b"", ID3V1, id3v2(77), ape(True)])) for _ in kinds]
    content = b"".join(tag + MP3S[kind] for kind, tag in zip(kinds, tags, strict=True))
    walk = mpeg.walk(content)
    expected = sum(mpeg.walk(MP3S[kind]).pieces[0].frames for kind in kinds)
    assert sum(piece.frames for piece in walk.pieces) == expected
    assert (walk.lead, walk.rest, sum(piece.lost for piece in walk.pieces)) == (0, 0, 0)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize("kind", MP3S)
def test_lengths_and_sound_are_those_of_ffmpeg(kind: str, tmp_path: Path) -> None:
    for content in (MP3S[kind], bytes(1000) + MP3S[kind], MP3S[kind] + mp3(B), MP3S[kind] + bytes(50_000)):
        path = tmp_path / "song.mp3"
        audio, rate = both_ways(content, path)
        command = [
            "ffmpeg",
            "-v",
            "quiet",
            "-i",
            str(path),
            "-f",
            "f32le",
            "-ac",
            str(len(audio)),
            "-ar",
            str(rate),
            "-",
        ]
        output = subprocess.run(command, capture_output=True, check=True).stdout
        other = np.frombuffer(output, np.float32).reshape(-1, len(audio)).T
        assert audio.shape[1] / rate == pytest.approx(other.shape[1] / rate, abs=0.15)
        if rate == RATE:
            assert likeness(audio, other) > 0.99


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("m_concat.mp3", 55.0),
        ("m_trailing_zeros_noxing.mp3", 35.0),
        ("m_zeros_lead.mp3", 35.0),
        ("n_mid900zeros_noxing.mp3", 35.0),
        ("n_vbr_xing_frames0.mp3", 35.0),
        ("data_size_0.wav", 6.0),
        ("float_int16_scale.wav", "too_loud"),
    ],
)
def test_real_cases_have_their_right_result(name: str, expected: float | str, data_dir: Path) -> None:
    path = data_dir / "cases" / name
    if isinstance(expected, str):
        with pytest.raises(ClipError) as raised:
            decode(path, LIMITS)
        assert raised.value.reason == expected
    else:
        audio, rate = decode(path, LIMITS)
        assert audio.shape[1] / rate == pytest.approx(expected, abs=0.1)
        assert np.abs(audio).max() < 1.0
