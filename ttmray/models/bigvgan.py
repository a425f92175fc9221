"""BigVGAN generators, v2 at 44.1 kHz and v1 at 16 kHz: log-mel -> waveform.

Architecture: Lee et al., "BigVGAN: A Universal Neural Vocoder with Large-Scale Training" (ICLR 2023) and
NVIDIA's v2 release (github.com/NVIDIA/BigVGAN, MIT). Inference only: weight normalisation is folded into
plain weights when a checkpoint is read. Module names are those of the released checkpoints.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.models import seeded
from ttmray.models.state_dicts import load_exactly, read_state_dict

_TAPS = 12  # length of the anti-aliasing filters


@dataclass(frozen=True, kw_only=True)
class BigVGANConfig:
    """Defaults: nvidia/bigvgan_v2_44khz_128band_512x, names as in its config.json."""

    num_mels: int = 128
    upsample_rates: tuple[int, ...] = (8, 4, 2, 2, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (16, 8, 4, 4, 4, 4)
    upsample_initial_channel: int = 1536  # halved by every stage
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    use_bias_at_final: bool = False  # v1 has a bias and tanh there, v2 clamps
    use_tanh_at_final: bool = False

    @property
    def hop(self) -> int:
        """Samples per mel frame."""
        return math.prod(self.upsample_rates)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "BigVGANConfig":
        """Config from the keys of a released config.json; training keys in it are ignored.

        Raises:
            UserError: a variant that is not v2 (other activation, residual block, tanh or bias at the end),
                or lists that do not fit together.
        """
        required = {
            "resblock": "1",
            "activation": "snakebeta",
            "snake_logscale": True,
            "use_tanh_at_final": False,
            "use_bias_at_final": False,
        }
        for key, expected in required.items():
            if values.get(key, expected) != expected:
                raise UserError(
                    f"BigVGAN config: {key} is {values[key]!r}, only {expected!r} is supported",
                    "Use a BigVGAN v2 generator such as nvidia/bigvgan_v2_44khz_128band_512x.",
                )
        known = {f.name: _tuples(values[f.name]) for f in fields(cls) if f.name in values}
        config = cls(**known)
        if len(config.upsample_rates) != len(config.upsample_kernel_sizes):
            raise UserError("BigVGAN config: upsample_rates and upsample_kernel_sizes differ in length")
        if len(config.resblock_kernel_sizes) != len(config.resblock_dilation_sizes):
            raise UserError("BigVGAN config: resblock_kernel_sizes and _dilation_sizes differ in length")
        return config


PUBLIC_16K = BigVGANConfig(
    num_mels=80,
    upsample_rates=(4, 4, 2, 2, 2, 2),
    upsample_kernel_sizes=(8, 8, 4, 4, 4, 4),
    use_bias_at_final=True,
    use_tanh_at_final=True,
)
"""The 16 kHz generator of Make-An-Audio 2, which MMAudio and MeanAudio use (best_netG.pt)."""


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def kaiser_sinc_filter() -> torch.Tensor:
    """(1, 1, 12) float32 low-pass at half the band of the doubled rate, unit sum.

    Kaiser's design formulas for cutoff 0.25 and transition half-width 0.3, relative to the doubled rate.
    """
    attenuation_db = 2.285 * (_TAPS / 2 - 1) * math.pi * (4 * 0.3) + 7.95
    beta = 0.1102 * (attenuation_db - 8.7)  # valid for attenuations above 50 dB; this one is 51
    window = torch.kaiser_window(_TAPS, beta=beta, periodic=False, device="cpu")
    times = torch.arange(_TAPS, device="cpu") - _TAPS / 2 + 0.5
    taps = window * torch.sinc(2 * 0.25 * times)
    return (taps / taps.sum()).view(1, 1, _TAPS)


class Upsample2x(nn.Module):
    """(B, C, T) -> (B, C, 2T), band-limited."""

    filter: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", kaiser_sinc_filter())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[1]
        x = F.pad(x, (5, 5), mode="replicate")
        x = F.conv_transpose1d(x, self.filter.expand(channels, -1, -1), stride=2, groups=channels)
        return 2.0 * x[..., 15:-15]  # the stride spreads the energy over two samples


class _LowPass(nn.Module):
    filter: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", kaiser_sinc_filter())


class Downsample2x(nn.Module):
    """(B, C, T) -> (B, C, ceil(T / 2)), band-limited."""

    def __init__(self) -> None:
        super().__init__()
        self.lowpass = _LowPass()  # a level of its own in the checkpoints' names

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[1]
        x = F.pad(x, (5, 6), mode="replicate")
        return F.conv1d(x, self.lowpass.filter.expand(channels, -1, -1), stride=2, groups=channels)


class SnakeBeta(nn.Module):
    """x + sin^2(a x) / b of (B, C, T), per channel; parameters are ln a and ln b."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frequency = self.alpha.exp()[:, None]
        magnitude = self.beta.exp()[:, None]
        return x + torch.sin(x * frequency).square() / (magnitude + 1e-9)


