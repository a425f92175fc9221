"""LAION-CLAP checkpoints: their names in transformers' `ClapModel`.

The released `.pt` files are training checkpoints of `laion_clap` (LAION-AI/CLAP, CC0-1.0): a dictionary with
"state_dict" beside the epoch and the optimiser, keys with the "module." of DistributedDataParallel.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ttmray.errors import UserError


def unwrap_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a training checkpoint (or the mapping itself), of any shapes, without DDP's "module." prefix.

    Raises:
        UserError: a value is not a tensor, or only some keys carry the prefix.
    """
    state = checkpoint.get("state_dict", checkpoint)
    foreign = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if foreign:
        raise UserError(f"CLAP state dict: {_some(foreign)} are not tensors")
    prefixed = [key for key in state if key.startswith("module.")]
    if not prefixed:
        return dict(state)
    if len(prefixed) != len(state):
        raise UserError(f"CLAP state dict: some keys lack 'module.': {_some(set(state) - set(prefixed))}")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _affine(source: str, target: str) -> dict[str, tuple[str, ...]]:
    return {f"{source}.{part}": (f"{target}.{part}",) for part in ("weight", "bias")}


def _audio_block(source: str, target: str) -> dict[str, tuple[str, ...]]:
    attention = f"{target}.attention.self"
    names = {
        **_affine(f"{source}.norm1", f"{target}.layernorm_before"),
        **_affine(f"{source}.norm2", f"{target}.layernorm_after"),
        **_affine(f"{source}.attn.proj", f"{target}.attention.output.dense"),
        **_affine(f"{source}.mlp.fc1", f"{target}.intermediate.dense"),
        **_affine(f"{source}.mlp.fc2", f"{target}.output.dense"),
    }
    for part in ("relative_position_bias_table", "relative_position_index"):
        names[f"{source}.attn.{part}"] = (f"{attention}.{part}",)
    for part in ("weight", "bias"):  # one fused matrix (3d, d): query, key, value from top to bottom
        thirds = (f"{attention}.query.{part}", f"{attention}.key.{part}", f"{attention}.value.{part}")
        names[f"{source}.attn.qkv.{part}"] = thirds
    return names


def _text_layer(source: str, target: str) -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {}
    for part in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "attention.output.LayerNorm",
        "intermediate.dense",
        "output.dense",
        "output.LayerNorm",
    ):
        names |= _affine(f"{source}.{part}", f"{target}.{part}")
    return names


def laion_key_map(depths: list[int], text_layers: int) -> dict[str, tuple[str, ...]]:
    """LAION name -> transformers name(s); three names mean: split in three along the first axis.

    Args:
        depths: blocks per HTSAT stage.
        text_layers: RoBERTa layers.
    """
    audio, audio_to = "audio_branch", "audio_model.audio_encoder"
    text, text_to = "text_branch.embeddings", "text_model.embeddings"
    names: dict[str, tuple[str, ...]] = {
        **_affine(f"{audio}.bn0", f"{audio_to}.batch_norm"),
        **_affine(f"{audio}.patch_embed.proj", f"{audio_to}.patch_embed.proj"),
        **_affine(f"{audio}.patch_embed.norm", f"{audio_to}.patch_embed.norm"),
        **_affine(f"{audio}.norm", f"{audio_to}.norm"),
        **_affine(f"{text}.LayerNorm", f"{text_to}.LayerNorm"),
        **_affine("text_branch.pooler.dense", "text_model.pooler.dense"),
        **_affine("audio_projection.0", "audio_projection.linear1"),
        **_affine("audio_projection.2", "audio_projection.linear2"),
        **_affine("text_projection.0", "text_projection.linear1"),
        **_affine("text_projection.2", "text_projection.linear2"),
        "logit_scale_a": ("logit_scale_a",),
        "logit_scale_t": ("logit_scale_t",),
        f"{text}.position_ids": (f"{text_to}.position_ids",),
    }
    for part in ("running_mean", "running_var", "num_batches_tracked"):
        names[f"{audio}.bn0.{part}"] = (f"{audio_to}.batch_norm.{part}",)
    for part in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        names[f"{text}.{part}.weight"] = (f"{text_to}.{part}.weight",)
    for stage, depth in enumerate(depths):
        for block in range(depth):
            tail = f"layers.{stage}.blocks.{block}"
            names |= _audio_block(f"{audio}.{tail}", f"{audio_to}.{tail}")
        if stage < len(depths) - 1:
            tail = f"layers.{stage}.downsample"
            names |= _affine(f"{audio}.{tail}.norm", f"{audio_to}.{tail}.norm")
            names[f"{audio}.{tail}.reduction.weight"] = (f"{audio_to}.{tail}.reduction.weight",)
    for layer in range(text_layers):
        names |= _text_layer(f"text_branch.encoder.layer.{layer}", f"text_model.encoder.layer.{layer}")
    return names


