"""FluxAudio in plain PyTorch, the way the public MeanAudio-style code runs it: the peer of the speed benchmarks.

Written from the description of the network, not from its code. Takes the same state dict as
`ttmray.models.backbone.FluxAudio` (heads none, v1 and v2) and gives the same numbers. What is plain about it:
convolutions are `Conv1d` between two transposes, attention is forced to PyTorch's math kernel (the whole score matrix
in memory, as the reference needs for other models that share its code), guidance is two forwards of batch 1, both
texts are encoded for every prompt, AdamW and the averages go from tensor to tensor. On a GPU it has TF32 and cuDNN's
search for the fastest kernel, which the public scripts switch on.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ttmray.models import seeded
from ttmray.models.backbone import BackboneConfig, FluxAudio, gated_width
from ttmray.models.score_heads import FREQUENCIES
from ttmray.training.ema import beta_of, gamma_of
from ttmray.training.flow_matching import Batch


@contextmanager
def public_settings() -> Iterator[None]:
    """TF32 and cuDNN's search for kernels inside; neither does anything on a CPU."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True):
            yield
    finally:
        matmul.allow_tf32 = before


class SequenceConv(nn.Conv1d):
    """Convolution along the sequence of (B, N, C)."""

    def __init__(self, width: int, out: int, taps: int, bias: bool = True) -> None:
        super().__init__(width, out, taps, padding=taps // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class GatedMLP(nn.Module):
    def __init__(self, width: int, hidden: int, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        inner = gated_width(hidden)
        self.w1, self.w2, self.w3 = make(width, inner), make(inner, width), make(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def linear(width: int, out: int) -> nn.Module:
    return nn.Linear(width, out, bias=False)


def conv(taps: int) -> Callable[[int, int], nn.Module]:
    return lambda width, out: SequenceConv(width, out, taps, bias=False)


def rotation(length: int, dim: int) -> Tensor:
    """(length, dim / 2, 2, 2) rotation matrices."""
    angles = torch.arange(length, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2).double() / dim)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2)).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    turned = table[..., 0] * pairs[..., 0] + table[..., 1] * pairs[..., 1]
    return turned.reshape(x.shape).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, N, H * d)."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)

    def forward(self, x: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(2, (self.heads, -1, 3)).transpose(1, 2).unbind(-1)
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if table is None else (rotate(q, table), rotate(k, table), v)


class Block(nn.Module):
    """One stream of a block; a block of latents alone when called."""

    def __init__(self, config: BackboneConfig, latents: bool, last: bool = False) -> None:
        super().__init__()
        width, hidden = config.hidden, int(config.hidden * config.mlp_ratio)
        self.last = last
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attn = Attention(width, config.heads)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (2 if last else 6) * width))
        if not last:
            self.linear1 = SequenceConv(width, width, 3) if latents else nn.Linear(width, width)
            self.ffn = GatedMLP(width, hidden, conv(3) if latents else linear)

    def before(self, x: Tensor, c: Tensor, table: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        shift, scale, *rest = self.adaLN_modulation(c).chunk(2 if self.last else 6, dim=-1)
        return self.attn(self.norm1(x) * (1 + scale) + shift, table), tuple(rest)

    def after(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        if self.last:
            return x
        gate, shift, scale, gate_mlp = modulation
        x = x + self.linear1(attended) * gate
        return x + self.ffn(self.norm2(x) * (1 + scale) + shift) * gate_mlp

    def forward(self, x: Tensor, c: Tensor, table: Tensor | None) -> Tensor:
        qkv, modulation = self.before(x, c, table)
        return self.after(x, attend(*qkv), modulation)


class JointBlock(nn.Module):
    def __init__(self, config: BackboneConfig, last: bool) -> None:
        super().__init__()
        self.latent_block = Block(config, latents=True)
        self.text_block = Block(config, latents=False, last=last)

    def forward(
        self, x: Tensor, text: Tensor, c: Tensor, tables: tuple[Tensor | None, Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        qkv, modulation = self.latent_block.before(x, c, tables[0])
        text_qkv, text_modulation = self.text_block.before(text, c, tables[1])
        both = attend(*(torch.cat(pair, dim=2) for pair in zip(qkv, text_qkv, strict=True)))
        length = x.shape[1]
        x = self.latent_block.after(x, both[:, :length], modulation)
        return x, self.text_block.after(text, both[:, length:], text_modulation)


class TimeEmbedding(nn.Module):
    freqs: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 10000.0 ** (-torch.arange(128) / 128), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.freqs
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(t.dtype))


class ScoreEmbedding(nn.Module):
    freqs: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.empty(FREQUENCIES))
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, score: Tensor, null: Tensor) -> Tensor:
        angles = score.float()[:, None] * self.freqs
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1)) * ~null[:, None]


