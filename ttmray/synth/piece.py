"""What a composed piece is: its attributes, who plays, and the notes. Plain data that is rendered elsewhere."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from ttmray.synth.theory import NAMES, Key, tempo_word

STEMS = ("drums", "bass", "other", "vocals")
"""The four stems in the order of Demucs."""


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """The truth about a piece. An empty string means that there is no such part.

    Attributes:
        tempo: beats per minute.
        beats: beats per bar.
        swing: share of a pair of notes that the first takes (0.5 straight).
        voice: register of the singer: low, high or "".
        bright: tone of the whole band, -1 (mellow) to 1 (brilliant); style, not a fault.
    """

    style: str
    word: str
    tempo: float
    key: Key
    beats: int
    swing: float
    swung: int
    kit: str
    bass: str
    comp: str
    lead: str
    pad: str
    voice: str
    room: str
    bright: float

    @property
    def tempo_word(self) -> str:
        return tempo_word(self.tempo)

    def row(self) -> dict[str, Any]:
        """Flat columns for a table."""
        row = asdict(self) | {"tonic": NAMES[self.key.tonic], "mode": self.key.mode, "tempo_word": self.tempo_word}
        del row["key"]
        return row | {"drums": bool(self.kit), "vocals": bool(self.voice)}


@dataclass(frozen=True)
class Player:
    """One player. `gain_db` is against the loudest part, `pan` from -1 (left) to 1, `width` and `send` 0 to 1."""

    part: str
    instrument: str
    stem: str
    gain_db: float
    pan: float
    width: float
    send: float
    tone: float
    """Brightness of the timbre, -1 to 1."""


@dataclass(frozen=True)
class Note:
    """One sound of a part: start and length in seconds, velocity 0 to 1.

    `say` is the drum for drums, and consonant and vowel for the voice.
    """

    part: str
    midi: float
    start: float
    length: float
    velocity: float
    say: str = ""

    @property
    def end(self) -> float:
        return self.start + self.length


@dataclass(frozen=True)
class Section:
    """A part of the form; seconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Piece:
    """Everything that a rendering needs; `seed` and `index` name it."""

    seed: int
    index: int
    seconds: float
    attributes: Attributes
    tracks: tuple[Player, ...]
    notes: tuple[Note, ...]
    """In order of their starts."""
    sections: tuple[Section, ...]

    def with_notes(self, notes: tuple[Note, ...]) -> Self:
        return replace(self, notes=tuple(sorted(notes, key=lambda note: (note.start, note.part, note.midi))))

    def heard(self, start: float, seconds: float) -> Attributes:
        """The attributes of a clip: parts that do not sound in it are left out.

        A part counts if its notes cover 8 % of the clip; the drums if they strike twice.
        """
        cover = dict.fromkeys(("bass", "comp", "lead", "pad", "voice", "drums"), 0.0)
        strikes = 0
        for note in self.notes:
            overlap = min(note.end, start + seconds) - max(note.start, start)
            if overlap > 0:
                cover[note.part] += overlap
                strikes += note.part == "drums" and note.start >= start
        plays = {part: covered >= 0.08 * seconds for part, covered in cover.items()}
        silent: dict[str, Any] = {part: "" for part in ("bass", "comp", "lead", "pad", "voice") if not plays[part]}
        if strikes < 2:
            silent["kit"] = ""
        return replace(self.attributes, **silent)


@dataclass(frozen=True)
class Clock:
    """Beats to seconds, with swing."""

    tempo: float
    swing: float = 0.5
    swung: int = 2

    def seconds(self, beat: float) -> float:
        unit = 2 / self.swung
        whole, share = divmod(beat / unit, 1.0)
        late = share * 2 * self.swing if share < 0.5 else self.swing + (share - 0.5) * 2 * (1 - self.swing)
        return (whole + late) * unit * 60 / self.tempo
