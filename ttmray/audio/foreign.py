"""AAC and ALAC in MP4, raw AAC, and WMA, which libsndfile does not know: decoded by PyAV, an extra, to the same limits.

They are told by their first bytes, never by their names. Without PyAV such a file fails with a reason of its own.
"""

import importlib.util
import math
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from ttmray.audio.limits import AudioInfo, AudioLimits, check_upper_limits, too_loud
from ttmray.errors import ClipError

EXTENSIONS: frozenset[str] = frozenset({".m4a", ".aac", ".wma"})
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_TOLERANCE_S = 0.15
"""Encoders put up to 2,112 samples before the sound, and fill the last frame behind it."""
_TELLS_LENGTH = ("MP4", "WMA")


@dataclass(frozen=True)
class ForeignInfo:
    """What the container of such a file says; `frames` is 0 where it does not say the length."""

    sample_rate: int
    channels: int
    frames: int


def kind(stream: BinaryIO) -> str:
    """`MP4`, `AAC` or `WMA` by the first bytes; empty for anything else."""
    stream.seek(0)
    head = stream.read(16)
    if head[4:8] == b"ftyp":
        return "MP4"
    if head == _ASF:
        return "WMA"
    # an ADTS frame: twelve ones, layer 0, and a sampling rate that there is
    adts = len(head) > 6 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0 and (head[2] >> 2) & 15 < 13
    return "AAC" if adts else ""


def info(stream: BinaryIO, what: str) -> ForeignInfo:
    """Rate, channels and length by the container, without decoding.

    Args:
        what: see `kind`.

    Raises:
        ClipError: failed/`no_decoder` where PyAV is not installed, `not_audio`.
    """
    with _opened(stream, what) as container:
        return _info(container, what)


def decode(stream: BinaryIO, what: str, limits: AudioLimits) -> tuple[np.ndarray, int]:
    """All samples (channels, frames) float32 of the first sound in a file, and its rate in Hz.

    Raises:
        ClipError: failed/`no_decoder`, `not_audio`, `truncated`, `non_finite`; rejected, see `io.decode`. The lower
            limit of the duration is the caller's to check.
    """
    with _opened(stream, what) as container:
        told = _info(container, what)
        check_upper_limits(AudioInfo(told.sample_rate, told.channels, told.frames), limits)
        most = min(limits.max_duration_s * told.sample_rate, limits.max_decoded_bytes / 4 / told.channels)
        blocks, done = [], 0
        try:
            for block in _blocks(container, told):
                blocks.append(block)
                done += block.shape[1]
                if done > most:  # the container said less, or nothing
                    check_upper_limits(AudioInfo(told.sample_rate, told.channels, done), limits)
        except _errors() as error:
            raise _cut(done, told, f" ({error})") from error
    if not done:
        raise ClipError("failed", "not_audio", f"no sound in this {what} file")
    if told.frames - done > _TOLERANCE_S * told.sample_rate:
        raise _cut(done, told)
    audio = np.concatenate(blocks, axis=1)
    low, high = float(audio.min()), float(audio.max())
    if not math.isfinite(low + high):
        raise ClipError("failed", "non_finite", "NaN or infinite samples")
    if (peak := max(-low, high)) > limits.max_peak:
        raise ClipError("rejected", "too_loud", too_loud(peak, limits.max_peak))
    return audio, told.sample_rate


def _opened(stream: BinaryIO, what: str) -> Any:
    if importlib.util.find_spec("av") is None:
        raise ClipError(
            "failed", "no_decoder", f"{what} needs PyAV: pip install 'ttmray[av]', or convert it to FLAC or WAV"
        )
    import av

    stream.seek(0)
    try:
        return av.open(stream, mode="r", metadata_errors="replace")
    except _errors() as error:
        raise ClipError("failed", "not_audio", f"cannot be decoded as {what}: {error}") from error


def _errors() -> tuple[type[Exception], ...]:
    import av

    return (av.error.FFmpegError, ValueError, EOFError, OSError)


def _info(container: Any, what: str) -> ForeignInfo:
    if not container.streams.audio:
        raise ClipError("failed", "not_audio", f"no sound in this {what} file")
    sound = container.streams.audio[0]
    if sound.codec_context is None:
        raise ClipError("failed", "not_audio", f"the sound of this {what} file has a codec that nobody knows")
    rate, channels = int(sound.codec_context.sample_rate or 0), int(sound.codec_context.channels or 0)
    if rate <= 0 or channels <= 0:
        raise ClipError("failed", "not_audio", f"a {what} file of no known rate or number of channels")
    seconds = 0.0
    if what in _TELLS_LENGTH:  # a raw stream has an estimate
        if sound.duration is not None and sound.time_base is not None:
            seconds = float(sound.duration * sound.time_base)
        elif container.duration is not None:
            seconds = container.duration / 1e6
    return ForeignInfo(rate, channels, round(max(seconds, 0.0) * rate))


def _blocks(container: Any, told: ForeignInfo) -> Any:
    """Decoded samples (channels, n) float32 at the rate that the container says."""
    import av

    layout = container.streams.audio[0].codec_context.layout
    resampler = av.AudioResampler(format="fltp", layout=layout, rate=told.sample_rate)
    for frame in container.decode(audio=0):
        frame.pts = None  # gaps between time stamps are no silence
        for one in resampler.resample(frame):
            yield one.to_ndarray()
    for one in resampler.resample(None):
        yield one.to_ndarray()


def _cut(done: int, told: ForeignInfo, why: str = "") -> ClipError:
    held_s, told_s = done / told.sample_rate, told.frames / told.sample_rate
    promised = f" of {told_s:.2f} s" if told.frames else ""
    return ClipError("failed", "truncated", f"only {held_s:.2f} s{promised} can be decoded{why}")
