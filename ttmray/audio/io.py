"""Decoding, resampling and writing of audio files.

There is one decoder (soundfile, that is libsndfile with mpg123) for every file that it knows: some other MP3 decoders
keep the encoder's delay, and stems and mixes decoded by different libraries are 25 ms apart. What it does not know and
people have all the same (.m4a, .aac, .wma) goes to `audio/foreign.py`.
"""

import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import BinaryIO

import numpy as np
import soundfile
import soxr
from scipy.io import wavfile

from ttmray.audio import foreign
from ttmray.audio.chatter import held_back
from ttmray.audio.limits import (
    NO_LENGTH,
    UNKNOWN_FRAMES,
    AudioInfo,
    AudioLimits,
    check_upper_limits,
    too_loud,
)
from ttmray.audio.survey import (
    FORMATS,
    TOLERANCE_S,
    Stretch,
    check_chunks,
    mismatch,
    survey,
    tells_length,
    truncated,
)
from ttmray.errors import ClipError

AUDIO_EXTENSIONS: frozenset[str] = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus"}) | foreign.EXTENSIONS
"""File name extensions of audio, in lower case; match names case-insensitively."""

READING = 3
"""Version of the rules by which files are read; what was measured under another is measured again."""

Source = str | os.PathLike[str] | BinaryIO

_BLOCK_FRAMES = 1 << 15  # decoded at a time; checked and transposed while it is in the cache
_PROBE_BYTES = 1 << 28


class _ForwardFile(soundfile.SoundFile):
    """A SoundFile that is only read from front to back.

    `SoundFile.read` seeks after every call if the file is seekable. With MP3 that can reset the decoder, and
    blocks then differ from the same file read at once: by up to 0.4 at block borders at low bit rates.
    """

    def seekable(self) -> bool:
        return False


@contextmanager
def _stream(source: Source) -> Iterator[BinaryIO]:
    """Unbuffered stream, so that its position is the decoder's, too; closes only what it opened."""
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb", buffering=0) as file, _stream(file) as stream:
            yield stream
        return
    if source.seek(0, os.SEEK_END) == 0:
        raise ClipError("failed", "empty_file", "0 bytes")
    yield source


@contextmanager
def _sound(stream: BinaryIO) -> Iterator[_ForwardFile]:
    stream.seek(0)
    # By descriptor or file object, never by name: libsndfile then goes by content, not by the extension.
    handle = stream.fileno() if isinstance(stream, io.FileIO) else stream
    try:
        sound = _ForwardFile(handle, closefd=False)
    except soundfile.LibsndfileError as error:
        raise ClipError("failed", "not_audio", f"cannot be decoded: {error.error_string}") from error
    with sound:
        if sound.format not in FORMATS:
            message = f"{sound.format_info} has no length that can be checked; convert it to WAV or FLAC"
            raise ClipError("failed", "unsupported_format", message)
        yield sound


def probe(source: Source) -> AudioInfo:
    """Length of a local file or seekable file object without decoding it.

    Where libsndfile finds no length, or only an estimate (an MP3 without a frame count), all bytes are read, of files
    up to 256 MiB.

    Raises:
        ClipError: failed/`empty_file`, `not_audio`, `unsupported_format`, `no_decoder`, `unknown_length`, `truncated`
            or `length_mismatch`.
        OSError: if the file cannot be opened.
    """
    with _stream(source) as stream, held_back():
        if what := foreign.kind(stream):
            held = foreign.info(stream, what)
            if not held.frames:
                raise ClipError("failed", "unknown_length", NO_LENGTH)
            return AudioInfo(held.sample_rate, held.channels, held.frames)
        told, format = None, None
        try:
            with _sound(stream) as sound:
                told, format = AudioInfo(sound.samplerate, sound.channels, sound.frames), sound.format
        except ClipError as error:
            if error.reason != "not_audio":
                raise
            problem = error
        if told is not None:
            if told.frames < UNKNOWN_FRAMES and (format != "MP3" or tells_length(stream)):
                return told
            problem = ClipError("failed", "unknown_length", NO_LENGTH)
        parts = survey(stream, format) if stream.seek(0, os.SEEK_END) <= _PROBE_BYTES else None
        if parts is None or not parts[0].samples:
            raise problem
        return _told(parts)


