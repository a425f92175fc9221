"""What each player does in a bar: bass lines, accompaniment, drum grooves, melodies and their words.

Times are in beats from the start of a bar or a phrase; a part is a list of (beat, length, MIDI number, velocity).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ttmray.synth.theory import FAST_BPM, Chord, nearest

Event = tuple[float, float, int, float]

VOWELS = ("a", "e", "i", "o", "u")
CONSONANTS = ("", "", "m", "n", "l", "s", "t", "d", "k", "h")

CELLS: dict[int, tuple[tuple[tuple[float, float], ...], ...]] = {
    # rhythms of half a bar (of a bar in 3/4): (beat, length)
    4: (
        ((0, 1), (1, 1)),
        ((0, 0.5), (0.5, 0.5), (1, 1)),
        ((0, 1), (1, 0.5), (1.5, 0.5)),
        ((0, 1.5), (1.5, 0.5)),
        ((0, 0.5), (0.5, 1), (1.5, 0.5)),
        ((0, 0.5), (0.5, 0.5), (1, 0.5), (1.5, 0.5)),
        ((0, 2),),
        ((0.5, 0.5), (1, 1)),
        ((0, 0.75), (0.75, 0.75), (1.5, 0.5)),
        ((1, 0.5), (1.5, 0.5)),
    ),
    3: (
        ((0, 1), (1, 1), (2, 1)),
        ((0, 2), (2, 1)),
        ((0, 1.5), (1.5, 0.5), (2, 1)),
        ((0, 1), (1, 0.5), (1.5, 0.5), (2, 1)),
        ((0, 3),),
        ((0, 1), (1, 2)),
    ),
}


@dataclass(frozen=True)
class Bar:
    """A bar's harmony: its chord, the next bar's chord, the voicing for the accompaniment, and its beats."""

    chord: Chord
    following: Chord
    voicing: tuple[int, ...]
    beats: int


def bass_line(kind: str, bar: Bar, low: int, rng: np.random.Generator) -> list[Event]:
    """One bar of bass at or above the MIDI number `low`."""
    root = bar.chord.root(low)
    fifth = root + (bar.chord.classes()[2] - root) % 12
    if fifth > low + 14:
        fifth -= 12
    beats = bar.beats
    if kind == "eighths":
        return [(i / 2, 0.46, root, 0.9 if i % 2 == 0 else 0.75) for i in range(2 * beats)]
    if kind == "sixteenths":
        shape = (0, 0, 12, 0)
        return [(i / 4, 0.22, root + shape[i % 4], 0.9 if i % 4 == 0 else 0.65) for i in range(4 * beats)]
    if kind == "octaves":
        return [(i / 2, 0.42, root + 12 * (i % 2), 0.85) for i in range(2 * beats)]
    if kind == "offbeat":
        return [(i + 0.5, 0.45, root, 0.9) for i in range(beats)]
    if kind == "rootfifth":
        half = beats / 2
        return [(0, half * 0.9, root, 0.9), (half, half * 0.9, fifth, 0.8)]
    if kind == "walking":
        return _walk(bar, root, low)
    if kind == "syncopated":
        return [(0, 0.7, root, 0.9), (1.5, 0.45, root, 0.75), (2.5, 0.7, fifth, 0.8), (3.5, 0.4, root, 0.7)]
    if kind == "long":
        return [(0, beats * 0.98, root, 0.8)]
    if kind == "ones":
        return [(0, 0.95, root if rng.random() < 0.7 else fifth, 0.9)]
    if beats == 4:
        return [(0, 1.9, root, 0.9), (2, 1.9, root, 0.8)]
    return [(0, beats - 0.1, root, 0.9)]


def _walk(bar: Bar, root: int, low: int) -> list[Event]:
    """Quarter notes through the chord towards the next root."""
    goal = bar.following.root(low)
    scale, classes = bar.chord.scale(), bar.chord.classes()
    second = nearest(root + 3.5, tuple(classes[1:]))
    third = nearest((second + goal) / 2 + 2, classes)
    last = nearest(goal + (2 if goal < third else -2), scale)
    return [(i, 0.92, pitch, 0.9 - 0.1 * (i % 2)) for i, pitch in enumerate((root, second, third, last)[: bar.beats])]


def comping(kind: str, bar: Bar) -> list[Event]:
    """One bar of accompaniment."""
    chord, beats = bar.voicing, bar.beats
    if kind == "slow":
        return _chord(chord, 0, beats * 0.98, 0.8)
    if kind == "block":
        half = beats / 2 if beats == 4 else beats
        return [e for i in range(int(beats / half)) for e in _chord(chord, i * half, half * 0.95, 0.85 - 0.1 * i)]
    if kind in ("arpeggio", "sixteenths", "alberti"):
        step = 0.25 if kind == "sixteenths" else 0.5
        order = (0, 2, 1, 2) if kind == "alberti" else (0, 1, 2, 1)
        high = (*chord, chord[0] + 12)
        if kind == "sixteenths":
            order = (0, 1, 2, 3)
        count = round(beats / step)
        return [(i * step, step * 1.6, high[order[i % 4]], 0.85 if i % 4 == 0 else 0.7) for i in range(count)]
    patterns: dict[str, tuple[tuple[float, float, float], ...]] = {
        "strum": ((0, 0.9, 0.9), (1, 0.45, 0.7), (1.5, 0.45, 0.6), (2.5, 0.45, 0.7), (3, 0.45, 0.8), (3.5, 0.4, 0.6)),
        "pulse": tuple((i / 2, 0.45, 0.9 if i % 2 == 0 else 0.7) for i in range(2 * beats)),
        "charleston": ((0, 1.2, 0.85), (1.5, 0.6, 0.75)),
        "stabs": ((0, 0.3, 0.9), (0.75, 0.3, 0.8), (1.5, 0.3, 0.8), (3, 0.3, 0.8)),
        "offbeat": tuple((i + 0.5, 0.3, 0.85) for i in range(beats)),
        "oompah": tuple((i, 0.6, 0.75) for i in range(1, beats)),
        "bossa": ((0, 0.8, 0.85), (1.5, 0.4, 0.75), (2.5, 0.9, 0.8), (3.5, 0.4, 0.7)),
        "boomchick": tuple((i + 0.5, 0.35, 0.8) for i in range(beats)),
    }
    return [event for beat, length, force in patterns[kind] for event in _chord(chord, beat, length, force)]


def _chord(pitches: Sequence[int], beat: float, length: float, force: float) -> list[Event]:
    return [(beat, length, pitch, force) for pitch in pitches]


def settle(groove: dict[str, str], slow: bool, rng: np.random.Generator) -> dict[str, str]:
    """A groove of a piece: question marks become strokes or rests; slow pieces keep hats to the beats."""
    settled = {}
    for drum, pattern in groove.items():
        marks = ["x" if mark == "?" and rng.random() < 0.5 else mark.replace("?", ".") for mark in pattern]
        if slow and drum in ("hat", "shaker", "ride") and marks[0] != ".":
            marks = [mark if step % 4 == 0 else "." for step, mark in enumerate(marks)]
        settled[drum] = "".join(marks)
    return settled


def drum_bar(groove: dict[str, str], fill: str, crash: bool, force: float) -> list[tuple[float, str, float]]:
    """(beat, drum, velocity) of one bar. `fill` is "" or the drum that rolls through the last beat."""
    length = len(next(iter(groove.values())))
    strokes = []
    for drum, pattern in groove.items():
        for step, mark in enumerate(pattern):
            if mark == "." or (fill and step >= length - 4 and drum != "kick"):
                continue
            accent = 1.0 if step % 4 == 0 else 0.82
            strokes.append((step / 4, drum, force * accent * (0.35 if mark == "g" else 0.9)))
    if fill:
        strokes += [((length - 4 + i) / 4, fill, force * (0.6 + 0.1 * i)) for i in range(4)]
    if crash:
        strokes.append((0.0, "crash", force * 0.8))
    return strokes


@dataclass(frozen=True)
class Rhythm:
    """A two-bar motif: (beat, length, steps from the note before)."""

    notes: tuple[tuple[float, float, int], ...]


def motif(beats: int, bars: int, tempo: float, rng: np.random.Generator) -> Rhythm:
    """A random rhythm with a contour; fast tempos get longer notes."""
    cells, per_bar = CELLS[4 if beats == 4 else 3], 2 if beats == 4 else 1
    weight = np.ones(len(cells))
    if tempo > FAST_BPM:
        weight[[0, 3, 6] if beats == 4 else [1, 4, 5]] = 2.5
    notes = []
    for i in range(bars * per_bar):
        cell = cells[rng.choice(len(cells), p=weight / weight.sum())]
        notes += [(i * beats / per_bar + beat, length) for beat, length in cell]
    steps = rng.choice([-4, -3, -2, -1, 0, 1, 2, 3, 4], size=len(notes), p=STEP_CHANCES)
    return Rhythm(tuple((beat, length, int(step)) for (beat, length), step in zip(notes, steps, strict=True)))


STEP_CHANCES = np.array([0.02, 0.06, 0.16, 0.22, 0.1, 0.22, 0.14, 0.05, 0.03])


def melody(chords: Sequence[Chord], beats: int, low: int, tempo: float, rng: np.random.Generator) -> list[Event]:
    """A melody over one chord a bar, in a range of 14 semitones: motif, repeat, and a cadence on a long note.

    Strong beats take chord notes; other notes belong to the scale of the moment.
    """
    theme = motif(beats, min(2, len(chords)), tempo, rng)
    length = min(2, len(chords)) * beats
    events: list[Event] = []
    pitch = float(nearest(low + 6, chords[0].classes()))
    for bar, chord in enumerate(chords):
        scale = sorted(n for n in range(low, low + 15) if n % 12 in chord.scale())
        last = bar == len(chords) - 1
        offset = (bar * beats) % length
        for beat, duration, step in theme.notes:
            if not offset <= beat < offset + beats:
                continue
            place = beat - offset
            if last and place >= beats / 2:
                break
            index = min(range(len(scale)), key=lambda i: abs(scale[i] - pitch)) + step
            if not 0 <= index < len(scale):
                index -= 2 * step
            pitch = float(scale[int(np.clip(index, 0, len(scale) - 1))])
            if place % 2 == 0 or duration >= 1.5:
                pitch = float(nearest(pitch, chord.classes()))
            duration = min(duration, beats - place)
            events.append((bar * beats + place, duration * 0.95, int(pitch), 0.9 if place % 1 == 0 else 0.75))
        if last:
            final = nearest(pitch, chord.classes()[:1] + chord.classes()[2:3])
            events.append((bar * beats + beats / 2, beats / 2 * 0.9, final, 0.85))
    return events


def words(count: int, rng: np.random.Generator) -> list[str]:
    """Syllables (consonant and vowel) of made-up words that come back, as in a lyric."""
    vocabulary = [
        [CONSONANTS[rng.integers(len(CONSONANTS))] + VOWELS[rng.integers(5)] for _ in range(rng.integers(1, 4))]
        for _ in range(6)
    ]
    syllables: list[str] = []
    while len(syllables) < count:
        syllables += vocabulary[rng.integers(6)]
    return syllables[:count]
