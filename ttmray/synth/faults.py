"""Quality faults of known strength, and the true quality that follows from them.

A fault has a strength from 0 (none) to 1 (as bad as it gets). Some act on the notes, the others on the audio. They are
drawn from a stream of random numbers of their own, so that quality knows nothing of style, and style nothing of it:

    quality = BASE - sum over faults of cost x strength - SHORT (a piece of less than a bar);  FLOOR for silence

With faults as `draw_faults` draws them, quality has a mean of about 0.6 and a standard deviation of about 0.6, like the
rewards of the paper's training clips (0.62 and 0.59).

After all faults the mix is still the sum of the stems. Tone and wow act on each stem alike; noise belongs to the stem
`other`; where the mix clips, each stem is scaled at that sample by what is left of the mix.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.signal import butter, sosfilt

from ttmray.synth.composer import FAULTS, stream
from ttmray.synth.instruments import RATE, Audio
from ttmray.synth.mixing import LUFS, PEAK_DB, Stems, measured_loudness, mix, render
from ttmray.synth.piece import STEMS, Note, Piece

BASE = 1.1
SHORT = 1.0
FLOOR = -2.0
COUNTS = (0.15, 0.4, 0.3, 0.15)
"""Chances of 0, 1, 2 and 3 faults in a piece."""
LEAST = 0.1
"""Weakest strength that is drawn; the strengths are uniform from here to 1."""


@dataclass(frozen=True)
class Fault:
    """Cost in quality at strength 1, and what a strength means."""

    cost: float
    meaning: str


KINDS: dict[str, Fault] = {
    "detune": Fault(0.1, "notes off by a random 30 cents (standard deviation) x strength, and players by 20"),
    "timing": Fault(0.1, "onsets off by a random 55 ms (standard deviation) x strength"),
    "dropped": Fault(0.5, "in a share of 0.4 x strength of all eighths nothing sounds"),
    "clash": Fault(0.1, "a share of 0.5 x strength of all notes are a semitone wrong"),
    "noise": Fault(0.8, "hiss, hum or crackle at -48 dB + 40 dB x strength against the music"),
    "clipping": Fault(0.6, "driven 20 dB x strength into a hard limit"),
    "wow": Fault(0.1, "pitch swings by 70 cents x strength about once a second, by 15 about nine times"),
    "dull": Fault(2.0, "low-pass, 12 dB an octave, from 9 kHz down to 600 Hz"),
    "thin": Fault(2.0, "high-pass, 12 dB an octave, from 80 Hz up to 1 kHz"),
}
ON_NOTES = ("detune", "timing", "dropped", "clash")
ON_AUDIO = tuple(kind for kind in KINDS if kind not in ON_NOTES)

Strengths = Mapping[str, float]


def draw_faults(rng: np.random.Generator) -> dict[str, float]:
    """Up to three kinds with their strengths; dull and thin exclude each other."""
    count = int(rng.choice(len(COUNTS), p=COUNTS))
    kinds = [str(kind) for kind in rng.permutation(list(KINDS))]
    if "dull" in kinds[:count] and "thin" in kinds[:count]:
        kinds.remove("thin")
    return {kind: round(float(rng.uniform(LEAST, 1)), 3) for kind in sorted(kinds[:count])}


def faults_of(seed: int, index: int) -> dict[str, float]:
    """The faults of piece `index`, whatever the piece is like."""
    return draw_faults(stream(seed, index, FAULTS))


def true_quality(faults: Strengths, piece: Piece | None = None) -> float:
    """Quality on the scale of the module; `piece` is looked at for its length alone.

    Raises:
        ValueError: an unknown kind, or a strength outside 0 to 1.
    """
    check(faults)
    quality = BASE - sum(KINDS[kind].cost * strength for kind, strength in faults.items())
    if piece and piece.seconds < piece.attributes.beats * 60 / piece.attributes.tempo:
        quality -= SHORT
    return round(max(FLOOR, quality), 4)


def check(faults: Strengths) -> None:
    for kind, strength in faults.items():
        if kind not in KINDS or not 0 <= strength <= 1:
            raise ValueError(f"{kind}: {strength} is no fault; known: {', '.join(KINDS)}, each from 0 to 1")


def perform(piece: Piece, faults: Strengths, start: float = 0.0, seconds: float | None = None) -> Stems:
    """The stems of a piece, or of a window of it, as it sounds with its faults: (2, samples) float32 each."""
    check(faults)
    stems = render(on_notes(piece, faults), start, seconds)
    audible = {kind: strength for kind, strength in faults.items() if kind not in ON_NOTES and strength > 0}
    if not audible:
        return stems
    rng = np.random.default_rng([piece.seed, piece.index, FAULTS, 2, round(start * 1000)])
    return on_stems(stems, audible, rng)


def on_notes(piece: Piece, faults: Strengths) -> Piece:
    """The piece as it is played: wrong pitches, wrong times, missing notes."""
    rng = np.random.default_rng([piece.seed, piece.index, FAULTS, 1])
    notes = list(piece.notes)
    if faults.get("dropped"):
        notes = _dropped(notes, piece, faults["dropped"], rng)
    if faults.get("timing"):
        late = rng.normal(0, 0.055 * faults["timing"], len(notes)).tolist()
        notes = [replace(note, start=max(0.0, note.start + shift)) for note, shift in zip(notes, late, strict=True)]
    if faults.get("clash"):
        wrong = (rng.random(len(notes)) < 0.5 * faults["clash"]) * rng.choice([-1, 1], len(notes))
        notes = [_bent(note, float(step)) for note, step in zip(notes, wrong, strict=True)]
    if faults.get("detune"):
        strength = faults["detune"]
        player = {track.part: rng.normal(0, 0.2 * strength) for track in piece.tracks}
        off = rng.normal(0, 0.3 * strength, len(notes)).tolist()
        notes = [_bent(note, cents + player[note.part]) for note, cents in zip(notes, off, strict=True)]
    return piece.with_notes(tuple(notes)) if notes != list(piece.notes) else piece


def _bent(note: Note, semitones: float) -> Note:
    return note if note.part == "drums" or not semitones else replace(note, midi=note.midi + semitones)


def _dropped(notes: list[Note], piece: Piece, strength: float, rng: np.random.Generator) -> list[Note]:
    """Holes of an eighth: notes do not start in them, and those that sound into one end there."""
    eighth = 30 / piece.attributes.tempo
    slots = int(piece.seconds / eighth) + 2
    hole = rng.random(slots) < 0.4 * strength
    left = []
    for note in notes:
        slot = min(round(note.start / eighth - 0.2), slots - 1)
        if hole[slot]:
            continue
        ends = np.flatnonzero(hole[slot + 1 : int(note.end / eighth) + 1])
        if note.part != "drums" and ends.size:
            stop = (slot + 1 + int(ends[0])) * eighth
            note = replace(note, length=max(0.03, min(note.length, stop - note.start)))
        left.append(note)
    return left


def on_stems(stems: Stems, faults: Strengths, rng: np.random.Generator) -> Stems:
    """Audio faults on stems (2, samples), changed in place: tone, wow, noise, clipping in this order; then -16 LUFS."""
    if not mix(stems).any():
        return stems
    if faults.get("dull"):
        _filter(stems, 9000 * (600 / 9000) ** faults["dull"], "lowpass")
    if faults.get("thin"):
        _filter(stems, 80 * (1000 / 80) ** faults["thin"], "highpass")
    if faults.get("wow"):
        _wow(stems, faults["wow"], rng)
    if faults.get("noise"):
        _noise(stems, faults["noise"], rng)
    if faults.get("clipping"):
        _clip(stems, faults["clipping"])
    level(stems)
    return stems


def draw_more(present: Strengths, rng: np.random.Generator) -> dict[str, float]:
    """One or two audio faults that a clip with the faults `present` does not have; dull and thin exclude each other."""
    tone = {"dull", "thin"}
    free = [kind for kind in ON_AUDIO if kind not in present and not (kind in tone and tone & present.keys())]
    kinds = [str(kind) for kind in rng.permutation(free)[: int(rng.integers(1, 3))]]
    if tone <= set(kinds):
        kinds.remove("thin")
    return {kind: round(float(rng.uniform(LEAST, 1)), 3) for kind in kinds}


def add_faults(audio: Audio, faults: Strengths, rng: np.random.Generator) -> Audio:
    """A mix (2, samples) float32 with further audio faults, at -16 LUFS again; the given one is left as it is.

    Raises:
        ValueError: an unknown kind, one that acts on notes, or a strength outside 0 to 1.
    """
    check(faults)
    if set(faults) & set(ON_NOTES):
        raise ValueError(f"{', '.join(sorted(set(faults) & set(ON_NOTES)))} acts on notes, which a mix has no more")
    stems = {stem: np.zeros_like(audio) for stem in STEMS} | {"other": audio.copy()}
    return mix(on_stems(stems, faults, rng))


def level(stems: Stems) -> None:
    """One gain for stems (2, samples) to -16 LUFS, or a peak of -1.5 dBFS if that comes first: flat tops stay flat."""
    total = mix(stems)
    peak, loudness = float(np.abs(total).max()), measured_loudness(total)
    if peak == 0 or loudness == -np.inf:
        return
    gain = np.float32(min(10 ** ((LUFS - loudness) / 20), 10 ** (PEAK_DB / 20) / peak))
    for audio in stems.values():
        audio *= gain


def _filter(stems: Stems, edge: float, form: str) -> None:
    sections = butter(2, edge, form, fs=RATE, output="sos")
    for stem, audio in stems.items():
        if audio.any():
            stems[stem] = sosfilt(sections, audio, axis=1).astype(np.float32)


def _wow(stems: Stems, strength: float, rng: np.random.Generator) -> None:
    """Reads every stem at the same swinging places, with linear interpolation."""
    samples = next(iter(stems.values())).shape[1]
    time = np.arange(samples) / RATE
    places = time.copy()
    for cents, low, high in ((70, 0.6, 1.3), (15, 7.0, 11.0)):
        rate = rng.uniform(low, high)
        depth = strength * cents * np.log(2) / 1200 / (2 * np.pi * rate)
        places += depth * np.sin(2 * np.pi * (rate * time + rng.random()))
    places = np.clip(places * RATE, 0, samples - 1.001)
    whole = places.astype(np.int64)
    share = (places - whole).astype(np.float32)
    following = np.minimum(whole + 1, samples - 1)
    for stem, audio in stems.items():
        if audio.any():
            stems[stem] = audio[:, whole] * (1 - share) + audio[:, following] * share


def _noise(stems: Stems, strength: float, rng: np.random.Generator) -> None:
    total = mix(stems)
    samples = total.shape[1]
    kind = rng.choice(["hiss", "hum", "crackle"], p=[0.5, 0.25, 0.25])
    wave = rng.standard_normal((2, samples), dtype=np.float32)
    if kind == "hum":  # mains and its odd harmonics, with some hiss
        base = rng.choice([50.0, 60.0])
        time = np.arange(samples) / RATE
        hum = sum(np.sin(2 * np.pi * base * k * time + k) / k**0.7 for k in (1, 2, 3, 5, 7, 9, 11, 15))
        wave = 0.4 * wave + np.asarray(hum, np.float32)
    elif kind == "crackle":
        clicks = (rng.random((2, samples), dtype=np.float32) < 60 / RATE) * rng.laplace(0, 12, (2, samples))
        sections = butter(1, (600, 9000), "bandpass", fs=RATE, output="sos")
        wave = 0.35 * wave + np.clip(sosfilt(sections, clicks, axis=1), -6, 6).astype(np.float32)
    ratio = 10 ** ((-48 + 40 * strength) / 20)
    stems["other"] += wave * np.float32(ratio * total.std() / max(1e-9, float(wave.std())))


def _clip(stems: Stems, strength: float) -> None:
    """Hard limit below the peak; stems are scaled by the share of the mix that is left."""
    total = mix(stems)
    limit = float(np.abs(total).max()) * 10 ** (-20 * strength / 20)
    share = limit / np.maximum(np.abs(total), np.float32(limit))
    for audio in stems.values():
        audio *= share


def sum_error(stems: Stems, total: Audio) -> float:
    """Largest difference of a mix (2, samples) and the sum of its stems, against full scale."""
    return float(np.abs(sum(stems[stem].astype(np.float64) for stem in STEMS) - total).max())