def _told(parts: Sequence[Stretch]) -> AudioInfo:
    """Rate of the first part, channels of the widest, frames of all together."""
    rate = parts[0].rate
    return AudioInfo(
        rate, max(part.channels for part in parts), sum(round(part.samples * rate / part.rate) for part in parts)
    )


def decode(source: Source, limits: AudioLimits, name: str = "") -> tuple[np.ndarray, int]:
    """Decode a whole file at its own sample rate, or say why it cannot be had as a whole.

    Upper limits are checked on what header and bytes say before anything is decoded, and no more frames than that are
    ever decoded, so a header that lies costs address space at most.

    What the header promises, what the bytes hold (`survey`) and what the decoder gives must agree within 0.1 s. Where a
    header promises nothing or less than there is (MP3, FLAC, a WAV that was never closed), all that the bytes hold is
    decoded; joined files are decoded one after the other, at the rate of the first. Where sound is missing or the bytes
    inside are damaged by more than that, the file fails. Not seen are a loss of less, damage that leaves the frames of
    an MP3 in place, and an MP3 without frame count that was cut: nothing says how long it was.

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
        ClipError: failed/`empty_file`, `not_audio`, `unsupported_format`, `no_decoder`, `truncated`,
            `length_mismatch`, `unknown_length`, `non_finite`; rejected/`sample_rate`, `channels`, `too_short`,
            `too_long`, `too_loud`, `decoded_size`.
        OSError: if the file cannot be opened.
    """
    try:
        with _stream(source) as stream, held_back():
            what = foreign.kind(stream)
            audio, rate = _decode_foreign(stream, what, limits) if what else _decode(stream, limits)
        # After decoding, as an MP3's header may promise a little too much.
        duration_s = audio.shape[1] / rate
        if duration_s < limits.min_duration_s:
            message = f"{duration_s:.2f} s, shorter than {limits.min_duration_s:g} s"
            raise ClipError("rejected", "too_short", message)
    except ClipError as error:
        if name:
            raise ClipError(error.status, error.reason, f"{name}: {error.message}") from error
        raise
    return audio, rate


def _decode_foreign(stream: BinaryIO, what: str, limits: AudioLimits) -> tuple[np.ndarray, int]:
    streams = [stream]
    if what == foreign.OGG_FLAC and (parts := survey(stream, "OGG")):
        streams = [io.BytesIO(part.file()) for part in parts]
    return _joined([part for one in streams for part in foreign.decode(one, what, limits)], limits)


def _decode(stream: BinaryIO, limits: AudioLimits) -> tuple[np.ndarray, int]:
    try:
        with _sound(stream) as sound:
            info, format = AudioInfo(sound.samplerate, sound.channels, sound.frames), sound.format
            if format != "MP3" and info.frames < UNKNOWN_FRAMES:
                check_upper_limits(info, limits)  # before the bytes are read
            begin = stream.tell()
            parts = survey(stream, format)
            if parts is not None and all(part.samples for part in parts):
                check_upper_limits(_told(parts), limits)
            if parts is None or _as_it_is(parts, info):
                stream.seek(begin)
                held = parts[0].samples if parts else 0
                try:
                    audio = _read(sound, replace(info, frames=min(info.frames, held or info.frames)), limits)
                    check_chunks(stream, audio.shape[1] / info.sample_rate)
                    return audio, info.sample_rate
                except ClipError as error:
                    if error.reason != "truncated" or parts is None or format != "MP3":
                        raise
                    # mpg123 stumbles over what stands behind the frames; the parts have nothing there
    except ClipError as error:
        if error.reason != "not_audio":
            raise
        parts = survey(stream, None)
        if parts is None:
            check_chunks(stream, 0.0)  # libsndfile refuses a CAF that was cut
            raise
        if all(part.samples for part in parts):
            check_upper_limits(_told(parts), limits)
    return _read_parts(parts, limits)


