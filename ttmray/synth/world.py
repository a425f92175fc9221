"""The small world: songs with stems, captions and a known quality, as numbers in memory or as a folder of files.

    python -m ttmray.synth.world OUT --pieces 12 --seed 0
    python -m ttmray.synth.world OUT --pieces 200 --clips 5 --stems

`OUT/songs` is a folder that the corpus job reads, audio with `captions.json`; `OUT/world.parquet` has all that is true
of each file. Item `index` of a seed is the same however many are made, so that disjoint ranges of indices are disjoint
sets.
"""

import argparse
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from ttmray.errors import UserError, run_program
from ttmray.storage import Folder
from ttmray.synth.captions import caption
from ttmray.synth.composer import CAPTION, compose, stream
from ttmray.synth.faults import FLOOR, KINDS, Strengths, faults_of, perform, true_quality
from ttmray.synth.instruments import RATE, Audio
from ttmray.synth.mixing import Stems, mix
from ttmray.synth.piece import STEMS, Attributes, Piece

TABLE = "world.parquet"
CAPTIONS = "songs/captions.json"
SUBTYPES = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS", "mp3": "MPEG_LAYER_III"}
WINDOW = 5
"""Stream of the random place of a clip, beside those of the composer."""


@dataclass(frozen=True)
class Clip:
    """A song or a part of it, with everything that is true of it.

    Attributes:
        stems: the four stems, (2, samples) float32 at 44.1 kHz; `mix` is their sum.
        heard: attributes of this part: instruments that do not sound in it are left out.
        caption, unseen: a training wording and a held-out wording of them.
        quality: true quality (see `ttmray.synth.faults`).
    """

    key: str
    piece: Piece
    start: float
    seconds: float
    stems: Stems
    mix: Audio
    heard: Attributes
    caption: str
    unseen: str
    faults: Strengths
    quality: float

    def row(self) -> dict[str, Any]:
        """Flat columns for a table."""
        place = {"seed": self.piece.seed, "index": self.piece.index, "start_s": self.start, "seconds": self.seconds}
        strengths = {f"fault_{kind}": float(self.faults.get(kind, 0.0)) for kind in KINDS}
        words = {"quality": self.quality, "caption": self.caption, "caption_unseen": self.unseen}
        return {"key": self.key, **place, **self.heard.row(), **strengths, **words}


def clip(
    seed: int,
    index: int,
    seconds: float = 5.0,
    *,
    start: float | None = None,
    faults: Strengths | None = None,
    **attributes: Any,
) -> Clip:
    """One clip of piece `index`: of distinct indices, clips of distinct pieces.

    Args:
        start: seconds into the piece; by default a random place where the music plays on to the end of the clip.
        faults: strengths to use instead of what the piece drew; `{}` for none.
        attributes: passed on to the composer.

    Raises:
        ValueError: the clip would lie outside the piece, or an unknown fault.
    """
    piece = compose(seed, index, **attributes)
    if start is None:
        start = round(float(stream(seed, index, WINDOW).uniform(0, max(0.0, piece.seconds - seconds))), 3)
    if start < 0 or start >= piece.seconds:
        raise ValueError(f"piece {index} lasts {piece.seconds:.1f} s; no clip starts at {start} s")
    return _clip(piece, faults, start, min(seconds, piece.seconds - start), f"{index:06d}")


def song(seed: int, index: int, *, seconds: float | None = None, faults: Strengths | None = None, **more: Any) -> Clip:
    """A whole piece; arguments as for `clip` and `compose`."""
    piece = compose(seed, index, seconds=seconds, **more)
    return _clip(piece, faults, 0.0, piece.seconds, f"{index:06d}")


def cut(
    seed: int, index: int, clip_s: float = 5.0, *, seconds: float | None = None, faults: Strengths | None = None
) -> Iterator[Clip]:
    """All whole clips of a piece of `seconds`, each mastered by itself; of a piece shorter than a clip, all of it."""
    piece = compose(seed, index, seconds=seconds)
    for i in range(max(1, int(piece.seconds / clip_s))):
        yield _clip(piece, faults, i * clip_s, min(clip_s, piece.seconds), f"{index:06d}_{i}")


