"""What the bytes of an MP3 hold: its frames, tags, damage, and where one stream ends and the next begins.

The length of an MP3 is written nowhere but in an optional Xing, Info or VBRI header, which joining, cutting or a bad
encoder make wrong; only its frames can be counted. `walk` reads the four bytes of every frame header and no sound, and
`MpegStream.file` gives any part of a file as an MP3 that a decoder reads whole: header frame with the true count, then
frames. Layouts: ISO 11172-3 and 13818-3 (frames), the LAME tag specification, ID3v2.4, APEv2, Lyrics3 v2.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
_KBPS = {
    # (MPEG-1?, layer)
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_SYNC = re.compile(rb"\xff(?=[\xe2-\xff])")  # the second byte may be the first of the true one
_IN_A_ROW = 3
"""Frames of one kind, one behind the other, that random bytes do not hold."""
_MAX_FREE_FRAME = 8192
_ID3_FOOTER = 0x10
_RESYNC_BYTES = 1024  # how far mpg123 looks for the next frame
_ID3V1, _LYRICS_END = 128, re.compile(rb"LYRICS200|LYRICSEND")


class Kind(NamedTuple):
    """What all frames of a stream share. `version` is 3 for MPEG-1, 2 for MPEG-2, 0 for MPEG-2.5."""

    version: int
    layer: int
    rate: int
    channels: int

    @property
    def samples(self) -> int:
        """Samples per frame and channel."""
        return 384 if self.layer == 1 else 576 if self.layer == 3 and self.version != 3 else 1152


@dataclass
class MpegStream:
    """Frames of one kind that belong to one stream.

    Attributes:
        frames: how many hold sound (a header frame holds none).
        spans: (start, end, frames) of these frames in bytes; more than one where damage lies between.
        header: byte range of the Xing, Info or VBRI frame, None without one.
        promised: frames by that header, None where it does not say or says 0.
        trimmed: samples of encoder delay and padding that decoders leave out by the LAME tag.
        lost: bytes of damage between its frames.
        in_spans: frames in `spans` so far.
        gaps: places where they lie. With each goes a frame more: that behind it takes bits of those before.
    """

    kind: Kind
    frames: int = 0
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    header: tuple[int, int] | None = None
    promised: int | None = None
    trimmed: int = 0
    lost: int = 0
    gaps: int = 0
    in_spans: int = 0

    @property
    def header_holds(self) -> bool:
        """Whether the header's count is that of the frames; some encoders count the header itself."""
        return self.promised is not None and abs(self.promised - self.frames) <= 1

    @property
    def samples(self) -> int:
        """Per channel, as a decoder of `file` gives them."""
        whole = self.frames * self.kind.samples
        return whole - self.trimmed if self.header_holds and self.trimmed < whole else whole

    @property
    def sound_bytes(self) -> int:
        return sum(end - start for start, end, _ in self.spans)

    def file(self, data: bytes) -> bytes:
        """The piece as an MP3 of its own, whose header tells its true length."""
        if self.header is not None and self.header_holds:
            first = data[slice(*self.header)]
        else:
            first = _info_frame(data[self.spans[0][0] : self.spans[0][0] + 4], self.kind, self.frames)
        return b"".join([first, *(data[start:end] for start, end, _ in self.spans)])

    def undamaged(self) -> "list[MpegStream]":
        """The pieces between damage. One decoder over all would take bits of the frames before for those that are lost,
        which can be heard as a loud click."""
        if len(self.spans) == 1:
            return [self]
        return [MpegStream(self.kind, span[2], [span]) for span in self.spans]


@dataclass
class Walk:
    """All of a file.

    Attributes:
        pieces: in order; joined files have several.
        at_start: whether the first frame stands at the start of the file, or right behind one common ID3v2 tag.
        lead: bytes before the first frame that are no tag.
        behind: bytes behind the last frame.
        rest: those of them that are no tag and not zero.
    """

    pieces: list[MpegStream]
    at_start: bool
    lead: int
    behind: int
    rest: int

    @property
    def plain(self) -> bool:
        """One undamaged stream where every decoder looks for it, whose header, if there is one, is true."""
        (piece, *others) = self.pieces
        whole = self.at_start and not others and len(piece.spans) == 1
        if piece.header is None:  # then decoders look for more frames, to the end or until they give up
            return whole and self.behind <= _RESYNC_BYTES
        return whole and piece.header_holds


