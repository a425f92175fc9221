"""What the bytes of WAV, AIFF, AU, CAF, FLAC and Ogg files say about their length, without decoding any sound.

libsndfile adapts quietly to files that were cut, joined or never finished. These readers look at chunk sizes, frame
numbers and pages, so that `survey` can compare what was promised, what is there and what was decoded.
Layouts: RIFF and EBU Tech 3306 (RF64), Sony Wave64, AIFF 1.3, Sun audio, Apple CAF, RFC 9639 (FLAC), RFC 3533 (Ogg).
"""

import os
import re
import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO, Literal, NamedTuple

from ttmray.audio.mpeg import unexplained

_OPEN_SIZES = {4: 0x7FFF0000, 8: 1 << 63}
"""Sizes by their width that mean "to the end": who writes WAV into a pipe puts 0x7FFFxxxx or 0xFFFFFFFF, CAF has -1."""
_TAIL_BYTES = 1 << 20  # tags behind the sound are looked for in at most this much
_W64_SOUND = bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")  # the GUID that begins with "data"


@dataclass(frozen=True)
class Sound:
    """Where the sound of a chunked file lies.

    Attributes:
        start: offset of its first byte.
        promised: its bytes by the header; None where that leaves them open ("to the end of the file").
        held: its bytes that are there.
        rest: bytes behind it that are no chunk, no tag and not zero.
    """

    start: int
    promised: int | None
    held: int
    rest: int


class _Layout(NamedTuple):
    sound: bytes  # name of the chunk
    first: int = 12  # offset of the first chunk
    id_bytes: int = 4
    size_bytes: int = 4
    order: Literal["little", "big"] = "little"
    align: int = 2
    size_has_head: bool = False


_LAYOUTS = {
    b"RIFF": _Layout(b"data"),
    b"RF64": _Layout(b"data"),
    b"BW64": _Layout(b"data"),
    b"RIFX": _Layout(b"data", order="big"),
    b"FORM": _Layout(b"SSND", order="big"),
    b"caff": _Layout(b"data", first=8, size_bytes=8, order="big", align=1),
    b"riff": _Layout(_W64_SOUND, first=40, id_bytes=16, size_bytes=8, align=8, size_has_head=True),
}


def is_chunked(head: bytes) -> bool:
    """Whether a file that begins with `head` is one that `find_sound` knows."""
    return head[:4] in _LAYOUTS or head[:4] in (b".snd", b"dns.")


