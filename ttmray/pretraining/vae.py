"""Training of the mel VAE.

Full size: MMAudio's 44.1 kHz VAE (Cheng et al. 2025), 305 M parameters, after Make-An-Audio 2's 1-D convolutional VAE.
Its trainer is not published; the paper names reconstruction, KL and adversarial losses and EDM2's magnitude-preserving
layers (Karras et al. 2024). Here: L1 of log-mels and the KL of Kingma and Welling, without discriminator, the raw
weights projected after every update as in EDM2. For the full size set `hidden_dim: 512`, `embed_dim: 40` and clips of
10 s.
"""

import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ttmray.audio.mel import LogMel
from ttmray.config import added
from ttmray.models import seeded
from ttmray.models.griffin_lim import GriffinLim
from ttmray.models.latents import LatentEncoder
from ttmray.models.vae import MelVAE, MelVAEConfig
from ttmray.pretraining.clips import ClipSet, place
from ttmray.pretraining.fidelity import mean_of, mel_errors, pitch_error
from ttmray.pretraining.loop import Part, PartConfig, weights_of
from ttmray.pretraining.losses import MEL_FLOOR, heard, kl_to_normal
from ttmray.storage import Folder
from ttmray.training.tensors import pack


class VAEConfig(PartConfig):
    """The micro VAE: 4.9 M parameters, about 0.1 CPU seconds per 5 s."""

    steps: int = Field(4000, ge=1)
    lr: float = Field(3e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    hidden_dim: int = Field(64, ge=8)
    embed_dim: int = Field(20, ge=1)
    """Latent channels."""
    ch_mult: tuple[int, ...] = added((1, 2, 4), min_length=2)
    """Width of each level, times hidden_dim. The first should not be below the mel's 128 bands, which it would blur."""
    num_res_blocks: int = added(2, ge=1)
    """Per level of the encoder; the decoder has one more."""
    reconstruction: Literal["l1", "l2"] = "l1"
    kl_weight: float = Field(1e-3, ge=0)
    """Of the KL per latent element, against the error per mel element in units of the data's standard deviation."""
    mel_floor: float = MEL_FLOOR
    """What is less is not to be reconstructed."""
    alone: float = added(0.0, ge=0, le=1)
    """Share of the items that are some of a clip's stems: what plays alone shows its harmonics, which mixes hide."""
    detail_weight: float = added(0.0, ge=0)
    """Of the error of the steps between neighbouring bands, which harmonics make: without it copies are smooth along
    frequency, and their pitch is lost."""
    crop_frames: int = Field(216, ge=8)
    """Mel frames of an item, a random part of a clip."""


class VAEPart(Part):
    """Log-mels of random parts of the clips' mono mixes."""

    name = "vae"

    def __init__(self, config: VAEConfig, clips: ClipSet, device: torch.device) -> None:
        self.config, self.clips, self.device = config, clips, device
        self.mel = LogMel().to(device)
        with seeded(config.seed):
            shape = {name: getattr(config, name) for name in ("hidden_dim", "embed_dim", "ch_mult", "num_res_blocks")}
            model = MelVAE(MelVAEConfig(**shape))
        model.project_weights()
        mels = torch.cat([self._mel_of(i) for i in range(min(64, clips.count))], dim=2)
        mels = heard(mels, config.mel_floor)
        model.data_mean.copy_(mels.mean(dim=(0, 2), keepdim=True))
        model.data_std.copy_(mels.std(dim=(0, 2), keepdim=True).clamp_min(0.3))
        self.model: MelVAE = model.to(device)

    def _mel_of(self, index: int) -> Tensor:
        return self.mel(torch.from_numpy(self.clips.mono(index))[None].to(self.device))

    def batch(self, position: int, count: int) -> Tensor:
        """(count, 128, crop_frames) log-mel; shorter clips give fewer frames."""
        hop, waves = self.mel.config.hop, []
        samples = min(self.config.crop_frames * hop, self.clips.samples // (2 * hop) * 2 * hop)
        for i in range(position, position + count):
            rng = np.random.default_rng([self.config.seed, i])
            alone = self.config.alone > 0 and rng.random() < self.config.alone
            wave = self._stems(i, rng) if alone else self.clips.mono(place(self.config.seed, i, self.clips.count))
            start = int(rng.integers(len(wave) - samples + 1))
            gain = 10 ** (rng.uniform(-12, 3) / 20)  # vocals removed, a mix is up to 12 dB softer
            waves.append(wave[start : start + samples] * np.float32(gain))
        with torch.no_grad():
            return self.mel(torch.from_numpy(np.stack(waves)).to(self.device))

    def _stems(self, position: int, rng: np.random.Generator) -> np.ndarray:
        """(samples,) of one or two stems of a clip, drawn from those that sound."""
        stems = self.clips.stem(place(self.config.seed, position, self.clips.stems)).mean(axis=1)
        sound = np.flatnonzero(np.square(stems).mean(axis=1) > 1e-6)  # -60 dBFS
        chosen = rng.permutation(sound)[: int(rng.integers(1, 3))]
        wave: np.ndarray = stems[chosen].sum(axis=0)
        return wave

    def loss(self, batch: Tensor) -> dict[str, Tensor]:
        posterior = self.model.encode(batch)
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape).to(self.device)
        error = (self.model.decode(latents) - heard(batch, self.config.mel_floor)) / self.model.data_std
        reconstruction = error.abs().mean() if self.config.reconstruction == "l1" else error.square().mean()
        kl = kl_to_normal(posterior.mean, posterior.logvar)
        losses = {"loss": reconstruction + self.config.kl_weight * kl, "reconstruction": reconstruction, "kl": kl}
        if self.config.detail_weight:
            losses["detail"] = error.diff(dim=1).abs().mean()
            losses["loss"] = losses["loss"] + self.config.detail_weight * losses["detail"]
        return losses

    def after_update(self) -> None:
        self.model.project_weights()

    def measure(self, fresh: ClipSet) -> dict[str, float]:
        """Errors of log-mels (see `mel_errors`), the latents' mean deviation and noise, and by how many semitones the
        pitch of copied voices is off, the median over clips that sing."""
        model = MelVAE(self.model.config)
        model.load_state_dict(weights_of(self.model, half=False))
        coder = LatentEncoder(model.eval().normalise_weights(), fresh.samples)
        mel, rows = LogMel(), []
        for index in range(fresh.count):
            wave = fresh.mono(index)
            means, stds = coder.encode(wave[None])
            ours = torch.from_numpy(coder.decode(means))
            theirs = mel(torch.from_numpy(wave)[None])[..., : ours.shape[2]]
            row = mel_errors(ours, theirs) | {"latent_std": float(means.std()), "latent_noise": float(stds.mean())}
            rows.append(row)
        pitches = [self._pitch(coder, fresh.stem(index)[3].mean(axis=0)) for index in range(min(fresh.stems, 24))]
        sung = [pitch for pitch in pitches if not math.isnan(pitch)]
        return mean_of(rows) | {"voice_pitch": float(np.median(sung)) if sung else math.nan}

    def _pitch(self, coder: LatentEncoder, voice: np.ndarray) -> float:
        copy: Tensor = GriffinLim()(torch.from_numpy(coder.decode(coder.encode(voice[None])[0])))
        return pitch_error(copy[0, 0].numpy(), voice)

    def export(self, out: Folder, half: bool) -> None:
        """Raw weights, as `load_vae` reads them."""
        out.write("model.safetensors", pack(weights_of(self.model, half), {"clip_act": self.model.config.clip_act}))
