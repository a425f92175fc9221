"""Drum kits: every stroke is synthesised once per piece, with tunings of its own, and then placed."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.signal import butter, sosfilt

from ttmray.synth.instruments import RATE, Audio, damped, noise


@dataclass(frozen=True)
class Kit:
    """Character of a kit.

    Attributes:
        kick: (start Hz, end Hz, seconds of the fall, seconds of the decay, click).
        snare: (Hz of the shell, seconds of the shell, seconds of the noise, level of the noise).
        hat: seconds of a closed hi-hat.
        metal: level of inharmonic squares in the cymbals, against noise.
    """

    kick: tuple[float, float, float, float, float]
    snare: tuple[float, float, float, float]
    hat: float
    metal: float


KITS = {
    "acoustic": Kit((130, 58, 0.02, 0.14, 0.25), (190, 0.07, 0.11, 0.8), 0.035, 0.2),
    "electronic": Kit((220, 48, 0.03, 0.2, 0.4), (210, 0.05, 0.13, 0.9), 0.03, 0.1),
    "machine": Kit((120, 44, 0.05, 0.42, 0.1), (180, 0.09, 0.09, 0.6), 0.025, 0.7),
    "chip": Kit((300, 60, 0.035, 0.07, 0.0), (320, 0.01, 0.08, 1.0), 0.015, 0.0),
    "brushes": Kit((95, 62, 0.02, 0.12, 0.05), (180, 0.04, 0.2, 0.5), 0.04, 0.1),
    "ride": Kit((100, 60, 0.02, 0.12, 0.1), (200, 0.06, 0.12, 0.5), 0.035, 0.3),
    "hand": Kit((110, 66, 0.02, 0.12, 0.05), (230, 0.06, 0.06, 0.4), 0.03, 0.1),
}
LOUDNESS = {
    "kick": 1.0, "snare": 0.75, "rim": 0.4, "clap": 0.6, "tom": 0.7, "hat": 0.22, "open": 0.28, "ride": 0.26,
    "crash": 0.4, "shaker": 0.16, "tambourine": 0.22, "conga": 0.6,
}  # fmt: skip


def strokes(kit: str, drum: str, tone: float, rng: np.random.Generator) -> list[Audio]:
    """Two takes (samples,) of a drum, mono float32.

    Args:
        kit: a name in `KITS`.
        drum: a name in `LOUDNESS`.
        tone: -1 (dark) to 1 (brilliant).
    """
    spec, make = KITS[kit], MAKERS[drum]
    tune = float(2 ** rng.uniform(-0.25, 0.25))
    takes = [make(spec, tune, tone, rng) for _ in range(2)]
    level = LOUDNESS[drum] * (0.7 if kit == "brushes" and drum == "snare" else 1.0)
    return [(take * (level / max(1e-6, float(np.abs(take).max())))).astype(np.float32) for take in takes]


def _time(seconds: float) -> np.ndarray:
    return np.arange(int(seconds * RATE), dtype=np.float32) / RATE


def _kick(kit: Kit, tune: float, tone: float, rng: np.random.Generator) -> Audio:
    start, end, fall, decay, click = kit.kick
    time = _time(decay * 4)
    turns = tune * (end * time + (start - end) * fall * (1 - np.exp(-time / fall)))
    wave = np.sin(2 * np.pi * turns) * np.exp(-time / decay)
    snap = int(0.01 * RATE)
    wave[:snap] += click * (1 + 0.5 * tone) * noise("dark", snap, rng) * np.exp(-time[:snap] / 0.002) * 0.4
    return _shaped(wave)


def _snare(kit: Kit, tune: float, tone: float, rng: np.random.Generator) -> Audio:
    shell, ring, hiss, level = kit.snare
    time = _time(hiss * 5)
    modes = tune * shell * np.array([1.0, 1.78, 2.3])
    wave = damped(modes, np.array([1.0, 0.5, 0.3]), np.full(3, 1 / ring), time.size)
    rattle = _band(noise("white", time.size, rng), 900 + 500 * tone, 9500)
    return _shaped(0.8 * wave + level * rattle * np.exp(-time / hiss) * 0.6)


def _cymbal(seconds: float, low: float) -> Callable[[Kit, float, float, np.random.Generator], Audio]:
    def make(kit: Kit, tune: float, tone: float, rng: np.random.Generator) -> Audio:
        decay = seconds or kit.hat
        time = _time(decay * 5)
        wave = noise("white", time.size, rng).copy()
        if kit.metal:
            partials = tune * np.array([205.3, 304.4, 369.6, 522.7, 540.0, 800.0]) * 1.6
            squares = sum(np.sign(np.sin(2 * np.pi * f * time)) for f in partials)
            wave = (1 - kit.metal) * wave + kit.metal * squares.astype(np.float32)
        wave = _band(wave, low * (1 + 0.2 * tone), 15000)
        return _shaped(wave * np.exp(-time / decay))

    return make


def _clap(kit: Kit, tune: float, tone: float, rng: np.random.Generator) -> Audio:
    time = _time(0.35)
    body = _band(noise("white", time.size, rng), 900 * tune, 4500)
    envelope = 0.6 * np.exp(-time / 0.07)
    for hand in (0.0, 0.011, 0.023):
        late = np.maximum(time - hand, 0)
        envelope = np.maximum(envelope, np.where(time >= hand, np.exp(-late / 0.006), 0))
    return _shaped(body * envelope)


def _rim(kit: Kit, tune: float, tone: float, rng: np.random.Generator) -> Audio:
    time = _time(0.12)
    wave = damped(tune * np.array([480.0, 1720.0, 2900.0]), np.array([0.6, 1.0, 0.5]), np.full(3, 70.0), time.size)
    return _shaped(wave)


def _tom(kit: Kit, tune: float, tone: float, rng: np.random.Generator) -> Audio:
    time = _time(0.6)
    turns = tune * (105 * time + 30 * 0.05 * (1 - np.exp(-time / 0.05)))
    return _shaped(np.sin(2 * np.pi * turns) * np.exp(-time / 0.16))


def _conga(kit: Kit, tune: float, tone: float, rng: np.random.Generator) -> Audio:
    time = _time(0.45)
    modes = tune * 190 * np.array([1.0, 1.6, 2.2])
    wave = damped(modes, np.array([1.0, 0.35, 0.2]), np.array([11.0, 25.0, 35.0]), time.size)
    return _shaped(wave + 0.15 * noise("dark", time.size, rng) * np.exp(-time / 0.008))


def _shaker(kit: Kit, tune: float, tone: float, rng: np.random.Generator) -> Audio:
    time = _time(0.14)
    grains = _band(noise("white", time.size, rng), 4000 * tune, 12000)
    return _shaped(grains * np.minimum(1, time / 0.012) * np.exp(-time / 0.028))


MAKERS: dict[str, Callable[[Kit, float, float, np.random.Generator], Audio]] = {
    "kick": _kick,
    "snare": _snare,
    "rim": _rim,
    "clap": _clap,
    "tom": _tom,
    "conga": _conga,
    "shaker": _shaker,
    "hat": _cymbal(0.0, 6500),
    "open": _cymbal(0.14, 6000),
    "ride": _cymbal(0.28, 4800),
    "crash": _cymbal(0.5, 3200),
    "tambourine": _cymbal(0.06, 7500),
}


def _band(wave: np.ndarray, low: float, high: float) -> Audio:
    filtered: Audio = sosfilt(butter(2, (low, high), "bandpass", fs=RATE, output="sos"), wave).astype(np.float32)
    return filtered


def _shaped(wave: np.ndarray) -> Audio:
    """Without a click at either end."""
    wave = np.asarray(wave, np.float32)
    wave[:20] *= np.linspace(0, 1, 20, dtype=np.float32)
    length = min(wave.size, 400)
    wave[-length:] *= np.linspace(1, 0, length, dtype=np.float32)
    return wave
