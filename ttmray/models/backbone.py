"""FluxAudio: the flow-matching transformer that turns noise into latents, given a text and a score.

Checkpoint-compatible with the public FluxAudio-S (198 tensors, MeanAudio, MIT), and with a score head (203). Latents
are (B, N, C) channel-last throughout, normalised per channel; t = 1 is noise, t = 0 is data.

    x -> input projection -+
                           +-> 4 joint blocks (latents and text attend together) -> 8 fused blocks (latents) -> velocity
    text -> projection ----+
    c = embedding of t + projection of the pooled text: modulates every block (AdaLN)

Facts of the reference that are easy to get wrong: qkv channels are interleaved (head, d, q/k/v); RoPE turns adjacent
pairs after the RMSNorm and starts at 0 for latents and for text; t is not scaled by 1000; padded text is not masked;
gates multiply after the output projection.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ttmray.models.conv import SameConv1d, convolve
from ttmray.models.score_heads import Head, Injection, Null, ScoreEmbedding

TIME_FEATURES = 256


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Shape of a backbone. Defaults are FluxAudio-S at 44.1 kHz with the paper's training head.

    `latent_len` 430 is 9.98 s at 44.1 kHz; `fused_depth` blocks of `depth` see latents alone.
    """

    latent_dim: int = 40
    latent_len: int = 430
    text_dim: int = 1024
    text_len: int = 77
    text_c_dim: int = 512
    hidden: int = 448
    heads: int = 7
    depth: int = 12
    fused_depth: int = 8
    mlp_ratio: float = 4.0
    rope: bool = True
    head: Head = "none"
    null: Null = "zero_embedding"

    def with_head(self, head: Head, null: Null | None = None) -> Self:
        return replace(self, head=head, null=null or self.null)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Size = Literal["s_44k", "l_44k", "m_44k", "s_16k", "l_16k"]
SIZES: dict[Size, BackboneConfig] = {
    "s_44k": BackboneConfig(),
    "l_44k": BackboneConfig(hidden=896, heads=14),
    # Resonate's: as narrow as S, more than four times as deep; its pooled text is a mean of T5 rows
    "m_44k": BackboneConfig(depth=52, fused_depth=36, text_c_dim=1024),
    "s_16k": BackboneConfig(latent_dim=20, latent_len=312),
    "l_16k": BackboneConfig(latent_dim=20, latent_len=312, hidden=896, heads=14),
}


@dataclass(frozen=True)
class Conditions:
    """Projected text: what does not change over the steps of a sample.

    Shapes: tokens (B, T, D), pooled (B, 1, D).
    """

    tokens: Tensor
    pooled: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "Conditions":
        return Conditions(self.tokens[rows], self.pooled[rows])

    @staticmethod
    def cat(parts: "list[Conditions]") -> "Conditions":
        return Conditions(torch.cat([p.tokens for p in parts]), torch.cat([p.pooled for p in parts]))


def gated_width(hidden: int) -> int:
    """Inner width of a gated MLP: two thirds, rounded up to a multiple of 256."""
    return -(-int(2 * hidden / 3) // 256) * 256


class GatedMLP(nn.Module):
    """w2(SiLU(w1 x) * w3 x) of (..., D), without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        inner = gated_width(hidden)
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class GatedConvMLP(nn.Module):
    """The same of (B, N, D) with convolutions over the sequence."""

    def __init__(self, width: int, hidden: int, kernel_size: int) -> None:
        super().__init__()
        inner = gated_width(hidden)
        self.w1 = SameConv1d(width, inner, kernel_size, bias=False)
        self.w2 = SameConv1d(inner, width, kernel_size, bias=False)
        self.w3 = SameConv1d(width, inner, kernel_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = convolve(x, self.w1, self.w3)
        return self.w2(F.silu(gate) * value)


class TimeEmbedding(nn.Module):
    """t in [0, 1], not scaled, as cosines and sines of 128 frequencies, and an MLP."""

    freqs: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        half = TIME_FEATURES // 2
        steps = torch.arange(half, device="cpu")  # real numbers on the meta device, too
        self.register_buffer("freqs", 10000.0 ** (-steps / half), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, 1, D)."""
        angles = t.float()[:, None] * self.freqs
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(t.dtype))[:, None]


