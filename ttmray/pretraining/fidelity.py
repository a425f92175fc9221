"""How near a copy of music is to the original: log-mel, pitch and tempo; and Griffin-Lim, the vocoder to beat."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ttmray.audio.mel import LogMel, MelConfig, slaney_filter_bank
from ttmray.pretraining.losses import heard
from ttmray.synth.measures import measure, pitch

DB_PER_NEPER = 20 / math.log(10)


def mel_errors(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Mean absolute errors of natural-log mels of equal shape.

    Returns:
        `mel_db`, over all elements; `mel_heard_db`, of what is above the floor of the losses; `mel_of_silence`, the
        first as a share of the error that silence makes.
    """
    error = float((ours - theirs).abs().mean())
    above = float((heard(ours) - heard(theirs)).abs().mean())
    silence = float((theirs - math.log(MelConfig().floor)).abs().mean())
    return {
        "mel_db": error * DB_PER_NEPER,
        "mel_heard_db": above * DB_PER_NEPER,
        "mel_of_silence": error / max(silence, 1e-6),
    }


def pitch_error(ours: np.ndarray, theirs: np.ndarray, clarity: float = 0.85) -> float:
    """Median distance in semitones where the original (samples,) at 44.1 kHz is clearly pitched; NaN if nowhere."""
    hertz, clear = pitch(theirs)
    other, _ = pitch(ours[: len(theirs)])
    length = min(len(hertz), len(other))
    voiced = (clear[:length] > clarity) & (hertz[:length] > 0)
    if voiced.sum() < 8:
        return math.nan
    distance = np.abs(12 * np.log2(np.maximum(other[:length][voiced], 1.0) / hertz[:length][voiced]))
    return float(np.median(distance))


def compare_waves(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Errors of the log-mel, and whether the tempo is within 2 %, of two mono waves at 44.1 kHz.

    The shorter one's length is compared. Tempo is that which is measured in the original.
    """
    length = min(len(ours), len(theirs))
    mel = LogMel()
    a, b = (mel(torch.from_numpy(np.ascontiguousarray(wave[:length]))[None]) for wave in (ours, theirs))
    before, after = measure(theirs[None, :length]).tempo, measure(ours[None, :length]).tempo
    same = math.nan if before == 0 else float(abs(after / before - 1) < 0.02)
    return mel_errors(a, b) | {"tempo_kept": same}


def mean_of(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means by name over the rows; what is NaN in a row does not count."""
    names = rows[0].keys()
    means = {}
    for name in names:
        values = [row[name] for row in rows if not math.isnan(row[name])]
        means[name] = float(np.mean(values)) if values else math.nan
    return means


def griffin_lim(mel: Tensor, iterations: int = 32, momentum: float = 0.99, seed: int = 0) -> np.ndarray:
    """Waves (B, hop * frames) float32 of log-mels (B, bands, frames), without any learning.

    Magnitudes by a few multiplicative updates of non-negative least squares, phases by the fast algorithm of
    Perraudin, Balazs and Sondergaard (WASPAA 2013).
    """
    config = MelConfig()
    filters, window = _filters(), torch.hann_window(config.n_fft)
    target = mel.exp()
    magnitude = filters.T @ target + 1e-6
    for _ in range(20):
        magnitude = magnitude * (filters.T @ target) / (filters.T @ (filters @ magnitude)).clamp_min(1e-8)
    phase = torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(seed)) * 2 * math.pi
    angles, before = torch.polar(torch.ones_like(phase), phase), torch.zeros_like(phase, dtype=torch.complex64)
    length = config.hop * mel.shape[2]
    for _ in range(iterations):
        wave = _istft(magnitude * angles, window, config, length)
        now = torch.stft(
            _padded(wave, config), config.n_fft, config.hop, window=window, center=False, return_complex=True
        )
        angles = now + momentum * (now - before)
        angles, before = angles / angles.abs().clamp_min(1e-8), now
    return _istft(magnitude * angles, window, config, length).clamp(-1, 1).numpy()


@cache
def _filters() -> Tensor:
    return torch.from_numpy(slaney_filter_bank(MelConfig()))


def _padded(wave: Tensor, config: MelConfig) -> Tensor:
    return torch.nn.functional.pad(wave[:, None], (config.padding, config.padding), mode="reflect")[:, 0]


def _istft(spectrum: Tensor, window: Tensor, config: MelConfig, length: int) -> Tensor:
    """Overlap-add with the frames of `LogMel`, whose first one begins `padding` samples before the wave."""
    frames = torch.fft.irfft(spectrum, config.n_fft, dim=1) * window[:, None]
    total = (spectrum.shape[2] - 1) * config.hop + config.n_fft
    fold = torch.nn.functional.fold
    wave = fold(frames, (1, total), (1, config.n_fft), stride=(1, config.hop))[:, 0, 0]
    weights = window.square()[None, :, None].expand(1, -1, spectrum.shape[2])
    norm = fold(weights, (1, total), (1, config.n_fft), stride=(1, config.hop))[:, 0, 0]
    return (wave / norm.clamp_min(1e-3))[:, config.padding : config.padding + length]
