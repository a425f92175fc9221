"""Decoding, resampling and writing of audio files.

There is one decoder (soundfile, that is libsndfile with mpg123) for every file of the project: some other
MP3 decoders keep the encoder's delay, and stems and mixes decoded by different libraries are 25 ms apart.
"""

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import soundfile
import soxr
from scipy.io import wavfile

from ttmray.errors import ClipError

AUDIO_EXTENSIONS: frozenset[str] = frozenset({".wav", ".flac", ".mp3", ".ogg"})
"""File name extensions of audio, in lower case; match names case-insensitively."""

Source = str | os.PathLike[str] | BinaryIO

_BLOCK_FRAMES = 1 << 15  # decoded at a time; checked and transposed while it is in the cache
_TRUNCATION_TOLERANCE_S = 0.1  # encoder delay and padding in MP3 are below this
_UNREAD_SHARE = 0.05  # of an MP3 after its last decoded frame: more than tags take at the end of a song
_UNKNOWN_FRAMES = 1 << 62  # libsndfile reports 2^63 - 1 where a header does not give the length
_STREAMED_WAV_BYTES = 0x7FFF0000  # who writes WAV into a pipe puts 0x7FFFxxxx or 0xFFFFFFFF as data size


@dataclass(frozen=True)
class AudioLimits:
    """What may be decoded. Durations in seconds, rates in Hz; sizes are of the float32 samples as decoded."""

    min_duration_s: float = 5.0
    max_duration_s: float = 7200.0
    max_channels: int = 2
    min_sample_rate: int = 16000
    max_sample_rate: int = 192000
    max_decoded_bytes: int = 2 * 1024**3


@dataclass(frozen=True)
class AudioInfo:
    """What the header of a file says; `frames` of an MP3 without Xing header is an estimate."""

    sample_rate: int
    channels: int
    frames: int

    @property
    def duration_s(self) -> float:
        return self.frames / self.sample_rate


class _ForwardFile(soundfile.SoundFile):
    """A SoundFile that is only read from front to back.

    `SoundFile.read` seeks after every call if the file is seekable. With MP3 that can reset the decoder, and
    blocks then differ from the same file read at once: by up to 0.4 at block borders at low bit rates.
    """

    def seekable(self) -> bool:
        return False


@contextmanager
def _opened(source: Source) -> Iterator[tuple[BinaryIO, int, _ForwardFile]]:
    """Stream at the decoder's position, its size in bytes, and the decoder; closes only what it opened."""
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb", buffering=0) as file, _opened(file) as opened:
            yield opened
        return
    size = source.seek(0, os.SEEK_END)
    source.seek(0)
    if size == 0:
        raise ClipError("failed", "empty_file", "0 bytes")
    # By descriptor or file object, never by name: libsndfile then goes by content, not by the extension.
    handle = source.fileno() if isinstance(source, io.FileIO) else source
    try:
        sound = _ForwardFile(handle, closefd=False)
    except soundfile.LibsndfileError as error:
        raise ClipError("failed", "not_audio", f"cannot be decoded: {error.error_string}") from error
    with sound:
        yield source, size, sound


def _header(sound: soundfile.SoundFile) -> AudioInfo:
    if sound.frames >= _UNKNOWN_FRAMES:
        raise ClipError("failed", "unknown_length", "the header does not give the length; re-encode the file")
    return AudioInfo(sound.samplerate, sound.channels, sound.frames)


def probe(source: Source) -> AudioInfo:
    """Read the header of a local file or seekable file object.

    Raises:
        ClipError: failed/`empty_file`, failed/`not_audio` or failed/`unknown_length`.
        OSError: if the file cannot be opened.
    """
    with _opened(source) as (_, _, sound):
        return _header(sound)


