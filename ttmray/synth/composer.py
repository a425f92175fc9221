"""Composes any number of pieces: piece `index` of `seed` is the same however many are made.

A piece is drawn in this order: a style, its attributes, a form, a harmony per section, and then what each player does
in each bar. Nothing here knows of faults: quality is drawn from another stream of random numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ttmray.synth.instruments import INSTRUMENTS
from ttmray.synth.parts import Bar, Event, bass_line, comping, drum_bar, melody, settle, words
from ttmray.synth.piece import Attributes, Clock, Note, Piece, Player, Section
from ttmray.synth.styles import GROOVES, ROLES, STYLES, Style
from ttmray.synth.theory import PROGRESSIONS, Chord, Key, tempo_word, voicing

ATTRIBUTES, NOTES, FAULTS, SOUND, CAPTION = range(5)
"""Streams of random numbers of a piece, so that one choice never moves another."""

FORMS = (
    ("intro", "verse", "chorus", "verse", "chorus", "bridge", "chorus"),
    ("intro", "verse", "verse", "chorus", "bridge", "chorus", "verse"),
    ("verse", "chorus", "verse", "chorus", "bridge", "chorus"),
    ("intro", "chorus", "verse", "chorus", "bridge", "verse", "chorus"),
)
VOICE_CHANCE = 0.5
LEVELS = {"drums": -1.0, "bass": -2.5, "voice": 0.0, "lead": -1.5, "comp": -6.0, "pad": -9.5}
"""dB of each part's active loudness, before a mixing engineer's taste."""


def stream(seed: int, index: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, index, purpose])


def compose(seed: int, index: int, *, seconds: float | None = None, **attributes: Any) -> Piece:
    """Compose piece `index` of a seed.

    Args:
        seconds: length, by default 30 to 60 s; any length above 0 gives a piece, even less than a bar.
        attributes: fields of `Attributes` to use instead of what is drawn, e.g. `tempo=140.0` or `voice=""`.

    Raises:
        ValueError: `seconds` is not above 0.
        TypeError: an attribute that does not exist.
    """
    if seconds is not None and not 0 < seconds < float("inf"):
        raise ValueError(f"a piece of {seconds} s cannot be composed")
    rng = stream(seed, index, ATTRIBUTES)
    drawn, style = draw_attributes(rng, **attributes)
    length = float(seconds or rng.uniform(30, 60))
    tracks = tuple(_tracks(drawn, rng))
    rng = stream(seed, index, NOTES)
    score = _Score(drawn, style, rng)
    sections, notes = [], []
    clock = Clock(drawn.tempo, drawn.swing, drawn.swung)
    bar = 0
    for name, bars in _form(drawn, rng):
        start = clock.seconds(bar * drawn.beats)
        if start >= length:
            break
        notes += [note for note in score.section(name, bar, bars) if note.start < length - 0.02]
        bar += bars
        sections.append(Section(name, start, min(length, clock.seconds(bar * drawn.beats))))
    piece = Piece(seed, index, length, drawn, tracks, (), tuple(sections))
    playing = {track.part for track in tracks}
    return piece.with_notes(tuple(_human(note, style.loose, rng) for note in notes if note.part in playing))


def draw_attributes(rng: np.random.Generator, **fixed: Any) -> tuple[Attributes, Style]:
    """Attributes of a random style, and the style."""
    names = sorted(STYLES)
    name = names[rng.integers(len(names))]
    name = fixed.get("style", name)
    style = STYLES[name]
    low, high = style.tempo
    attributes = Attributes(
        style=name,
        word=_pick(rng, style.words),
        tempo=round(float(np.exp(rng.uniform(np.log(low), np.log(high)))), 1),
        key=Key(int(rng.integers(12)), _pick(rng, style.modes)),
        beats=style.beats,
        swing=round(float(rng.uniform(*style.swing)), 3),
        swung=style.swung,
        kit=_pick(rng, style.kits),
        bass=_pick(rng, style.bass),
        comp=_pick(rng, style.comp),
        lead=_pick(rng, style.lead),
        pad=_pick(rng, style.pads),
        voice=_pick(rng, ("low", "high")) if rng.random() < VOICE_CHANCE else "",
        room=_pick(rng, style.rooms),
        bright=round(float(rng.uniform(-1, 1)), 3),
    )
    if attributes.lead == attributes.comp:
        others = [lead for lead in style.lead if lead != attributes.comp]
        attributes = replace(attributes, lead=others[rng.integers(len(others))])
    return replace(attributes, **fixed), style


def _lowest(instrument: str) -> int:
    """Lowest note of an instrument; of a part that nobody plays, any."""
    return INSTRUMENTS[instrument].low if instrument else 48


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def _tracks(attributes: Attributes, rng: np.random.Generator) -> Iterator[Player]:
    """Who plays, where, and how loud; levels vary by 1.5 dB from piece to piece."""
    send = {"dry": 0.12, "room": 0.5, "hall": 1.0}[attributes.room]
    side = float(rng.choice([-1, 1]))
    pans = {"lead": 0.25 * side, "comp": -0.4 * side}
    widths = {"drums": 0.4, "comp": 0.35, "pad": 0.9, "lead": 0.15, "voice": 0.1, "bass": 0.0}
    wet = {"drums": 0.35, "bass": 0.0, "voice": 0.7, "lead": 0.8, "comp": 0.7, "pad": 1.0}
    for part, stem in ROLES.items():
        name = "kit" if part == "drums" else part
        instrument = getattr(attributes, name)
        level = LEVELS[part] + float(rng.uniform(-1.5, 1.5))
        pan = pans.get(part, 0.0) * float(rng.uniform(0.3, 1.3))
        tone = float(np.clip(0.6 * attributes.bright + rng.uniform(-0.4, 0.4), -1, 1))
        if instrument:
            yield Player(part, instrument, stem, level, pan, widths[part], send * wet[part], tone)


def _form(attributes: Attributes, rng: np.random.Generator) -> Iterator[tuple[str, int]]:
    """Sections with their bars, without end."""
    bar = attributes.beats * 60 / attributes.tempo
    bars = 4 if bar > 1.6 else 8
    form: tuple[str, ...] = FORMS[rng.integers(len(FORMS))]
    first = True
    while True:
        for name in form:
            yield name, bars // 2 if name == "intro" and first else bars
            first = False
        form = form[1:] if form[0] == "intro" else form


def _human(note: Note, loose: float, rng: np.random.Generator) -> Note:
    shift = float(np.clip(rng.normal(0, loose), -2 * loose, 2 * loose)) / 1000
    force = float(np.clip(note.velocity * (1 + rng.normal(0, 0.05)), 0.05, 1))
    return replace(note, start=max(0.0, note.start + shift), velocity=force)


@dataclass(frozen=True)
class _Plan:
    """What comes back whenever a section of this name does."""

    chords: tuple[Chord, ...]
    tune: tuple[Event, ...]
    solo: tuple[Event, ...]
    lyric: tuple[str, ...]


class _Score:
    """The bars of a piece; sections of one name share harmony, melody and words."""

    def __init__(self, attributes: Attributes, style: Style, rng: np.random.Generator) -> None:
        self._of, self._style, self._rng = attributes, style, rng
        self._clock = Clock(attributes.tempo, attributes.swing, attributes.swung)
        slow = tempo_word(attributes.tempo) == "slow"
        groove = _pick(rng, style.grooves)
        if groove == "half" and tempo_word(attributes.tempo) == "fast":
            groove = "backbeat"  # half time at a fast tempo is slow music
        options = GROOVES[groove]
        self._groove = settle(options[rng.integers(len(options))], slow, rng)
        self._bassline = _pick(rng, style.basslines)
        self._comping = _pick(rng, style.comping)
        if slow and self._comping == "sixteenths":
            self._comping = "arpeggio"
        if slow and self._bassline == "sixteenths":
            self._bassline = "eighths"
        self._size = 4 if rng.random() < style.sevenths else 3
        self._fill = _pick(rng, ("snare", "tom", "tom")) if "snare" in self._groove else ""
        family = PROGRESSIONS[_pick(rng, style.harmony)]
        order = rng.permutation(len(family))
        self._progressions = {
            name: family[order[i % len(family)]] for i, name in enumerate(("verse", "chorus", "bridge"))
        }
        self._progressions["intro"] = self._progressions["verse"]
        self._plans: dict[tuple[str, int], _Plan] = {}
        self._intro = ["comp", *(part for part in ("pad", "bass", "drums", "lead") if rng.random() < 0.4)]
        self._bare_bridge = bool(rng.random() < 0.5)

    def _plan(self, name: str, bars: int) -> _Plan:
        known = self._plans.get((name, bars))
        if known:
            return known
        degrees = self._progressions[name]
        chords = tuple(
            Chord(self._of.key, degrees[i % len(degrees)], self._size, self._style.raised) for i in range(bars)
        )
        low = {"low": 45, "high": 57, "": 57}[self._of.voice] + (4 if name == "chorus" else 0)
        instrument = _lowest(self._of.lead)
        phrase, tunes = chords[: min(4, bars)], []
        for start in (low, instrument + (3 if name == "chorus" else 0)):
            first = melody(phrase, self._of.beats, start, self._of.tempo, self._rng)
            shift = len(phrase) * self._of.beats
            # longer sections repeat the phrase where the harmony does, and sing a second one where it does not
            second = first if chords[4:8] == phrase else melody(chords[4:8], *self._second(start)) if bars > 4 else []
            tunes.append((*first, *((beat + shift, length, pitch, loud) for beat, length, pitch, loud in second)))
        lyric = tuple(words(len(tunes[0]), self._rng))
        return self._plans.setdefault((name, bars), _Plan(chords, tunes[0], tunes[1], lyric))

    def _second(self, low: int) -> tuple[int, int, float, np.random.Generator]:
        return self._of.beats, low, self._of.tempo, self._rng

    def _players(self, name: str) -> set[str]:
        if name == "intro":
            return set(self._intro)
        sings = {"voice"} if self._of.voice else {"lead"}
        if name == "verse":
            return {"drums", "bass", "comp", *sings}
        if name == "bridge":
            return {"bass", "comp", "pad", "lead", *(() if self._bare_bridge else ("drums",))}
        return {"drums", "bass", "comp", "pad", *sings}

    def section(self, name: str, first: int, bars: int) -> Iterator[Note]:
        """Notes of a section that starts with bar `first`."""
        plan, players = self._plan(name, bars), self._players(name)
        force = {"intro": 0.75, "verse": 0.85, "chorus": 1.0, "bridge": 0.85}[name]
        beats = self._of.beats
        before: tuple[int, ...] = ()
        low, high = self._comp_range()
        for i, chord in enumerate(plan.chords):
            start = (first + i) * beats
            before = voicing(chord, before, low, high)
            bar = Bar(chord, plan.chords[(i + 1) % bars], before, beats)
            if "bass" in players:
                line = bass_line(self._bassline, bar, _lowest(self._of.bass), self._rng)
                yield from self._notes("bass", line, start, force)
            if "comp" in players:
                yield from self._notes("comp", comping(self._comping, bar), start, force)
            if "pad" in players and self._of.pad:
                held = [(0.0, beats * 0.99, pitch + (12 if pitch < 58 else 0), 0.8) for pitch in before]
                yield from self._notes("pad", held, start, force)
            if "drums" in players and self._of.kit:
                fill = self._fill if i == bars - 1 else ""
                crash = i == 0 and name == "chorus" and "kick" in self._groove
                for beat, drum, velocity in drum_bar(self._groove, fill, crash, force):
                    yield Note("drums", 0.0, self._clock.seconds(start + beat), 0.1, velocity, drum)
        if "voice" in players:
            yield from self._notes("voice", plan.tune, first * beats, force, plan.lyric)
        if "lead" in players:
            yield from self._notes("lead", plan.solo, first * beats, force)

    def _comp_range(self) -> tuple[int, int]:
        low = max(48, _lowest(self._of.comp) - 8)
        return low, low + 24

    def _notes(self, part: str, events: Any, start: float, force: float, lyric: tuple[str, ...] = ()) -> Iterator[Note]:
        for i, (beat, length, pitch, velocity) in enumerate(events):
            begin = self._clock.seconds(start + beat)
            end = self._clock.seconds(start + beat + length)
            say = lyric[i % len(lyric)] if lyric else ""
            yield Note(part, float(pitch), begin, end - begin, velocity * force, say)
