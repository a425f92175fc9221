"""Eight songs of the small world as a music folder that people have, and the broken files that every such folder has.

They are composed like all others (`ttmray.synth.composer`), but style, tempo, key and players fit their titles, and
their faults are chosen: three songs have none, the others have different ones. They are written as MP3,
FLAC, WAV and OGG with tags and a caption table. `truth.json` has what is true of every file.

    python -m ttmray.synth.songs FOLDER [--seed N]
"""

import argparse
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ttmray.audio.io import resample
from ttmray.json_text import read_json
from ttmray.storage import Folder
from ttmray.synth.instruments import RATE
from ttmray.synth.theory import Key
from ttmray.synth.world import Clip, encoded
from ttmray.synth.world import song as perform

VERSION = 3
"""Raise it whenever the same seed gives other files, so that old folders are written anew."""
MANIFEST = ".songs.json"
CAPTIONS = "captions.json"
TRUTH = "truth.json"


@dataclass(frozen=True, kw_only=True)
class Song:
    """What the composer is told, and what is done to its piece.

    Attributes:
        told: attributes of the piece (`ttmray.synth.piece.Attributes`); the others are drawn.
        faults: strength, 0 to 1, of each kind of fault (`ttmray.synth.faults`).
        captioned: whether the caption table has it.
    """

    path: str
    title: str
    artist: str
    seconds: float
    told: Mapping[str, Any]
    faults: Mapping[str, float] = field(default_factory=dict)
    captioned: bool = True
    sample_rate: int = RATE
    channels: int = 2


SONGS = (
    Song(
        path="amber_fields/harvest_road.mp3",
        title="Harvest Road",
        artist="Amber Fields",
        seconds=34.0,
        told={"style": "country", "tempo": 96.0, "key": Key(7, "major"), "kit": "acoustic", "voice": "low"},
    ),
    Song(
        path="amber_fields/slow_tide.flac",
        title="Slow Tide",
        artist="Amber Fields",
        seconds=28.0,
        told={"style": "ambient", "tempo": 72.0, "key": Key(4, "minor"), "kit": "", "voice": "", "lead": "flute"},
        faults={"dull": 0.6, "wow": 0.6},
    ),
    Song(
        path="kite/paper_kite.wav",
        title="Paper Kite",
        artist="Kite",
        seconds=18.0,
        told={"style": "chiptune", "tempo": 120.0, "key": Key(9, "major"), "kit": "chip", "voice": ""},
        faults={"clash": 0.8, "detune": 0.9},
        sample_rate=48000,
    ),
    Song(
        path="kite/rooftop.ogg",
        title="Rooftop",
        artist="Kite",
        seconds=22.0,
        told={"style": "drum and bass", "tempo": 160.0, "key": Key(2, "minor"), "voice": ""},
        faults={"timing": 0.8, "dropped": 0.6},
    ),
    Song(
        path="lumen/night_drive.mp3",
        title="Night Drive",
        artist="Lumen",
        seconds=14.0,
        told={"style": "synthwave", "tempo": 110.0, "key": Key(5, "minor"), "voice": "high"},
    ),
    Song(
        path="lumen/blue_hour.mp3",
        title="Blue Hour",
        artist="Lumen",
        seconds=12.0,
        told={"style": "jazz", "tempo": 84.0, "key": Key(10, "major"), "kit": "brushes", "voice": "", "lead": "piano"},
        faults={"noise": 0.8},
        channels=1,
    ),
    Song(
        path="lumen/Été à la plage (été 2).flac",
        title="Été à la plage",
        artist="Lumen",
        seconds=12.0,
        told={"style": "bossa nova", "tempo": 104.0, "key": Key(0, "major"), "kit": "hand", "voice": ""},
        faults={"clipping": 1.0},
    ),
    Song(
        path="north_harbour/first_light.flac",
        title="First Light",
        artist="North Harbour",
        seconds=10.0,
        told={"style": "classical", "tempo": 90.0, "key": Key(0, "minor"), "voice": "", "lead": "violin"},
        captioned=False,
    ),
)
ODD = {
    "odd/truncated.mp3": ("failed", "truncated"),
    "odd/empty.mp3": ("failed", "empty_file"),
    "odd/not_music.mp3": ("failed", "not_audio"),
    "odd/silence.flac": ("rejected", "silent"),
    "odd/three_seconds.wav": ("rejected", "too_short"),
    "odd/telephone_8khz.wav": ("rejected", "sample_rate"),
    "odd/surround_51.flac": ("rejected", "channels"),
    "odd/night_drive_copy.mp3": ("rejected", "duplicate"),
}
"""Odd file -> status and reason that the corpus job has to give it."""
ODD_CAPTION = "A short test recording."
UNMATCHED = {"path": "north_harbour/lost_tape.mp3", "caption": "A lo-fi tape that is not in this folder."}


