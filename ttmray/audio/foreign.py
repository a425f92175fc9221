"""AAC and ALAC in MP4, raw AAC, and WMA, which libsndfile does not know, and two kinds that it misreads: FLAC in Ogg,
which it gives up on, and ALAC in CAF, whose damage it passes over. Decoded by PyAV, an extra, to the same limits.

They are told by their first bytes, never by their names. Without PyAV such a file fails with a reason of its own.
"""

import importlib.util
import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, BinaryIO

import numpy as np

from ttmray.audio import mpeg
from ttmray.audio.limits import AudioInfo, AudioLimits, check_upper_limits, too_loud
from ttmray.errors import ClipError

EXTENSIONS: frozenset[str] = frozenset({".m4a", ".aac", ".wma"})
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_TOLERANCE_S = 0.15
"""Encoders put up to 2,112 samples before the sound, and fill the last frame behind it."""
OGG_FLAC = "FLAC in Ogg"
_TELLS_LENGTH = ("MP4", "WMA", "CAF", OGG_FLAC)
_HEAD_BYTES = 1 << 20
"""Of raw AAC, which tell rate and channels; no more is known of it without decoding all."""
_ONCE_IN_MP4 = (b"ftyp", b"moov")
WaveAndRate = tuple[np.ndarray, int]
"""Samples (channels, n) float32, and their rate in Hz."""


@dataclass(frozen=True)
class ForeignInfo:
    """What the container of such a file says; `frames` is 0 where it does not say the length."""

    sample_rate: int
    channels: int
    frames: int


def kind(stream: BinaryIO) -> str:
    """`MP4`, `AAC`, `WMA`, `CAF` or `FLAC in Ogg` by the first bytes behind ID3v2 tags; empty for anything else."""
    begin = _behind_tags(stream)
    stream.seek(begin)
    head = stream.read(48)
    if head[4:8] == b"ftyp":
        return "MP4"
    if head[:16] == _ASF:
        return "WMA"
    if head[:4] == b"caff" and head[28:32] == b"alac":
        return "CAF"
    if head[:4] == b"OggS" and head[28:33] == b"\x7fFLAC":
        return OGG_FLAC
    return "AAC" if _is_adts(head) else ""


def _behind_tags(stream: BinaryIO) -> int:
    begin = 0
    while True:
        stream.seek(begin)
        if not (length := mpeg.id3v2_bytes(stream.read(10))):
            return begin
        begin += length


def _is_adts(head: bytes) -> bool:
    """Whether an ADTS frame begins: twelve ones, layer 0, and a sampling rate that there is."""
    return len(head) > 6 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0 and (head[2] >> 2) & 15 < 13