class HeadNorm(nn.Module):
    """RMSNorm of (..., d) over the channels of a head, in float32 (its epsilon is float32's)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        eps = torch.finfo(torch.float32).eps
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), eps)


class Projections(nn.Module):
    """Queries, keys and values of one stream, in the reference's channel order."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = HeadNorm(width // heads)
        self.k_norm = HeadNorm(width // heads)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> q, k, v, each (B, H, N, d); q and k normalised, not yet rotated."""
        # channels are (head, d, 3) in the file; regrouping the weight gives contiguous thirds
        order = (self.heads, -1, 3)
        weight = self.qkv.weight.unflatten(0, order).permute(2, 0, 1, 3).flatten(0, 2)
        bias = self.qkv.bias.unflatten(0, order).permute(2, 0, 1).flatten()
        q, k, v = F.linear(x, weight, bias).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v


def rotate(x: Tensor, table: Tensor | None) -> Tensor:
    """RoPE: turn adjacent pairs of channels by their position's angle.

    Args:
        x: (B, H, N, d).
        table: (2, N, d / 2) cosines and sines, float32; None leaves x as it is.
    """
    if table is None:
        return x
    cos, sin = table
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1).flatten(-2).to(x.dtype)


def rope_table(length: int, dim: int) -> Tensor:
    """(2, length, dim / 2): cosines and sines of position * 10000^(-2i / dim), float32, always on the CPU."""
    freqs = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * freqs
    return torch.stack([angles.cos(), angles.sin()]).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm of x (B, N, D) without parameters, then scale and shift, (B, 1, D) each, by the condition."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


@dataclass(frozen=True)
class Token:
    """A score token (B, 1, D) and its gates (H,) in one block."""

    embedding: Tensor
    gate: Tensor


