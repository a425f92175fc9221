"""1-D variational autoencoder of log-mel spectrograms, and the adapter between waveforms and latents.

Architecture: MMAudio's 44.1 kHz VAE (Cheng et al., CVPR 2025; github.com/hkchengrex/MMAudio, MIT), a latent
diffusion autoencoder made magnitude-preserving after Karras et al., "Analyzing and Improving the Training
Dynamics of Diffusion Models" (EDM2, CVPR 2024). Module names are those of the released checkpoint.

Checkpoints hold raw weights that are normalised once before use. The normalisation has an epsilon and is not
idempotent, so a model knows whether it has been done: it refuses to run before and refuses a second time. In training
mode it runs on raw weights and normalises them in every forward pass, through which gradients go; the trainer calls
`project_weights` after each update (EDM2's forced weight normalisation).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ttmray.audio.mel import LogMel, MelConfig
from ttmray.errors import UserError
from ttmray.models import micro_batch, seeded, to_float32
from ttmray.models.bigvgan import BigVGAN, debug_bigvgan
from ttmray.models.griffin_lim import GriffinLim
from ttmray.models.state_dicts import load_exactly, read_state_dict

_EPS = 1e-4
_RESIDUAL = 0.3  # weight of the branch in a residual sum


@dataclass(frozen=True, kw_only=True)
class MelVAEConfig:
    """Defaults: the released 44.1 kHz model (305.5 M parameters)."""

    data_dim: int = 128  # mel bands
    embed_dim: int = 40  # latent channels
    hidden_dim: int = 512
    ch_mult: tuple[int, ...] = (1, 2, 4)  # width of each level, times hidden_dim
    num_res_blocks: int = 2  # per encoder level; the decoder has one more
    down_layers: tuple[int, ...] = (0,)  # levels followed by a halving of the length
    clip_act: float = 256.0  # bound of the activations after each block; no tensor of a checkpoint says it

    @property
    def downsampling(self) -> int:
        """Mel frames per latent frame."""
        return 2 ** len(self.down_layers)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor]) -> "MelVAEConfig":
        """Config of a checkpoint, read from the shapes of its tensors; what they do not say is the default.

        Raises:
            UserError: the tensors are not those of such a VAE.
        """
        try:
            hidden = state["encoder.conv_in.weight"].shape[0]
            levels = _count(state, "encoder.down.{}.block.0.conv1.weight")
            widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
            return cls(
                data_dim=state["encoder.conv_in.weight"].shape[1],
                embed_dim=state["decoder.conv_in.weight"].shape[1],
                hidden_dim=hidden,
                ch_mult=tuple(width // hidden for width in widths),
                num_res_blocks=_count(state, "encoder.down.0.block.{}.conv1.weight"),
                down_layers=tuple(i for i in range(levels) if f"encoder.down.{i}.downsample.conv1.weight" in state),
            )
        except (KeyError, AttributeError, IndexError, ZeroDivisionError) as error:
            raise UserError(
                f"not the weights of a mel VAE: {error}",
                "Expected are the 57 tensors of MMAudio's v1-44.pth.",
            ) from error


def _count(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    count = 0
    while pattern.format(count) in state:
        count += 1
    return count


def normalise_channels(x: torch.Tensor) -> torch.Tensor:
    """(B, C, L) with unit root mean square over the channels, the norm taken in float32."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    return x / (_EPS + norm / math.sqrt(x.shape[1])).to(x.dtype)


def normalise_weight(weight: torch.Tensor) -> torch.Tensor:
    """Magnitude-preserving weight (C_out, C_in, K) of a raw one. Not idempotent."""
    fan_in = weight[0].numel()
    norm = torch.linalg.vector_norm(weight, dim=(1, 2), keepdim=True, dtype=torch.float32)
    return weight / (_EPS + norm / math.sqrt(fan_in)).to(weight.dtype) / math.sqrt(fan_in)


def _silu(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x) / 0.596  # keeps the variance of a unit normal input