def decode(source: Source, limits: AudioLimits, name: str = "") -> tuple[np.ndarray, int]:
    """Decode a whole file at its own sample rate.

    Upper limits are checked on the header before anything is decoded, and no more frames than the header
    gives are ever decoded, so a header that lies costs address space at most.

    What `truncated` catches (found by experiment with libsndfile 1.2.2): FLAC, by its decoder's error; WAV,
    by comparing the size of the data chunk with that of the file, as libsndfile itself quietly adapts; MP3
    with a Xing or Info header. What cannot be seen: a cut MP3 without such a header and a cut Ogg, whose
    length follows from the bytes that are there, and a loss of less than 0.1 s (FLAC: any loss is seen). Of
    an MP3 without a length header, libsndfile decodes only as much as it estimated; with a variable bit rate
    that can be far too little, and is `unknown_length` if more than 5 % of the file is left over.

    Args:
        source: local path, or seekable binary file object in memory or on a local disk, which is read from
            its start and left open. libsndfile takes an exception raised by the object for the end of the
            file, so fetch remote files first.
        limits: what to accept.
        name: what to call the file at the start of messages, if anything.

    Returns:
        float32 samples (channels, frames), each channel contiguous, full scale 1.0 (lossy formats can exceed
        it), and the sample rate in Hz.

    Raises:
        ClipError: failed/`empty_file`, `not_audio`, `truncated`, `unknown_length`, `non_finite`;
            rejected/`sample_rate`, `channels`, `too_short`, `too_long`, `decoded_size`.
        OSError: if the file cannot be opened.
    """
    try:
        with _opened(source) as (stream, size, sound):
            info = _header(sound)
            _check_upper_limits(info, limits)
            audio = _read(sound, info)
            _check_complete(stream, size, sound.format, info, audio.shape[1])
        # After decoding, as an MP3's header may promise a little too much, or far too little.
        duration_s = audio.shape[1] / info.sample_rate
        if duration_s < limits.min_duration_s:
            message = f"{duration_s:.2f} s, shorter than {limits.min_duration_s:g} s"
            raise ClipError("rejected", "too_short", message)
    except ClipError as error:
        if name:
            raise ClipError(error.status, error.reason, f"{name}: {error.message}") from error
        raise
    return audio, info.sample_rate


def _check_upper_limits(info: AudioInfo, limits: AudioLimits) -> None:
    low, high = limits.min_sample_rate, limits.max_sample_rate
    if not low <= info.sample_rate <= high:
        raise ClipError("rejected", "sample_rate", f"{info.sample_rate} Hz, outside {low} to {high} Hz")
    if info.channels > limits.max_channels:
        raise ClipError("rejected", "channels", f"{info.channels} channels, more than {limits.max_channels}")
    if info.duration_s > limits.max_duration_s:
        message = f"{info.duration_s:.2f} s, longer than {limits.max_duration_s:g} s"
        raise ClipError("rejected", "too_long", message)
    decoded = 4 * info.frames * info.channels
    if decoded > limits.max_decoded_bytes:
        message = f"{decoded} bytes when decoded, more than {limits.max_decoded_bytes}"
        raise ClipError("rejected", "decoded_size", message)


def _read(sound: _ForwardFile, info: AudioInfo) -> np.ndarray:
    # Pages of np.empty that are never written take no memory, so a header may promise too much.
    audio = np.empty((info.channels, info.frames), dtype=np.float32)
    buffer = np.empty((_BLOCK_FRAMES, info.channels), dtype=np.float32)
    done = 0
    while done < info.frames:
        try:
            block = sound.read(out=buffer[: info.frames - done])
        except soundfile.LibsndfileError as error:
            raise _truncated(done, info, error.error_string) from error
        if len(block) == 0:
            break
        if not np.isfinite(block).all():
            message = f"NaN or infinite samples after {done / info.sample_rate:.2f} s"
            raise ClipError("failed", "non_finite", message)
        audio[:, done : done + len(block)] = block.T
        done += len(block)
    # MP3 estimates are off by a fraction of a per cent: then a view does. It must not keep much more alive.
    return audio[:, :done] if done > 0.99 * info.frames else audio[:, :done].copy()


def _truncated(done: int, info: AudioInfo, why: str) -> ClipError:
    seconds = f"{done / info.sample_rate:.2f} of {info.duration_s:.2f} s"
    return ClipError("failed", "truncated", f"{seconds} can be decoded: {why}")


def _check_complete(stream: BinaryIO, size: int, format: str, info: AudioInfo, done: int) -> None:
    """Raise if less was decoded than the file should hold. `stream` stands where the decoder stopped."""
    position = stream.tell()
    if format == "MP3" and not _mp3_gives_length(stream):
        if done >= info.frames and size - position > _UNREAD_SHARE * size:
            message = f"no Xing header, and {size - position} of {size} bytes lie after the estimated end"
            raise ClipError("failed", "unknown_length", message)
        return
    if info.frames - done > _TRUNCATION_TOLERANCE_S * info.sample_rate:
        raise _truncated(done, info, "the file ends early")
    if format in ("WAV", "WAVEX"):
        missing_s = _wav_missing_s(stream, size)
        if missing_s > _TRUNCATION_TOLERANCE_S:
            raise ClipError("failed", "truncated", f"the data chunk lacks its last {missing_s:.2f} s")


