"""Training of the BigVGAN vocoder.

Full size: BigVGAN v2 (Lee et al. 2023; NVIDIA's bigvgan_v2_44khz_128band_512x: 65,536 samples, batch 32, learning rate
1e-4 and betas (0.8, 0.99)) sums multi-scale mel L1 of weight 15, least-squares adversarial losses and feature matching.
Here: mel L1 and the multi-resolution STFT loss of Parallel WaveGAN (Yamamoto et al. 2020), no discriminators, weight
normalisation as there. For the full size set `channels: 1536`, `kernels: [3, 7, 11]`, `segment_frames: 128`.
"""

import json
import math
from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ttmray.audio.mel import LogMel
from ttmray.models import seeded
from ttmray.models.bigvgan import BigVGAN, BigVGANConfig, fold_weight_norm
from ttmray.models.griffin_lim import GriffinLim
from ttmray.models.state_dicts import load_exactly
from ttmray.pretraining.clips import ClipSet, place
from ttmray.pretraining.fidelity import compare_waves, mean_of, pitch_error
from ttmray.pretraining.loop import Part, PartConfig, to_half, weights_of
from ttmray.pretraining.losses import MultiResolutionSTFT, heard
from ttmray.storage import Folder
from ttmray.training.tensors import pack


class VocoderConfig(PartConfig):
    """The micro vocoder: 0.5 M parameters, about 0.11 CPU seconds per item of 0.37 s."""

    steps: int = Field(8000, ge=1)
    batch: int = Field(4, ge=1)
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.8, 0.99)
    clip_norm: float = Field(10.0, gt=0)
    channels: int = Field(128, ge=64)
    """Of the first layer; each of the six stages halves it."""
    kernels: tuple[int, ...] = (3, 7)
    segment_frames: int = Field(32, ge=8)
    """Mel frames of an item."""
    mel_weight: float = Field(1.0, ge=0)
    """Of the L1 of log-mels, against the STFT loss of weight 1."""


class VocoderPart(Part):
    """Random segments of the clips' mono mixes, through `LogMel` and back."""

    name = "vocoder"
    measured = 32
    """Fresh clips at most; Griffin-Lim is slow."""

    def __init__(self, config: VocoderConfig, clips: ClipSet, device: torch.device) -> None:
        self.config, self.clips, self.device = config, clips, device
        self.mel, self.stft = LogMel().to(device), MultiResolutionSTFT().to(device)
        dilations = tuple((1, 3, 5) for _ in config.kernels)
        shape = BigVGANConfig(
            upsample_initial_channel=config.channels,
            resblock_kernel_sizes=config.kernels,
            resblock_dilation_sizes=dilations,
        )
        with seeded(config.seed):
            model = BigVGAN(shape)
            for name, module in model.named_modules():
                if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
                    # branches and the end begin small: 36 residual sums at full size would saturate the wave
                    share = 0.1 if ".convs2." in name or name == "conv_post" else 1.0
                    nn.init.normal_(module.weight, std=share / math.sqrt(_fan_in(module)))
                    weight_norm(module)
        self.model: BigVGAN = model.to(device)

    def batch(self, position: int, count: int) -> tuple[Tensor, Tensor]:
        """Log-mels (count, 128, T) of segments within their music, T = segment_frames, and waves (count, 512 * T)."""
        hop, context = self.mel.config.hop, 4
        samples = (self.config.segment_frames + 2 * context) * hop
        waves = []
        for i in range(position, position + count):
            wave = self.clips.mono(place(self.config.seed, i, self.clips.count))
            rng = np.random.default_rng([self.config.seed, i])
            start = int(rng.integers(len(wave) - samples + 1))
            waves.append(wave[start : start + samples] * np.float32(10 ** (rng.uniform(-12, 3) / 20)))
        stacked = torch.from_numpy(np.stack(waves)).clamp(-1, 1).to(self.device)
        with torch.no_grad():
            mel = self.mel(stacked)[..., context:-context]  # frames that saw no reflected edge
        return mel, stacked[:, context * hop : -context * hop]

    def loss(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        mel, wave = batch
        ours = self.model(mel)[:, 0]
        distance = F.l1_loss(heard(self.mel(ours)), heard(self.mel(wave)))
        spectra = self.stft(ours, wave)
        return {"loss": self.config.mel_weight * distance + spectra, "mel": distance, "stft": spectra}

    def measure(self, fresh: ClipSet) -> dict[str, float]:
        """Of copies from true mels: log-mel, tempo, and the pitch of the voice; `gl_`: the same of Griffin-Lim."""
        model = BigVGAN(self.model.config)
        load_exactly(model, fold_weight_norm(weights_of(self.model, half=False)), "the vocoder in training")
        model.eval()
        rows = []
        for index in range(min(fresh.count, self.measured)):
            wave = fresh.mono(index)
            row = self._copies(model, wave)
            if index < fresh.stems and fresh.truth(index).attributes["vocals"]:
                voice = fresh.stem(index)[3].mean(axis=0)
                row |= self._pitches(model, voice)
            rows.append({"pitch": math.nan, "gl_pitch": math.nan} | row)
        return mean_of(rows)

    @torch.no_grad()
    def _copies(self, model: BigVGAN, wave: np.ndarray) -> dict[str, float]:
        mel = LogMel()(torch.from_numpy(wave)[None])
        learned, plain = model(mel)[0, 0].numpy(), GriffinLim()(mel)[0, 0].numpy()
        baseline = {f"gl_{name}": value for name, value in compare_waves(plain, wave).items()}
        return compare_waves(learned, wave) | baseline

    @torch.no_grad()
    def _pitches(self, model: BigVGAN, voice: np.ndarray) -> dict[str, float]:
        mel = LogMel()(torch.from_numpy(voice)[None])
        learned, plain = model(mel)[0, 0].numpy(), GriffinLim()(mel)[0, 0].numpy()
        return {"pitch": pitch_error(learned, voice), "gl_pitch": pitch_error(plain, voice)}

    def export(self, out: Folder, half: bool) -> None:
        """Folded weights and `config.json`, as `load_bigvgan` reads them."""
        folded = fold_weight_norm(weights_of(self.model, half=False))
        out.write("config.json", json.dumps(asdict(self.model.config), indent=1).encode())
        out.write("model.safetensors", pack(to_half(folded) if half else folded))


def _fan_in(module: nn.Conv1d | nn.ConvTranspose1d) -> int:
    """Inputs that one output sums: of a transposed convolution each output meets kernel / stride taps."""
    kernel, stride = module.kernel_size[0], module.stride[0]
    if isinstance(module, nn.ConvTranspose1d):
        return module.in_channels * max(1, kernel // stride)
    return module.in_channels * kernel