def _as_it_is(parts: Sequence[Stretch], info: AudioInfo) -> bool:
    """Whether the decoder sees the file as its bytes are, so that it need not be cut into parts."""
    (part, *others) = parts
    # an estimate that is too large does no harm: no more is read than the bytes hold
    reaches_end = info.frames >= part.samples - TOLERANCE_S * info.sample_rate
    return part.whole_file and not others and reaches_end


def _read_parts(parts: Sequence[Stretch], limits: AudioLimits) -> tuple[np.ndarray, int]:
    waves: list[foreign.WaveAndRate] = []
    rate = frames = 0
    for part in parts:
        stream = io.BytesIO(part.file())
        with _sound(stream) as sound:
            info = AudioInfo(sound.samplerate, sound.channels, sound.frames)
            rate = rate or info.sample_rate
            frames += round(info.frames * rate / info.sample_rate)
            check_upper_limits(AudioInfo(rate, info.channels, frames), limits)
            wave = _read(sound, info, limits)
            if not part.samples:
                check_chunks(stream, wave.shape[1] / info.sample_rate)
        if abs(part.samples - wave.shape[1]) > TOLERANCE_S * info.sample_rate and part.samples:
            held_s, promised_s = wave.shape[1] / info.sample_rate, part.samples / info.sample_rate
            raise mismatch(held_s, f"its bytes are {promised_s:.2f} s")
        if waves and part.samples > wave.shape[1]:
            # mpg123 drops its own delay at every start; the sound behind stays in its place
            wave = np.pad(wave, ((0, 0), (part.samples - wave.shape[1], 0)))
        waves.append((wave, info.sample_rate))
    return _joined(waves, limits)


def _joined(parts: Sequence[foreign.WaveAndRate], limits: AudioLimits) -> tuple[np.ndarray, int]:
    """Parts one after the other at the rate of the first; one channel fills as many as another part has."""
    rate = parts[0][1]
    if len(parts) == 1:
        return parts[0]
    seconds = sum(wave.shape[1] / part_rate for wave, part_rate in parts)
    channels = max(len(wave) for wave, _ in parts)
    check_upper_limits(AudioInfo(rate, channels, round(seconds * rate)), limits)
    if any(len(wave) not in (1, channels) for wave, _ in parts):
        counts = sorted({len(wave) for wave, _ in parts})
        raise ClipError("rejected", "channels", f"parts of {counts} channels, joined")
    waves = [resample(wave, part_rate, rate) for wave, part_rate in parts]
    return np.concatenate([np.broadcast_to(wave, (channels, wave.shape[1])) for wave in waves], axis=1), rate


def _read(sound: _ForwardFile, info: AudioInfo, limits: AudioLimits) -> np.ndarray:
    """All samples (channels, frames) that the decoder gives, which are as many as it promised."""
    if info.frames >= UNKNOWN_FRAMES:
        raise ClipError("failed", "unknown_length", NO_LENGTH)
    # Pages of np.empty that are never written take no memory, so a header may promise too much.
    audio = np.empty((info.channels, info.frames), dtype=np.float32)
    buffer = np.empty((_BLOCK_FRAMES, info.channels), dtype=np.float32)
    done, peak = 0, 0.0
    while done < info.frames:
        try:
            block = sound.read(out=buffer[: info.frames - done])
        except soundfile.LibsndfileError as error:
            raise truncated(done / info.sample_rate, info.duration_s, error.error_string) from error
        if len(block) == 0:
            break
        low, high = float(block.min()), float(block.max())
        if not math.isfinite(low + high):
            message = f"NaN or infinite samples after {done / info.sample_rate:.2f} s"
            raise ClipError("failed", "non_finite", message)
        peak = max(peak, -low, high)
        audio[:, done : done + len(block)] = block.T
        done += len(block)
    if peak > limits.max_peak:
        raise ClipError("rejected", "too_loud", too_loud(peak, limits.max_peak))
    if info.frames - done > TOLERANCE_S * info.sample_rate:
        raise truncated(done / info.sample_rate, info.duration_s)
    return audio[:, :done]


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
        common = min(frames, resampled.shape[1])
        exact[:, :common] = resampled[:, :common]
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