def _adts_bytes(head: bytes) -> int:
    """Length of the ADTS frame that begins with `head`; 0 where none does."""
    return (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5 if _is_adts(head) else 0


def _without_tags(stream: BinaryIO, what: str, most: int) -> BinaryIO:
    """The file, of raw AAC without tags before, between and behind its frames: the decoder takes them for damage.

    Args:
        most: bytes of raw AAC that are read behind the tags in front; -1: all.
    """
    begin = _behind_tags(stream)
    if what != "AAC":
        stream.seek(begin)
        return io.BytesIO(stream.read()) if begin else stream
    stream.seek(begin)
    content = stream.read(most)
    runs, position = [], 0
    while position < len(content):
        start = position
        while length := _adts_bytes(content[position : position + 7]):
            position += length
        after = mpeg.skip_tags(content, position)
        if after == position < len(content):
            position = after = len(content)  # damage, of which the decoder says more
        runs.append(content[start:position])
        position = after
    return io.BytesIO(b"".join(runs))


def _check_boxes(stream: BinaryIO) -> None:
    """An MP4 describes itself once; where it does so again, another file was joined to it, which nobody would hear.

    Raises:
        ClipError: failed/`length_mismatch`.
    """
    size, position, seen = stream.seek(0, os.SEEK_END), 0, set[bytes]()
    while position + 8 <= size:
        stream.seek(position)
        head = stream.read(16)
        length, name = int.from_bytes(head[:4], "big"), head[4:8]
        if name in _ONCE_IN_MP4 and name in seen:
            message = f"another file begins in it at byte {position} of {size}; separate the two"
            raise ClipError("failed", "length_mismatch", message)
        seen.add(name)
        length = int.from_bytes(head[8:], "big") if length == 1 else length
        if length < 8:  # to the end, or no box
            break
        position += length


def info(stream: BinaryIO, what: str) -> ForeignInfo:
    """Rate, channels and length by the container, without decoding.

    Args:
        what: see `kind`.

    Raises:
        ClipError: failed/`no_decoder` where PyAV is not installed, `not_audio`,
            `length_mismatch`.
    """
    with _opened(stream, what, _HEAD_BYTES) as container:
        return _info(container, what)


def decode(stream: BinaryIO, what: str, limits: AudioLimits) -> list[WaveAndRate]:
    """All samples (channels, n) float32 of the first sound in a file, with their rate; one part, or more where rate or
    channels change inside.

    Raises:
        ClipError: failed/`no_decoder`, `not_audio`, `truncated`, `length_mismatch`, `non_finite`; rejected, see
            `io.decode`. The lower limit of the duration is the caller's to check.
    """
    with _opened(stream, what) as container:
        told = _info(container, what)
        check_upper_limits(AudioInfo(told.sample_rate, told.channels, told.frames), limits)
        most_s = min(limits.max_duration_s, limits.max_decoded_bytes / 4 / told.channels / told.sample_rate)
        blocks: list[WaveAndRate] = []
        done_s = 0.0
        try:
            for block, rate in _blocks(container):
                blocks.append((block, rate))
                done_s += block.shape[1] / rate
                # the container said less, nothing, or something else
                if done_s > most_s or (len(block), rate) != (told.channels, told.sample_rate):
                    check_upper_limits(AudioInfo(rate, len(block), round(done_s * rate)), limits)
        except _errors() as error:
            raise _cut(done_s, told, f" ({error})") from error
    if not done_s:
        raise ClipError("failed", "not_audio", f"no sound in this {what} file")
    if told.frames / told.sample_rate - done_s > _TOLERANCE_S:
        raise _cut(done_s, told)
    parts = [_joined(list(run)) for _, run in groupby(blocks, lambda part: (len(part[0]), part[1]))]
    low = min(float(audio.min()) for audio, _ in parts)
    high = max(float(audio.max()) for audio, _ in parts)
    if not math.isfinite(low + high):
        raise ClipError("failed", "non_finite", "NaN or infinite samples")
    if (peak := max(-low, high)) > limits.max_peak:
        raise ClipError("rejected", "too_loud", too_loud(peak, limits.max_peak))
    return parts


def _joined(run: list[WaveAndRate]) -> WaveAndRate:
    return np.concatenate([block for block, _ in run], axis=1), run[0][1]


def _opened(stream: BinaryIO, what: str, most: int = -1) -> Any:
    if importlib.util.find_spec("av") is None:
        raise ClipError(
            "failed", "no_decoder", f"{what} needs PyAV: pip install 'ttmray[av]', or convert it to FLAC or WAV"
        )
    import av

    stream = _without_tags(stream, what, most)
    if what == "MP4":
        _check_boxes(stream)
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


def _blocks(container: Any) -> Iterator[WaveAndRate]:
    """Decoded samples, at the rate and with the channels that each frame has."""
    import av

    resampler, form = None, None
    for frame in container.decode(audio=0):
        if resampler is None or form != (frame.format.name, frame.layout.name, frame.sample_rate):
            form = (frame.format.name, frame.layout.name, frame.sample_rate)
            resampler = av.AudioResampler(format="fltp", layout=frame.layout, rate=frame.sample_rate)
        frame.pts = None  # gaps between time stamps are no silence
        for one in resampler.resample(frame):
            yield one.to_ndarray(), one.sample_rate


def _cut(done_s: float, told: ForeignInfo, why: str = "") -> ClipError:
    promised = f" of {told.frames / told.sample_rate:.2f} s" if told.frames else ""
    return ClipError("failed", "truncated", f"only {done_s:.2f} s{promised} can be decoded{why}")