class StreamBlock(nn.Module):
    """What one stream does in one block, before and after attention.

    Args:
        config: shape of the backbone.
        conv: convolutions (latents) or linear maps (text).
        last: text of the last joint block: it is only attended to, and has no output of its own.
    """

    def __init__(self, config: BackboneConfig, conv: bool, last: bool = False) -> None:
        super().__init__()
        width, hidden = config.hidden, int(config.hidden * config.mlp_ratio)
        self.last = last
        self.attn = Projections(width, config.heads)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (2 if last else 6) * width))
        if not last:
            self.linear1 = SameConv1d(width, width, 3) if conv else nn.Linear(width, width)
            self.ffn = GatedConvMLP(width, hidden, 3) if conv else GatedMLP(width, hidden)

    def before(
        self, x: Tensor, c: Tensor, table: Tensor | None, token: Token | None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(q, q not rotated, k, v) of the stream; (k, v, gate) of its score token, if any; the other modulations.

        From x (B, N, D) and c (B, 1, D): q, k and v are (B, H, N, d), those of the token (B, H, 1, d), its gate (H,),
        and modulations (B, 1, D).
        """
        shift, scale, *rest = self.adaLN_modulation(c).chunk(2 if self.last else 6, dim=-1)
        q, k, v = self.attn(modulate(x, shift, scale))
        extra: tuple[Tensor, ...] = ()
        if token is not None:
            _, token_k, token_v = self.attn(modulate(token.embedding.to(x.dtype), shift, scale))
            extra = (token_k, token_v, token.gate)
        return (rotate(q, table), q, rotate(k, table), v), extra, tuple(rest)

    def after(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """The stream after attention (B, H, N, d) and its MLP."""
        if self.last:
            return x
        gate, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate * self.linear1(attended.transpose(1, 2).flatten(2))
        return x + gate_mlp * self.ffn(modulate(x, shift_mlp, scale_mlp))


def _read_tokens(q: Tensor, extras: list[tuple[Tensor, ...]]) -> Tensor | float:
    """What queries (B, H, N, d) read from score tokens: gate * sigmoid(q k / sqrt(d)) * v."""
    read: Tensor | float = 0.0
    for k, v, gate in extras:
        weight = torch.sigmoid((q * k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5)
        read = read + gate[:, None, None].to(v.dtype) * weight * v
    return read


class JointBlock(nn.Module):
    """Latents and text, each with its own weights, attend to both."""

    def __init__(self, config: BackboneConfig, last: bool) -> None:
        super().__init__()
        self.latent_block = StreamBlock(config, conv=True)
        self.text_block = StreamBlock(config, conv=False, last=last)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        c: Tensor,
        c_text: Tensor,
        tables: tuple[Tensor | None, Tensor | None],
        token: Token | None = None,
        text_token: Token | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Latents x (B, N, D) and text (B, T, D), each under its condition (B, 1, D), after the block.

        Tables are (2, N, d / 2) and (2, T, d / 2), see `rotate`.
        """
        (q, q_flat, k, v), extra, modulation = self.latent_block.before(x, c, tables[0], token)
        (tq, tq_flat, tk, tv), text_extra, text_modulation = self.text_block.before(text, c_text, tables[1], text_token)
        length = x.shape[1]
        both = F.scaled_dot_product_attention(torch.cat([q, tq], 2), torch.cat([k, tk], 2), torch.cat([v, tv], 2))
        attended, text_attended = both[:, :, :length], both[:, :, length:]
        extras = [e for e in (extra, text_extra) if e]
        if extras:
            attended = attended + _read_tokens(q_flat, extras)
            text_attended = text_attended + _read_tokens(tq_flat, extras)
        return self.latent_block.after(x, attended, modulation), self.text_block.after(
            text, text_attended, text_modulation
        )


class FusedBlock(StreamBlock):
    """Latents attend to latents."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config, conv=True)

    def forward(self, x: Tensor, c: Tensor, table: Tensor | None, token: Token | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D) under the condition c (B, 1, D); the table is (2, N, d / 2), see `rotate`."""
        (q, q_flat, k, v), extra, modulation = self.before(x, c, table, token)
        attended = F.scaled_dot_product_attention(q, k, v)
        if extra:
            attended = attended + _read_tokens(q_flat, [extra])
        return self.after(x, attended, modulation)


class FinalLayer(nn.Module):
    """Modulated norm and a convolution to the velocity."""

    def __init__(self, width: int, latent_dim: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.conv = SameConv1d(width, latent_dim, 7)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, C) under the condition c (B, 1, D)."""
        return self.conv(modulate(x, *self.adaLN_modulation(c).chunk(2, dim=-1)))


class FluxAudio(nn.Module):
    """The backbone. Frozen parameters: latent statistics and the features of the empty text.

    `checkpointing` recomputes blocks in the backward pass: less memory for a third more time.
    """

    latent_rot: Tensor
    text_rot: Tensor

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        width, hidden = config.hidden, int(config.hidden * config.mlp_ratio)

        def frozen(*shape: int, value: float) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, value), requires_grad=False)

        self.latent_mean = frozen(1, 1, config.latent_dim, value=float("nan"))
        self.latent_std = frozen(1, 1, config.latent_dim, value=float("nan"))
        self.empty_string_feat = frozen(config.text_len, config.text_dim, value=0.0)
        self.empty_string_feat_c = frozen(config.text_c_dim, value=0.0)
        self.audio_input_proj = nn.Sequential(
            SameConv1d(config.latent_dim, width, 7), nn.SELU(), GatedConvMLP(width, hidden, 7)
        )
        self.text_input_proj = nn.Sequential(nn.Linear(config.text_dim, width), GatedMLP(width, hidden))
        self.text_cond_proj = nn.Sequential(nn.Linear(config.text_c_dim, width), GatedMLP(width, hidden))
        self.t_embed = TimeEmbedding(width)
        joint = config.depth - config.fused_depth
        self.joint_blocks = nn.ModuleList(JointBlock(config, last=i == joint - 1) for i in range(joint))
        self.fused_blocks = nn.ModuleList(FusedBlock(config) for _ in range(config.fused_depth))
        self.final_layer = FinalLayer(width, config.latent_dim)
        self.score_embed: ScoreEmbedding | None = None
        if config.head != "none":
            readers = config.depth if config.head == "v3" else joint
            self.score_embed = ScoreEmbedding(width, config.head, config.null, readers, config.heads)
        self.register_buffer("latent_rot", torch.empty(0), persistent=False)
        self.register_buffer("text_rot", rope_table(config.text_len, width // config.heads), persistent=False)
        self.resize(config.latent_len)
        self.reset()

    def resize(self, latent_len: int) -> None:
        """Take latents of another length from now on; RoPE is extended, not interpolated."""
        self.latent_len = latent_len
        table = rope_table(latent_len, self.config.hidden // self.config.heads)
        self.latent_rot = table.to(self.text_rot.device)

    def reset(self) -> None:
        """Initialise as the reference does: Xavier for linear maps, zeros for modulations and the last convolution."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.startswith("t_embed") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            elif "adaLN_modulation" in name or name.startswith("final_layer.conv"):
                nn.init.zeros_(parameter)
        if self.score_embed is not None:
            self.score_embed.reset()

    def normalise(self, latents: Tensor) -> Tensor:
        """VAE latents (B, N, C) as the model sees them."""
        return (latents - self.latent_mean) / self.latent_std

    def unnormalise(self, x: Tensor) -> Tensor:
        """The inverse of `normalise`, (B, N, C)."""
        return x * self.latent_std + self.latent_mean

    def conditions(self, text: Tensor, text_c: Tensor) -> Conditions:
        """Project a text once for all steps.

        Args:
            text: (B, T, text_dim) features of the tokens, padding included.
            text_c: (B, text_c_dim) pooled feature.
        """
        if text.shape[1:] != (self.config.text_len, self.config.text_dim):
            raise ValueError(
                f"text must be (B, {self.config.text_len}, {self.config.text_dim}), not {tuple(text.shape)}"
            )
        return Conditions(self.text_input_proj(text), self.text_cond_proj(text_c)[:, None])

    def empty_conditions(self, batch: int) -> Conditions:
        """The conditions of the empty text."""
        empty = self.conditions(self.empty_string_feat[None], self.empty_string_feat_c[None])
        return Conditions(empty.tokens.expand(batch, -1, -1), empty.pooled.expand(batch, -1, -1))

    def velocity(
        self, x: Tensor, t: Tensor, conditions: Conditions, score: Tensor | None = None, null: Tensor | None = None
    ) -> Tensor:
        """The velocity of the flow.

        Args:
            x: (B, N, C) normalised latents at time t.
            t: (B,) in [0, 1].
            conditions: of B texts.
            score: (B,), in the unit of the rewards that the model was trained with; None for no score at all.
            null: (B,) bool, true for rows without a score; None where all have one.

        Returns:
            (B, N, C): noise minus data.

        Raises:
            ValueError: latents of another length than the model is set to (see `resize`), or a score for a backbone
                without a score head.
        """
        if x.shape[1:] != (self.latent_len, self.config.latent_dim):
            raise ValueError(f"x must be (B, {self.latent_len}, {self.config.latent_dim}), not {tuple(x.shape)}")
        inject = self._inject(len(x), x, score, null)
        c = self.t_embed(t) + conditions.pooled
        c_text = c if inject.text_condition is None else c + inject.text_condition
        c = c if inject.audio_condition is None else c + inject.audio_condition
        h = self.audio_input_proj(x)
        h = h if inject.latents is None else h + inject.latents
        text = conditions.tokens
        tables = (self.latent_rot, self.text_rot) if self.config.rope else (None, None)
        for i, block in enumerate(self.joint_blocks):
            tokens = self._token(inject.audio_token, i), self._token(inject.text_token, i)
            h, text = self._run(block, h, text, c, c_text, tables, *tokens)
        for i, block in enumerate(self.fused_blocks, len(self.joint_blocks)):
            h = self._run(block, h, c, tables[0], self._token(inject.audio_token, i))
        return self.final_layer(h, c)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        text_c: Tensor,
        score: Tensor | None = None,
        null: Tensor | None = None,
    ) -> Tensor:
        """`velocity` (B, N, C) from text features, see `conditions`: one call, as training under DDP needs it."""
        return self.velocity(x, t, self.conditions(text, text_c), score, null)

    def _inject(self, batch: int, x: Tensor, score: Tensor | None, null: Tensor | None) -> Injection:
        if self.score_embed is None:
            if score is not None:
                raise ValueError("this backbone has no score head, so it takes no score")
            return Injection()
        if score is None:
            score, null = x.new_zeros(batch), torch.ones(batch, dtype=torch.bool, device=x.device)
        if null is None:
            null = torch.zeros_like(score, dtype=torch.bool)
        return self.score_embed.inject(score, null)

    def _token(self, embedding: Tensor | None, block: int) -> Token | None:
        if embedding is None:
            return None
        assert self.score_embed is not None
        assert self.score_embed.gate is not None
        return Token(embedding, self.score_embed.gate[block])

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)
