"""Losses that several trainers share: log-mel distance, multi-resolution STFT, symmetric InfoNCE."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEL_FLOOR = -8.0
"""Natural log of a mel magnitude that no listener hears beside music: about white noise at -70 dBFS. Below it errors do
not count, otherwise half the loss is about digital silence."""


def heard(mel: Tensor, floor: float = MEL_FLOOR) -> Tensor:
    """Log-mel of any shape with all that is below the floor raised to it."""
    return mel.clamp_min(floor)


def kl_to_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence in nats of diagonal Gaussians from the unit normal, the mean () over all elements (Kingma and
    Welling 2014)."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


class MultiResolutionSTFT(nn.Module):
    """Spectral convergence plus L1 of log magnitudes, the mean over three resolutions.

    Yamamoto, Song and Kim, "Parallel WaveGAN" (ICASSP 2020): FFT 512, 1024, 2048, hops 50, 120, 240, windows 240, 600,
    1200 there; here windows are as long as the FFT and hops a quarter of it.
    """

    def __init__(self, sizes: tuple[int, ...] = (512, 1024, 2048)) -> None:
        super().__init__()
        self.sizes = sizes
        for size in sizes:
            self.register_buffer(f"window{size}", torch.hann_window(size), persistent=False)

    def forward(self, wave: Tensor, target: Tensor) -> Tensor:
        """(B, T) twice -> scalar."""
        total = wave.new_zeros(())
        for size in self.sizes:
            ours, theirs = self._magnitude(wave, size), self._magnitude(target, size)
            # a quiet target would otherwise count for more than all music
            least = 1e-3 * size / 4 * theirs.numel() ** 0.5
            convergence = torch.linalg.vector_norm(theirs - ours) / torch.linalg.vector_norm(theirs).clamp_min(least)
            total = total + convergence + F.l1_loss(ours.log(), theirs.log())
        return total / len(self.sizes)

    def _magnitude(self, wave: Tensor, size: int) -> Tensor:
        window = self.get_buffer(f"window{size}")
        spectrum = torch.stft(wave, size, size // 4, window=window, return_complex=True)
        # the floor is -60 dB against a sine of full scale; without it silence would rule the logarithms
        return torch.view_as_real(spectrum).square().sum(-1).add((1e-3 * size / 4) ** 2 * 1e-1).sqrt()


def info_nce(audio: Tensor, text: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE of pairs (Radford et al. 2021; LAION-CLAP), and the share of rows whose own text is first.

    Args:
        audio, text: (B, D) unit vectors, row i of both a pair.
        log_scale: scalar, log of the inverse temperature, held below ln 100 as in CLIP.
    """
    logits = log_scale.clamp(max=math.log(100.0)).exp() * audio @ text.T
    own = torch.arange(len(logits), device=logits.device)
    loss = 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))
    return loss, (logits.argmax(dim=1) == own).float().mean()
