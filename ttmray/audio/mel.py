"""Log-mel spectrogram at 44.1 kHz, the input of the VAE and of the vocoder.

The definition is that of NVIDIA's BigVGAN v2 44 kHz configuration (MIT), which MMAudio's 44 kHz converter
shares, so that the VAE's output feeds the vocoder directly. The filter bank is Slaney's Auditory Toolbox
(Interval Research TR 1998-010) scale and area normalisation, as librosa computes it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

_BREAK_HZ = 1000.0  # Slaney's scale is linear below and logarithmic above
_HZ_PER_MEL = 200.0 / 3.0
_LOG_STEP = np.log(6.4) / 27.0


@dataclass(frozen=True, kw_only=True)
class MelConfig:
    """Defaults: BigVGAN v2 44 kHz, 128 bands, hop 512."""

    sample_rate: int = 44100  # Hz
    n_fft: int = 2048  # samples; also the length of the periodic Hann window
    hop: int = 512  # samples
    n_mels: int = 128
    fmin: float = 0.0  # Hz
    fmax: float = 22050.0  # Hz
    magnitude_eps: float = 1e-9  # added to |X|^2 before the root
    floor: float = 1e-5  # least mel value, before the logarithm

    @property
    def padding(self) -> int:
        """Samples reflected at each side before framing; 768 for the defaults."""
        return (self.n_fft - self.hop) // 2

    def frames(self, samples: int) -> int:
        """Frames of a waveform of that many samples: 441,000 -> 861, 440,320 -> 860."""
        return (samples + 2 * self.padding - self.n_fft) // self.hop + 1


PUBLIC_16K = MelConfig(sample_rate=16_000, n_fft=1024, hop=256, n_mels=80, fmax=8000.0)
"""Shape of the spectrograms behind 16 kHz latents. Their logarithm is of base 10, which `LogMel` does not make: the
public VAE of that rate only decodes here."""


def _hz_to_mel(hz: float) -> float:
    if hz < _BREAK_HZ:
        return hz / _HZ_PER_MEL
    return _BREAK_HZ / _HZ_PER_MEL + float(np.log(hz / _BREAK_HZ)) / _LOG_STEP


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    knee = _BREAK_HZ / _HZ_PER_MEL
    return np.where(mel < knee, mel * _HZ_PER_MEL, _BREAK_HZ * np.exp(_LOG_STEP * (mel - knee)))


def slaney_filter_bank(config: MelConfig) -> np.ndarray:
    """Triangular mel filters of equal area: (n_mels, n_fft // 2 + 1) float32."""
    bins = np.linspace(0.0, config.sample_rate / 2, config.n_fft // 2 + 1)
    edges = _mel_to_hz(np.linspace(_hz_to_mel(config.fmin), _hz_to_mel(config.fmax), config.n_mels + 2))
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (bins - left) / (centre - left)
    falling = (right - bins) / (right - centre)
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return (triangles * (2.0 / (right - left))).astype(np.float32)


class LogMel(nn.Module):
    """Waveform -> natural logarithm of the mel magnitude spectrogram.

    Samples beyond [-1, 1] are clamped. Magnitudes are sqrt(|X|^2 + 1e-9) and mel values at least 1e-5 (by default), so
    the output is never below ln(1e-5) = -11.5.
    """

    filters: torch.Tensor
    window: torch.Tensor

    def __init__(self, config: MelConfig | None = None) -> None:
        super().__init__()
        self.config = config or MelConfig()
        self.register_buffer("filters", torch.from_numpy(slaney_filter_bank(self.config)), persistent=False)
        self.register_buffer("window", torch.hann_window(self.config.n_fft), persistent=False)

    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        """(B, T) float32 mono at `sample_rate` -> (B, n_mels, frames) float32.

        Raises:
            ValueError: not (B, T), or too short to be reflected at its ends (769 samples for the defaults).
        """
        if waves.ndim != 2:
            raise ValueError(f"waves must be (batch, samples), not {tuple(waves.shape)}")
        pad = self.config.padding
        if waves.shape[1] <= pad:
            raise ValueError(f"{waves.shape[1]} samples are too few for a mel frame, {pad + 1} are needed")
        padded = torch.nn.functional.pad(waves.clamp(-1.0, 1.0)[:, None], (pad, pad), mode="reflect")[:, 0]
        spectrum = torch.stft(
            padded, self.config.n_fft, self.config.hop, window=self.window, center=False, return_complex=True
        )
        magnitude = torch.view_as_real(spectrum).square().sum(-1).add(self.config.magnitude_eps).sqrt()
        return (self.filters @ magnitude).clamp(min=self.config.floor).log()
