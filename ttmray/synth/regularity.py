"""How regular the rhythm of a clip is, and how far its tones lie from one tempered scale: of any music, without a fit.

Both are circular statistics (Mardia & Jupp, Directional Statistics, 2000): onsets are angles on the circle of a pulse,
tones angles on the circle of a semitone. The length R of their mean vector is 1 where all agree and 0 where they are
spread evenly; for a normal scatter with standard deviation s of a circle, R = exp(-(2 pi s)^2 / 2), which gives s back.
"""

import numpy as np
from numpy.typing import NDArray

from ttmray.synth.instruments import RATE, Audio
from ttmray.synth.measures import ONSET_HOP, WINDOW, onsets, spectra, tempo, tones

VERSION = "1"
"""Of the numbers, which evaluations name."""
EVENTS = 6
"""Fewer onsets, or tones, say nothing."""
LOUD = 0.15
"""Share of the strongest onset below which a rise is none."""
APART_S = 0.05
"""Of two onsets nearer than this the stronger one counts."""
PARTS = (1, 2, 3, 4)
"""Parts of a beat that may be the pulse."""

Floats = NDArray[np.float64]


def rhythm(audio: Audio) -> dict[str, float]:
    """Regularity of the onsets of a clip (channels, samples) float32 at 44.1 kHz.

    `rhythm_regularity` is the vector strength (Goldberg & Brown, J. Neurophysiol. 32, 1969) of onsets on the pulse that
    they fit best among 1 to 4 parts of the beat, each weighted by its strength, and corrected for their number: 0 for
    random times, 1 for a machine. `rhythm_jitter_ms` is the standard deviation of those normal deviations from that
    pulse that have this strength, at most that of random times. With too few onsets: 0 and 0.
    """
    times, weights = onset_times(audio.mean(axis=0))
    bpm = tempo(onsets(_level(audio.mean(axis=0))))[0]
    if len(times) < EVENTS or bpm == 0:
        return {"rhythm_regularity": 0.0, "rhythm_jitter_ms": 0.0}
    rates = np.concatenate([np.linspace(0.97, 1.03, 241) * bpm / 60 * parts for parts in PARTS])
    strengths = np.abs(np.exp(2j * np.pi * np.outer(rates, times)) @ weights) / weights.sum()
    best = int(np.argmax(strengths))
    count = weights.sum() ** 2 / np.square(weights).sum()  # as many equal ones say as much
    regularity = np.sqrt(max(0.0, (count * strengths[best] ** 2 - 1) / (count - 1)))
    jitter = min(_scatter(regularity), 12**-0.5) / rates[best]
    return {"rhythm_regularity": float(regularity), "rhythm_jitter_ms": float(1000 * jitter)}


def tuning(audio: Audio) -> dict[str, float]:
    """`tuning_deviation` of a clip (channels, samples) float32 at 44.1 kHz, in cents.

    The standard deviation of normal deviations from the one scale of semitones that the spectral peaks between C3 and
    2.5 kHz fit best, weighted by amplitude, whatever its concert pitch. Overtones of tempered tones lie beside it (the
    fifth by 14 cents), so that music in perfect tune has some cents, too. At most 29, which is that of tones without
    any scale; 0 where too few sound.
    """
    mono = _level(audio.mean(axis=0))
    _, midi, weight = tones(spectra(mono))
    sharp = midi > 48
    if np.count_nonzero(sharp) < EVENTS:
        return {"tuning_deviation": 0.0}
    amplitudes = np.square(weight[sharp])
    resultant = np.abs(np.sum(amplitudes * np.exp(2j * np.pi * midi[sharp]))) / amplitudes.sum()
    return {"tuning_deviation": float(100 * min(_scatter(resultant), 12**-0.5))}


def onset_times(mono: Audio) -> tuple[Floats, Floats]:
    """Times in seconds (n,) and strengths (n,) of the onsets of (samples,): peaks of the onset strength, between frames
    by a parabola."""
    envelope = onsets(_level(mono))
    inner = envelope[1:-1]
    peaks = 1 + np.flatnonzero(
        (inner > envelope[:-2]) & (inner >= envelope[2:]) & (inner > LOUD * envelope.max(initial=0))
    )
    chosen: list[int] = []
    for peak in peaks[np.argsort(-envelope[peaks])]:
        if all(abs(peak - other) * ONSET_HOP / RATE >= APART_S for other in chosen):
            chosen.append(int(peak))
    places = np.array(sorted(chosen), int)
    left, middle, right = (envelope[places + step] for step in (-1, 0, 1))
    shift = 0.5 * (left - right) / np.minimum(left - 2 * middle + right, -1e-12)
    return (places + np.clip(shift, -0.5, 0.5)) * ONSET_HOP / RATE, middle


def _scatter(resultant: float) -> float:
    """Standard deviation, in turns, of a wrapped normal distribution with this mean vector's length."""
    return float(np.sqrt(-2 * np.log(np.clip(resultant, 1e-12, 1))) / (2 * np.pi))


def _level(mono: Audio) -> Audio:
    """(samples,) of an RMS of 1, at least a window long; silence stays silence."""
    rms = float(np.sqrt(np.mean(np.square(mono, dtype=np.float64))))
    level = (mono / rms if rms > 0 else mono).astype(np.float32)
    return np.pad(level, (0, max(0, WINDOW - level.size)))
