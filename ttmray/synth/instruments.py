"""Timbres by additive synthesis: plucked and struck sounds as damped partials, blown, bowed and synthetic ones as
wavetables with vibrato. Vectorised numpy, float32, mono, 44.1 kHz.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, sosfilt

from ttmray.synth.theory import hertz

RATE = 44100
TOP_HZ = 16000.0
TABLE = 8192
BLOCK = 512

Audio = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Damped:
    """A string, bar or bell that is set in motion once.

    Attributes:
        low: lowest MIDI number that suits it as a melody instrument.
        slope: partial k starts at k ** -slope.
        seconds: time constant of the fundamental's decay at A3; an octave up it is a third shorter.
        damping: partial k decays `1 + damping * (k - 1)` times as fast.
        place: where it is plucked or struck, as a share of the string: partials with a node there are missing.
        ratios: frequencies against the fundamental with their levels; empty for a string of harmonics.
        stiff: inharmonicity of a stiff string, f_k = k f sqrt(1 + stiff k^2).
        release: time constant in seconds once the note ends.
        knock: level of the noise of the attack.
        tremolo: depth, at 5 Hz.
    """

    family: str
    low: int
    slope: float = 1.2
    seconds: float = 1.2
    damping: float = 0.25
    place: float = 0.0
    ratios: tuple[tuple[float, float], ...] = ()
    stiff: float = 0.0
    release: float = 0.12
    knock: float = 0.0
    tremolo: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Sustained:
    """A tone that is kept up: two wavetables, a dull and a bright one, mixed by an envelope.

    Attributes:
        slope: harmonic k of the bright table is at k ** -slope; `dull` is added to the slope for the dull one.
        even: level of the even harmonics (0: clarinet, square).
        formants: (Hz, gain) of resonances with a bandwidth of a third of their frequency.
        attack, release: seconds.
        bite: time constant in seconds of the brightness after the attack; 0: as bright as the note is loud.
        sustain: level to which the loudness falls, with the time constant `fall` in seconds.
        vibrato: cents, at about 5.3 Hz, from 0.25 s after the start.
        breath: level of noise around the note.
        unison: cents between three voices; 0: one voice.
    """

    family: str
    low: int
    slope: float = 1.2
    dull: float = 0.8
    even: float = 1.0
    formants: tuple[tuple[float, float], ...] = ()
    attack: float = 0.03
    release: float = 0.08
    bite: float = 0.0
    sustain: float = 1.0
    fall: float = 0.4
    vibrato: float = 0.0
    breath: float = 0.0
    unison: float = 0.0


GLOCKENSPIEL = ((1.0, 1.0), (2.76, 0.35), (5.4, 0.15), (8.93, 0.06))
MARIMBA = ((1.0, 1.0), (3.93, 0.25), (9.2, 0.06))
VIBRAPHONE = ((1.0, 1.0), (4.0, 0.18), (10.0, 0.04))
TINE = ((1.0, 1.0), (2.0, 0.28), (3.0, 0.12), (4.0, 0.07), (7.1, 0.1))

INSTRUMENTS: dict[str, Damped | Sustained] = {
    "nylon guitar": Damped(family="plucked", low=55, slope=1.5, seconds=0.7, damping=0.35, place=0.3, knock=0.05),
    "steel guitar": Damped(family="plucked", low=55, slope=0.95, seconds=0.9, damping=0.16, place=0.14, knock=0.06),
    "electric guitar": Damped(family="plucked", low=55, slope=1.15, seconds=1.3, damping=0.2, place=0.22, knock=0.02),
    "banjo": Damped(family="plucked", low=60, slope=0.7, seconds=0.26, damping=0.12, place=0.1, knock=0.1),
    "harp": Damped(family="plucked", low=60, slope=1.9, seconds=1.5, damping=0.4, place=0.45, release=0.6),
    "pizzicato strings": Damped(family="plucked", low=57, slope=1.4, seconds=0.14, damping=0.3, place=0.25, knock=0.04),
    "synth pluck": Damped(family="plucked", low=60, slope=0.8, seconds=0.28, damping=0.5),
    "piano": Damped(family="struck", low=62, slope=1.35, seconds=1.1, damping=0.28, place=0.12, stiff=0.0003,
                    knock=0.03),
    "electric piano": Damped(family="struck", low=60, seconds=1.4, damping=0.7, ratios=TINE, tremolo=0.25),
    "vibraphone": Damped(family="struck", low=60, seconds=2.2, damping=0.5, ratios=VIBRAPHONE, tremolo=0.45,
                         release=0.3),
    "marimba": Damped(family="struck", low=60, seconds=0.3, damping=0.8, ratios=MARIMBA, knock=0.05),
    "glockenspiel": Damped(family="struck", low=79, seconds=1.4, damping=0.5, ratios=GLOCKENSPIEL, release=1.0,
                           knock=0.03),
    "finger bass": Damped(family="bass", low=28, slope=1.7, seconds=1.6, damping=0.35, place=0.2, knock=0.02),
    "picked bass": Damped(family="bass", low=28, slope=0.9, seconds=1.4, damping=0.2, place=0.12, knock=0.06),
    "upright bass": Damped(family="bass", low=28, slope=2.0, seconds=0.6, damping=0.5, place=0.3, knock=0.08),
    "violin": Sustained(family="bowed", low=62, slope=1.0, dull=0.5, formants=((500, 0.7), (1300, 0.8), (2800, 0.9)),
                        attack=0.06, release=0.12, vibrato=16, breath=0.012),
    "cello": Sustained(family="bowed", low=36, slope=1.1, dull=0.5, formants=((250, 0.8), (600, 0.7), (1500, 0.5)),
                       attack=0.07, release=0.14, vibrato=12, breath=0.01),
    "strings": Sustained(family="bowed", low=55, slope=1.2, attack=0.22, release=0.35, unison=7, breath=0.01),
    "flute": Sustained(family="blown", low=67, slope=2.6, dull=0.8, attack=0.05, release=0.08, vibrato=9, breath=0.06),
    "clarinet": Sustained(family="blown", low=57, slope=1.2, even=0.08, attack=0.04, release=0.07, breath=0.015),
    "trumpet": Sustained(family="blown", low=60, slope=0.6, dull=1.2, formants=((1200, 1.5), (2400, 0.8)),
                         attack=0.035, release=0.07, vibrato=8),
    "saxophone": Sustained(family="blown", low=55, slope=0.9, dull=0.7, formants=((650, 1.4), (1500, 0.8)),
                           attack=0.04, release=0.08, vibrato=14, breath=0.045),
    "harmonica": Sustained(family="blown", low=62, slope=0.7, dull=0.3, formants=((1800, 1.6),), even=0.6,
                           attack=0.03, release=0.06, vibrato=10, breath=0.03),
    "accordion": Sustained(family="blown", low=57, slope=0.8, dull=0.2, attack=0.04, release=0.07, unison=5),
    "organ": Sustained(family="blown", low=57, slope=1.4, dull=0.0, even=1.2, attack=0.012, release=0.05, unison=1.5),
    "saw lead": Sustained(family="synth", low=60, slope=1.0, dull=1.2, attack=0.008, release=0.1, bite=0.5, unison=9),
    "square lead": Sustained(family="synth", low=60, slope=1.0, dull=0.8, even=0.0, attack=0.005, bite=0.4, vibrato=6),
    "saw stab": Sustained(family="synth", low=57, slope=0.9, dull=1.6, attack=0.004, bite=0.16, sustain=0.3, fall=0.25,
                          unison=10),
    "synth brass": Sustained(family="synth", low=57, slope=0.9, dull=1.3, attack=0.06, release=0.12, unison=8),
    "warm pad": Sustained(family="synth", low=55, slope=1.8, dull=0.8, attack=0.35, release=0.5, unison=8),
    "glass pad": Sustained(family="synth", low=64, slope=1.6, dull=0.1, even=0.3, formants=((2500, 1.5), (4200, 1.2)),
                           attack=0.25, release=0.6, unison=5),
    "synth bass": Sustained(family="bass", low=28, slope=1.0, dull=1.4, attack=0.004, release=0.05, bite=0.16,
                            sustain=0.7),
    "sub bass": Sustained(family="bass", low=28, slope=3.0, dull=1.0, attack=0.008, release=0.06),
    "acid bass": Sustained(family="bass", low=28, slope=1.0, dull=1.0, formants=((900, 3.5),), attack=0.003,
                           release=0.04, bite=0.12, sustain=0.8),
    "chip bass": Sustained(family="bass", low=33, slope=2.0, dull=0.0, even=0.0, attack=0.002, release=0.01),
    "chip lead": Sustained(family="synth", low=64, slope=1.0, dull=0.0, even=0.7, attack=0.002, release=0.01,
                           vibrato=8),
    "chip pulse": Sustained(family="synth", low=60, slope=0.9, dull=0.0, even=0.4, attack=0.002, release=0.01,
                            sustain=0.4, fall=0.15),
    "distorted guitar": Sustained(family="synth", low=52, slope=0.45, dull=0.1, attack=0.004, release=0.06,
                                  formants=((700, 1.0), (2200, 1.6)), sustain=0.75, fall=0.9, unison=3, breath=0.01),
}  # fmt: skip
FAMILIES = ("plucked", "struck", "bowed", "blown", "synth", "bass")


def tone(
    name: str, midi: float, seconds: float, bright: float, rng: np.random.Generator, velocity: float = 0.8
) -> Audio:
    """One note (samples,), mono float32, about as loud as any other of any instrument; it rings on after `seconds`.

    Args:
        midi: pitch, fractions allowed.
        bright: -1 (mellow) to 1 (brilliant).
        velocity: softer notes are also duller; the loudness is left to the caller.
    """
    spec = INSTRUMENTS[name]
    tilt = -0.35 * bright + 0.35 * (0.8 - velocity)
    if isinstance(spec, Damped):
        return _damped_note(spec, midi, seconds, tilt, rng)
    return _sustained_note(name, spec, midi, seconds, tilt, rng)


def damped(frequencies: np.ndarray, amplitudes: np.ndarray, rates: np.ndarray, samples: int) -> Audio:
    """Sum of decaying sines as one product of matrices: blocks of 512 samples by partials.

    Args:
        frequencies, amplitudes, rates: (partials,) in Hz, linear, and 1/s.
    """
    poles = -rates + 2j * np.pi * frequencies
    blocks = -(-samples // BLOCK)
    inner = np.exp(poles[:, None] * (np.arange(BLOCK) / RATE))
    outer = amplitudes * np.exp(poles * (np.arange(blocks) * (BLOCK / RATE))[:, None])
    left = np.concatenate([outer.imag, outer.real], axis=1).astype(np.float32)
    right = np.concatenate([inner.real, inner.imag]).astype(np.float32)
    wave: Audio = (left @ right).reshape(-1)[:samples]
    return wave


def _damped_note(spec: Damped, midi: float, seconds: float, tilt: float, rng: np.random.Generator) -> Audio:
    base = hertz(midi)
    if spec.ratios:
        ratios, levels = (np.array(column) for column in zip(*spec.ratios, strict=True))
        levels = levels * ratios ** (-0.5 * tilt)
    else:
        k = np.arange(1, min(48, int(TOP_HZ / base)) + 1)
        ratios = k * np.sqrt(1 + spec.stiff * k**2)
        ratios = ratios / ratios[0]
        levels = k ** -(spec.slope + tilt)
        if spec.place:
            levels = levels * np.abs(np.sin(np.pi * k * spec.place))
    audible = (ratios * base < TOP_HZ) & (levels > 0.002 * levels.max())
    ratios, levels = ratios[audible], levels[audible]
    # a third shorter per octave above A3
    rates = (1 + spec.damping * (ratios - 1)) / spec.seconds * 1.5 ** ((midi - 57) / 12)
    total = min(seconds + 4 * spec.release, 6.0 / float(rates.min()) + 0.05)
    samples = max(64, int(total * RATE))
    wave = damped(ratios * base, levels * (0.3 / np.sqrt(np.sum(levels**2) / 2)), rates, samples)
    time = np.arange(samples, dtype=np.float32) / RATE
    if spec.tremolo:
        wave *= 1 - spec.tremolo * (0.5 - 0.5 * np.cos(2 * np.pi * 5 * time))
    end = int(seconds * RATE)
    if end < samples:
        wave[end:] *= np.exp(-(time[: samples - end]) / spec.release)
    if spec.knock:
        length = min(samples, int(0.03 * RATE))
        wave[:length] += spec.knock * noise("dark", length, rng) * np.exp(-time[:length] / 0.007)
    soft = min(samples, 40)
    wave[:soft] *= np.linspace(0, 1, soft, dtype=np.float32)
    return _faded(wave)


@lru_cache(maxsize=4096)
def _tables(name: str, semitone: int, tilt: float) -> tuple[Audio, Audio]:
    """Dull and bright wavetable of an instrument near a pitch, of equal RMS."""
    spec = INSTRUMENTS[name]
    assert isinstance(spec, Sustained)
    base = hertz(semitone)
    k = np.arange(1, max(2, min(TABLE // 4, int(TOP_HZ / base) + 1)))
    gain = np.where(k % 2 == 0, spec.even, 1.0) * resonances(k * base, spec.formants)
    dull, bright = (k ** -(spec.slope + tilt + extra) * gain for extra in (spec.dull, 0.0))
    return wavetable(k, dull), wavetable(k, bright)


def resonances(frequencies: np.ndarray, formants: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Gain at frequencies of any shape, in Hz; formants are (centre in Hz, level)."""
    gain = np.ones_like(frequencies)
    for centre, level in formants:
        gain = gain + level / (1 + ((frequencies - centre) / (centre / 6)) ** 2)
    return gain


