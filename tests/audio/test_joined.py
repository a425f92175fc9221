"""Files behind files, tags around them, and what a container says of itself: heard as a whole, or said not to be."""

import importlib.util
import io
import struct

import numpy as np
import pytest
import soundfile

from ttmray.audio import mpeg
from ttmray.audio.containers import _ogg_checksum
from ttmray.audio.io import decode
from ttmray.audio.level import silence
from ttmray.audio.limits import AudioLimits
from ttmray.errors import ClipError

RATE = 44100
LIMITS = AudioLimits(min_duration_s=0.5)
PYAV = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV is an extra: pip install 'ttmray[av]'")
ID3V1 = b"TAG" + b"x" * 125


def noise(seconds: float, seed: int, rate: int = RATE, channels: int = 2) -> np.ndarray:
    """Of which every moment is like no other; quiet enough for every codec."""
    return np.random.default_rng(seed).normal(0, 0.1, (channels, round(seconds * rate))).astype(np.float32)


A, B = noise(3.0, 1), noise(2.0, 2)


def file_of(wave: np.ndarray, format: str, rate: int = RATE, subtype: str | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave.T, rate, format=format, subtype=subtype, **options)
    return file.getvalue()


def by_av(wave: np.ndarray, container: str, codec: str, rate: int = RATE, sample: str = "fltp") -> bytes:
    import av

    sink, layout = io.BytesIO(), "stereo" if len(wave) == 2 else "mono"
    if sample == "s16":
        wave = np.rint(wave * 32767).astype(np.int16)
    with av.open(sink, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        for start in range(0, wave.shape[1], 1024):
            block = wave[:, start : start + 1024]
            block = block.T.reshape(1, -1) if sample == "s16" else block
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format=sample, layout=layout)
            frame.rate, frame.pts = rate, start
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return sink.getvalue()


def mp3(wave: np.ndarray, header: bool = True) -> bytes:
    content = file_of(wave, "MP3", bitrate_mode="CONSTANT", compression_level=0.5)
    (piece,) = mpeg.walk(content).pieces
    assert piece.header is not None
    return content if header else content[piece.header[1] :]


def id3v2(body: bytes, footer: bool = False) -> bytes:
    size = len(body)
    sizes = bytes([size >> 21 & 127, size >> 14 & 127, size >> 7 & 127, size & 127])
    flags = b"\x10" if footer else b"\0"
    return b"ID3\x04\0" + flags + sizes + body + (b"3DI\x04\0\x10" + sizes if footer else b"")


def seconds(content: bytes) -> float:
    audio, rate = decode(io.BytesIO(content), LIMITS)
    return audio.shape[1] / rate


def reason(content: bytes) -> str:
    with pytest.raises(ClipError) as raised:
        decode(io.BytesIO(content), LIMITS)
    return raised.value.reason


def lag_s(audio: np.ndarray, of: np.ndarray) -> float:
    """Where the last second of `of` begins in `audio`, both (channels, samples) at 44.1 kHz."""
    end = of[0, -RATE:]
    size = 1 << int(np.ceil(np.log2(audio.shape[1] + RATE)))
    products = np.fft.irfft(np.fft.rfft(audio[0], size) * np.conj(np.fft.rfft(end, size)), size)
    return float(np.argmax(products[: audio.shape[1]])) / RATE


def test_an_mp3_that_breaks_off_in_a_frame_before_another_is_joined_to_it_is_truncated() -> None:
    first, second = mp3(A), mp3(B)
    (piece,) = mpeg.walk(first).pieces
    start = piece.spans[0][0]
    for _ in range(50):
        start += mpeg._Frames(first).at(start)[0]  # type: ignore[index]
    for cut in (start + 1, start + 3, start + 100):
        assert reason(first[:cut] + second) == "truncated"


def test_what_is_put_into_an_mp3_here_and_there_breaks_frames_and_is_damage() -> None:
    content = mp3(A, header=False)
    put_in = b"\x02" + b"StreamTitle='of a station';".ljust(32, b"\0")
    blocks = [content[start : start + 8192] for start in range(0, len(content), 8192)]
    assert len(blocks) > 5
    assert reason(put_in.join(blocks)) == "length_mismatch"
    assert seconds(content[:8192] + put_in + content[8192:]) == pytest.approx(3.0, abs=0.1), "one such place is short"


