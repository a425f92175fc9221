"""Griffin-Lim: log-mels to waves without any learning, where a small vocoder would sound worse.

Magnitudes by a few multiplicative updates of non-negative least squares, phases by the fast algorithm of Perraudin,
Balazs and Sondergaard, "A Fast Griffin-Lim Algorithm" (WASPAA 2013).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttmray.audio.mel import MelConfig, slaney_filter_bank

MAGNITUDE_UPDATES = 20


@dataclass(frozen=True)
class GriffinLimConfig:
    """`momentum` is the paper's alpha; `seed` is of the first phases, the same for every clip."""

    num_mels: int = 128
    hop: int = 512
    iterations: int = 32
    momentum: float = 0.99
    seed: int = 0


class GriffinLim(nn.Module):
    """Takes the place of `BigVGAN`: (B, 128, frames) natural-log mels -> (B, 1, 512 x frames) float32 in [-1, 1]."""

    filters: Tensor
    window: Tensor

    def __init__(self, config: GriffinLimConfig | None = None) -> None:
        super().__init__()
        self.config, self.mel = config or GriffinLimConfig(), MelConfig()
        self.register_buffer("filters", torch.from_numpy(slaney_filter_bank(self.mel)), persistent=False)
        self.register_buffer("window", torch.hann_window(self.mel.n_fft), persistent=False)

    @torch.no_grad()
    def forward(self, mel: Tensor) -> Tensor:
        magnitude, length = self._magnitude(mel.exp()), self.mel.hop * mel.shape[2]
        draws = torch.Generator().manual_seed(self.config.seed)
        phase = torch.rand(magnitude.shape[1:], generator=draws).to(mel.device) * 2 * math.pi
        angles = torch.polar(torch.ones_like(phase), phase).expand(magnitude.shape)
        before = torch.zeros_like(angles)
        for _ in range(self.config.iterations):
            now = self._stft(self._istft(magnitude * angles, length))
            angles = now + self.config.momentum * (now - before)
            angles, before = angles / angles.abs().clamp_min(1e-8), now
        return self._istft(magnitude * angles, length).clamp(-1, 1)[:, None]

    def _magnitude(self, target: Tensor) -> Tensor:
        """(B, bins, frames) spectra of these mels."""
        magnitude = self.filters.T @ target + 1e-6
        for _ in range(MAGNITUDE_UPDATES):
            heard = (self.filters.T @ (self.filters @ magnitude)).clamp_min(1e-8)
            magnitude = magnitude * (self.filters.T @ target) / heard
        return magnitude

    def _stft(self, wave: Tensor) -> Tensor:
        padded = nn.functional.pad(wave[:, None], (self.mel.padding, self.mel.padding), mode="reflect")[:, 0]
        n_fft, hop = self.mel.n_fft, self.mel.hop
        return torch.stft(padded, n_fft, hop, window=self.window, center=False, return_complex=True)

    def _istft(self, spectrum: Tensor, length: int) -> Tensor:
        """Overlap-add with the frames of `LogMel`, whose first one begins `padding` samples before the wave."""
        n_fft, hop = self.mel.n_fft, self.mel.hop
        frames = torch.fft.irfft(spectrum, n_fft, dim=1) * self.window[:, None]
        total, fold = (spectrum.shape[2] - 1) * hop + n_fft, nn.functional.fold
        wave = fold(frames, (1, total), (1, n_fft), stride=(1, hop))[:, 0, 0]
        weights = self.window.square()[None, :, None].expand(1, -1, spectrum.shape[2])
        norm = fold(weights, (1, total), (1, n_fft), stride=(1, hop))[:, 0, 0]
        return (wave / norm.clamp_min(1e-3))[:, self.mel.padding : self.mel.padding + length]