def wavetable(harmonics: np.ndarray, levels: np.ndarray) -> Audio:
    """One cycle (8192,) with an RMS of 0.3; numbers of harmonics (n,) and their levels (n,)."""
    spectrum = np.zeros(TABLE // 2 + 1, complex)
    spectrum[harmonics] = levels * np.exp(1j * (np.pi * harmonics**2 / (len(harmonics) + 1)))  # spread: low crest
    cycle = np.fft.irfft(spectrum)
    scaled: Audio = (cycle * (0.3 / np.sqrt(np.mean(cycle**2)))).astype(np.float32)
    return scaled


def read_table(table: Audio, turns: np.ndarray) -> Audio:
    """A wavetable (8192,) at phases in turns, of any shape."""
    return table[(turns * TABLE).astype(np.int64) & (TABLE - 1)]


def _sustained_note(
    name: str, spec: Sustained, midi: float, seconds: float, tilt: float, rng: np.random.Generator
) -> Audio:
    samples = int((seconds + spec.release * 3) * RATE) + 64
    time = np.arange(samples, dtype=np.float32) / RATE
    base = hertz(midi)
    turns = base * np.arange(samples) / RATE
    if spec.vibrato:
        rate, depth = rng.uniform(4.9, 5.8), base * spec.vibrato / 1200 * np.log(2)
        swell = np.clip((time - 0.2) / 0.25, 0, 1)
        turns = turns - depth / (2 * np.pi * rate) * swell * np.cos(np.float32(2 * np.pi * rate) * time)
    dull, bright = _tables(name, round(midi), round(tilt, 2))
    loud = np.minimum(1, time / spec.attack)
    loud *= spec.sustain + (1 - spec.sustain) * np.exp(-time / spec.fall)
    end = int(seconds * RATE)
    if end < samples:
        loud[end:] *= np.exp(-time[: samples - end] / (spec.release * 0.7))
    shine = np.exp(-time / spec.bite) if spec.bite else loud
    wave = np.zeros(samples, np.float32)
    voices = ((-spec.unison, 0.55), (0.0, 1.0), (spec.unison, 0.55)) if spec.unison else ((0.0, 1.0),)
    for cents, share in voices:
        phase = turns * 2 ** (cents / 1200) + rng.random()
        index = (phase * TABLE).astype(np.int64) & (TABLE - 1)
        low = dull[index]
        wave += np.float32(share) * (low if not spec.dull else low + shine * (bright[index] - low))
    wave *= np.float32(1 / np.sqrt(sum(share**2 for _, share in voices)))
    if spec.breath:
        wave += spec.breath * noise("breath", samples, rng)
    return _faded(wave * loud)


@lru_cache(maxsize=8)
def _noise(kind: str) -> Audio:
    """Four seconds of noise with an RMS of 1: white, dark (below 3 kHz) or breath (1 to 6 kHz)."""
    wave = np.random.default_rng(len(kind)).standard_normal(4 * RATE)
    bands = {"dark": (3000, "lowpass"), "breath": ((1000, 6000), "bandpass")}
    if kind in bands:
        edge, form = bands[kind]
        wave = sosfilt(butter(2, edge, form, fs=RATE, output="sos"), wave)
    return (wave / wave.std()).astype(np.float32)


def noise(kind: str, samples: int, rng: np.random.Generator) -> Audio:
    """A piece (samples,) of a fixed noise from a random place on."""
    source = _noise(kind)
    start = int(rng.integers(source.size))
    return (
        np.take(source, range(start, start + samples), mode="wrap")
        if samples > source.size - start
        else source[start : start + samples]
    )


def _faded(wave: Audio) -> Audio:
    """The last 3 ms go to zero."""
    length = min(wave.size, 132)
    wave[-length:] *= np.linspace(1, 0, length, dtype=np.float32)
    return wave
