"""The segment rule: which 10 s clips are taken from a track.

A track shorter than `min_s` gives no clip. Otherwise it gives as many clips as fit without overlap, at least
one and at most `max_clips`, spread evenly from the first sample to the last. Positions are counted in samples
at the track's own rate, before any resampling. This is the rule of the challenge baseline's data preparation,
so that clip numbers and positions agree with clips that were cut there.
"""

from dataclasses import dataclass
from typing import overload

import numpy as np

from ttmray.errors import ClipError


@dataclass(frozen=True)
class SegmentRule:
    """Clip length, shortest usable track, and most clips per track (seconds, seconds, count)."""

    clip_s: float = 10.0
    min_s: float = 5.0
    max_clips: int = 10

    @classmethod
    def for_files(cls, clip_s: float) -> "SegmentRule":
        """For single files of a bundle whose clips are `clip_s` long: half of that is enough for a padded clip."""
        return cls(clip_s, clip_s / 2)

    def __post_init__(self) -> None:
        if not (self.min_s > 0 and self.clip_s > 0 and self.max_clips >= 1):
            raise ValueError(f"clip_s, min_s and max_clips must be positive: {self}")


_DEFAULT_RULE = SegmentRule()


def _counts(num_samples: np.ndarray, sample_rate: int, rule: SegmentRule) -> np.ndarray:
    clip = int(sample_rate * rule.clip_s)
    if clip < 1:
        raise ValueError(f"a clip of {rule.clip_s} s has no sample at {sample_rate} Hz")
    fitting = np.clip(num_samples // clip, 1, rule.max_clips)
    return np.where(num_samples < sample_rate * rule.min_s, 0, fitting)


def partition(num_samples: int, sample_rate: int, rule: SegmentRule = _DEFAULT_RULE) -> list[tuple[int, int]]:
    """Segments of a track as (start, end), end exclusive, in samples at the track's own rate.

    All segments are `clip_s` long. Only the single segment of a track that is shorter than `clip_s` ends
    past the track; `cut` pads it with zeros. The list is empty if the track is shorter than `min_s`.
    """
    count = int(_counts(np.asarray(num_samples), sample_rate, rule))
    clip = int(sample_rate * rule.clip_s)
    hop = (num_samples - clip) // (count - 1) if count > 1 else 0
    return [(i * hop, i * hop + clip) for i in range(count)]


@overload
def count_clips(duration_s: float, sample_rate: int = ..., rule: SegmentRule = ...) -> int: ...
@overload
def count_clips(duration_s: np.ndarray, sample_rate: int = ..., rule: SegmentRule = ...) -> np.ndarray: ...
def count_clips(
    duration_s: float | np.ndarray, sample_rate: int = 44100, rule: SegmentRule = _DEFAULT_RULE
) -> int | np.ndarray:
    """Number of segments of a track of `duration_s` seconds; durations of any shape give int64 counts of that shape.

    Catalogues give durations rounded to, say, 0.1 s and MP3 headers may be estimates, so this is what to
    expect of a track, not what its decoded samples give.
    """
    num_samples = np.rint(np.asarray(duration_s, dtype=np.float64) * sample_rate).astype(np.int64)
    counts = _counts(num_samples, sample_rate, rule)
    return counts if isinstance(duration_s, np.ndarray) else int(counts)


def cut(audio: np.ndarray, rate: int, start: int, end: int) -> np.ndarray:
    """Samples [start, end) of `audio` (channels, frames), zero-padded on the right if the track ends early.

    Args:
        audio: (channels, frames) at `rate` Hz.
        rate: sample rate, for the message of the error.
        start, end: segment in samples at `rate`.

    Returns:
        New array (channels, end - start) of the dtype of `audio`.

    Raises:
        ClipError: failed/`past_end` if the segment starts at or after the end, which means that it was
            planned from a header that promised a longer track.
        ValueError: if the segment is empty or starts before 0.
    """
    if not 0 <= start < end:
        raise ValueError(f"not a segment: start {start}, end {end}")
    channels, frames = audio.shape
    if start >= frames:
        message = f"segment starts at {start / rate:.2f} s, the track ends at {frames / rate:.2f} s"
        raise ClipError("failed", "past_end", message)
    segment = np.zeros((channels, end - start), dtype=audio.dtype)
    available = audio[:, start:end]
    segment[:, : available.shape[1]] = available
    return segment
