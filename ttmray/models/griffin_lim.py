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
        # frames go before bins from here on, as FFTs like them; a transposed copy in every iteration takes longer
        magnitude, length = self._magnitude(mel.exp()).mT.contiguous(), self.mel.hop * mel.shape[2]
        norm = self._overlap_add(self.window.square().expand(1, mel.shape[2], -1)).clamp_min(1e-3)
        draws = torch.Generator().manual_seed(self.config.seed)
        phase = torch.rand(magnitude.mT.shape[1:], generator=draws).mT.contiguous().to(mel.device) * 2 * math.pi
        spectrum = torch.polar(magnitude, phase.expand(magnitude.shape))
        before = torch.zeros_like(spectrum)
        for _ in range(self.config.iterations):
            now = self._stft(self._istft(spectrum, norm, length))
            ahead = now + self.config.momentum * (now - before)
            spectrum, before = ahead * (magnitude / ahead.abs().clamp_min(1e-8)), now
        return self._istft(spectrum, norm, length).clamp(-1, 1)[:, None]

    def _magnitude(self, target: Tensor) -> Tensor:
        """(B, bins, frames) spectra of these mels."""
        spread = self.filters.T @ target
        magnitude = spread + 1e-6
        for _ in range(MAGNITUDE_UPDATES):
            heard = (self.filters.T @ (self.filters @ magnitude)).clamp_min(1e-8)
            magnitude = magnitude * spread / heard
        return magnitude

    def _stft(self, wave: Tensor) -> Tensor:
        """(B, samples) -> (B, frames, bins)."""
        padded = nn.functional.pad(wave[:, None], (self.mel.padding, self.mel.padding), mode="reflect")[:, 0]
        return torch.fft.rfft(padded.unfold(1, self.mel.n_fft, self.mel.hop) * self.window)

    def _istft(self, spectrum: Tensor, norm: Tensor, length: int) -> Tensor:
        """Overlap-add with the frames of `LogMel`, whose first one begins `padding` samples before the wave."""
        frames = torch.fft.irfft(spectrum, self.mel.n_fft) * self.window
        return (self._overlap_add(frames) / norm)[:, self.mel.padding : self.mel.padding + length]

    def _overlap_add(self, frames: Tensor) -> Tensor:
        """(B, frames, samples of a frame) -> (B, samples)."""
        hop, per_frame = self.mel.hop, self.mel.n_fft // self.mel.hop
        count = frames.shape[1]
        total = frames.new_zeros(frames.shape[0], count + per_frame - 1, hop)
        for part in range(per_frame):
            total[:, part : part + count] += frames[:, :, part * hop : (part + 1) * hop]
        return total.flatten(1)
