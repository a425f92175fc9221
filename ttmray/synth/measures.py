"""What can be told from audio alone: pitch, tempo, tuning, timing, noise, clipping, tone; and the quality that follows.

Made to judge generated clips by the same yardstick as the small world's own: `measure` gives numbers with units,
`estimate` turns them into the strengths of the faults (linear models, fitted by `ttmray.synth.calibrate` on pieces with
known faults) and into an estimated quality. `ttmray/synth/measures.json` holds the fitted numbers.
"""

from dataclasses import asdict, dataclass, fields
from functools import cache
from hashlib import sha256
from importlib import resources

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, rfft
from scipy.ndimage import maximum_filter1d, median_filter, minimum_filter1d, uniform_filter1d
from scipy.signal.windows import hann

from ttmray.json_text import read_json
from ttmray.synth.faults import BASE, FLOOR, KINDS
from ttmray.synth.instruments import RATE, Audio

WINDOW = 8192
HOP = 2048
ONSET_WINDOW = 1024
ONSET_HOP = 256
SLOWEST, FASTEST = 50.0, 200.0
DIATONIC = (0, 2, 4, 5, 7, 9, 11)

Floats = NDArray[np.float64]
FITTED = (resources.files("ttmray.synth") / "measures.json").read_text()
VERSION = sha256(FITTED.encode()).hexdigest()[:8]
"""Of the estimates, which evaluations name."""


@dataclass(frozen=True)
class Measures:
    """Numbers about a clip; all are finite, for silence too.

    Attributes:
        tempo: beats per minute, 0 if nothing pulses.
        pulse: share of the onsets' energy that lies on one regular grid, 0 to 1.
        sharpness: how much the onsets stand out of the sound between them, 0 to 1.
        tuning: mean distance in cents of the partials from a grid of semitones, 0 to 25.
        drift: cents (standard deviation) by which the whole grid moves with time.
        in_key: share of the tones that belong to the one diatonic scale that fits best.
        semitones: share of simultaneous tones that are a semitone apart.
        floor_low, floor_high: dB of the floor between partials and between strokes, below and above 3 kHz, against
            the whole.
        flat: log10 of the share of samples within 1.5 % of the peak: flat tops.
        crest: dB of the peak over the RMS.
        bass, treble, air: dB of what is below 200 Hz, above 2.5 kHz and above 6 kHz, against the whole.
        gaps: share of the time in which the sound falls by 18 dB for a moment.
        level: dB of the RMS.
    """

    tempo: float
    pulse: float
    sharpness: float
    tuning: float
    drift: float
    in_key: float
    semitones: float
    floor_low: float
    floor_high: float
    flat: float
    crest: float
    bass: float
    treble: float
    air: float
    gaps: float
    level: float


SILENCE = Measures(0, 0, 0, 25, 0, 0, 0, 0, 0, 0, 0, -60, -60, -60, 1, -120)


def measure(audio: Audio) -> Measures:
    """Measures of a clip.

    Args:
        audio: (channels, samples) float32 at 44.1 kHz, of any length and loudness.

    Raises:
        ValueError: not two-dimensional, empty, or samples that are NaN or infinite.
    """
    if audio.ndim != 2 or audio.shape[1] == 0 or not np.isfinite(audio).all():
        raise ValueError(f"expected finite samples (channels, frames), not {audio.shape}")
    mono = audio.mean(axis=0).astype(np.float32)
    rms = float(np.sqrt(np.mean(np.square(mono, dtype=np.float64))))
    if rms < 1e-5:
        return SILENCE
    mono = mono / rms
    if mono.size < WINDOW:
        mono = np.pad(mono, (0, WINDOW - mono.size))
    power = spectra(mono)
    envelope = onsets(mono)
    bpm, pulse = tempo(envelope)
    peaks = tones(power)
    peak = float(np.abs(audio).max())
    return Measures(
        tempo=bpm,
        pulse=pulse,
        sharpness=float(
            np.sqrt(np.mean(envelope**2)) / (np.sqrt(np.mean(envelope**2)) + 3 * np.median(envelope) + 1e-9)
        ),
        **_tuning(peaks),
        **_harmony(peaks),
        **_tone(power),
        flat=float(np.log10(np.mean(np.abs(audio) >= 0.985 * peak) + 1e-6)),
        crest=float(20 * np.log10(peak / np.sqrt(np.mean(np.square(audio, dtype=np.float64))))),
        gaps=_gaps(mono),
        level=float(20 * np.log10(rms)),
    )


