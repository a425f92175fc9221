import io
import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ttmray.audio.io import decode, encode_flac, probe, resample, to_mono, write_audio
from ttmray.audio.limits import AudioLimits
from ttmray.errors import ClipError

RATE = 44100
LIMITS = AudioLimits()
FORMATS = {"wav": "PCM_16", "flac": "PCM_16", "mp3": None, "ogg": None}


def tone(seconds: float = 6.0, rate: int = RATE, channels: int = 2) -> np.ndarray:
    rng = np.random.default_rng(0)
    t = np.arange(int(seconds * rate)) / rate
    pitches = 220 * (1 + np.arange(channels))[:, None]
    return (0.3 * np.sin(2 * np.pi * pitches * t) + rng.normal(0, 0.05, (channels, t.size))).astype(np.float32)


def file_bytes(x: np.ndarray, format: str, rate: int = RATE, **options: object) -> bytes:
    file = io.BytesIO()
    options = {"subtype": FORMATS[format], **options}
    soundfile.write(file, x.T, rate, format=format.upper(), **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def encoded() -> dict[str, bytes]:
    return {format: file_bytes(tone(), format) for format in FORMATS}


def error_of(content: bytes, limits: AudioLimits = LIMITS) -> tuple[str, str]:
    with pytest.raises(ClipError) as raised:
        decode(io.BytesIO(content), limits)
    return raised.value.status, raised.value.reason


def without_first_mp3_frame(content: bytes) -> bytes:
    """Drop the Xing header, which is a whole MPEG-1 layer III frame at 44.1 kHz."""
    assert b"Xing" in content[:64] or b"Info" in content[:64]
    kbps = [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320][content[2] >> 4]
    rest = content[144_000 * kbps // RATE + (content[2] >> 1 & 1) :]
    assert rest[:2] == content[:2]
    return rest


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_decodes_to_the_samples_of_one_bare_read(
    format: str, encoded: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / f"song.{format.upper()}"
    path.write_bytes(encoded[format])
    expected, rate = soundfile.read(path, dtype="float32", always_2d=True)
    for source in (str(path), path, io.BytesIO(encoded[format])):
        audio, decoded_rate = decode(source, LIMITS)
        assert (audio.dtype, audio.shape, decoded_rate) == (np.float32, (2, 6 * RATE), rate)
        np.testing.assert_array_equal(audio, expected.T)


@pytest.mark.parametrize("format", FORMATS)
def test_probing_reads_rate_channels_and_length(format: str, encoded: dict[str, bytes]) -> None:
    info = probe(io.BytesIO(encoded[format]))
    assert (info.sample_rate, info.channels, info.frames, info.duration_s) == (RATE, 2, 6 * RATE, 6.0)


def test_mono_decodes_to_one_channel() -> None:
    audio, rate = decode(io.BytesIO(file_bytes(tone(channels=1, rate=48000), "flac", 48000)), LIMITS)
    assert (audio.shape, rate) == ((1, 6 * 48000), 48000)


def test_a_low_rate_mp3_has_no_seams_where_blocks_meet() -> None:
    content = file_bytes(tone(), "mp3", bitrate_mode="CONSTANT", compression_level=0.9)
    expected, _ = soundfile.read(io.BytesIO(content), dtype="float32")
    np.testing.assert_array_equal(decode(io.BytesIO(content), LIMITS)[0], expected.T)


def test_real_tracks_decode_as_by_a_bare_read(data_dir: Path) -> None:
    paths = sorted((data_dir / "tracks").rglob("*.mp3"))
    assert paths
    for path in paths:
        expected, rate = soundfile.read(path, dtype="float32", always_2d=True)
        audio, decoded_rate = decode(path, LIMITS)
        assert decoded_rate == rate
        np.testing.assert_array_equal(audio, expected.T)
        assert probe(path).duration_s == pytest.approx(audio.shape[1] / rate, rel=0.005)


def test_a_file_object_is_read_from_its_start_and_stays_open(encoded: dict[str, bytes]) -> None:
    file = io.BytesIO(encoded["mp3"])
    file.seek(5000)
    first, _ = decode(file, LIMITS)
    second, _ = decode(file, LIMITS)
    np.testing.assert_array_equal(first, second)
    assert not file.closed


def test_a_missing_file_is_not_a_bad_clip(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "absent.mp3", LIMITS)


def test_an_empty_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "song.mp3"
    path.touch()
    for read in (probe, lambda source: decode(source, LIMITS)):
        with pytest.raises(ClipError) as raised:
            read(path)
        assert (raised.value.status, raised.value.reason) == ("failed", "empty_file")


@pytest.mark.parametrize(
    "content",
    [b"<html>404 not found</html>\n" * 50, bytes(5000), b"R", b"ID3\x04\0\0\0\0\2\1" + bytes(range(256)) * 9],
)
@pytest.mark.parametrize("name", ["song.mp3", "song.wav", "song.raw"])
def test_content_that_is_no_audio_is_refused_whatever_its_name(content: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ClipError, match=r"cannot be decoded: \w") as raised:
        decode(path, LIMITS)
    assert (raised.value.status, raised.value.reason) == ("failed", "not_audio")


def test_messages_start_with_the_name_that_was_given() -> None:
    with pytest.raises(ClipError) as raised:
        decode(io.BytesIO(b""), LIMITS, name="07/123.mp3")
    assert raised.value.message == "07/123.mp3: 0 bytes"


@pytest.mark.parametrize("format", ["wav", "flac", "mp3"])
@pytest.mark.parametrize("share", [0.9, 0.95])
def test_a_truncated_file_is_caught(format: str, share: float, encoded: dict[str, bytes]) -> None:
    content = encoded[format]
    assert error_of(content[: int(share * len(content))]) == ("failed", "truncated")


def test_the_loss_of_the_last_bytes_of_a_flac_is_caught(encoded: dict[str, bytes]) -> None:
    assert error_of(encoded["flac"][:-100]) == ("failed", "truncated")


def test_a_flac_with_damage_in_the_middle_is_caught(encoded: dict[str, bytes]) -> None:
    content = bytearray(encoded["flac"])
    middle = len(content) // 2
    content[middle : middle + 3000] = np.random.default_rng(0).bytes(3000)
    assert error_of(bytes(content)) == ("failed", "truncated")


def test_a_truncated_float_wav_with_an_extra_chunk_is_caught() -> None:
    content = file_bytes(tone(), "wav", subtype="FLOAT")
    junk = b"JUNK" + struct.pack("<I", 5) + b"12345\0"
    content = content[:12] + junk + content[12:]
    decode(io.BytesIO(content), LIMITS)
    assert error_of(content[: int(0.9 * len(content))]) == ("failed", "truncated")


@pytest.mark.parametrize("size", [0x7FFFFFFF, 0xFFFFFFFF])
def test_a_wav_written_into_a_pipe_has_no_length_and_is_read_to_its_end(size: int, encoded: dict[str, bytes]) -> None:
    content = encoded["wav"]
    assert content[36:40] == b"data"
    streamed = content[:4] + struct.pack("<I", size) + content[8:40] + struct.pack("<I", size) + content[44:]
    audio, _ = decode(io.BytesIO(streamed), LIMITS)
    assert audio.shape == (2, 6 * RATE)


def test_an_id3_tag_does_not_hide_the_length_of_an_mp3(encoded: dict[str, bytes]) -> None:
    tag = b"ID3\x04\0\0" + bytes([0, 0, 4, 0]) + bytes(512)
    tagged = tag + encoded["mp3"]
    audio, _ = decode(io.BytesIO(tagged), LIMITS)
    assert audio.shape == (2, 6 * RATE)
    assert error_of(tagged[: int(0.9 * len(tagged))]) == ("failed", "truncated")


def test_a_constant_rate_mp3_without_length_header_decodes_in_full(encoded: dict[str, bytes]) -> None:
    content = without_first_mp3_frame(file_bytes(tone(), "mp3", bitrate_mode="CONSTANT", compression_level=0.5))
    audio, _ = decode(io.BytesIO(content), LIMITS)
    assert audio.shape[1] / RATE == pytest.approx(6.0, abs=0.1)


def test_a_variable_rate_mp3_without_length_header_is_read_whole() -> None:
    # From loud to quiet: the decoder estimates the length from the first, large frames and stops there.
    loud_then_quiet = tone(12.0)
    loud_then_quiet[:, 6 * RATE :] *= 0.01
    whole = file_bytes(loud_then_quiet, "mp3", bitrate_mode="VARIABLE", compression_level=0.2)
    audio, _ = decode(io.BytesIO(whole), LIMITS)
    assert audio.shape == (2, 12 * RATE)
    headless = without_first_mp3_frame(whole)
    assert len(soundfile.read(io.BytesIO(headless))[0]) < 11 * RATE
    whole_again, _ = decode(io.BytesIO(headless), LIMITS)
    assert whole_again.shape[1] / RATE == pytest.approx(12.0, abs=0.1)


def with_flac_length(content: bytes, frames: int) -> bytes:
    fields = int.from_bytes(content[18:26], "big")
    return content[:18] + ((fields >> 36 << 36) | frames).to_bytes(8, "big") + content[26:]


@pytest.mark.parametrize("frames", [0, 3 * RATE])
def test_a_flac_whose_header_has_no_length_or_too_little_is_read_whole(frames: int, encoded: dict[str, bytes]) -> None:
    content = with_flac_length(encoded["flac"], frames)
    audio, _ = decode(io.BytesIO(content), LIMITS)
    np.testing.assert_array_equal(audio, decode(io.BytesIO(encoded["flac"]), LIMITS)[0])
    if frames == 0:
        assert probe(io.BytesIO(content)).duration_s == 6.0


def test_a_header_that_promises_too_much_is_rejected_before_decoding(encoded: dict[str, bytes]) -> None:
    assert error_of(with_flac_length(encoded["flac"], (1 << 36) - 1)) == ("rejected", "too_long")


def test_a_header_that_promises_more_than_there_is_counts_as_truncated(encoded: dict[str, bytes]) -> None:
    assert error_of(with_flac_length(encoded["flac"], 3000 * RATE)) == ("failed", "truncated")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_samples_are_caught_wherever_they_are(value: float) -> None:
    for position in (0, 6 * RATE - 1):
        x = tone()
        x[1, position] = value
        assert error_of(file_bytes(x, "wav", subtype="FLOAT")) == ("failed", "non_finite")


@pytest.mark.parametrize(
    ("x", "rate", "limits", "reason"),
    [
        (tone(6, 8000), 8000, LIMITS, "sample_rate"),
        (tone(6), RATE, replace(LIMITS, max_sample_rate=32000), "sample_rate"),
        (tone(6, 16000, channels=6), 16000, LIMITS, "channels"),
        (tone(4.99), RATE, LIMITS, "too_short"),
        (tone(0), RATE, LIMITS, "too_short"),
        (tone(6), RATE, replace(LIMITS, max_duration_s=5.5), "too_long"),
        (tone(6), RATE, replace(LIMITS, max_decoded_bytes=2 * 4 * 6 * RATE - 1), "decoded_size"),
    ],
)
def test_what_breaks_a_limit_is_rejected(x: np.ndarray, rate: int, limits: AudioLimits, reason: str) -> None:
    assert error_of(file_bytes(x, "wav", rate), limits) == ("rejected", reason)


def test_limits_are_inclusive() -> None:
    x = tone(5.0)
    exact = AudioLimits(5.0, 5.0, 2, RATE, RATE, x.nbytes)
    audio, _ = decode(io.BytesIO(file_bytes(x, "wav")), exact)
    assert audio.shape == x.shape


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(0, 3000),
    rates=st.tuples(*[st.sampled_from([8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000, 96000])] * 2),
    shape=st.sampled_from([(), (1,), (2,), (3, 2)]),
)
@example(frames=0, rates=(8000, 11025), shape=())
@example(frames=0, rates=(44100, 48000), shape=(2,))
@example(frames=10, rates=(96000, 24000), shape=(2,))  # soxr alone gives one sample more
@example(frames=1000, rates=(24000, 44100), shape=(2,))  # and here one less
def test_resampling_gives_exactly_the_rounded_length(
    frames: int, rates: tuple[int, int], shape: tuple[int, ...]
) -> None:
    x = np.random.default_rng(frames).normal(0, 0.1, (*shape, frames)).astype(np.float32)
    y = resample(x, *rates)
    assert y.shape == (*shape, round(frames * rates[1] / rates[0]))
    assert y.dtype == np.float32
    assert y.flags["C_CONTIGUOUS"]
    if rates[0] == rates[1]:
        assert y is x


def test_resampling_is_soxr_hq_for_every_channel_alone() -> None:
    x = tone(1.0)
    batch = resample(np.stack([x, x[::-1]]), RATE, 48000)
    for channel in (0, 1):
        expected = soxr.resample(x[channel], RATE, 48000, quality="HQ")
        np.testing.assert_array_equal(batch[0, channel], expected)
        np.testing.assert_array_equal(batch[1, 1 - channel], expected)


def test_resampling_keeps_a_tone() -> None:
    x = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE).astype(np.float32)
    expected = np.sin(2 * np.pi * 1000 * np.arange(24000) / 24000)
    np.testing.assert_allclose(resample(x, RATE, 24000)[2000:-2000], expected[2000:-2000], atol=1e-4)


def test_mono_is_the_mean_of_the_channels() -> None:
    np.testing.assert_array_equal(to_mono(np.array([[1, 0], [0.5, -1]], np.float32)), np.float32([0.75, -0.5]))
    np.testing.assert_array_equal(to_mono(np.array([[1, 2]], np.float32)), np.float32([1, 2]))


def test_float_wav_keeps_every_bit(tmp_path: Path) -> None:
    x = 3 * tone()  # beyond full scale
    write_audio(tmp_path / "x.wav", x, RATE, format="wav")
    audio, rate = decode(tmp_path / "x.wav", LIMITS)
    assert rate == RATE
    np.testing.assert_array_equal(audio, x)


def test_flac_rounds_to_the_nearest_of_16_bits_and_clips() -> None:
    x = tone()
    x[0, :4] = [1.0, -1.0, 7.0, -7.0]
    audio, _ = decode(io.BytesIO(encode_flac(x, RATE)), LIMITS)
    np.testing.assert_array_equal(audio[0, :4], np.float32([32767, -32768, 32767, -32768]) / 32768)
    assert np.abs(audio - x)[:, 4:].max() <= 0.5 / 32768


def test_flac_bytes_are_the_same_each_time_and_after_decoding(tmp_path: Path) -> None:
    first = encode_flac(tone(), RATE)
    assert encode_flac(tone(), RATE) == first
    assert encode_flac(decode(io.BytesIO(first), LIMITS)[0], RATE) == first
    write_audio(tmp_path / "x.flac", tone(), RATE)
    assert (tmp_path / "x.flac").read_bytes() == first


@pytest.mark.parametrize("format", ["flac", "wav"])
def test_non_finite_samples_are_not_written(format: str) -> None:
    with pytest.raises(ValueError, match="finite"):
        write_audio(io.BytesIO(), np.full((1, 100), np.nan, np.float32), RATE, format)


def test_an_unknown_output_format_is_refused() -> None:
    with pytest.raises(ValueError, match="'aac'"):
        write_audio(io.BytesIO(), tone(), RATE, "aac")