def _residual_sum(x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    return torch.lerp(x, branch, _RESIDUAL) / math.hypot(1 - _RESIDUAL, _RESIDUAL)


class Conv(nn.Module):
    """Convolution of odd kernel and equal length, without bias; a raw weight is normalised on the way."""

    def __init__(self, c_in: int, c_out: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, kernel))
        self.raw = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = normalise_weight(self.weight) if self.raw else self.weight
        return F.conv1d(x, weight, padding=weight.shape[-1] // 2)


class ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = Conv(c_in, c_out, 3)
        self.conv2 = Conv(c_out, c_out, 3)
        self.nin_shortcut = Conv(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = normalise_channels(x)
        branch = self.conv2(_silu(self.conv1(_silu(x))))
        if self.nin_shortcut is not None:
            x = self.nin_shortcut(x)
        return _residual_sum(x, branch)


class Attention(nn.Module):
    """Self-attention over the frames, one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = Conv(channels, 3 * channels, 1)
        self.proj_out = Conv(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, length = x.shape
        # Query, key and value of one channel lie side by side.
        qkv = self.qkv(x).reshape(batch, channels, 3, length)
        q, k, v = (normalise_channels(part).transpose(1, 2) for part in qkv.unbind(2))
        mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return _residual_sum(x, self.proj_out(mixed.transpose(1, 2)))


class Downsample(nn.Module):
    """Halves the length; the last frame of an odd length is dropped."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv(channels, channels, 1)
        self.conv2 = Conv(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(F.avg_pool1d(self.conv1(x), 2))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.repeat_interleave(2, dim=-1))


class Level(nn.Module):
    """Residual blocks of one width, with a change of length after them where the config asks for one."""

    def __init__(
        self, c_in: int, c_out: int, blocks: int, resample: tuple[str, nn.Module] | None, clip_act: float
    ) -> None:
        super().__init__()
        self._clip = clip_act
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self._resample_name = resample[0] if resample else None
        if resample:
            self.add_module(*resample)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.block:
            x = block(x).clamp(-self._clip, self._clip)
        return self.get_submodule(self._resample_name)(x) if self._resample_name else x


class Middle(nn.Module):
    def __init__(self, channels: int, clip_act: float) -> None:
        super().__init__()
        self._clip = clip_act
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = Attention(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in (self.block_1, self.attn_1, self.block_2):
            x = module(x).clamp(-self._clip, self._clip)
        return x


class Encoder(nn.Module):
    """(B, data_dim, L) normalised mel -> (B, 2 embed_dim, L / downsampling), means then log-variances."""

    def __init__(self, config: MelVAEConfig) -> None:
        super().__init__()
        widths = [config.hidden_dim * mult for mult in config.ch_mult]
        self.conv_in = Conv(config.data_dim, config.hidden_dim, 3)
        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([config.hidden_dim, *widths], widths, strict=False)):
            resample = ("downsample", Downsample(c_out)) if i in config.down_layers else None
            self.down.append(Level(c_in, c_out, config.num_res_blocks, resample, config.clip_act))
        self.mid = Middle(widths[-1], config.clip_act)
        self.conv_out = Conv(widths[-1], 2 * config.embed_dim, 3)
        self.learnable_gain = nn.Parameter(torch.zeros([]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(_silu(self.mid(x))) * (self.learnable_gain + 1)


class Decoder(nn.Module):
    """(B, embed_dim, L) latents -> (B, data_dim, L * downsampling) normalised mel."""

    def __init__(self, config: MelVAEConfig) -> None:
        super().__init__()
        widths = [config.hidden_dim * mult for mult in config.ch_mult]
        self.conv_in = Conv(config.embed_dim, widths[-1], 3)
        self.mid = Middle(widths[-1], config.clip_act)
        self.up = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            # The encoder halves after level i, so the doubling that undoes it comes before level i.
            resample = ("upsample", Upsample(c_out)) if i - 1 in config.down_layers else None
            self.up.append(Level(c_in, c_out, config.num_res_blocks + 1, resample, config.clip_act))
        self.conv_out = Conv(widths[0], config.data_dim, 3)
        self.learnable_gain = nn.Parameter(torch.zeros([]))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(_silu(x)) * (self.learnable_gain + 1)


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussian over the latents, each field (B, embed_dim, L)."""

    mean: torch.Tensor
    logvar: torch.Tensor  # within [-30, 20]

    @property
    def std(self) -> torch.Tensor:
        return (0.5 * self.logvar).exp()


class MelVAE(nn.Module):
    """Mel VAE. Fresh or freshly loaded weights are raw: call `normalise_weights` once, then run it, or train them.

    A state dict taken after `normalise_weights` is not a checkpoint: loading it would normalise twice.
    `data_mean` and `data_std` (1, data_dim, 1) are part of the checkpoint.
    """

    data_mean: torch.Tensor
    data_std: torch.Tensor

    def __init__(self, config: MelVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config or MelVAEConfig()
        if len(self.config.ch_mult) - 1 in self.config.down_layers:
            raise ValueError("the last level cannot be in down_layers: the decoder has no level to undo it")
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.register_buffer("data_mean", torch.zeros(1, self.config.data_dim, 1))
        self.register_buffer("data_std", torch.ones(1, self.config.data_dim, 1))
        self._normalised = False
        self.register_load_state_dict_post_hook(_weights_are_raw)

    @torch.no_grad()
    def normalise_weights(self) -> "MelVAE":
        """Replaces the raw weights by magnitude-preserving ones, in place.

        Raises:
            RuntimeError: already done; a second pass would change the weights again.
        """
        if self._normalised:
            raise RuntimeError("the VAE's weights are already normalised; a second pass would change them")
        for module in self.modules():
            if isinstance(module, Conv):
                module.weight.data = normalise_weight(module.weight.data)
                module.raw = False
        self._normalised = True
        return self

    @torch.no_grad()
    def project_weights(self) -> None:
        """Brings raw weights back to unit root mean square per output channel, which changes no output.

        Gradients are at right angles to normalised weights, so these would only grow and learn ever more slowly.

        Raises:
            RuntimeError: the weights are normalised for use; they are no longer trained.
        """
        if self._normalised:
            raise RuntimeError("the VAE's weights are normalised for use, only raw ones are trained")
        for module in self.modules():
            if isinstance(module, Conv):
                module.weight.mul_(
                    1.0 / torch.linalg.vector_norm(module.weight, dim=(1, 2), keepdim=True).clamp_min(_EPS)
                )
                module.weight.mul_(math.sqrt(module.weight[0].numel()))

    def encode(self, mel: torch.Tensor) -> Posterior:
        """(B, data_dim, L) natural-log mel -> posterior of L // downsampling frames.

        Raises:
            RuntimeError: weights not normalised, outside of training.
        """
        self._require_normalised()
        mean, logvar = self.encoder((mel - self.data_mean) / self.data_std).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """(B, embed_dim, L) latents -> (B, data_dim, L * downsampling) natural-log mel.

        Raises:
            RuntimeError: weights not normalised, outside of training.
        """
        self._require_normalised()
        return self.decoder(z) * self.data_std + self.data_mean

    def _require_normalised(self) -> None:
        if not self._normalised and not self.training:
            raise RuntimeError("the VAE's weights are raw; call normalise_weights() once before running it")


def _weights_are_raw(vae: MelVAE, _: object) -> None:
    vae._normalised = False
    for module in vae.modules():
        if isinstance(module, Conv):
            module.raw = True


class LatentEncoder:
    """Waveforms <-> latents for clips of one length, on one device. Holds the VAE and, optionally, a vocoder.

    On a CPU clips are run one at a time, so that a clip's numbers do not depend on its neighbours.
    """

    def __init__(
        self,
        vae: MelVAE,
        clip_samples: int = 441_000,
        device: str | torch.device = "cpu",
        vocoder: BigVGAN | GriffinLim | None = None,
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


def load_vae(path: str | Path, clip_act: float = MelVAEConfig.clip_act) -> MelVAE:
    """VAE in eval mode on the CPU with normalised weights, from raw ones (57 tensors in the released file).

    The config is read from the shapes, the match of names and shapes is exact.

    Args:
        path: `.safetensors`, or a torch checkpoint of plain tensors such as MMAudio's v1-44.pth.
        clip_act: bound of the activations that it was trained with.

    Raises:
        UserError: unreadable file, or not the weights of such a VAE.
    """
    state = read_state_dict(path)
    config = replace(MelVAEConfig.from_state_dict(state), clip_act=clip_act)
    with torch.device("meta"):
        model = MelVAE(config)
    load_exactly(model, state, f"VAE weights {path}")
    return model.eval().requires_grad_(False).normalise_weights()


def debug_vae(seed: int, hidden_dim: int = 16, embed_dim: int = 40, data_dim: int = 128) -> MelVAE:
    """Untrained VAE of the released layout, weights normalised; torch's global generator is untouched."""
    with seeded(seed):
        model = MelVAE(MelVAEConfig(hidden_dim=hidden_dim, embed_dim=embed_dim, data_dim=data_dim))
    # About the level and spread of the log-mel of music, so that decoded mels are in the vocoder's range.
    model.data_mean.fill_(-5.0)
    model.data_std.fill_(2.3)
    return model.eval().requires_grad_(False).normalise_weights()


def debug_latent_encoder(
    seed: int, hidden_dim: int = 16, clip_samples: int = 441_000, device: str | torch.device = "cpu"
) -> LatentEncoder:
    """Untrained VAE (40 latent channels) and vocoder behind the adapter, seeded."""
    return LatentEncoder(debug_vae(seed, hidden_dim), clip_samples, device, debug_bigvgan(seed))