def estimate(measures: Measures) -> tuple[dict[str, float], float]:
    """Estimated strengths of all faults (0 to 1), and the quality that they leave."""
    if measures.level <= SILENCE.level:
        return dict.fromkeys(KINDS, 0.0), FLOOR
    models = fitted()
    features = (features_of(measures) - models["mean"]) / models["scale"]
    strengths = np.clip(models["strengths"] @ np.clip(features, -4, 4) + models["offsets"], 0, 1)
    quality = float(models["quality"] @ np.clip(features, -4, 4) + models["quality_offset"])
    return dict(zip(KINDS, strengths.tolist(), strict=True)), float(np.clip(quality, FLOOR, BASE))


def clip_quality(audio: Audio) -> dict[str, float]:
    """`estimated_quality`, and the estimated strengths that it follows from as `fault_<kind>`, of a clip
    (channels, samples) float32 at 44.1 kHz: `clip_metrics: [small_world]` of an evaluation.
    """
    strengths, quality = estimate(measure(audio))
    return {"estimated_quality": quality} | {f"fault_{kind}": strength for kind, strength in strengths.items()}


def features_of(measures: Measures) -> Floats:
    """Inputs (26,) of the linear models: measures but tempo and level, and bends where a fault shows on one side."""
    row = asdict(measures)
    plain = np.array([row[field.name] for field in fields(Measures) if field.name not in ("tempo", "level")])
    bends = [
        max(0.0, row["tuning"] - 12), max(0.0, row["drift"] - 8), max(0.0, row["floor_high"] + 55),
        max(0.0, row["floor_low"] + 50), max(0.0, row["flat"] + 3.5), max(0.0, -8 - row["bass"]),
        max(0.0, -30 - row["treble"]), max(0.0, 11 - row["crest"]), max(0.0, 0.93 - row["in_key"]),
        max(0.0, 0.3 - row["pulse"]), max(0.0, row["gaps"] - 0.05), max(0.0, -40 - row["air"]),
    ]  # fmt: skip
    return np.concatenate([plain, bends])


@cache
def fitted() -> dict[str, Floats]:
    """The linear models of `measures.json`, see `ttmray.synth.calibrate.fit`: `mean`, `scale` and `quality` (26,),
    `strengths` (9, 26), `offsets` (9,), `quality_offset` () and `tempo` (17,).
    """
    return {name: np.asarray(values, np.float64) for name, values in read_json(FITTED)["models"].items()}


def spectra(mono: Audio) -> Floats:
    """(frames, bins) float32 power spectra of (samples,), every 46 ms over 186 ms."""
    return _power(mono, WINDOW, HOP)


def _power(mono: Audio, window: int, hop: int) -> Floats:
    """(frames, window / 2 + 1) float32 power spectra."""
    frames = np.lib.stride_tricks.sliding_window_view(mono, window)[::hop]
    spectra = rfft(frames * hann(window, sym=False).astype(np.float32), axis=1)
    return np.square(spectra.real) + np.square(spectra.imag)


def onsets(mono: Audio) -> Floats:
    """Onset strength (frames,) every 5.8 ms of (samples,): the rise of the log spectrum, summed over 40 bands."""
    if mono.size < 2 * ONSET_WINDOW:
        return np.zeros(1)
    power = _power(mono, ONSET_WINDOW, ONSET_HOP)
    edges = np.unique(np.geomspace(2, power.shape[1] - 1, 41).astype(int))
    bands = np.log1p(np.add.reduceat(power, edges[:-1], axis=1) * 0.05)
    rise = np.maximum(0, bands[2:] - bands[:-2]).sum(axis=1)
    return np.asarray(np.maximum(0, rise - uniform_filter1d(rise, 60)), np.float64)


def tempo(envelope: Floats) -> tuple[float, float]:
    """(beats per minute, pulse) of an onset envelope (frames,); zeros where nothing pulses.

    Which of several candidates is the beat (and not half or double of it) is decided by a fitted linear score. The
    pulse is how well onsets fit a grid of 1 to 4 parts of the beat.
    """
    bpm, features = tempo_candidates(envelope)
    if not bpm.size:
        return 0.0, 0.0
    best = int(np.argmax(features @ fitted()["tempo"]))
    return float(bpm[best]), float(features[best, PULSES].max())