def walk(data: bytes) -> Walk:
    """Find the frames of an MP3. Joined streams, other rates or channel counts inside start a new piece.

    Args:
        data: the whole file.

    Returns:
        Without pieces if there are not three frames in a row anywhere.
    """
    parser = _Frames(data)
    pieces: list[MpegStream] = []
    position = lead = rest = 0
    while position < len(data):
        after = skip_tags(data, position)
        start = parser.next_run(after)
        if start is None:
            rest = unexplained(data[position:])
            break
        if start > after > position:  # the tag may say too large a size
            start = parser.run_across(position, after, start) or start
        if not pieces:  # zeros behind a tag are its padding
            lead = start - after if not after else len(data[after:start].lstrip(b"\0"))
        elif after == position:  # no tag, so it was sound
            pieces[-1].lost += start - after
            pieces[-1].gaps += 1
        position = _take_run(data, parser, start, pieces)
    pieces = [piece for piece in pieces if piece.frames]
    begin = min((pieces[0].header or pieces[0].spans[0])[0], pieces[0].spans[0][0]) if pieces else 0
    common = id3v2_bytes(data) if not data[5:6] or not data[5] & _ID3_FOOTER else 0
    behind = len(data) - pieces[-1].spans[-1][1] if pieces else len(data)
    return Walk(pieces, begin == common, lead, behind, rest)


def _take_run(data: bytes, parser: "_Frames", position: int, pieces: list[MpegStream]) -> int:
    """Add the frames that follow each other from `position` on to the pieces; returns where they end."""
    start = last = position
    current = pieces[-1] if pieces else None
    first = True
    while (frame := parser.at(position)) is not None and position + frame[0] <= len(data):
        length, kind = frame
        other = current is None or kind != current.kind
        # the side information of a header frame is zero
        about = _header(data, position, length, kind) if first or data[position + 6] == 0 else None
        if other or about is not None:
            if other and current is not None and not parser.is_run(position):
                break  # one header of another kind is damage
            _close(current, start, position)
            current = MpegStream(kind)
            pieces.append(current)
            start = position
            if about is not None:
                current.header = (position, position + length)
                current.promised, current.trimmed = about
                start = position = position + length
                first = False
                continue
        assert current is not None
        current.frames += 1
        last, position = position, position + length
        first = False
    if current is not None and position > last > start and (inside := parser.next_run(last + 4, position)):
        # that frame was cut, and what begins in its bytes is the next file, or its sound after a loss
        current.frames -= 1
        current.lost, current.gaps = current.lost + inside - last, current.gaps + 1
        _close(current, start, last)
        return inside
    _close(current, start, position)
    return position


def _close(piece: MpegStream | None, start: int, end: int) -> None:
    if piece is not None and end > start:
        piece.spans.append((start, end, piece.frames - piece.in_spans))
        piece.in_spans = piece.frames