class FinalLayer(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden, 2 * config.hidden))
        self.conv = SequenceConv(config.hidden, config.latent_dim, 7)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.conv(self.norm(x) * (1 + scale) + shift)


class PlainFluxAudio(nn.Module):
    """The network. A dropped score is a zero embedding."""

    latent_mean: Tensor
    latent_std: Tensor
    empty_string_feat: Tensor
    empty_string_feat_c: Tensor

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        if config.head not in ("none", "v1", "v2"):
            raise ValueError(f"the plain model has no head {config.head}")
        self.config = config
        width, hidden = config.hidden, int(config.hidden * config.mlp_ratio)
        frozen = {
            "latent_mean": (1, 1, config.latent_dim),
            "latent_std": (1, 1, config.latent_dim),
            "empty_string_feat": (config.text_len, config.text_dim),
            "empty_string_feat_c": (config.text_c_dim,),
        }
        for name, shape in frozen.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=False))
        self.audio_input_proj = nn.Sequential(
            SequenceConv(config.latent_dim, width, 7), nn.SELU(), GatedMLP(width, hidden, conv(7))
        )
        self.text_input_proj = nn.Sequential(nn.Linear(config.text_dim, width), GatedMLP(width, hidden, linear))
        self.text_cond_proj = nn.Sequential(nn.Linear(config.text_c_dim, width), GatedMLP(width, hidden, linear))
        self.t_embed = TimeEmbedding(width)
        joint = config.depth - config.fused_depth
        self.joint_blocks = nn.ModuleList(JointBlock(config, last=i == joint - 1) for i in range(joint))
        self.fused_blocks = nn.ModuleList(Block(config, latents=True) for _ in range(config.fused_depth))
        self.final_layer = FinalLayer(config)
        if config.head != "none":
            self.score_embed = ScoreEmbedding(width)
        dim = width // config.heads
        self.register_buffer("latent_rot", rotation(config.latent_len, dim), persistent=False)
        self.register_buffer("text_rot", rotation(config.text_len, dim), persistent=False)

    def conditions(self, text: Tensor, text_c: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) tokens and (B, D) pooled, projected."""
        return self.text_input_proj(text), self.text_cond_proj(text_c)

    def velocity(
        self, x: Tensor, t: Tensor, conditions: tuple[Tensor, Tensor], score: Tensor | None, null: Tensor | None
    ) -> Tensor:
        """As `FluxAudio.velocity`, but score and null both or neither."""
        text, pooled = conditions
        c = (self.t_embed(t) + pooled)[:, None]
        h = self.audio_input_proj(x)
        if score is not None and null is not None:
            e = self.score_embed(score, null)[:, None]
            if self.config.head == "v1":
                c = c + e
            else:
                h = h + e
        tables = (self.latent_rot, self.text_rot) if self.config.rope else (None, None)
        for block in self.joint_blocks:
            h, text = block(h, text, c, tables)
        for block in self.fused_blocks:
            h = block(h, c, tables[0])
        return self.final_layer(h, c)


def seeded_backbone(config: BackboneConfig, seed: int = 0) -> FluxAudio:
    """Ours with seeded weights whose output is not zero: modulations, last convolution and score are drawn, too."""
    with seeded(seed):
        model = FluxAudio(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "adaLN_modulation" in name or name.startswith("final_layer.conv"):
                    parameter.normal_(std=0.02)
                elif name.startswith(("score_embed.mlp.2", "empty_string")):
                    parameter.normal_(std=0.1)
            model.latent_mean.normal_(std=0.5)
            model.latent_std.uniform_(0.5, 2.0)
    return model


def plain_copy(model: FluxAudio) -> PlainFluxAudio:
    """The plain model with the same weights, on the same device."""
    plain = PlainFluxAudio(model.config)
    plain.load_state_dict(model.state_dict(), strict=True)
    return plain.to(model.latent_mean.device)


@public_settings()
@torch.inference_mode()
def plain_sample(
    model: PlainFluxAudio, text: Any, clap: Any, prompt: str, negative: str, x: Tensor, steps: int, weight: float,
    score: float | None, bf16: bool,
) -> Tensor:  # fmt: skip
    """Latents (N, C) of one prompt by the released script's procedure.

    Args:
        text: `ttmray.models.t5.TextEncoder`.
        clap: `ttmray.models.clap.Clap`.
        prompt: with its prefix.
        x: (1, N, C) noise on the model's device.
        bf16: the network under autocast; the encoders stay as they are, as in ours.
    """
    device = x.device
    texts = [
        [torch.from_numpy(encode([words])).to(device) for encode in (text.encode, clap.embed_text)]
        for words in (prompt, negative)
    ]
    scores = None if score is None else torch.full((1,), score, device=device)
    null = torch.ones(1, dtype=torch.bool, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        prompted, without = (model.conditions(*features) for features in texts)
        grid = torch.linspace(1, 0, steps + 1)
        for t, following in pairwise(grid):
            now = t.to(device).expand(1)
            v = weight * model.velocity(x, now, prompted, scores, ~null)
            v = v + (1 - weight) * model.velocity(x, now, without, scores, null)
            x = x + (following - t) * v
    return (x * model.latent_std + model.latent_mean)[0].float().cpu()


class PlainTrainer:
    """Updates of the plain model as the public trainer makes them, but for AdamW, which goes tensor by tensor."""

    def __init__(
        self, model: PlainFluxAudio, lr: Callable[[int], float], sigma_rels: Sequence[float], bf16: bool
    ) -> None:
        self.model, self.lr, self.bf16 = model.train(), lr, bf16
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, betas=(0.9, 0.95), eps=1e-6, weight_decay=1e-6, foreach=False, fused=False
        )
        self.gammas = [gamma_of(sigma) for sigma in sigma_rels]
        self.averages: list[list[Tensor]] = []
        self.step = 0
        self.after_backward: list[float] = []
        """Seconds of clipping, AdamW and averages, per update."""

    def loss(self, batch: Batch) -> Tensor:
        model = self.model
        x1 = (batch.mean + batch.std * batch.posterior_noise - model.latent_mean) / model.latent_std
        t = torch.sigmoid(batch.z)
        x_t = (1 - t[:, None, None]) * x1 + t[:, None, None] * batch.noise
        text, text_c = batch.text.clone(), batch.text_c.clone()
        text[batch.u_text < 0.1] = model.empty_string_feat
        text_c[batch.u_text < 0.1] = model.empty_string_feat_c
        null = None if batch.score is None else batch.u_score < 0.1
        predicted = model.velocity(x_t, t, model.conditions(text, text_c), batch.score, null)
        return (predicted - (batch.noise - x1)).square().mean(dim=(1, 2)).mean()

    @public_settings()
    def update(self, batch: Batch) -> Tensor:
        """One optimiser step; returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.step)
        with torch.autocast(batch.mean.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(batch)
        loss.backward()
        if loss.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0, foreach=False)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._average()
        if loss.is_cuda:
            torch.cuda.synchronize()
        self.after_backward.append(time.perf_counter() - started)
        return loss.detach()

    @torch.no_grad()
    def _average(self) -> None:
        """float32 averages of all parameters, frozen ones included, one tensor after another."""
        if not self.averages:
            self.averages = [[p.detach().clone() for p in self.model.parameters()] for _ in self.gammas]
            return
        for gamma, average in zip(self.gammas, self.averages, strict=True):
            for mean, current in zip(average, self.model.parameters(), strict=True):
                mean.lerp_(current.detach(), 1 - beta_of(self.step, gamma))