def write_demo_songs(folder: Path, seed: int = 0) -> list[Path]:
    """Write the songs, the odd files, `captions.json` and `truth.json`; nothing where they are there already.

    The songs are 8 good tracks of 10 to 34 s, 150 s in all. `odd/` holds a truncated MP3, an empty file, a
    text file named .mp3, a silent track, a 3 s track, an 8 kHz mono file, a 5.1 file and a copy of a good
    track. One good track has no caption and one caption has no track. MP3, FLAC and WAV bytes depend on seed
    and codec version alone; OGG streams carry a random serial number.

    Args:
        folder: where to write; made if it is absent. Other files in it are left alone.
        seed: another seed gives other pieces under the same names.

    Returns:
        The paths of all audio inputs, good and odd, sorted.
    """
    target = Folder.at(str(folder))
    if not _complete(target, seed):
        takes = [perform(seed, i, seconds=s.seconds, faults=s.faults, **s.told) for i, s in enumerate(SONGS)]
        good = {song.path: _file(song, take) for song, take in zip(SONGS, takes, strict=True)}
        files = {**good, **_odd_files(takes[0], good)}
        files[CAPTIONS], files[TRUTH] = _captions(takes), _truth(takes)
        for name, data in files.items():
            target.write(name, data)
        digests = {name: _sha256(data) for name, data in files.items()}
        manifest = {"version": VERSION, "seed": seed, "files": digests}
        target.write(MANIFEST, _json(manifest))
    names = target.read_json(MANIFEST, "files")["files"]
    return sorted(Path(folder) / name for name in names if name not in (CAPTIONS, TRUTH))


def _file(song: Song, take: Clip) -> bytes:
    mix = take.mix if song.channels == 2 else take.mix.mean(axis=0, keepdims=True)
    suffix = song.path.rsplit(".", 1)[1]
    return encoded(resample(mix, RATE, song.sample_rate), suffix, song.sample_rate, song.title, song.artist)


def _odd_files(take: Clip, good: Mapping[str, bytes]) -> dict[str, bytes]:
    """All of `ODD`; what sounds in them is from the first song."""
    whole = good[SONGS[0].path]
    start = {stem: audio[:, : 12 * RATE] for stem, audio in take.stems.items()}
    mono = take.mix[:, : 12 * RATE].mean(axis=0, keepdims=True)
    # left, right, centre, low frequencies, left and right surround
    voice, bass = (start[stem].mean(axis=0, keepdims=True) for stem in ("vocals", "bass"))
    surround = np.concatenate([start["drums"], voice, bass, start["other"]])
    files = {
        "truncated.mp3": whole[: len(whole) * 2 // 5],
        "empty.mp3": b"",
        "not_music.mp3": b"This is a text file that somebody renamed to .mp3.\n" * 40,
        "silence.flac": encoded(np.zeros((2, 12 * RATE), np.float32), "flac"),
        "three_seconds.wav": encoded(take.mix[:, : 3 * RATE], "wav"),
        "telephone_8khz.wav": encoded(resample(mono, RATE, 8000), "wav", 8000),
        "surround_51.flac": encoded(surround, "flac"),
        "night_drive_copy.mp3": good["lumen/night_drive.mp3"],
    }
    return {path: files[path.removeprefix("odd/")] for path in ODD}


def _captions(takes: list[Clip]) -> bytes:
    rows = [
        {"path": song.path, "caption": take.caption} for song, take in zip(SONGS, takes, strict=True) if song.captioned
    ]
    rows += [{"path": path, "caption": ODD_CAPTION} for path in ODD]
    return _json([*rows, UNMATCHED])


def _truth(takes: list[Clip]) -> bytes:
    """A row per file: the outcome that a corpus job owes it, and of songs all that is true of them."""
    rows: list[dict[str, Any]] = [
        {"path": song.path, "title": song.title, "artist": song.artist, "status": "ok", "reason": "", **take.row()}
        for song, take in zip(SONGS, takes, strict=True)
    ]
    rows += [{"path": path, "status": status, "reason": reason} for path, (status, reason) in ODD.items()]
    return _json(rows)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _complete(folder: Folder, seed: int) -> bool:
    if not folder.exists(MANIFEST):
        return False
    try:
        manifest = read_json(folder.read(MANIFEST))
        if (manifest["version"], manifest["seed"]) != (VERSION, seed):
            return False
        files = dict(manifest["files"])
    except (ValueError, KeyError, TypeError):
        return False  # a manifest that somebody edited: write everything anew
    return all(folder.exists(name) and _sha256(folder.read(name)) == digest for name, digest in files.items())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write demo songs, and the odd files of every music folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    paths = write_demo_songs(arguments.folder, arguments.seed)
    print(f"{len(paths)} audio files in {arguments.folder}")


if __name__ == "__main__":
    main()
