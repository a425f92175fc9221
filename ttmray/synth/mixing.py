"""From notes to four stems: parts are synthesised in mono, levelled, panned, given a room, and mastered together.

The mix is the sum of the stems at every sample: loudness and peaks are set by one gain that all stems share.
"""

import math

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.ndimage import maximum_filter1d, uniform_filter1d

from ttmray.audio.loudness import integrated_loudness
from ttmray.synth.composer import SOUND, stream
from ttmray.synth.drums import strokes
from ttmray.synth.instruments import RATE, Audio, tone
from ttmray.synth.piece import STEMS, Note, Piece, Player
from ttmray.synth.voice import sing

LUFS = -16.0
PEAK_DB = -1.5
"""Highest sample; between samples the true peak stays below 0 dBTP."""
MOST_REDUCTION_DB = 8.0
"""Peaks are limited by no more than this; beyond it the piece stays quieter than `LUFS`."""
ROOM_SECONDS = {"dry": 0.25, "room": 0.7, "hall": 1.5}
"""Time in which the reverberation falls by 60 dB."""
TAIL_S = 3.0
"""Notes that started this long before a window still ring in it."""

Stems = dict[str, Audio]


def render(piece: Piece, start: float = 0.0, seconds: float | None = None) -> Stems:
    """The four stems, each (2, samples) float32 at 44.1 kHz, mastered; silence stays silence.

    Args:
        start, seconds: a window of the piece (default: all of it). Only its notes are synthesised; it is mastered
            by itself, so that its loudness is that of any other clip.

    Raises:
        ValueError: the window is empty.
    """
    seconds = piece.seconds - start if seconds is None else seconds
    samples = round(seconds * RATE)
    if samples < 1:
        raise ValueError(f"a window of {seconds} s has no samples")
    rng = stream(piece.seed, piece.index, SOUND)
    stems = {stem: np.zeros((2, samples), np.float32) for stem in STEMS}
    sends = {stem: np.zeros(samples, np.float32) for stem in STEMS}
    for number, track in enumerate(piece.tracks):
        seeds = np.random.default_rng([piece.seed, piece.index, SOUND, number])
        part = _part(piece, track, start, samples, seeds)
        part *= _level(part, track)
        _place(stems[track.stem], part, track)
        if track.send:
            sends[track.stem] += track.send * part
    response = room(piece.attributes.room, rng)
    for stem, send in sends.items():
        if send.any():
            stems[stem] += convolve(send, response)
    _fade(stems)
    return master(stems)


def mix(stems: Stems) -> Audio:
    """Sum of the stems (2, samples) float32, always in the same order."""
    total = stems[STEMS[0]].copy()
    for stem in STEMS[1:]:
        total += stems[stem]
    return total


def _part(piece: Piece, track: Player, origin: float, samples: int, rng: np.random.Generator) -> Audio:
    """A player's notes in a window, mono float32."""
    end = origin + samples / RATE
    notes = [n for n in piece.notes if n.part == track.part and n.start < end and n.end > origin - TAIL_S]
    if track.part == "voice":
        return sing(notes, track.instrument, track.tone, origin, samples, rng)
    out = np.zeros(samples, np.float32)
    if track.part == "drums":
        _beat(out, notes, track, origin, rng)
        return out
    takes: dict[tuple[float, int, int], Audio] = {}
    for note in notes:
        kind = (round(note.midi, 2), round(note.length * 50), round(note.velocity * 5))
        if kind not in takes:
            takes[kind] = tone(track.instrument, note.midi, note.length, track.tone, rng, note.velocity)
        _add(out, takes[kind], round((note.start - origin) * RATE), note.velocity**1.5)
    return out


def _beat(out: Audio, notes: list[Note], track: Player, origin: float, rng: np.random.Generator) -> None:
    kit: dict[str, list[Audio]] = {}
    for drum in sorted({note.say for note in notes}):
        kit[drum] = strokes(track.instrument, drum, track.tone, np.random.default_rng([*rng.bytes(4)]))
    for i, note in enumerate(notes):
        _add(out, kit[note.say][i % 2], round((note.start - origin) * RATE), note.velocity**1.5)


def _add(out: Audio, sound: Audio, begin: int, gain: float) -> None:
    first, last = max(0, begin), min(out.size, begin + sound.size)
    if last > first:
        out[first:last] += gain * sound[first - begin : last - begin]


