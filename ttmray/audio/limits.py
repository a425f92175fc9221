"""What may be decoded: limits of length, rate, channels, size and level, and the messages where one is passed."""

import math
from dataclasses import dataclass

import numpy as np

from ttmray.errors import ClipError

UNKNOWN_FRAMES = 1 << 62
"""And more: libsndfile reports 2^63 - 1 where a header does not give the length."""
NO_LENGTH = "neither its header nor its bytes give the length; re-encode the file"


@dataclass(frozen=True)
class AudioLimits:
    """What may be decoded. Durations in seconds, rates in Hz; sizes are of the float32 samples as decoded."""

    min_duration_s: float = 5.0
    max_duration_s: float = 7200.0
    max_channels: int = 2
    min_sample_rate: int = 16000
    max_sample_rate: int = 192000
    max_decoded_bytes: int = 2 * 1024**3
    max_peak: float = 10.0
    """Largest sample, full scale 1.0: 10 is +20 dBFS, which no music is and samples in integer range always are."""


@dataclass(frozen=True)
class AudioInfo:
    """What header and bytes of a file say."""

    sample_rate: int
    channels: int
    frames: int

    @property
    def duration_s(self) -> float:
        return self.frames / self.sample_rate


def check_samples(audio: np.ndarray, rate: int, limits: AudioLimits) -> None:
    """Hold samples (channels, frames) that are in memory already to the limits of `decode`.

    Raises:
        ClipError: failed/`non_finite`; rejected/`sample_rate`, `channels`, `too_short`, `too_long`, `too_loud`,
            `decoded_size`.
    """
    info = AudioInfo(rate, audio.shape[0], audio.shape[1])
    check_upper_limits(info, limits)
    if info.duration_s < limits.min_duration_s:
        raise ClipError("rejected", "too_short", f"{info.duration_s:.2f} s, shorter than {limits.min_duration_s:g} s")
    if not np.isfinite(audio).all():
        raise ClipError("failed", "non_finite", "NaN or infinite samples")
    if (peak := float(np.abs(audio).max(initial=0.0))) > limits.max_peak:
        raise ClipError("rejected", "too_loud", too_loud(peak, limits.max_peak))


def check_upper_limits(info: AudioInfo, limits: AudioLimits) -> None:
    """Hold what a file says of itself to the upper limits of `decode`.

    Raises:
        ClipError: failed/`unknown_length`; rejected/`sample_rate`, `channels`, `too_long`, `decoded_size`.
    """
    low, high = limits.min_sample_rate, limits.max_sample_rate
    if info.frames >= UNKNOWN_FRAMES:
        raise ClipError("failed", "unknown_length", NO_LENGTH)
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


def too_loud(peak: float, most: float) -> str:
    """The message about a sample peak (full scale 1.0) beyond the limit."""
    level = f"sample peak {peak:.6g} ({20 * math.log10(peak):+.1f} dBFS), more than {most:g}"
    scales = {bits: 2.0 ** (bits - 1) for bits in (16, 24, 32)}
    likely = [bits for bits, scale in scales.items() if scale / 1000 < peak <= scale]
    return level + (f"; float samples in the range of {likely[0]}-bit integers? divide them first" if likely else "")
