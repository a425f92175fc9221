"""A singing voice by formants: vowels as wavetables, gliding pitch and vibrato, and consonants from noise.

A phrase is sung on one phase, so that pitch glides between notes; each syllable has the harmonics of its pitch,
weighted by the resonances of its vowel. Formant frequencies follow the averages of Peterson and Barney, "Control
Methods Used in a Study of the Vowels", JASA 24, 1952, rounded.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.ndimage import uniform_filter1d

from ttmray.synth.instruments import RATE, TABLE, TOP_HZ, Audio, noise, read_table, wavetable
from ttmray.synth.piece import Note
from ttmray.synth.theory import hertz

FORMANTS = {
    "a": (730.0, 1090.0, 2440.0, 3400.0),
    "e": (530.0, 1840.0, 2480.0, 3500.0),
    "i": (290.0, 2250.0, 3000.0, 3600.0),
    "o": (560.0, 850.0, 2410.0, 3300.0),
    "u": (310.0, 870.0, 2240.0, 3300.0),
    "m": (250.0, 1000.0, 2200.0, 3300.0),
}
LEVELS_DB = (0.0, -7.0, -16.0, -20.0)
WIDTHS = (90.0, 110.0, 160.0, 220.0)
TRACT = {"low": 0.96, "high": 1.16}
"""Formants of a register against the table."""
BREAK_S = 0.12
"""A longer gap starts a new phrase."""
GLIDE_S = 0.05
VIBRATO = 28.0
"""Cents."""
HISSES = {"s": (0.09, 0.5, "white"), "t": (0.03, 0.55, "white"), "k": (0.03, 0.5, "breath"), "h": (0.07, 0.18,
"breath"),
          "d": (0.02, 0.35, "dark")}  # fmt: skip
"""Consonant -> seconds, level and noise."""
HUMS = ("m", "n", "l")


def sing(
    notes: Sequence[Note], register: str, bright: float, origin: float, samples: int, rng: np.random.Generator
) -> Audio:
    """A voice part, mono float32 (samples,), from `origin` seconds on.

    Args:
        notes: in order of their starts; `say` holds consonant and vowel.
        register: low or high.
        bright: -1 to 1.
    """
    out = np.zeros(samples, np.float32)
    phrase: list[Note] = []
    for note in [*notes, None]:
        if phrase and (note is None or note.start - phrase[-1].end > BREAK_S):
            begin = round((phrase[0].start - origin) * RATE)
            sound = _phrase(phrase, register, bright, rng)
            first, last = max(0, begin), min(samples, begin + sound.size)
            if last > first:
                out[first:last] += sound[first - begin : last - begin]
            phrase = []
        if note is not None:
            phrase.append(note)
    return out


def _phrase(notes: Sequence[Note], register: str, bright: float, rng: np.random.Generator) -> Audio:
    begin = notes[0].start
    tail = 0.12
    samples = int((max(note.end for note in notes) - begin + tail) * RATE) + 1
    starts = [max(0, round((note.start - begin) * RATE)) for note in notes]
    ends = [*starts[1:], samples - int((tail - 0.02) * RATE)]
    turns = _turns(notes, starts, samples, rng)
    out = np.zeros(samples, np.float32)
    edge = int(0.02 * RATE)
    for note, start, end in zip(notes, starts, ends, strict=True):
        end = min(end, start + round(note.length * RATE) + edge)
        stop = min(samples, end + edge)
        if stop - start < 4:
            continue
        consonant, vowel = note.say[:-1], (note.say or "a")[-1]
        pitch = round(note.midi)
        table = vowel_table(vowel, pitch, register, round(bright, 1))
        span = turns[start:stop]
        sound = read_table(table, span)
        shape = _shape(stop - start, stop - end, consonant)
        if consonant in HUMS:
            closed = read_table(vowel_table("m", pitch, register, round(bright, 1)), span)
            opening = np.clip(np.arange(stop - start, dtype=np.float32) / (0.07 * RATE) - 0.4, 0, 1)
            sound = 0.5 * (1 - opening) * closed + opening * sound
        sound = sound + 0.02 * noise("breath", stop - start, rng)
        out[start:stop] += note.velocity * shape * sound
        if consonant in HISSES:
            length, level, kind = HISSES[consonant]
            hiss = noise(kind, min(int(length * RATE), samples - start), rng)
            out[start : start + hiss.size] += (
                0.3 * level * note.velocity * np.hanning(hiss.size).astype(np.float32) * hiss
            )
    return out


def _shape(samples: int, release: int, consonant: str) -> Audio:
    """Loudness of a syllable: plosives open late and fast, vowels slowly."""
    late = {"s": 0.07, "t": 0.03, "k": 0.03, "d": 0.015, "h": 0.04}.get(consonant, 0.0)
    rise = 0.015 if late else 0.03
    time = np.arange(samples, dtype=np.float32) / RATE
    shape: Audio = np.clip((time - late) / rise, 0, 1).astype(np.float32)
    if release:
        shape[-release:] *= np.linspace(1, 0, release, dtype=np.float32)
    return shape


def _turns(notes: Sequence[Note], starts: Sequence[int], samples: int, rng: np.random.Generator) -> np.ndarray:
    """Phase in turns: the notes' pitches with glides, a vibrato on held notes and a slow drift of 4 cents."""
    steps = np.empty(samples)
    for note, start, end in zip(notes, starts, [*starts[1:], samples], strict=True):
        steps[start:end] = note.midi
    pitch = uniform_filter1d(steps, int(GLIDE_S * RATE), mode="nearest")
    time = np.arange(samples) / RATE
    since = np.empty(samples)
    for start, end in zip(starts, [*starts[1:], samples], strict=True):
        since[start:end] = time[: end - start]
    depth = np.clip((since - 0.25) / 0.3, 0, 1) * VIBRATO / 100
    pitch += depth * np.sin(2 * np.pi * rng.uniform(5.0, 6.0) * time)
    knots = rng.normal(0, 0.04, size=samples // (RATE // 8) + 2)
    pitch += np.interp(time * 8, np.arange(knots.size), knots)
    frequency: np.ndarray = hertz(69) * np.exp2((pitch - 69) / 12)
    return np.cumsum(frequency) / RATE


@lru_cache(maxsize=2048)
def vowel_table(vowel: str, pitch: int, register: str, bright: float) -> Audio:
    """One cycle (8192,) of a vowel at a MIDI pitch."""
    base = hertz(pitch)
    k = np.arange(1, max(3, min(TABLE // 4, int(0.7 * TOP_HZ / base))))
    frequency = k * base
    gain = np.full(k.size, 0.004)
    for centre, level, width in zip(FORMANTS[vowel], LEVELS_DB, WIDTHS, strict=True):
        centre = max(centre * TRACT[register], base if level == 0 else 0)  # singers tune the first formant up
        gain = gain + 10 ** (level / 20) / (1 + ((frequency - centre) / (0.7 * width)) ** 2)
    return wavetable(k, k ** -(0.9 - 0.25 * bright) * gain)