class AntiAliasedSnake(nn.Module):
    """SnakeBeta of (B, C, T) at twice the rate, so that the harmonics it makes do not fold back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.act = SnakeBeta(channels)
        self.upsample = Upsample2x()
        self.downsample = Downsample2x()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.downsample(self.act(self.upsample(x)))


class AMPBlock(nn.Module):
    """Residual block of (B, C, T): per dilation, activation, dilated convolution, activation, plain convolution."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, dilation=d, padding=d * (kernel - 1) // 2) for d in dilations
        )
        self.convs2 = nn.ModuleList(nn.Conv1d(channels, channels, kernel, padding=(kernel - 1) // 2) for _ in dilations)
        self.activations = nn.ModuleList(AntiAliasedSnake(channels) for _ in range(2 * len(dilations)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pairs = zip(self.activations[::2], self.convs1, self.activations[1::2], self.convs2, strict=True)
        for act1, dilated, act2, plain in pairs:
            x = x + plain(act2(dilated(act1(x))))
        return x


class BigVGAN(nn.Module):
    """(B, num_mels, T) log-mel, natural for v2, of base 10 for `PUBLIC_16K` -> (B, 1, hop * T) waveform in [-1, 1]."""

    def __init__(self, config: BigVGANConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or BigVGANConfig()
        width = config.upsample_initial_channel
        self.conv_pre = nn.Conv1d(config.num_mels, width, 7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
            up = nn.ConvTranspose1d(width, width // 2, kernel, stride=rate, padding=(kernel - rate) // 2)
            self.ups.append(nn.Sequential(up))  # nested once more in the checkpoints' names
            width //= 2
            for size, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True):
                self.resblocks.append(AMPBlock(width, size, dilations))
        self.activation_post = AntiAliasedSnake(width)
        self.conv_post = nn.Conv1d(width, 1, 7, padding=3, bias=config.use_bias_at_final)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        x = self.conv_pre(mel)
        per_stage = len(self.config.resblock_kernel_sizes)
        for stage, up in enumerate(self.ups):
            x = up(x)
            blocks = self.resblocks[stage * per_stage : (stage + 1) * per_stage]
            x = sum(block(x) for block in blocks) / per_stage
        wave = self.conv_post(self.activation_post(x))
        return wave.tanh() if self.config.use_tanh_at_final else wave.clamp(-1.0, 1.0)


def fold_weight_norm(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict with every weight-normalised pair folded into a plain `weight`, w = g v / ||v||:
    gains (A, 1, 1) and directions (A, B, K) of 1-D convolutions; other tensors may be of any shape.

    Takes the pairs of classic weight norm (`weight_g`, `weight_v`), those of torch's parametrisation
    (`parametrizations.weight.original0`, `original1`), and leaves plain weights alone. The norm runs over all
    dimensions but the first, which is the output channel of a convolution and the input channel of a
    transposed one.

    Raises:
        UserError: half of a pair is missing.
    """
    styles = (
        (".weight_g", ".weight_v"),
        (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
    )
    folded: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        for gain, direction in styles:
            if key.endswith(direction):
                stem = key.removesuffix(direction)
                if stem + gain not in state:
                    raise UserError(f"weights hold {key} without {stem + gain}")
                norm = torch.linalg.vector_norm(value, dim=(1, 2), keepdim=True)
                folded[stem + ".weight"] = state[stem + gain] * (value / norm)
                break
            if key.endswith(gain):
                stem = key.removesuffix(gain)
                if stem + direction not in state:
                    raise UserError(f"weights hold {key} without {stem + direction}")
                break
        else:
            folded[key] = value
    return folded


def load_bigvgan(path: str | Path, config: BigVGANConfig | None = None) -> BigVGAN:
    """Generator in eval mode on the CPU, weight norm folded.

    Args:
        path: `.safetensors`, or a torch checkpoint with the state dict alone or under "generator".
        config: default: from `config.json` beside the file, else the 44 kHz release.

    Raises:
        UserError: unreadable file, weights that do not fit the config, or a variant that is not v2.
    """
    path = Path(path)
    state: Any = read_state_dict(path)
    if isinstance(state.get("generator"), dict):
        state = state["generator"]
    beside = path.parent / "config.json"
    if config is None and beside.is_file():
        try:
            config = BigVGANConfig.from_json(read_json(beside.read_text()))
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{beside} is not a BigVGAN config: {error}") from error
    with torch.device("meta"):
        model = BigVGAN(config)
    load_exactly(model, fold_weight_norm(state), f"BigVGAN weights {path}")
    return model.eval().requires_grad_(False)


def debug_bigvgan(seed: int, width: int = 64, num_mels: int = 128, like: BigVGANConfig = BigVGANConfig()) -> BigVGAN:
    """Untrained generator with the released rates (hop 512), one AMP block per stage, seeded.

    Args:
        seed: of the weights; torch's global generator is left as it was.
        width: initial channels, a multiple of 64.
        num_mels: input bands.
        like: whose rates and end it has.
    """
    config = replace(
        like,
        num_mels=num_mels,
        upsample_initial_channel=width,
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1,),),
    )
    with seeded(seed):
        return BigVGAN(config).eval().requires_grad_(False)