def test_frames_that_change_their_channels_stay_where_they_are_in_time() -> None:
    wave = noise(4.0, 3)
    stereo, mono = (mp3(part, header=False) for part in (wave, wave[:1]))
    spans = []
    for content in (stereo, mono):
        frames, position = [], 0
        while frame := mpeg._Frames(content).at(position):
            frames.append(content[position : position + frame[0]])
            position += frame[0]
        spans.append(frames)
    mixed = b"".join(spans[i // 10 % 2][i] for i in range(min(map(len, spans))))
    audio, _ = decode(io.BytesIO(mixed), LIMITS)
    plain, _ = decode(io.BytesIO(stereo), LIMITS)
    assert abs(audio.shape[1] - plain.shape[1]) <= 1152
    assert lag_s(audio, wave) == pytest.approx(lag_s(plain, wave), abs=0.015), "the delay of one decoder, not of all"


def test_zeros_behind_a_tag_are_its_padding() -> None:
    content = mp3(A, header=False)
    assert seconds(id3v2(b"\x01" * 400) + bytes(30_000) + content) == pytest.approx(3.0, abs=0.1)
    assert reason(bytes(30_000) + content) == "length_mismatch", "without a tag they may stand for sound"


@pytest.mark.parametrize("format", ["MP3", "FLAC", "OGG"])
@pytest.mark.parametrize("size", [400, 200_000])
def test_a_tag_may_hold_the_first_bytes_of_any_format(format: str, size: int) -> None:
    content = mp3(A) if format == "MP3" else file_of(A, format)
    tag = id3v2((b"OggS fLaC RIFF ID3 " * size)[:size], footer=True)
    assert seconds(tag + content) == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("size", [30, 5_000, 20_001])
def test_a_tag_whose_size_reaches_into_the_sound_takes_none_of_it(header: bool, size: int) -> None:
    whole = mp3(A, header)
    tag = id3v2(bytes(size))[:10]  # of a tag whose padding is gone
    assert seconds(tag + whole) == pytest.approx(seconds(whole), abs=0.03)
    assert seconds(whole + tag + whole) == pytest.approx(2 * seconds(whole), abs=0.06)


def test_frames_in_a_tag_that_ends_before_the_sound_are_no_sound() -> None:
    whole = mp3(A)
    assert seconds(id3v2(mp3(B, header=False)) + whole) == seconds(whole)
    assert seconds(id3v2(mp3(B)[:3000]) + bytes(300) + whole) == seconds(whole)


def test_every_frame_between_many_damaged_places_is_counted_once() -> None:
    content, junk = mp3(A[:, :RATE], header=False), b"\x01\x02\x03"
    size = mpeg._Frames(content).at(0)
    assert size is not None
    run = content[: 4 * size[0]]
    (piece,) = mpeg.walk((run + junk) * 2000).pieces
    assert len(piece.spans) == piece.gaps + 1 >= 1900
    assert piece.frames == sum(frames for _, _, frames in piece.spans)


@pytest.mark.parametrize("format", ["WAV", "W64", "RF64", "AIFF", "AU", "CAF"])
@pytest.mark.parametrize("second", ["the same", "WAV", "FLAC"])
def test_a_file_behind_another_is_never_left_out_without_a_word(format: str, second: str) -> None:
    first = file_of(A, format, subtype="PCM_16")
    behind = first if second == "the same" else file_of(B, second, subtype="PCM_16")
    assert reason(first + behind) == "length_mismatch"


def test_a_caf_that_leaves_its_size_open_is_read_to_its_end() -> None:
    content = bytearray(file_of(A, "CAF", subtype="PCM_16"))
    at = content.find(b"data") + 4
    content[at : at + 8] = b"\xff" * 8
    assert seconds(bytes(content)) == pytest.approx(3.0, abs=0.001)


def ogg_pages(content: bytes) -> list[bytearray]:
    pages, position = [], 0
    while position < len(content):
        head = 27 + content[position + 26]
        end = position + head + sum(content[position + 27 : position + head])
        pages.append(bytearray(content[position:end]))
        position = end
    return pages


def signed(page: bytearray) -> bytes:
    """A page with its right checksum, from the definition: polynomial 0x04C11DB7, no inversion."""
    page[22:26] = bytes(4)
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ 0x104C11DB7) if crc & 0x80000000 else crc << 1
    page[22:26] = crc.to_bytes(4, "little")
    assert _ogg_checksum(bytes(page))
    return bytes(page)


@pytest.mark.parametrize(("subtype", "rate"), [("VORBIS", RATE), ("OPUS", 48000)])
def test_an_ogg_whose_positions_or_pages_go_back_is_a_mismatch(subtype: str, rate: int) -> None:
    whole = file_of(noise(3.0, 4, rate), "OGG", rate, subtype)
    assert seconds(whole) == pytest.approx(3.0, abs=0.01)
    for position in (rate, -1):
        pages = ogg_pages(whole)
        pages[-1][6:14] = struct.pack("<q", position)
        assert reason(b"".join([*pages[:-1], signed(pages[-1])])) == "length_mismatch"
    pages = ogg_pages(whole)
    middle = len(pages) // 2
    assert reason(b"".join([*pages[:middle], pages[middle], *pages[middle:]])) == "length_mismatch"


@PYAV
def test_flac_in_ogg_is_read_and_checked_like_every_ogg() -> None:
    first, second = (by_av(wave, "ogg", "flac", sample="s16") for wave in (A, B))
    audio, rate = decode(io.BytesIO(first + second), LIMITS)
    assert audio.shape[1] / rate == pytest.approx(5.0, abs=0.05)
    np.testing.assert_allclose(audio[:, :RATE], A[:, :RATE], atol=1e-4)
    assert reason(first[: len(first) // 2]) == "truncated"
    assert seconds(id3v2(b"x" * 3000) + first) == seconds(first)
    assert reason(id3v2(b"x" * 3000) + first[: len(first) // 2]) == "truncated"


@PYAV
def test_alac_in_caf_is_read_and_its_damage_seen() -> None:
    content = file_of(A, "CAF", subtype="ALAC_16")
    audio, _ = decode(io.BytesIO(content), LIMITS)
    np.testing.assert_allclose(audio[:, : A.shape[1]], A, atol=1e-4)
    middle = len(content) // 2
    assert reason(content[:middle] + bytes(50_000) + content[middle + 50_000 :]) == "truncated"


@PYAV
def test_tags_around_raw_aac_are_neither_sound_nor_damage() -> None:
    content = by_av(A, "adts", "aac")
    ape = b"APETAGEX" + struct.pack("<IIII", 2000, 32, 0, 0) + bytes(8)
    for before, behind in ((id3v2(b"\x01" * 300), b""), (id3v2(b"\x01" * 200_000), ID3V1), (b"", ape + ID3V1)):
        assert seconds(before + content + behind) == pytest.approx(3.0, abs=0.1)
    assert seconds(content + id3v2(b"\x01" * 300) + content) == pytest.approx(6.0, abs=0.2)
    middle = len(content) // 2
    assert reason(content[:middle] + bytes(9000) + content[middle + 9000 :]) == "truncated"


@PYAV
def test_raw_aac_joined_from_other_rates_and_channels_is_read_to_its_end() -> None:
    content = by_av(A, "adts", "aac") + by_av(noise(2.0, 5, 48000, 1), "adts", "aac", 48000)
    audio, rate = decode(io.BytesIO(content), LIMITS)
    assert (rate, len(audio)) == (RATE, 2)
    assert audio.shape[1] / rate == pytest.approx(5.0, abs=0.15)
    np.testing.assert_array_equal(audio[0, -RATE:], audio[1, -RATE:])


@PYAV
@pytest.mark.parametrize(("container", "codec"), [("ipod", "aac"), ("ipod", "alac")])
def test_an_mp4_behind_an_mp4_is_never_left_out_without_a_word(container: str, codec: str) -> None:
    wave = A if codec == "aac" else np.rint(A * 32767).astype(np.int16)
    content = by_av(wave, container, codec, sample="fltp" if codec == "aac" else "s16p")
    assert seconds(id3v2(b"\x01" * 50) + content) == pytest.approx(3.0, abs=0.1)
    assert seconds(content + ID3V1) == pytest.approx(3.0, abs=0.1)
    assert reason(content + content) == "length_mismatch"


def test_a_constant_offset_is_no_sound() -> None:
    offset = np.full((2, RATE), 0.5, np.float32)
    quiet = 1e-5 * noise(1.0, 6)
    assert "sample peak" in silence(offset)
    assert "sample peak" in silence(offset + quiet)
    assert "the channels cancel" in silence(np.stack([A[0], -A[0]]) + np.float32(0.3))
    assert not silence(offset + 0.01 * A[:, :RATE])
