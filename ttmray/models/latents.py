"""Waveforms <-> latents: spectrogram, VAE and vocoder behind one adapter."""

import numpy as np
import torch

from ttmray.audio.mel import LogMel, MelConfig
from ttmray.errors import UserError
from ttmray.models import micro_batch, to_float32
from ttmray.models.bigvgan import BigVGAN
from ttmray.models.vae import MelVAE


class LatentEncoder:
    """Waveforms <-> latents for clips of one length, on one device. Holds the VAE and, optionally, a vocoder.

    On a CPU clips are run one at a time, so that a clip's numbers do not depend on its neighbours.
    """

    def __init__(
        self,
        vae: MelVAE,
        clip_samples: int = 441_000,
        device: str | torch.device = "cpu",
        vocoder: BigVGAN | None = None,
        mel: MelConfig | None = None,
        decodes_only: bool = False,
    ) -> None:
        """
        Args:
            vae: with normalised weights.
            clip_samples: length at the rate of `mel`; lengths that give as many latent frames are accepted too.
            device: of all computation.
            vocoder: needed by `to_audio` only.
            mel: spectrogram definition; default the 44.1 kHz one.
            decodes_only: for a VAE of spectrograms that `LogMel` does not make.

        Raises:
            UserError: VAE, vocoder and spectrogram do not fit together.
        """
        mel = mel or MelConfig()
        if vae.config.data_dim != mel.n_mels:
            raise UserError(f"the VAE was made for {vae.config.data_dim} mel bands, not {mel.n_mels}")
        if vocoder is not None and (vocoder.config.num_mels, vocoder.config.hop) != (mel.n_mels, mel.hop):
            raise UserError(
                f"the vocoder takes {vocoder.config.num_mels} mel bands at hop {vocoder.config.hop}, "
                f"the VAE gives {mel.n_mels} at hop {mel.hop}"
            )
        self.device = torch.device(device)
        self.sample_rate = mel.sample_rate
        self.decodes_only = decodes_only
        self.channels = vae.config.embed_dim
        self.clip_samples = clip_samples
        self.frames = mel.frames(clip_samples) // vae.config.downsampling
        self.decoded_samples = self.frames * vae.config.downsampling * mel.hop
        """Length of what `to_audio` gives: 440,320 for 10 s clips."""
        if self.frames < 1:
            raise UserError(f"clip_samples {clip_samples} is too short for one latent frame")
        self._vae = vae.eval().requires_grad_(False).to(self.device)
        self._mel = LogMel(mel).to(self.device)
        self._vocoder = vocoder.eval().requires_grad_(False).to(self.device) if vocoder is not None else None

    @torch.inference_mode()
    def encode(self, waves: np.ndarray, batch: int = 16) -> tuple[np.ndarray, np.ndarray]:
        """(B, T) float32 mono in [-1, 1] -> posterior mean and std, each (B, frames, channels) float32.

        Args:
            waves: at 44.1 kHz. T must give `frames` latent frames: 440,320 to 441,343 samples for 430.
            batch: clips per forward pass on an accelerator.

        Raises:
            UserError: another length than the adapter was built for, or a VAE that only decodes.
            ValueError: not (B, T), or samples that are not finite.
        """
        if self.decodes_only:
            raise UserError(f"this bundle's VAE of {self.sample_rate} Hz only decodes", "Name the bundle paper.")
        if waves.ndim != 2:
            raise ValueError(f"waves must be (batch, samples), not {waves.shape}")
        if not np.isfinite(waves).all():
            raise ValueError("waves have samples that are not finite")
        mel_config = self._mel.config
        frames = mel_config.frames(waves.shape[1]) // self._vae.config.downsampling
        if frames != self.frames:
            shortest = self.frames * self._vae.config.downsampling * mel_config.hop
            longest = shortest + self._vae.config.downsampling * mel_config.hop - 1
            raise UserError(
                f"clips of {waves.shape[1]} samples give {frames} latent frames, {self.frames} are expected",
                f"Cut or pad clips to {self.clip_samples} samples at {self.sample_rate} Hz "
                f"(anything from {shortest} to {longest} is accepted).",
            )
        shape = (len(waves), self.frames, self.channels)
        means, stds = [], []
        for part in self._parts(waves, batch):
            posterior = self._vae.encode(self._mel(part))
            means.append(posterior.mean.transpose(1, 2))
            stds.append(posterior.std.transpose(1, 2))
        return (_joined(means, shape, "latent means"), _joined(stds, shape, "latent standard deviations"))

    @torch.inference_mode()
    def decode(self, latents: np.ndarray, batch: int = 16) -> np.ndarray:
        """(B, L, channels) latents of any length -> (B, mel bands, L * downsampling) float32 natural-log mel.

        Raises:
            ValueError: another number of channels.
        """
        self._check_latents(latents)
        mels = [self._decode(part) for part in self._parts(latents, batch)]
        length = latents.shape[1] * self._vae.config.downsampling
        return _joined(mels, (len(latents), self._mel.config.n_mels, length), "decoded mel")

    @torch.inference_mode()
    def to_audio(self, latents: np.ndarray, batch: int = 4) -> np.ndarray:
        """(B, L, channels) latents -> (B, T) float32 mono at `sample_rate` in [-1, 1]; L = 430 gives T = 440,320 at
        44.1 kHz.

        Raises:
            UserError: the adapter was built without a vocoder.
            ValueError: another number of channels.
        """
        if self._vocoder is None:
            raise UserError("no vocoder was loaded, latents cannot become audio", "Name BigVGAN weights too.")
        self._check_latents(latents)
        waves = [self._vocoder(self._decode(part))[:, 0] for part in self._parts(latents, batch)]
        samples = latents.shape[1] * self._vae.config.downsampling * self._mel.config.hop
        return _joined(waves, (len(latents), samples), "vocoded audio")

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self._vae.decode(latents.transpose(1, 2))

    def _check_latents(self, latents: np.ndarray) -> None:
        if latents.ndim != 3 or latents.shape[2] != self.channels:
            raise ValueError(f"latents must be (batch, frames, {self.channels}), not {latents.shape}")

    def _parts(self, array: np.ndarray, batch: int) -> list[torch.Tensor]:
        tensor = torch.tensor(array, dtype=torch.float32)
        parts = tensor.split(micro_batch(self.device, batch)) if len(tensor) else ()
        return [part.to(self.device) for part in parts]


def _joined(parts: list[torch.Tensor], shape: tuple[int, ...], what: str) -> np.ndarray:
    return to_float32(torch.cat(parts), shape, what) if parts else np.empty(shape, np.float32)