def _level(part: Audio, track: Player) -> float:
    """Gain that brings the RMS of the frames that sound to -20 dB and the track's own level."""
    frame = 2205
    power = (
        np.square(part[: part.size // frame * frame]).reshape(-1, frame).mean(axis=1)
        if part.size >= frame
        else (np.square(part).mean(keepdims=True))
    )
    sounding = power[power > 1e-4 * power.max()] if power.max() > 1e-12 else power[:0]
    if sounding.size == 0:
        return 0.0
    return float(10 ** ((track.gain_db - 20) / 20) / np.sqrt(sounding.mean()))


def _place(stem: Audio, part: Audio, track: Player) -> None:
    """Constant-power panning; width adds a delayed copy with opposite signs, which leaves the mono sum as it was."""
    angle = (track.pan + 1) * np.pi / 4
    stem[0] += np.float32(np.sqrt(2) * np.cos(angle)) * part
    stem[1] += np.float32(np.sqrt(2) * np.sin(angle)) * part
    delay = int(0.011 * RATE)
    if track.width and part.size > delay:
        late = np.float32(0.5 * track.width) * part[:-delay]
        stem[0, delay:] += late
        stem[1, delay:] -= late


def room(name: str, rng: np.random.Generator) -> Audio:
    """Impulse response (2, samples): early reflections and a tail of noise whose high tones die first."""
    seconds = ROOM_SECONDS[name] * float(rng.uniform(0.85, 1.15))
    samples = int(seconds * RATE)
    time = np.arange(samples, dtype=np.float32) / RATE
    tail = rng.standard_normal((2, samples), dtype=np.float32)
    dark = uniform_filter1d(tail, 9, axis=1) * 3
    decay = np.exp(-6.9 * time / seconds)
    response = (tail * decay**2 * 0.4 + dark * decay) * np.minimum(1, time / 0.012)
    for _ in range(6):
        at, side = int(rng.uniform(0.004, 0.03) * RATE), int(rng.integers(2))
        if at < samples:
            response[side, at] += 8 * rng.uniform(0.3, 1)
    return (response * (0.32 / np.sqrt(np.sum(response[0] ** 2)))).astype(np.float32)


def convolve(wave: Audio, response: Audio) -> Audio:
    """Mono (samples,) through a stereo response, cut to (2, samples), by overlap-add with blocks that fit the cache."""
    samples, taps = wave.size, response.shape[1]
    size = next_fast_len(max(4096, 2 * taps), real=True)
    step = size - taps + 1
    spectrum = rfft(response, size, axis=1)
    out = np.zeros((2, samples), np.float32)
    for first in range(0, samples, step):
        block = wave[first : first + step]
        if not block.any():
            continue
        wet = irfft(rfft(block, size) * spectrum, size, axis=1)
        stop = min(samples, first + size)
        out[:, first:stop] += wet[:, : stop - first]
    return out


def _fade(stems: Stems) -> None:
    """The last 30 ms of every stem."""
    for audio in stems.values():
        length = min(audio.shape[1], int(0.03 * RATE))
        audio[:, -length:] *= np.linspace(1, 0, length, dtype=np.float32)


def master(stems: Stems) -> Stems:
    """Stems (2, samples) whose mix is at -16 LUFS under -1.5 dBFS, changed in place; one limiter works on all alike."""
    for _ in range(2):
        total = mix(stems)
        loudness = measured_loudness(total)
        peak = float(np.abs(total).max())
        if loudness == -math.inf or peak == 0:
            return stems
        gain = LUFS - loudness
        ceiling = PEAK_DB + MOST_REDUCTION_DB
        gain = min(gain, ceiling - 20 * math.log10(peak))
        over = peak * 10 ** ((gain - PEAK_DB) / 20)
        curve = 10 ** (gain / 20) * (_limiter(total * 10 ** (gain / 20)) if over > 1 else np.float32(1))
        for audio in stems.values():
            audio *= np.float32(curve) if np.ndim(curve) == 0 else curve
        if over <= 1 or abs(gain) < 0.3:
            break
    final = float(np.abs(mix(stems)).max())
    excess = final / 10 ** (PEAK_DB / 20)
    if excess > 1:
        for audio in stems.values():
            audio /= np.float32(excess)
    return stems


def measured_loudness(audio: Audio) -> float:
    """Integrated loudness of (channels, samples) in LUFS; clips below 0.5 s are repeated; -inf for silence."""
    shortest = int(0.5 * RATE)
    if audio.shape[1] < shortest:
        audio = np.tile(audio, (1, -(-shortest // audio.shape[1])))
    return integrated_loudness(audio, RATE)


def _limiter(total: Audio) -> Audio:
    """Gain (samples,) that keeps peaks under the ceiling: blocks of 1 ms, looking 4 ms ahead, back in 80 ms."""
    block = RATE // 1000
    samples = total.shape[1]
    padded = np.pad(np.abs(total).max(axis=0), (0, -samples % block))
    peaks = np.maximum(padded.reshape(-1, block).max(axis=1), 1e-9)
    need = np.minimum(0, PEAK_DB - 20 * np.log10(peaks))
    held = -maximum_filter1d(-need, 13)
    smooth = np.minimum(held, 0.0)
    level = 0.0
    for i, low in enumerate(held.tolist()):  # a release of 80 ms; the attack is smoothed below
        level = low if low < level else level + (low - level) * (1 / 80)
        smooth[i] = level
    gain = (10 ** (uniform_filter1d(smooth, 9) / 20)).astype(np.float32)
    # linear from the middle of a block to the middle of the next
    edges = np.concatenate([gain[:1], gain, gain[-1:]])
    ramp = np.arange(block, dtype=np.float32) / block
    line = edges[:-1, None] + np.diff(edges)[:, None] * ramp
    curve: Audio = line.reshape(-1)[block // 2 : block // 2 + samples].astype(np.float32)
    return curve