def _clip(piece: Piece, faults: Strengths | None, start: float, seconds: float, key: str) -> Clip:
    strengths = faults_of(piece.seed, piece.index) if faults is None else faults
    stems = perform(piece, strengths, start, seconds)
    total = mix(stems)
    quality = true_quality(strengths, piece) if total.any() else FLOOR
    heard = piece.heard(start, seconds)
    rng = np.random.default_rng([piece.seed, piece.index, CAPTION, round(start * 1000)])
    text, unseen = caption(heard, rng), caption(heard, rng, heldout=True)
    return Clip(key, piece, start, seconds, stems, total, heard, text, unseen, strengths, quality)


def write_world(folder: str, clips: Iterator[Clip], *, format: str = "wav", stems: bool = False) -> int:
    """Write clips as files with their captions and the table of truth; the table comes last.

    Returns:
        How many were written.

    Raises:
        UserError: an unknown format, or there are no clips.
    """
    if format not in SUBTYPES:
        raise UserError(f"{format!r} is no audio format.", f"Known: {', '.join(SUBTYPES)}.")
    target = Folder.at(folder)
    rows = []
    for item in clips:
        path = f"songs/{item.key}.{format}"
        target.write(path, encoded(item.mix, format))
        if stems:
            for stem in STEMS:
                target.write(f"stems/{item.key}/{stem}.{format}", encoded(item.stems[stem], format))
        rows.append({"path": path, **item.row()})
    if not rows:
        raise UserError("there are no clips to write.", "Ask for at least one piece, as long as a clip.")
    write_tables(target, rows)
    return len(rows)


def write_tables(target: Folder, rows: Sequence[Mapping[str, Any]]) -> None:
    """The captions of songs that are there, and last the table of truth.

    Args:
        rows: `Clip.row` of each, with its path below `target`.
    """
    captions = [{"path": row["path"].removeprefix("songs/"), "caption": row["caption"]} for row in rows]
    target.write(CAPTIONS, json.dumps(captions, indent=1, ensure_ascii=False).encode())
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), buffer, compression="zstd")
    target.write(TABLE, buffer.getvalue())


def encoded(audio: Audio, format: str, rate: int = RATE, title: str = "", artist: str = "") -> bytes:
    """A whole file of (channels, samples) float32; lossless formats have 16 bits."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, len(audio), SUBTYPES[format], format=format.upper()) as file:
        if title:
            file.title, file.artist = title, artist
        for block in np.array_split(audio.T, max(1, audio.shape[1] // 65536)):  # Vorbis overflows on long blocks
            file.write(block)
    return buffer.getvalue()


def _wanted(arguments: argparse.Namespace) -> Iterator[Clip]:
    clean: Mapping[str, float] | None = {} if arguments.clean else None
    for index in range(arguments.first, arguments.first + arguments.pieces):
        if arguments.clips:
            yield from cut(arguments.seed, index, arguments.clips, seconds=arguments.seconds, faults=clean)
        else:
            yield song(arguments.seed, index, seconds=arguments.seconds, faults=clean)


def main(argv: list[str] | None = None) -> int:
    """Write the folder that the command names; returns the exit code.

    Raises:
        UserError: an argument that makes no sense, or what cannot be read or written.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder or bucket to write to")
    parser.add_argument("--pieces", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="index of the first piece")
    parser.add_argument("--seconds", type=float, help="length of each song (default: 30 to 60)")
    parser.add_argument("--clips", type=float, help="cut the songs to clips of so many seconds")
    parser.add_argument("--format", default="wav", choices=sorted(SUBTYPES))
    parser.add_argument("--stems", action="store_true", help="write the stems too")
    parser.add_argument("--clean", action="store_true", help="no faults")
    arguments = parser.parse_args(argv)
    for name, low in (("pieces", 1), ("seed", 0), ("first", 0), ("seconds", 1e-3), ("clips", 1e-3)):
        value = getattr(arguments, name)
        if value is not None and not low <= value < float("inf"):
            raise UserError(f"--{name} is {value}, but must be at least {low:g}.")
    count = write_world(arguments.folder, _wanted(arguments), format=arguments.format, stems=arguments.stems)
    print(f"{count} {'clips' if arguments.clips else 'songs'} of {arguments.pieces} pieces in {arguments.folder}")
    return 0


if __name__ == "__main__":
    run_program(main)
