"""Keys, modes, chords and tempo words: what the composer knows of music theory.

Pitches are MIDI numbers (69 = A4 = 440 Hz, equal temperament). Scale degrees count from 0, the tonic, and may leave
the octave in both directions.
"""

from dataclasses import dataclass

A4 = 440.0
NAMES = ("C", "D flat", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
MODES = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "minor": (0, 2, 3, 5, 7, 8, 10),
    "dorian": (0, 2, 3, 5, 7, 9, 10),
    "mixolydian": (0, 2, 4, 5, 7, 9, 10),
}
BRIGHT = ("major", "mixolydian")
"""Modes with a major third."""
SLOW_BPM = 84.0
FAST_BPM = 132.0

PROGRESSIONS: dict[str, tuple[tuple[int, ...], ...]] = {
    # one chord a bar, as scale degrees; the same degrees serve every mode
    "song": ((0, 4, 5, 3), (0, 5, 3, 4), (5, 3, 0, 4), (0, 3, 0, 4), (0, 2, 3, 4), (0, 3, 5, 4), (3, 0, 4, 5)),
    "rock": ((0, 6, 3, 0), (0, 3, 4, 3), (0, 0, 3, 4), (0, 5, 6, 0), (0, 2, 6, 3)),
    "jazz": ((1, 4, 0, 0), (0, 5, 1, 4), (2, 5, 1, 4), (0, 3, 1, 4), (5, 1, 4, 0)),
    "blues": ((0, 0, 0, 0, 3, 3, 0, 0, 4, 3, 0, 4), (0, 3, 0, 0, 3, 3, 0, 0, 4, 3, 0, 0)),
    "loop": ((0, 0, 5, 5), (0, 0, 3, 3), (0, 5, 0, 6), (0, 2, 0, 3), (0, 0, 0, 6)),
    "classical": ((0, 3, 4, 0), (0, 4, 0, 4, 5, 3, 4, 0), (0, 5, 1, 4), (0, 1, 4, 0), (0, 4, 5, 2, 3, 0, 3, 4)),
    "drift": ((0, 3), (0, 5), (0, 2, 5, 3), (3, 0), (0, 1)),
}


@dataclass(frozen=True)
class Key:
    """Tonic as a pitch class (0 = C), and mode."""

    tonic: int
    mode: str

    @property
    def name(self) -> str:
        return f"{NAMES[self.tonic]} {self.mode}"

    @property
    def bright(self) -> bool:
        return self.mode in BRIGHT

    def midi(self, degree: int, octave: int = 4) -> int:
        """MIDI number of a degree above the tonic of an octave (octave 4 holds middle C)."""
        scale = MODES[self.mode]
        return 12 * (octave + 1) + self.tonic + scale[degree % 7] + 12 * (degree // 7)

    def scale(self) -> frozenset[int]:
        """Pitch classes."""
        return frozenset((self.tonic + step) % 12 for step in MODES[self.mode])


@dataclass(frozen=True)
class Chord:
    """Thirds stacked on a scale degree; in minor the fifth degree has a leading tone if `raised`."""

    key: Key
    degree: int
    size: int = 3
    raised: bool = False

    def classes(self) -> tuple[int, ...]:
        """Pitch classes from the root up."""
        classes = [self.key.midi(self.degree + 2 * i) % 12 for i in range(self.size)]
        if self.sharpens:
            classes[1] = (classes[1] + 1) % 12
        return tuple(classes)

    @property
    def sharpens(self) -> bool:
        return self.raised and self.key.mode == "minor" and self.degree % 7 == 4

    def scale(self) -> frozenset[int]:
        """Pitch classes that a melody may use while this chord sounds."""
        scale = self.key.scale()
        if not self.sharpens:
            return scale
        leading = (self.key.tonic + 11) % 12
        return (scale - {(leading - 1) % 12}) | {leading}

    def root(self, low: int) -> int:
        """The root, at or above a MIDI number by less than an octave."""
        return low + (self.classes()[0] - low) % 12


def hertz(midi: float) -> float:
    return float(A4 * 2 ** ((midi - 69) / 12))


def nearest(pitch: float, classes: frozenset[int] | tuple[int, ...]) -> int:
    """The MIDI number with one of these pitch classes that is nearest to `pitch`; the lower one of two."""
    centre = round(pitch)
    return min((n for n in range(centre - 7, centre + 8) if n % 12 in classes), key=lambda n: (abs(n - pitch), n))


def voicing(chord: Chord, before: tuple[int, ...], low: int, high: int) -> tuple[int, ...]:
    """The chord in close position between `low` and `high` whose notes move least from the chord `before`."""
    classes = chord.classes()
    shapes = []
    for first in range(len(classes)):
        for bottom in range(low, low + 12):
            if bottom % 12 != classes[first]:
                continue
            notes = [bottom]
            for i in range(1, len(classes)):
                notes.append(notes[-1] + ((classes[(first + i) % len(classes)] - notes[-1]) % 12 or 12))
            shapes += [tuple(n + shift for n in notes) for shift in (0, 12, 24) if notes[-1] + shift <= high]
    if not shapes:
        return tuple(nearest((low + high) / 2, (c,)) for c in classes)
    goal = sum(before) / len(before) if before else (low + high) / 2
    return min(shapes, key=lambda notes: (abs(sum(notes) / len(notes) - goal), notes))


def tempo_word(bpm: float) -> str:
    """slow (below 84), medium, or fast (above 132)."""
    if bpm < SLOW_BPM:
        return "slow"
    return "fast" if bpm > FAST_BPM else "medium"