MULTIPLES = (0.25, 1 / 3, 0.5, 2 / 3, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Periods of the autocorrelation against that of a candidate."""
PULSES = slice(len(MULTIPLES), len(MULTIPLES) + 4)
RATIOS = (1 / 3, 0.5, 2 / 3, 1.0, 1.5, 2.0, 3.0)


def tempo_candidates(envelope: Floats) -> tuple[Floats, Floats]:
    """Tempos (k,) that may be the beat, and features (k, 17) to choose by; none where nothing pulses.

    The first guess is the period at whose multiples and half the autocorrelation is high; others are simple ratios
    of it.
    """
    frame = RATE / ONSET_HOP
    if envelope.size < frame or not envelope.any():
        return np.zeros(0), np.zeros((0, len(MULTIPLES) + 8))
    size = 4 * envelope.size
    auto = irfft(np.abs(rfft(envelope - envelope.mean(), size)) ** 2, size)[: envelope.size]
    auto = auto / (auto[0] + 1e-12) * envelope.size / np.maximum(envelope.size - np.arange(envelope.size), frame)
    spectrum = np.abs(rfft(envelope, 8 * envelope.size)) / envelope.sum()
    step = frame / (8 * envelope.size)
    guess = _guess(auto, frame)
    bpm = np.array([guess * ratio for ratio in RATIOS if SLOWEST - 2 < guess * ratio < FASTEST + 5])
    peaks = int(
        np.sum((envelope[1:-1] > envelope[:-2]) & (envelope[1:-1] >= envelope[2:]) & (envelope[1:-1] > envelope.std()))
    )
    density = np.log2(max(1, peaks) / envelope.size * frame)
    rows, refined = [], []
    for candidate in bpm:
        exact, pulses = _pulses(spectrum, step, candidate / 60)
        lags = 60 / (60 * exact) * frame * np.array(MULTIPLES)
        near = [np.interp(lags * (1 + shift), np.arange(auto.size), auto, right=0.0) for shift in (-0.015, 0.0, 0.015)]
        height = np.log2(exact * 60 / 115)
        rows.append([*np.max(near, axis=0), *pulses, height, height**2, density * height, abs(density - height - 2)])
        refined.append(60 * exact)
    return np.array(refined), np.array(rows)


def _guess(auto: Floats, frame: float) -> float:
    bpm = np.geomspace(SLOWEST, FASTEST, 600)
    lags = 60 / bpm * frame
    score, weight = np.zeros(bpm.size), np.zeros(bpm.size)
    for multiple, share in ((0.5, 0.5), (1, 1.0), (2, 0.8), (3, 0.3), (4, 0.7)):
        inside = lags * multiple < 0.85 * auto.size
        score += share * inside * np.interp(lags * multiple, np.arange(auto.size), auto)
        weight += share * inside
    score = score / np.maximum(weight, 1e-9) + 0.3 * np.exp(-0.5 * (np.log2(bpm / 140) / 0.7) ** 2)
    return float(bpm[int(np.argmax(score))])


def _pulses(spectrum: Floats, step: float, beats: float) -> tuple[float, list[float]]:
    """A rate of beats (per second) moved to the strongest line nearby, and the lines of its 1, 2, 3 and 4 parts."""
    lines, exact, strongest = [], beats, 0.0
    for parts in (1, 2, 3, 4):
        low, high = int(beats * parts * 0.97 / step), int(beats * parts * 1.03 / step) + 2
        span = spectrum[low:high]
        lines.append(float(span.max()) if span.size else 0.0)
        if parts != 3 and lines[-1] > strongest:
            strongest = lines[-1]
            exact = (low + int(np.argmax(span))) * step / parts
    return exact, lines


def tones(power: Floats) -> tuple[Floats, Floats, Floats]:
    """Peaks of power spectra (frames, bins) of `spectra` between 80 Hz and 2.5 kHz: frame number, MIDI number, root of
    the amplitude, each (n,)."""
    low, high = int(80 * WINDOW / RATE), int(2500 * WINDOW / RATE)
    logs = np.log(power[:, low - 1 : high + 1] + 1e-12)
    middle, left, right = logs[:, 1:-1], logs[:, :-2], logs[:, 2:]
    floor = maximum_filter1d(middle, 15, axis=1) - 1e-6
    strong = (middle > left) & (middle >= right) & (middle >= floor) & (middle > logs.max(axis=1)[:, None] - 8)
    frame, place = np.nonzero(strong)
    y0, y1, y2 = left[frame, place], middle[frame, place], right[frame, place]
    bins = low + place + 0.5 * (y0 - y2) / (y0 - 2 * y1 + y2 - 1e-9)
    midi = 69 + 12 * np.log2(bins * RATE / WINDOW / 440)
    return frame.astype(np.float64), midi, np.exp(0.25 * y1)


def _tuning(peaks: tuple[Floats, Floats, Floats]) -> dict[str, float]:
    frame, midi, weight = peaks
    sharp = midi > 48  # below, bins are too wide to say
    frame, midi, weight = frame[sharp], midi[sharp], weight[sharp]
    if frame.size < 8:
        return {"tuning": 0.0, "drift": 0.0}
    turns = np.exp(2j * np.pi * midi)
    centre = np.angle(np.sum(weight * turns)) / (2 * np.pi)
    away = (midi - centre + 0.5) % 1 - 0.5
    frames = int(frame.max()) + 1
    moving = np.zeros(frames, complex)
    np.add.at(moving, frame.astype(int), weight * turns)
    smooth = uniform_filter1d(moving.real, 3) + 1j * uniform_filter1d(moving.imag, 3)
    trend = np.angle(smooth * np.exp(-2j * np.pi * centre)) / (2 * np.pi)
    load = np.abs(smooth)
    drift = float(np.sqrt(np.sum(load * trend**2) / np.sum(load)))
    return {"tuning": float(100 * np.sum(weight * np.abs(away)) / np.sum(weight)), "drift": 100 * drift}


def _harmony(peaks: tuple[Floats, Floats, Floats]) -> dict[str, float]:
    frame, midi, weight = peaks
    low = midi < 84
    frame, midi, weight = frame[low], midi[low], weight[low]
    if frame.size < 8:
        return {"in_key": 1.0, "semitones": 0.0}
    classes = np.round(midi).astype(int) % 12
    chroma = np.bincount(classes, weight, 12)
    members = np.array([[(c - tonic) % 12 in DIATONIC for c in range(12)] for tonic in range(12)])
    by_frame = np.zeros((int(frame.max()) + 1, 12))
    np.add.at(by_frame, (frame.astype(int), classes), weight)
    clash = np.minimum(by_frame, np.roll(by_frame, 1, axis=1)).sum()
    return {"in_key": float((members @ chroma).max() / chroma.sum()), "semitones": float(clash / by_frame.sum())}


def _tone(power: Floats) -> dict[str, float]:
    hertz = np.arange(power.shape[1]) * RATE / WINDOW
    mean = power.mean(axis=0)
    total = mean.sum()

    def share(low: float, high: float) -> float:
        return float(np.clip(10 * np.log10(mean[(hertz >= low) & (hertz < high)].sum() / total + 1e-12), -70, 0))

    # the floor: quiet moments of the quiet bins between partials, as if it filled the band
    quiet = np.quantile(power, 0.1, axis=0)
    valley = median_filter(minimum_filter1d(quiet, 9), 21)

    def floor(low: float, high: float) -> float:
        band = valley[(hertz >= low) & (hertz < high)]
        return float(np.clip(10 * np.log10(band.sum() / total + 1e-12), -90, 0))

    return {
        "floor_low": floor(300, 3000),
        "floor_high": floor(3000, 14000),
        "bass": share(30, 200),
        "treble": share(2500, 20000),
        "air": share(6000, 20000),
    }


def _gaps(mono: Audio) -> float:
    """Share of frames of 20 ms that are 18 dB below what is loud within half a second around."""
    frame = RATE // 50
    power = np.square(mono[: mono.size // frame * frame]).reshape(-1, frame).mean(axis=1) + 1e-9
    around = maximum_filter1d(uniform_filter1d(power, 5), 25)
    return float(np.mean(power < around * 10**-1.8))


def pitch(mono: Audio, low: float = 60.0, high: float = 1500.0) -> tuple[Floats, Floats]:
    """Fundamental (frames,) in Hz every 46 ms, and how periodic the frame is (0 to 1), of one melody (samples,).

    Autocorrelation of frames of 186 ms; frames without a period have 0 Hz.
    """
    window, hop = 8192, 2048
    if mono.size < window:
        mono = np.pad(mono, (0, window - mono.size))
    frames = np.lib.stride_tricks.sliding_window_view(mono, window)[::hop] * hann(window, sym=False)
    auto = irfft(np.abs(rfft(frames, 2 * window, axis=1)) ** 2, axis=1)[:, : window // 2]
    shape = irfft(np.abs(rfft(hann(window, sym=False), 2 * window)) ** 2)[: window // 2]
    auto = auto / np.maximum(auto[:, :1], 1e-9) / (shape / shape[0])
    first, last = int(RATE / high), int(RATE / low)
    hertz, clarity = np.zeros(len(auto)), np.zeros(len(auto))
    for i, row in enumerate(auto):
        part = row[first:last]
        peaks = np.flatnonzero((part[1:-1] > part[:-2]) & (part[1:-1] >= part[2:])) + 1
        if not peaks.size:
            continue
        best = part[peaks].max()
        if best <= 0:  # peaks of a ripple on the falling side of something lower
            continue
        lag = int(peaks[part[peaks] > 0.9 * best][0])  # the first of the high ones is no multiple of the period
        y0, y1, y2 = part[lag - 1 : lag + 2]
        hertz[i] = RATE / (first + lag + 0.5 * (y0 - y2) / (y0 - 2 * y1 + y2 - 1e-12))
        clarity[i] = y1
    return hertz, np.clip(clarity, 0, 1)
