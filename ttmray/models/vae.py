"""1-D variational autoencoder of log-mel spectrograms.

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

import torch
import torch.nn.functional as F
from torch import nn

from ttmray.errors import UserError
from ttmray.models import seeded
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
    """Convolution (B, C_in, L) -> (B, C_out, L) of odd kernel, without bias; a raw weight is normalised on the way."""

    def __init__(self, c_in: int, c_out: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, kernel))
        self.raw = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = normalise_weight(self.weight) if self.raw else self.weight
        return F.conv1d(x, weight, padding=weight.shape[-1] // 2)


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut: (B, C_in, L) -> (B, C_out, L)."""

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
    """Self-attention over the frames of (B, C, L), one head."""

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
    """(B, C, L) -> (B, C, L // 2): the last frame of an odd length is dropped."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv(channels, channels, 1)
        self.conv2 = Conv(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(F.avg_pool1d(self.conv1(x), 2))


class Upsample(nn.Module):
    """(B, C, L) -> (B, C, 2 * L): every frame twice, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.repeat_interleave(2, dim=-1))


class Level(nn.Module):
    """Residual blocks (B, C_in, L) -> (B, C_out, L), then a change of length where the config asks for one."""

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
    """Residual block, attention, residual block on (B, C, L), each clipped."""

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