class _Frames:
    """Lengths and kinds of frames by position; equal headers are parsed once."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.known: dict[bytes, tuple[int, Kind] | None] = {}
        self.free: dict[bytes, int] = {}

    def at(self, position: int) -> tuple[int, Kind] | None:
        """(bytes, kind) of the frame whose header is at `position`, None where there is none."""
        header = self.data[position : position + 4]
        try:
            frame = self.known[header]
        except KeyError:
            frame = self.known[header] = _parse(header)
        if frame is not None and frame[0] == 0:
            return self._free_format(header, position, frame[1])
        return frame

    def is_run(self, position: int) -> bool:
        """Whether frames of one kind follow each other here, or reach the end of the file."""
        first = None
        for count in range(_IN_A_ROW):
            frame = self.at(position)
            if frame is None or (first is not None and frame[1] != first):
                return count > 1 and (position >= len(self.data) or skip_tags(self.data, position) > position)
            first = frame[1]
            position += frame[0]
        return True

    def next_run(self, position: int, end: int | None = None) -> int | None:
        """Where the first run that begins before `end` does."""
        for match in _SYNC.finditer(self.data, position, len(self.data) if end is None else end):
            if self.is_run(match.start()):
                return match.start()
        return None

    def run_across(self, begin: int, end: int, start: int) -> int | None:
        """Start of the frames between `begin` and `end` that reach over `end`, to the frame at `start`; or None."""
        position = begin
        while (first := self.next_run(position, end)) is not None:
            position = first
            while position < end and (frame := self.at(position)) is not None:
                position += frame[0]
            if position == start:
                return first
            position = max(position, first + 1)
        return None

    def _free_format(self, header: bytes, position: int, kind: Kind) -> tuple[int, Kind] | None:
        """A frame of a bit rate that no table holds: as long as it is to the next header alike, less padding."""
        padding = header[2] >> 1 & 1
        plain = bytes([header[0], header[1], header[2] & 0xFD])
        if plain not in self.free:
            alike = (plain, bytes([header[0], header[1], header[2] | 2]))
            ends = [self.data.find(one, position + 32, position + _MAX_FREE_FRAME) for one in alike]
            ends = [end for end in ends if end > 0]
            if not ends:
                return None
            self.free[plain] = min(ends) - position - padding
        return self.free[plain] + padding, kind


def _parse(header: bytes) -> tuple[int, Kind] | None:
    """(frame length in bytes, kind); length 0 for free format."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
    kbps, rate = header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or layer == 4 or kbps == 15 or rate == 3 or header[3] & 3 == 2:
        return None
    kind = Kind(version, layer, _RATES[version][rate], 1 if header[3] >> 6 == 3 else 2)
    bits = 1000 * _KBPS[version == 3, layer][kbps]
    padding = header[2] >> 1 & 1
    if bits == 0:
        return 0, kind
    if layer == 1:
        return 4 * (12 * bits // kind.rate + padding), kind
    return kind.samples // 8 * bits // kind.rate + padding, kind


def _header(data: bytes, position: int, length: int, kind: Kind) -> tuple[int | None, int] | None:
    """(promised frames or None, samples that decoders trim) of a Xing, Info or VBRI frame; None for any other."""
    if kind.layer != 3:
        return None
    frame = data[position : position + length]
    if frame[36:40] == b"VBRI":
        return int.from_bytes(frame[50:54], "big") or None, 0
    stereo = kind.channels == 2
    side = (32 if stereo else 17) if kind.version == 3 else (17 if stereo else 9)
    for start in (4 + side, 6 + side):  # with a checksum two bytes later, in theory; encoders disagree
        if frame[start : start + 4] in (b"Xing", b"Info"):
            break
    else:
        return None
    flags = int.from_bytes(frame[start + 4 : start + 8], "big")
    promised = int.from_bytes(frame[start + 8 : start + 12], "big") if flags & 1 else 0
    lame = start + 8 + 4 * (flags & 1) + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
    gap = int.from_bytes(frame[lame + 21 : lame + 24], "big") if len(frame) >= lame + 24 else 0
    return promised or None, (gap >> 12) + (gap & 0xFFF)


def _info_frame(header: bytes, kind: Kind, frames: int) -> bytes:
    """A frame that tells a decoder the length of what follows; empty for layers I and II, which have none."""
    if kind.layer != 3:
        return b""
    # without checksum, at 128 kb/s (80 for MPEG-2): long enough for every field
    start = bytes([0xFF, header[1] | 1, 0x90 | header[2] & 0x0C, header[3]])
    parsed = _parse(start)
    assert parsed is not None
    stereo = kind.channels == 2
    side = (32 if stereo else 17) if kind.version == 3 else (17 if stereo else 9)
    fields = b"Info" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
    return (start + bytes(side) + fields).ljust(parsed[0], b"\0")


def id3v2_bytes(data: bytes, position: int = 0) -> int:
    """Length of the ID3v2 tag at `position` with header and footer; 0 where there is none."""
    head = data[position : position + 10]
    if len(head) < 10 or head[:3] != b"ID3" or max(head[6:]) > 127:
        return 0
    size = sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    return 10 + size + (10 if head[5] & _ID3_FOOTER else 0)


def _tags(data: bytes, position: int) -> Iterator[int]:
    """Lengths of the tags that may start at `position`."""
    yield id3v2_bytes(data, position)
    head = data[position : position + 32]
    if head[:8] == b"APETAGEX" and len(head) == 32:
        size, is_header = int.from_bytes(head[12:16], "little"), head[23] & 0x20
        yield 32 + (size if is_header else 0)  # a footer alone ends a tag that was skipped as junk
    if head[:3] == b"TAG":
        yield 227 if head[3:4] == b"+" and data[position + 227 : position + 230] == b"TAG" else _ID3V1
    if head[:11] == b"LYRICSBEGIN":
        end = _LYRICS_END.search(data, position)
        yield end.end() - position if end else 0


def skip_tags(data: bytes, position: int) -> int:
    """Where tags, and zeros that are no frames, end. Zeros count only where a tag or the end of the file follows."""
    while position < len(data):
        length = max(_tags(data, position), default=0)
        if not length:
            zeros = position
            if data[position] == 0:
                match = re.compile(rb"\0+").match(data, position)
                zeros = match.end() if match else position
            if zeros == position or (zeros < len(data) and not max(_tags(data, zeros), default=0)):
                return position
            position = zeros
            continue
        position = min(position + length, len(data))
    return position


def unexplained(tail: bytes) -> int:
    """How many bytes behind the sound of a file are no tag (ID3v1, APE, Lyrics3, ID3v2) and no zeros."""
    start, end = skip_tags(tail, 0), len(tail)
    while end > start:
        rest = tail[start:end].rstrip(b"\0")
        end = start + len(rest)
        footer = rest.rfind(b"APETAGEX", -32)  # its own last bytes may be zeros
        if footer >= 0:
            ape = tail[start + footer : start + footer + 32].ljust(32, b"\0")
            size = int.from_bytes(ape[12:16], "little")  # of items and footer, without the header before them
            end = start + footer + 32 - max(size, 32) - (32 if ape[-9] & 0x80 else 0)
        elif rest[-128:-125] == b"TAG":
            end -= _ID3V1
        elif rest[-9:] in (b"LYRICS200", b"LYRICSEND") and b"LYRICSBEGIN" in rest:
            end = start + rest.rfind(b"LYRICSBEGIN")
        else:
            break
    return max(0, end - start)