def find_sound(stream: BinaryIO) -> Sound | None:
    """The sound chunk of a WAV, RF64, W64, AIFF, AU or CAF file; None where there is none."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    head = stream.read(12)
    magic = head[:4]
    if magic in (b".snd", b"dns."):
        order: Literal["little", "big"] = "big" if magic == b".snd" else "little"
        start, length = int.from_bytes(head[4:8], order), int.from_bytes(head[8:12], order)
        return _sound(stream, size, start, None if length == 0xFFFFFFFF else length, None)
    if magic not in _LAYOUTS:
        return None
    layout = _LAYOUTS[magic]
    chunks, _ = _chunks(stream, size, layout.first, layout)
    for name, start, length in chunks:
        if name != layout.sound:
            continue
        promised: int | None = length
        if magic in (b"RF64", b"BW64") and length == 0xFFFFFFFF:
            promised = _long_size(stream, chunks)
        elif length >= _OPEN_SIZES[layout.size_bytes] and start + length > size and magic != b"FORM":
            promised = None
        if layout.sound == b"SSND":  # begins with an offset and a block size
            return _sound(stream, size, start + 8, max(length - 8, 0), layout)
        return _sound(stream, size, start, promised, layout)
    return None


def _chunks(stream: BinaryIO, size: int, position: int, layout: _Layout) -> tuple[list[tuple[bytes, int, int]], int]:
    """(name, offset of the body, bytes by the header) of chunks that follow each other, and where that ends."""
    chunks: list[tuple[bytes, int, int]] = []
    head_bytes = layout.id_bytes + layout.size_bytes
    while position + head_bytes <= size:
        stream.seek(position)
        head = stream.read(head_bytes)
        name = head[: layout.id_bytes]
        length = int.from_bytes(head[layout.id_bytes :], layout.order) - head_bytes * layout.size_has_head
        if length < 0 or (layout.id_bytes == 4 and not re.fullmatch(rb"[ -~]{4}", name)) or is_chunked(name):
            break  # no chunk, or the beginning of another file
        is_sound = name == layout.sound
        if position + head_bytes + length > size and not is_sound:
            break
        chunks.append((name, position + head_bytes, length))
        position += head_bytes + length
        position += -position % layout.align
        if is_sound and length == 0:
            break  # what follows may be sound all the same
    return chunks, min(position, size)


def _long_size(stream: BinaryIO, chunks: list[tuple[bytes, int, int]]) -> int | None:
    for name, start, length in chunks:
        if name == b"ds64" and length >= 24:
            stream.seek(start + 8)
            return int.from_bytes(stream.read(8), "little")
    return None


def _sound(stream: BinaryIO, size: int, start: int, promised: int | None, layout: _Layout | None) -> Sound:
    if promised is None or start + promised >= size:
        return Sound(start, promised, max(0, size - start), 0)
    end = start + promised
    if layout is not None:
        _, end = _chunks(stream, size, end + -end % layout.align, layout)
    rest = size - end
    if 0 < rest <= _TAIL_BYTES:
        stream.seek(end)
        rest = unexplained(stream.read())
    return Sound(start, promised, promised, rest)


def sized(content: bytes, start: int) -> bytes:
    """A WAV or CAF whose data size was never filled in, with the size that reaches to its end; `start`: see `Sound`."""
    layout = _LAYOUTS[content[:4]]
    held = min(len(content) - start, (1 << 8 * layout.size_bytes) - 1)
    return content[: start - layout.size_bytes] + held.to_bytes(layout.size_bytes, layout.order) + content[start:]


@dataclass(frozen=True)
class FlacStream:
    """One FLAC stream of a file (files can be joined).

    Attributes:
        start, end: byte range.
        total: samples per channel by STREAMINFO, 0 where it does not say.
        last: samples up to the end of the last frame by its own number; None where no frame was found.
        rest: bytes behind the longest that the last frame can be, less tags and zeros.
    """

    start: int
    end: int
    rate: int
    channels: int
    total: int
    last: int | None
    rest: int

    def file(self, content: bytes) -> bytes:
        """The stream as a file of its own, with the total that its frames have."""
        total = self.start + 21  # 36 bits, that begin in the middle of this byte
        fixed = int.from_bytes(content[total : total + 5], "big") >> 36 << 36 | (self.last or self.total)
        return content[self.start : total] + fixed.to_bytes(5, "big") + content[total + 5 : self.end]


_FLAC = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
_FLAC_SYNC = re.compile(rb"\xff[\xf8\xf9]")
_FLAC_HEADER_BYTES = 16


def flac_streams(content: bytes) -> list[FlacStream]:
    """The FLAC streams of a file, in order; none where there is no STREAMINFO."""
    starts = [match.start() for match in _FLAC.finditer(content)]
    return [_flac_stream(content, *span) for span in pairwise([*starts, len(content)])]


def _flac_stream(content: bytes, start: int, end: int) -> FlacStream:
    info = content[start + 8 : start + 42]
    fields = int.from_bytes(info[10:18], "big")
    rate, channels, total = fields >> 44, (fields >> 41 & 7) + 1, fields & ((1 << 36) - 1)
    bits, blocks = (fields >> 36 & 31) + 1, int.from_bytes(info[2:4], "big")
    longest = int.from_bytes(info[7:10], "big") or blocks * channels * (bits + 1) // 8 + 64
    first = _flac_first_frame(content, start + 4, end)
    window = max(first, end - 4 * longest - _TAIL_BYTES)
    last, at, before = None, end, dict[int, int]()
    for match in _FLAC_SYNC.finditer(content, window, end):
        numbers = _flac_numbers(content[match.start() : match.start() + _FLAC_HEADER_BYTES], blocks, channels)
        if numbers is None:
            continue
        # random bytes look like a header once in 2^23; a true one goes on where another ends
        if numbers[0] == 0 or numbers[0] in before or not before:
            before[numbers[1]] = match.start()
            last, at = numbers[1], match.start()
    rest = max(0, unexplained(content[at:end]) - longest) if last is not None else 0
    return FlacStream(start, end, rate, channels, total, last, rest)


def _flac_first_frame(content: bytes, position: int, end: int) -> int:
    while position + 4 <= end:
        is_last = content[position] & 0x80
        position += 4 + int.from_bytes(content[position + 1 : position + 4], "big")
        if is_last:
            break
    return min(position, end)


def _flac_numbers(header: bytes, block: int, channels: int) -> tuple[int, int] | None:
    """First sample of a frame and the one behind its last; None where this is no frame header of the stream."""
    if len(header) < 6 or header[3] & 1:
        return None
    code, rate_code, mode = header[2] >> 4, header[2] & 15, header[3] >> 4
    if code == 0 or rate_code == 15 or (mode + 1 if mode < 8 else 2 if mode < 11 else 0) != channels:
        return None
    lead = header[4]
    extra = 0 if lead < 0x80 else 8 - (lead ^ 0xFF).bit_length() - 1  # coded like UTF-8
    if lead == 0xFF or 0x80 <= lead < 0xC0 or len(header) < 5 + extra:
        return None
    number = lead & ((1 << (6 - extra)) - 1) if extra else lead
    for byte in header[5 : 5 + extra]:
        if byte & 0xC0 != 0x80:
            return None
        number = number << 6 | byte & 0x3F
    position = 5 + extra
    if code in (6, 7):
        length = int.from_bytes(header[position : position + code - 5], "big") + 1
        position += code - 5
    else:
        length = 192 if code == 1 else 576 << (code - 2) if code < 6 else 256 << (code - 8)
    position += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if position >= len(header) or _crc8(header[:position]) != header[position] or length > block:
        return None
    first = number if header[1] & 1 else number * block
    return first, first + length


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 0x07) & 0xFF if crc & 0x80 else crc << 1
    return crc


@dataclass
class OggStream:
    """One logical stream of sound in an Ogg file (streams can be chained).

    Attributes:
        start, end: byte range.
        rate: of the granule positions, Hz; 0 for a codec that is not known.
        granule: position at the end of its last page, in samples.
        ended: whether its last page is marked as the last.
        damaged: pages with a wrong checksum, missing or repeated by their numbers, at an earlier position than those
            before, or last without a position.
    """

    start: int
    end: int
    rate: int
    granule: int = 0
    ended: bool = False
    damaged: int = 0

    def file(self, content: bytes) -> bytes:
        return content[self.start : self.end]


_FLIPPED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def ogg_streams(content: bytes) -> list[OggStream]:
    """The chained streams of an Ogg file; of multiplexed ones (video) the sound counts."""
    streams: list[OggStream] = []
    numbers: dict[int, int] = {}  # serial number of a stream -> number of its next page
    serial, opening, position = -1, False, content.find(b"OggS")
    while position >= 0 and position + 27 <= len(content):
        head = content[position : position + 27 + content[position + 26]]
        end = position + len(head) + sum(head[27:])
        flags, page_serial, number = head[5], head[14:18], int.from_bytes(head[18:22], "little")
        own = int.from_bytes(page_serial, "little")
        whole = end <= len(content)
        sound = whole and _ogg_checksum(content[position:end])
        if flags & 2 and sound:
            rate = _ogg_rate(content[position + len(head) : end])
            if not opening or not streams:  # a chain goes on; pages of multiplexed streams stand side by side
                streams.append(OggStream(position, end, rate))
                serial, numbers = own, {}
            elif rate and not streams[-1].rate:
                streams[-1].rate, serial = rate, own
            numbers[own] = number + 1
        elif streams and sound and own == serial:
            stream, granule = streams[-1], int.from_bytes(head[6:14], "little", signed=True)
            stream.damaged += abs(number - numbers.get(own, number))
            stream.ended = bool(flags & 4)
            # -1: no packet ends on this page, which the last can only say if it is empty
            stream.damaged += 0 <= granule < stream.granule or (stream.ended and granule < 0 < sum(head[27:]))
            stream.granule = max(stream.granule, granule)
            numbers[own] = number + 1
        elif streams and whole and not sound:
            streams[-1].damaged += 1
        opening = bool(flags & 2)
        if streams and whole:
            streams[-1].end = end
        position = _next_page(content, end if sound else position + 4)
    return streams


def _next_page(content: bytes, position: int) -> int:
    return position if content[position : position + 4] == b"OggS" else content.find(b"OggS", position)


def _ogg_rate(packet: bytes) -> int:
    if packet[:7] == b"\x01vorbis":
        return int.from_bytes(packet[12:16], "little")
    if packet[:8] == b"OpusHead":
        return 48000
    if packet[:5] == b"\x7fFLAC":
        return int.from_bytes(packet[27:30], "big") >> 4
    return int.from_bytes(packet[36:40], "little") if packet[:8] == b"Speex   " else 0


def _ogg_checksum(page: bytes) -> bool:
    """CRC-32 with the bits of every byte the other way round than zlib has them, and without its inversions."""
    flipped = (page[:22] + b"\0\0\0\0" + page[26:]).translate(_FLIPPED)
    crc = zlib.crc32(flipped, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return crc.to_bytes(4, "big").translate(_FLIPPED) == page[22:26]
