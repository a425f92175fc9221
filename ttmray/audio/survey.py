"""How long a sound file is by its bytes, and which parts of it must be decoded one by one.

Three numbers must agree within `TOLERANCE_S`: what the header promises, what the bytes hold, and what comes out of the
decoder (the last is checked by `io.decode`). Where a header is missing or promises less than there is, the bytes count,
and the file is cut into parts that the decoder reads whole. Where it promises more, sound is missing.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

from ttmray.audio import containers, mpeg
from ttmray.errors import ClipError

TOLERANCE_S = 0.1
"""Largest difference of lengths that is no error: encoder delay, padding and cut last frames are below it."""
_LEAD_BYTES = 4096
"""Bytes before the first frame of an MP3 without length header that count as no loss (zeros, a gap behind a tag)."""
_CHUNKED = frozenset({"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF"})
FORMATS = _CHUNKED | {"MP3", "FLAC", "OGG"}
"""Formats by libsndfile's names whose length can be checked."""
_MAGIC_BYTES = 1 << 16


@dataclass(frozen=True)
class Stretch:
    """A run of sound; `file` gives it as a file of its own.

    Rate, channels and samples per channel are what the bytes say, 0 where only the decoder can tell; `whole_file` where
    nothing would be cut away or mended.
    """

    rate: int
    channels: int
    samples: int
    file: Callable[[], bytes]
    whole_file: bool = False


def survey(stream: BinaryIO, format: str | None) -> list[Stretch] | None:
    """Look at the bytes of a file.

    Args:
        stream: seekable; its position is left anywhere.
        format: what libsndfile calls it, None where libsndfile does not know it. What has zeros, a gap or a tag that
            libsndfile does not know before its beginning is found all the same.

    Returns:
        The parts in order. None where there is nothing to add to what the decoder says: for bytes that are no audio,
        and for chunked files of a known length, which `check_chunks` looks at.

    Raises:
        ClipError: failed/`truncated` or `length_mismatch`, with both lengths.
    """
    if format is None or format in _CHUNKED:
        stream.seek(0)
        head = stream.read(10)
        tag = mpeg.id3v2_bytes(head)
        stream.seek(tag)
        head = stream.read(10)
        if containers.is_chunked(head):
            if tag:
                return _slice(stream, tag, None)
            return _cut_w64(stream) if format == "W64" else _unfinished(stream, format)
    stream.seek(0)
    content = stream.read()
    if format in _BY_FORMAT:
        return _BY_FORMAT[format](content)
    # tags before the beginning may hold any bytes
    begin = mpeg.skip_tags(content, 0)
    head = content[begin : begin + _MAGIC_BYTES]
    for magic, read in ((b"fLaC", _flac), (b"OggS", _ogg)):
        if magic in head and (parts := read(content[begin:])) is not None:
            return parts
    return _mpeg(content)


def truncated(held_s: float, promised_s: float, why: str = "the file ends early") -> ClipError:
    return ClipError("failed", "truncated", f"{held_s:.2f} of {promised_s:.2f} s can be decoded: {why}")


def mismatch(held_s: float, other: str) -> ClipError:
    return ClipError("failed", "length_mismatch", f"{held_s:.2f} s can be decoded, but {other}")


def tells_length(stream: BinaryIO) -> bool:
    """Whether an MP3 begins with a header that gives the number of its frames."""
    stream.seek(0)
    stream.seek(mpeg.id3v2_bytes(stream.read(10)))
    pieces = mpeg.walk(stream.read(_MAGIC_BYTES)).pieces
    return bool(pieces) and pieces[0].promised is not None


def _mpeg(content: bytes) -> list[Stretch] | None:
    walk = mpeg.walk(content)
    if not walk.pieces:
        return None
    held_s = sum(piece.samples / piece.kind.rate for piece in walk.pieces)
    bytes_per_s = sum(piece.sound_bytes for piece in walk.pieces) / held_s
    lost = sum(piece.lost for piece in walk.pieces)
    lost_s = lost / bytes_per_s + sum(piece.gaps * piece.kind.samples / piece.kind.rate for piece in walk.pieces)
    for piece in walk.pieces:
        missing = ((piece.promised or 0) - piece.frames) * piece.kind.samples / piece.kind.rate
        if missing > TOLERANCE_S:
            raise truncated(held_s, held_s + missing, f"the header promises {piece.promised} frames")
    if lost_s > TOLERANCE_S:
        raise mismatch(held_s, f"{lost} bytes ({lost_s:.2f} s with the frames that they break) inside are damaged")
    others = walk.rest + (0 if walk.pieces[0].header_holds or walk.lead <= _LEAD_BYTES else walk.lead)
    if others / bytes_per_s > TOLERANCE_S:
        raise mismatch(
            held_s, f"{others} of {len(content)} bytes ({others / bytes_per_s:.2f} s) are neither sound nor a tag"
        )
    return [
        Stretch(piece.kind.rate, piece.kind.channels, piece.samples, partial(piece.file, content), walk.plain)
        for whole in walk.pieces
        for piece in whole.undamaged()
    ]