def laion_dropped_keys(depths: list[int]) -> set[str]:
    """LAION names without a counterpart: fixed STFT and mel matrices, the AudioSet classifier, shift masks
    (recomputed), and the two MLPs that only training used."""
    audio = "audio_branch"
    dropped = {
        f"{audio}.spectrogram_extractor.stft.conv_real.weight",
        f"{audio}.spectrogram_extractor.stft.conv_imag.weight",
        f"{audio}.logmel_extractor.melW",
        *_affine(f"{audio}.tscam_conv", ""),
        *_affine(f"{audio}.head", ""),
    }
    for branch in ("audio_transform", "text_transform"):
        dropped |= {*_affine(f"{branch}.sequential.0", ""), *_affine(f"{branch}.sequential.3", "")}
    # Every second block is shifted and keeps its mask, except where the window covers the whole grid.
    dropped |= {
        f"{audio}.layers.{stage}.blocks.{block}.attn_mask"
        for stage, depth in enumerate(depths)
        for block in range(1, depth, 2)
    }
    return dropped


def convert_laion_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LAION-CLAP weights (HTSAT + RoBERTa, no fusion) under the names of transformers' `ClapModel`.

    A joint query, key and value (3 * D, ...) becomes three of (D, ...); all others stay as they are.

    Accepts the bare state dict or the checkpoint around it, with or without "module.". Every source key is
    either used or on `laion_dropped_keys`; `token_type_ids` (zeros) is the only tensor that is created.

    Raises:
        UserError: unknown or missing keys, by name.
    """
    state = unwrap_state_dict(state_dict)
    depths = _depths(state)
    text_layers = len(_numbers(state, "text_branch.encoder.layer."))
    names = laion_key_map(depths, text_layers)
    unknown = state.keys() - names.keys() - laion_dropped_keys(depths)
    missing = names.keys() - state.keys()
    if unknown or missing:
        raise UserError(
            "The checkpoint is not a LAION-CLAP model with HTSAT and RoBERTa without fusion."
            + (f" Unknown: {_some(unknown)}." if unknown else "")
            + (f" Missing: {_some(missing)}." if missing else ""),
            "Use music_audioset_epoch_15_esc_90.14.pt of lukewys/laion_clap.",
        )
    converted: dict[str, torch.Tensor] = {}
    for source, targets in names.items():
        if len(targets) == 1:
            converted[targets[0]] = state[source]
            continue
        if state[source].shape[0] % len(targets):
            raise UserError(f"{source} has {state[source].shape[0]} rows, which is not query, key and value")
        # Copies, because safetensors refuses tensors that share storage.
        converted |= {
            target: part.clone() for target, part in zip(targets, state[source].chunk(len(targets)), strict=True)
        }
    positions = converted["text_model.embeddings.position_ids"]
    converted["text_model.embeddings.token_type_ids"] = torch.zeros_like(positions)
    return converted


def _numbers(state: Mapping[str, torch.Tensor], prefix: str) -> set[int]:
    numbers = {key.removeprefix(prefix).split(".", 1)[0] for key in state if key.startswith(prefix)}
    return {int(number) for number in numbers if number.isascii() and number.isdecimal()}


def _depths(state: Mapping[str, torch.Tensor]) -> list[int]:
    stages = len(_numbers(state, "audio_branch.layers."))
    return [len(_numbers(state, f"audio_branch.layers.{stage}.blocks.")) for stage in range(stages)]


def _some(keys: Iterable[str], limit: int = 6) -> str:
    names = sorted(keys)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
