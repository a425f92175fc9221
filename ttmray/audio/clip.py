"""A sound file becomes a measured clip: read, decoded, padded, resampled, refused where it is silent, its levels taken.

The one way of `ttmray score`, the evaluation and the ranker. The corpus job decodes a track once for many clips and has
its own limits, but takes pad, silence and levels from the same functions.
"""

import hashlib
import io
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ttmray.audio import io as audio_io
from ttmray.audio import loudness, segment
from ttmray.audio.level import require_audible
from ttmray.audio.limits import AudioLimits, check_samples
from ttmray.errors import ClipError, UserError
from ttmray.quarantine import clip_error
from ttmray.storage import BAD_NAME, name_problem, split_path

SAMPLE_RATE = 44100
"""Hz at which clips are measured, separated and handed to the encoders."""
LIMITS = AudioLimits(min_duration_s=0.5, min_sample_rate=8000, max_channels=2)
"""Half a second is the shortest that the loudness standard (0.4 s) and MERT can say anything about."""
CLIP_S = 10.0
"""Clips of all bundles but the small ones (`Bundle.clip_s`)."""


@dataclass
class Reading:
    """What a file holds.

    Attributes:
        facts: as far as they are known: `sha256` of the file, `duration_s`, `sample_rate`, `channels`, and of the clip
            `silence`, `lufs` (None where every block is under the absolute gate), `true_peak_db`.
        wave: (channels, samples) float32 at 44.1 kHz; None with an error.
        error: why it is no clip.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    wave: np.ndarray | None = None
    error: ClipError | None = None

    def mono(self) -> np.ndarray:
        """(samples,) float32: the mean of the channels, as encoders hear it.

        Raises:
            ClipError: there is no clip.
        """
        if self.error is not None:
            raise self.error
        assert self.wave is not None
        return self.wave.mean(axis=0)


def read_clip(path: str, clip_s: float = CLIP_S, *, middle: bool = False, measured: bool = True) -> Reading:
    """A file as a clip; what is a clip long, or half of it, is padded with zeros to a clip, as in the corpus job.

    Args:
        path: local or s3://.
        clip_s: length of a clip of the bundle that is to hear it, in seconds.
        middle: of longer files take only the clip in the middle.
        measured: take silence, loudness and true peak.

    Raises:
        Exception: what would hit every other file too (`quarantine.clip_error`).
    """
    reading = Reading()
    try:
        reading.wave = _measured(*_decoded(path, reading.facts), clip_s, middle, measured, reading.facts)
    except UserError as error:
        reading.error = ClipError("failed", "unreadable", error.message)
    except Exception as error:
        reading.error = clip_error(error)
    return reading


def clip_of(
    audio: np.ndarray, rate: int, clip_s: float = CLIP_S, *, middle: bool = False, measured: bool = True
) -> Reading:
    """Samples that are in memory already as a clip: the same numbers as those of a file that holds them.

    Args:
        audio: (channels, samples) float32, full scale 1.0.
        rate: Hz.
        clip_s, middle, measured: as in `read_clip`.

    Raises:
        Exception: what would hit every other clip too (`quarantine.clip_error`).
    """
    reading = Reading()
    try:
        check_samples(audio, rate, LIMITS)
        reading.wave = _measured(audio, rate, clip_s, middle, measured, reading.facts)
    except Exception as error:
        reading.error = clip_error(error)
    return reading


def read_whole(path: str) -> tuple[np.ndarray, int]:
    """A file as it is: (channels, samples) float32, and its rate in Hz.

    Raises:
        ClipError: it cannot be decoded, or is outside of `LIMITS`.
        UserError: it is not there.
    """
    return _decoded(path, {})


def levels(x: np.ndarray, rate: int = SAMPLE_RATE) -> dict[str, float | None]:
    """`lufs` (integrated, None where every block is under the absolute gate) and `true_peak_db` (dBTP).

    Args:
        x: (channels, frames) float, full scale 1.0. A mono source is one channel: its copy would count twice (+3 LU).
    """
    values = {"lufs": loudness.integrated_loudness(x, rate), "true_peak_db": loudness.true_peak(x, rate)}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _decoded(path: str, facts: dict[str, Any]) -> tuple[np.ndarray, int]:
    folder, name = split_path(path)
    if problem := name_problem(name):
        raise ClipError("rejected", BAD_NAME, problem)
    data = folder.read(name)
    facts["sha256"] = hashlib.sha256(data).hexdigest()
    return audio_io.decode(io.BytesIO(data), LIMITS)


def _measured(
    audio: np.ndarray, rate: int, clip_s: float, middle: bool, measured: bool, facts: dict[str, Any]
) -> np.ndarray:
    rule = segment.SegmentRule.for_files(clip_s)
    facts |= {"duration_s": audio.shape[1] / rate, "sample_rate": rate, "channels": audio.shape[0]}
    segments = segment.partition(audio.shape[1], rate, rule)
    if len(segments) == 1 and segments[0][1] > audio.shape[1]:  # one clip, padded
        audio = segment.cut(audio, rate, *segments[0])
    elif middle:
        first = max(0, (audio.shape[1] - round(rule.clip_s * rate)) // 2)
        audio = audio[:, first : first + round(rule.clip_s * rate)]
    audio = audio_io.resample(audio, rate, SAMPLE_RATE)
    if measured:
        facts["silence"] = loudness.silence_ratio(audio, SAMPLE_RATE)
    require_audible(audio)
    if measured:
        facts |= levels(audio)
    return audio