def _flac(content: bytes) -> list[Stretch] | None:
    streams = containers.flac_streams(content)
    parts = []
    for stream in streams:
        if stream.last is None or not stream.rate:
            return None  # no frame: the decoder says what is wrong
        missing = (stream.total - stream.last) / stream.rate
        if stream.total and missing > TOLERANCE_S:
            raise truncated(stream.last / stream.rate, stream.total / stream.rate, "its last frame says so")
        if stream.rest > _LEAD_BYTES:
            message = f"{stream.rest} bytes behind its last frame are neither sound nor a tag"
            raise mismatch(stream.last / stream.rate, message)
        whole = len(streams) == 1 and stream.total == stream.last
        parts.append(Stretch(stream.rate, stream.channels, stream.last, partial(stream.file, content), whole))
    return parts or None


def _ogg(content: bytes) -> list[Stretch] | None:
    streams = [stream for stream in containers.ogg_streams(content) if stream.rate]
    if not streams:
        return None
    for stream in streams:
        held_s = stream.granule / stream.rate
        if stream.damaged:
            message = f"{held_s:.2f} s by its last page, of which {stream.damaged} pages are damaged or missing"
            raise ClipError("failed", "length_mismatch", message)
        if not stream.ended:
            message = f"{held_s:.2f} s can be decoded, and no page is marked as the last: the file breaks off"
            raise ClipError("failed", "truncated", message)
    rest = mpeg.unexplained(content[streams[-1].end :])
    if rest > _LEAD_BYTES:
        raise mismatch(held_s, f"{rest} bytes behind its last page are neither sound nor a tag")
    return [Stretch(stream.rate, 0, 0, partial(stream.file, content), len(streams) == 1) for stream in streams]


_BY_FORMAT = {"FLAC": _flac, "OGG": _ogg, "MP3": _mpeg}


def _slice(stream: BinaryIO, start: int, end: int | None) -> list[Stretch]:
    stream.seek(0)
    return [Stretch(0, 0, 0, partial(bytes, stream.read()[start:end]))]


def _cut_w64(stream: BinaryIO) -> list[Stretch] | None:
    """Without what lies behind the sound, which libsndfile would take for sound, too."""
    sound = containers.find_sound(stream)
    if sound is None or sound.promised is None or sound.start + sound.promised >= stream.seek(0, os.SEEK_END):
        return None
    if sound.rest > _LEAD_BYTES:
        message = f"{sound.promised} bytes are sound by the header, and {sound.rest} behind that neither chunk nor tag"
        raise ClipError("failed", "length_mismatch", message)
    return _slice(stream, 0, sound.start + sound.promised)


def _unfinished(stream: BinaryIO, format: str | None) -> list[Stretch] | None:
    """A WAV whose data size is still 0, as a recorder leaves it when it stops without closing, or a CAF that leaves its
    size open, which libsndfile refuses: to the end is sound."""
    sound = containers.find_sound(stream)
    stream.seek(0)
    magic = stream.read(4)
    if sound is None:
        return None
    wav = magic == b"RIFF" and sound.promised == 0 and sound.rest
    caf = magic == b"caff" and sound.promised is None and format is None
    if not (wav or caf):
        return None
    stream.seek(0)
    return [Stretch(0, 0, 0, partial(containers.sized, stream.read(), sound.start))]


def check_chunks(stream: BinaryIO, done_s: float) -> None:
    """Compare the decoded length of a chunked file with the size that its header gives, and with the file's end.

    Raises:
        ClipError: failed/`truncated` or `length_mismatch`.
    """
    sound = containers.find_sound(stream)
    if sound is None:
        return
    bytes_per_s = sound.held / done_s if done_s else 0.0
    missing = 0 if sound.promised is None else sound.promised - sound.held
    if missing > TOLERANCE_S * bytes_per_s:
        if not done_s:
            raise ClipError("failed", "truncated", f"no sound of {sound.promised} bytes that the header promises")
        raise truncated(done_s, done_s + missing / bytes_per_s, "the chunk of the sound reaches past the end")
    if sound.rest > TOLERANCE_S * bytes_per_s:
        seconds = f" ({sound.rest / bytes_per_s:.2f} s)" if bytes_per_s else ""
        raise mismatch(done_s, f"{sound.rest} bytes{seconds} behind that are neither a chunk nor a tag")
