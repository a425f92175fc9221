"""A few seeded songs with real musical structure, and the broken files that every music folder has.

Chord progression, bass line, drum pattern and a sung or played melody are composed as notes, rendered as four
stems (vocals, drums, bass, other) with band-limited wavetables, and written as MP3, FLAC, WAV and OGG with
tags and a caption table. Made for demos and tests; numpy and soundfile only.

    python -m ttmray.synth.songs FOLDER [--seed N]
"""

import argparse
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from ttmray.storage import Folder

VERSION = 1
"""Raise it whenever the same seed gives other files, so that old folders are written anew."""
MANIFEST = ".songs.json"
STEMS = ("vocals", "drums", "bass", "other")
MAJOR = (0, 2, 4, 5, 7, 9, 11)
MINOR = (0, 2, 3, 5, 7, 8, 10)
PEAK = 0.89

Audio = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Song:
    """What the composer is told. `key` is the MIDI note of the tonic two octaves below the melody."""

    path: str
    title: str
    artist: str
    caption: str
    seconds: float
    tempo: float
    key: int
    scale: tuple[int, ...]
    chords: tuple[int, ...]
    """Scale degree (0 = tonic) of the chord of each bar, repeated."""
    drums: Mapping[str, str]
    """Sixteenth-note pattern of one bar for each drum, `x` where it sounds."""
    bass: str
    """Eighth-note pattern of one bar: `r` root, `f` fifth, `o` octave, `-` rest."""
    lead: str
    pad: str
    width: float = 0.5
    """Stereo spread, 0 (mono) to 1."""
    sample_rate: int = 44100
    channels: int = 2


@dataclass(frozen=True)
class Note:
    """One sound: start and length in seconds, pan from -1 (left) to 1 (right)."""

    stem: str
    instrument: str
    midi: int
    start: float
    length: float
    gain: float
    pan: float


@dataclass(frozen=True)
class Instrument:
    """A timbre: harmonic `k` has amplitude `k ** -slope`, weighted by formants where there are any."""

    slope: float
    only_odd: bool
    attack: float
    """Seconds."""
    decay: float
    """Time constant in seconds of the fall towards `sustain`."""
    sustain: float
    vibrato: float = 0.0
    """Half range of the vibrato in semitones; its rate is 5.5 Hz."""
    formants: tuple[float, ...] = ()
    """Hz, each with a bandwidth of 15 %."""


INSTRUMENTS = {
    "voice": Instrument(0.9, False, 0.05, 0.4, 0.8, 0.3, (730.0, 1090.0, 2440.0)),
    "flute": Instrument(2.4, False, 0.06, 0.5, 0.8, 0.15),
    "guitar": Instrument(1.3, False, 0.004, 0.35, 0.0),
    "piano": Instrument(1.7, False, 0.005, 0.6, 0.05),
    "square": Instrument(1.0, True, 0.005, 0.25, 0.4),
    "strings": Instrument(1.2, False, 0.25, 1.0, 0.9, 0.1),
    "organ": Instrument(1.5, True, 0.02, 1.0, 1.0),
    "bass": Instrument(1.4, False, 0.008, 0.3, 0.3),
}
DRUM_SECONDS = {"kick": 0.35, "snare": 0.22, "hat": 0.06}
DRUM_GAIN = {"kick": 0.9, "snare": 0.5, "hat": 0.2}

ROCK = {"kick": "x.....x.x.......", "snare": "....x.......x...", "hat": "x.x.x.x.x.x.x.x."}
HOUSE = {"kick": "x...x...x...x...", "snare": "....x.......x...", "hat": "..x...x...x...x."}
BREAKS = {"kick": "x..x......x.....", "snare": "....x..x.x..x..x", "hat": "xxxxxxxxxxxxxxxx"}
BRUSHES = {"snare": "....x.......x...", "hat": "x...x.x.x...x.x."}