def _mp3_gives_length(stream: BinaryIO) -> bool:
    """Whether the first MPEG frame, after an ID3v2 tag if there is one, is a Xing or Info header."""
    stream.seek(0)
    tag = stream.read(10)
    start = 0
    if tag[:3] == b"ID3" and len(tag) == 10:
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
    stream.seek(start)
    frame = stream.read(64)  # the marker follows 4 bytes of header and at most 32 of side information
    return b"Xing" in frame or b"Info" in frame


def _wav_missing_s(stream: BinaryIO, size: int) -> float:
    """Seconds by which the data chunk of a WAV file reaches past the end; 0 if its size is not given."""
    position, bytes_per_second = 12, 0
    while position + 8 <= size:
        stream.seek(position)
        chunk = stream.read(24)
        length = int.from_bytes(chunk[4:8], "little")
        if chunk[:4] == b"fmt ":
            bytes_per_second = int.from_bytes(chunk[16:20], "little")
        elif chunk[:4] == b"data":
            if length >= _STREAMED_WAV_BYTES or bytes_per_second == 0:
                return 0.0
            return max(0, position + 8 + length - size) / bytes_per_second
        position += 8 + length + length % 2
    return 0.0


def resample(x: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """Resample along the last axis with soxr HQ: flat to 0.9 of the Nyquist frequency, aliases below -140 dB.

    Args:
        x: float32 (..., frames) at `rate_in` Hz.

    Returns:
        float32 (..., round(frames * rate_out / rate_in)), contiguous; `x` itself if the rates are equal.
        Every channel has the same bits as if it were resampled alone.
    """
    if rate_in == rate_out:
        return x
    frames = round(x.shape[-1] * rate_out / rate_in)
    rows = np.ascontiguousarray(x, dtype=np.float32).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    resampled = np.ascontiguousarray(soxr.resample(rows.T, rate_in, rate_out, quality="HQ").T)
    if resampled.shape[1] != frames:  # soxr rounds a half either way
        exact = np.zeros((len(rows), frames), dtype=np.float32)
        kept = min(frames, resampled.shape[1])
        exact[:, :kept] = resampled[:, :kept]
        resampled = exact
    return resampled.reshape(*x.shape[:-1], frames)


def to_mono(x: np.ndarray) -> np.ndarray:
    """Mean over the channels: (channels, frames) -> (frames,), same dtype."""
    return x[0] if x.shape[0] == 1 else x.mean(axis=0)


def write_audio(file: Source, x: np.ndarray, rate: int, format: str = "flac") -> None:
    """Write samples (channels, frames) as 16-bit FLAC (`flac`) or float32 WAV (`wav`); see `encode_flac`.

    The same samples give the same bytes. WAV keeps every bit of float32 samples.

    Raises:
        ValueError: for another format, or NaN or infinite samples.
    """
    if format == "flac":
        # 16-bit samples decode as k / 32768, so this scale makes decode-encode-decode the identity.
        samples = np.clip(np.rint(_finite(x).T * 32768.0), -32768, 32767).astype(np.int16)
        soundfile.write(file, samples, rate, format="FLAC", subtype="PCM_16")
    elif format == "wav":
        wavfile.write(file, rate, _finite(x).T.astype(np.float32))  # libsndfile would add the time of day
    else:
        raise ValueError(f"format is 'flac' or 'wav', not {format!r}")


def _finite(x: np.ndarray) -> np.ndarray:
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError(f"expected finite samples of shape (channels, frames), got shape {x.shape}")
    return x


def encode_flac(x: np.ndarray, rate: int) -> bytes:
    """16-bit FLAC file of samples (channels, frames): clipped to full scale, rounded to nearest, no dither.

    The same samples give the same bytes, and what `decode` returns for the file encodes to it again.

    Raises:
        ValueError: for NaN or infinite samples.
    """
    file = io.BytesIO()
    write_audio(file, x, rate)
    return file.getvalue()