SONGS = (
    Song(
        path="amber_fields/harvest_road.mp3",
        title="Harvest Road",
        artist="Amber Fields",
        seconds=34.0,
        tempo=96.0,
        key=43,
        scale=MAJOR,
        chords=(0, 4, 5, 3),
        drums=ROCK,
        bass="r-rfr-of",
        lead="voice",
        pad="guitar",
        width=0.6,
        caption="A warm folk rock song in G major at a walking tempo, with a soft lead voice over guitar, "
        "a round bass and a steady rock beat.",
    ),
    Song(
        path="amber_fields/slow_tide.flac",
        title="Slow Tide",
        artist="Amber Fields",
        seconds=28.0,
        tempo=72.0,
        key=40,
        scale=MINOR,
        chords=(0, 5, 2, 6),
        drums={},
        bass="r---f---",
        lead="flute",
        pad="strings",
        width=0.8,
        caption="A slow ambient piece in E minor without drums: a flute over wide strings, calm.",
    ),
    Song(
        path="kite/paper_kite.wav",
        title="Paper Kite",
        artist="Kite",
        seconds=18.0,
        tempo=120.0,
        key=45,
        scale=MAJOR,
        chords=(0, 3, 4, 0),
        drums=HOUSE,
        bass="r-o-r-o-",
        lead="square",
        pad="organ",
        width=0.4,
        sample_rate=48000,
        caption="A bouncy chiptune dance track in A major with a square lead and four-on-the-floor drums.",
    ),
    Song(
        path="kite/rooftop.ogg",
        title="Rooftop",
        artist="Kite",
        seconds=22.0,
        tempo=140.0,
        key=38,
        scale=MINOR,
        chords=(0, 6, 5, 6),
        drums=BREAKS,
        bass="r-r-f--o",
        lead="square",
        pad="strings",
        caption="A fast breakbeat track in D minor with busy hi-hats and a sharp synth lead.",
    ),
    Song(
        path="lumen/night_drive.mp3",
        title="Night Drive",
        artist="Lumen",
        seconds=14.0,
        tempo=110.0,
        key=41,
        scale=MINOR,
        chords=(0, 5, 3, 4),
        drums=HOUSE,
        bass="rrrrrrrr",
        lead="voice",
        pad="organ",
        width=0.7,
        caption="A synthwave song in F minor with a driving eighth-note bass, house drums and an airy voice.",
    ),
    Song(
        path="lumen/blue_hour.mp3",
        title="Blue Hour",
        artist="Lumen",
        seconds=12.0,
        tempo=84.0,
        key=46,
        scale=MAJOR,
        chords=(1, 4, 0, 5),
        drums=BRUSHES,
        bass="r-f-o-f-",
        lead="piano",
        pad="guitar",
        channels=1,
        caption="A relaxed jazz ballad in B flat major with piano melody, walking bass and brushed drums.",
    ),
    Song(
        path="lumen/Été à la plage (été 2).flac",
        title="Été à la plage",
        artist="Lumen",
        seconds=12.0,
        tempo=104.0,
        key=48,
        scale=MAJOR,
        chords=(0, 4, 3, 4),
        drums=BRUSHES,
        bass="r-rff-of",
        lead="guitar",
        pad="strings",
        caption="A sunny bossa-flavoured guitar tune in C major with light percussion.",
    ),
    Song(
        path="north_harbour/first_light.flac",
        title="First Light",
        artist="North Harbour",
        seconds=10.0,
        tempo=90.0,
        key=36,
        scale=MINOR,
        chords=(0, 2, 5, 4),
        drums=ROCK,
        bass="r---r-f-",
        lead="strings",
        pad="piano",
        width=0.3,
        caption="",
    ),
)
ODD_CAPTION = "A short test recording."
UNMATCHED = {"path": "north_harbour/lost_tape.mp3", "caption": "A lo-fi tape that is not in this folder."}


def compose(song: Song, seed: int = 0) -> list[Note]:
    """The notes of a song: the same song and seed give the same notes.

    The first bar is an introduction without drums and melody; the melody repeats a motif of two bars in the
    form A A B A; a chord lasts one bar.
    """
    rng = np.random.default_rng([seed, *song.path.encode()])
    beat = 60.0 / song.tempo
    bars = int(np.ceil(song.seconds / (4 * beat)))
    motifs = {name: rng.integers(-2, 3, size=16).cumsum() for name in "AB"}
    sounding = {name: rng.random(16) > 0.25 for name in "AB"}
    notes: list[Note] = []
    for bar in range(bars):
        start, root = bar * 4 * beat, song.chords[bar % len(song.chords)]
        for voice in (0, 2, 4):
            side = song.width * (voice - 2) / 2
            notes.append(Note("other", song.pad, _midi(song, root + voice, 1), start, 4 * beat, 0.16, side))
        for eighth, what in enumerate(song.bass):
            if what != "-":
                degree = root + {"r": 0, "f": 4, "o": 7}[what]
                pitch, when = _midi(song, degree, 0), start + eighth * beat / 2
                notes.append(Note("bass", "bass", pitch, when, beat / 2, 0.4, 0.0))
        if bar == 0:
            continue
        for drum, pattern in song.drums.items():
            for step, mark in enumerate(pattern):
                if mark == "x":
                    when, side = start + step * beat / 4, 0.4 * song.width if drum == "hat" else 0.0
                    notes.append(Note("drums", drum, 0, when, DRUM_SECONDS[drum], DRUM_GAIN[drum], side))
        part = "AABA"[((bar - 1) // 2) % 4]
        stem = "vocals" if song.lead == "voice" else "other"
        for eighth in range(8):
            place = eighth + 8 * ((bar - 1) % 2)
            strong = eighth % 4 == 0
            if strong or sounding[part][place]:
                step = int(motifs[part][place])
                # strong beats take the chord tone nearest to the motif, so that melody and harmony agree
                degree = _nearest(step, root) if strong else step
                pitch, when = _midi(song, degree, 2), start + eighth * beat / 2
                notes.append(Note(stem, song.lead, pitch, when, beat / 2, 0.3, -0.3 * song.width))
    return notes


def render(song: Song, seed: int = 0) -> dict[str, Audio]:
    """The four stems of a song, each (2, samples) float32; their sum has a sample peak of 0.89."""
    rate, total = song.sample_rate, round(song.seconds * song.sample_rate)
    rng = np.random.default_rng([seed, 1, *song.path.encode()])
    sounds: dict[tuple[str, int, float], Audio] = {}
    stems = {stem: np.zeros((2, total), np.float32) for stem in STEMS}
    for note in compose(song, seed):
        kind = (note.instrument, note.midi, note.length)
        if kind not in sounds:
            sounds[kind] = _drum(note.instrument, rate, rng) if note.stem == "drums" else _tone(*kind, rate)
        begin = round(note.start * rate)
        sound = sounds[kind][: max(total - begin, 0)]
        angle = (note.pan + 1) * np.pi / 4  # constant power
        sides = np.array([[np.cos(angle)], [np.sin(angle)]], np.float32)
        stems[note.stem][:, begin : begin + sound.size] += note.gain * sides * sound
    fade = np.minimum(1.0, np.arange(total, 0, -1) / (0.25 * rate)).astype(np.float32)
    peak = float(np.abs(sum(stems.values()) * fade).max())
    return {stem: (audio * fade * (PEAK / peak)).astype(np.float32) for stem, audio in stems.items()}


def write_demo_songs(folder: Path, seed: int = 0) -> list[Path]:
    """Write the songs, the odd files and `captions.json`; nothing happens where they are there already.

    The songs are 8 good tracks of 10 to 34 s, 150 s in all. `odd/` holds a truncated MP3, an empty file, a
    text file named .mp3, a silent track, a 3 s track, an 8 kHz mono file, a 5.1 file and a copy of a good
    track. One good track has no caption and one caption has no track. MP3, FLAC and WAV bytes depend on seed
    and codec version alone; OGG streams carry a random serial number.

    Args:
        folder: where to write; made if it is absent. Other files in it are left alone.
        seed: another seed gives other melodies and noises under the same names.

    Returns:
        The paths of all audio inputs, good and odd, sorted.
    """
    target = Folder.at(str(folder))
    if not _complete(target, seed):
        good = _good_files(seed)
        odd = _odd_files(seed, good)
        files = {**good, **odd, "captions.json": _captions(odd)}
        for name, data in files.items():
            target.write(name, data)
        digests = {name: _sha256(data) for name, data in files.items()}
        manifest = {"version": VERSION, "seed": seed, "files": digests}
        target.write(MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode())
    names = json.loads(target.read(MANIFEST))["files"]
    return sorted(Path(folder) / name for name in names if name != "captions.json")


def _midi(song: Song, degree: int, octave: int) -> int:
    return song.key + 12 * octave + song.scale[degree % 7] + 12 * (degree // 7)


def _nearest(degree: int, root: int) -> int:
    """The note of the triad on `root`, in any octave, that is nearest to a scale degree."""
    triad = [root + 7 * octave + third for octave in (-2, -1, 0, 1) for third in (0, 2, 4)]
    return min(triad, key=lambda note: abs(note - degree))


def _tone(instrument: str, midi: int, length: float, rate: int) -> Audio:
    kind, frequency = INSTRUMENTS[instrument], 440.0 * 2 ** ((midi - 69) / 12)
    release = 0.04
    time = np.arange(int((length + release) * rate)) / rate
    partial = np.arange(1, max(2, min(64, int(0.45 * rate / frequency))))
    level = partial ** -float(kind.slope) * ((partial % 2 == 1) if kind.only_odd else 1.0)
    if kind.formants:
        hertz = partial * frequency
        level = level * (0.05 + sum(np.exp(-(((hertz - f) / (0.15 * f)) ** 2)) for f in kind.formants))
    size = 4096
    spectrum = np.zeros(size // 2 + 1, complex)
    spectrum[partial] = -0.5j * size * level
    cycle = np.fft.irfft(spectrum)
    cycle /= 2.5 * np.sqrt(np.mean(cycle**2))  # equal loudness rather than equal peaks
    bend = kind.vibrato * np.sin(2 * np.pi * 5.5 * time)
    phase = np.cumsum(frequency * 2 ** (bend / 12)) / rate
    envelope = kind.sustain + (1 - kind.sustain) * np.exp(-time / kind.decay)
    envelope *= np.minimum(1, time / kind.attack)
    envelope *= np.minimum(1, (length + release - time) / release)
    return (cycle[(phase * size).astype(np.int64) % size] * envelope).astype(np.float32)


def _drum(name: str, rate: int, rng: np.random.Generator) -> Audio:
    time = np.arange(int(DRUM_SECONDS[name] * rate)) / rate
    if name == "kick":  # a sine that falls from 150 Hz to 50 Hz
        turns = 50 * time + 100 * 0.03 * (1 - np.exp(-time / 0.03))
        sound = np.sin(2 * np.pi * turns) * np.exp(-time / 0.1)
    elif name == "snare":
        noise = rng.standard_normal(time.size) * np.exp(-time / 0.06)
        sound = 0.4 * noise + 0.5 * np.sin(2 * np.pi * 190 * time) * np.exp(-time / 0.04)
    else:
        sound = np.diff(rng.standard_normal(time.size + 1)) * np.exp(-time / 0.015) * 0.5
    return sound.astype(np.float32)


def _encode(audio: Audio, rate: int, suffix: str, title: str = "", artist: str = "") -> bytes:
    """A whole file from (channels, samples) float audio, 16 bits where the format has sample widths."""
    subtype = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS", "mp3": "MPEG_LAYER_III"}[suffix]
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, len(audio), subtype, format=suffix.upper()) as file:
        if title:
            file.title, file.artist = title, artist
        for block in np.array_split(audio.T, max(1, audio.shape[1] // 65536)):
            file.write(block)
    return buffer.getvalue()


def _good_files(seed: int) -> dict[str, bytes]:
    files = {}
    for song in SONGS:
        suffix = song.path.rsplit(".", 1)[1]
        files[song.path] = _encode(_mix(song, seed), song.sample_rate, suffix, song.title, song.artist)
    return files


def _mix(song: Song, seed: int) -> Audio:
    """(channels, samples) float32."""
    mix = np.sum(list(render(song, seed).values()), axis=0)
    return mix if song.channels == 2 else mix.mean(axis=0, keepdims=True)


def _odd_files(seed: int, good: Mapping[str, bytes]) -> dict[str, bytes]:
    harvest = SONGS[0]
    short = replace(harvest, path="odd/three_seconds.wav", seconds=3.0)
    telephone = replace(harvest, path="odd/telephone_8khz.wav", seconds=12.0, sample_rate=8000, channels=1)
    cinema = replace(harvest, path="odd/surround_51.flac", seconds=12.0)
    stems = render(cinema, seed)
    # left, right, centre, low frequencies, left and right surround
    voice, bass = (stems[name].mean(axis=0, keepdims=True) for name in ("vocals", "bass"))
    surround = np.concatenate([stems["drums"], voice, bass, stems["other"]])
    whole = good[harvest.path]
    return {
        "odd/truncated.mp3": whole[: len(whole) * 2 // 5],
        "odd/empty.mp3": b"",
        "odd/not_music.mp3": b"This is a text file that somebody renamed to .mp3.\n" * 40,
        "odd/silence.flac": _encode(np.zeros((2, 12 * 44100), np.float32), 44100, "flac"),
        short.path: _encode(_mix(short, seed), short.sample_rate, "wav"),
        telephone.path: _encode(_mix(telephone, seed), telephone.sample_rate, "wav"),
        cinema.path: _encode(surround, cinema.sample_rate, "flac"),
        "odd/night_drive_copy.mp3": good["lumen/night_drive.mp3"],
    }


def _captions(odd: Iterable[str]) -> bytes:
    rows = [{"path": song.path, "caption": song.caption} for song in SONGS if song.caption]
    rows += [{"path": path, "caption": ODD_CAPTION} for path in odd]
    return (json.dumps([*rows, UNMATCHED], indent=1, ensure_ascii=False) + "\n").encode()


def _complete(folder: Folder, seed: int) -> bool:
    if not folder.exists(MANIFEST):
        return False
    try:
        manifest = json.loads(folder.read(MANIFEST))
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
