"""Weights of the backbone: files in and out, from one head to another, and how many there are.

Reads our safetensors (the config is in their metadata), released `.pth` files with 198 or 203 tensors, and older ones
that also hold tables. Every tensor is accounted for: nothing is loaded in part without saying so.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ttmray.console import console
from ttmray.errors import EXIT_OK, UserError
from ttmray.json_text import read_json
from ttmray.models import seeded
from ttmray.models.backbone import SIZES, BackboneConfig, FluxAudio, Size, gated_width
from ttmray.models.cross_load import CrossLoad, cross_load
from ttmray.models.score_heads import HEADS, NAMES, OWN, Head, Null
from ttmray.models.score_support import ScoreSupport
from ttmray.models.state_dicts import load_exactly, read_state_dict
from ttmray.models.weights import weights_file

METADATA = "ttmray"
"""Key of the metadata of safetensors files that holds JSON; its `backbone` is the config."""
NULL_EMBEDDING = "score_embed.null_embedding"
"""Tensor that files with a learned null score have beside the others."""
TABLES = ("latent_rot", "text_rot", "t_embed.freqs")
LATENT_LENGTHS = {20: 312, 40: 430}
SCORE = "score_embed."
"""Prefix of the tensors of a score head."""
CHALLENGE_LIMIT = 500_000_000
"""Parameters that the efficiency track allows (paper, introduction)."""


@dataclass(frozen=True)
class Transfer:
    """What became of every tensor when weights of one model were put into another."""

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]

    def lines(self) -> list[str]:
        """For people: counts, and the names of everything that was not loaded."""
        lines = [f"{len(self.loaded)} tensors loaded"]
        for what, names in (
            ("not in the file, kept as they were", self.missing),
            ("in the file only, left out", self.unexpected),
            ("of another shape, left out", self.reshaped),
        ):
            if names:
                lines.append(f"{len(names)} {what}: {', '.join(names)}")
        return lines


def load_backbone(
    path: str | Path,
    *,
    head: Head | None = None,
    null: Null | None = None,
    force: bool = False,
    device: str | torch.device = "cpu",
) -> FluxAudio:
    """A backbone with the weights of a file, in eval mode and without gradients. A cross-load is said aloud.

    Args:
        path: `.safetensors` or `.pth` / `.pt` with a plain state dict; local, or s3://.
        head: forward that uses the weights; default: the one that the file names. v1, v2 and v4 share their tensors,
            and v2 weights under v1 collapse (paper IV-B), so nothing is guessed where a file with a score embedding
            names none.
        null: what a dropped score is; default: what the file names.
        force: also v2 weights under v1 or v4 (`models/cross_load.py`).
        device: torch device.

    Raises:
        UserError: unreadable files, tensors that are no backbone, no fit for the head, or a cross-load that collapses.
    """
    path = str(path)
    state, config, crossed = _read(path, head, null, force)
    if crossed is not None:
        console.print(crossed.line(path), style="yellow", markup=False)
    with torch.device("meta"):
        model = FluxAudio(config)
    # copies: tensors of a mapped file lie where its header ends, and their alignment decides the last bits of products
    load_exactly(model, {key: value.clone() for key, value in state.items()}, path)
    for name in ("latent_mean", "latent_std"):
        if not torch.isfinite(getattr(model, name)).all():
            raise UserError(
                f"{path}: {name} is not finite: these weights were never trained on a corpus.",
                "Take the weights of a training run.",
            )
    return model.eval().requires_grad_(False).to(device)


def file_config(
    path: str | Path, *, head: Head | None = None, null: Null | None = None, force: bool = False
) -> tuple[BackboneConfig, CrossLoad | None]:
    """What `load_backbone` would make of a file, and its cross-load, if it is one; the same arguments and errors."""
    _, config, crossed = _read(str(path), head, null, force)
    return config, crossed


def _read(
    path: str, head: Head | None, null: Null | None, force: bool
) -> tuple[dict[str, Tensor], BackboneConfig, CrossLoad | None]:
    file = weights_file(path, "checkpoint")
    state = tidy(read_state_dict(file), path)
    known = read_config(file)
    config = config_of(state, known, path)
    named = file_head(state, known)
    if head is None and named is None:
        raise UserError(
            f"{path} has a score embedding and does not say for which head it was trained.",
            "Set head=v1, v2 or v4, which share their tensors; the paper's submission is v2.",
        )
    crossed = check_forward(path, config.head, config.null, head, null, named=named is not None, force=force)
    return state, config.with_head(head or config.head, null), crossed


def check_forward(
    what: str,
    own: Head,
    own_null: Null,
    head: Head | None,
    null: Null | None,
    *,
    named: bool = True,
    force: bool = False,
    score: float | None = None,
) -> CrossLoad | None:
    """Whether weights can be used in a forward as they are, and the cross-load, if it is one.

    Args:
        what: the weights, for messages.
        own: head that they were trained with.
        own_null: null score that they were trained with.
        head: forward that is to use them; None: their own.
        null: what a dropped score is to be; None: their own.
        named: whether `own` is known, and no guess between heads of the same tensors.
        force: also v2 weights under v1 or v4 (`models/cross_load.py`).
        score: that is to be sampled at; None: none.

    Raises:
        UserError: there is no such head in them, or null, or none for a score, or they would collapse.
    """
    if score is not None and own == "none":
        raise UserError(
            f"{what} has no score head, and sampler.score is {score:g}.",
            "Set sampler.score: null, or name weights with a head.",
        )
    if head is not None and (head == "none") != (own == "none"):
        has = "no score embedding" if own == "none" else f"a score embedding ({own})"
        raise UserError(
            f"{what} has {has}, which does not fit head {head}.",
            "Choose a head that fits, or train one from this file (train_sft.py with init).",
        )
    if own != "none" and null is not None and (null == "learned") != (own_null == "learned"):
        has = "a learned null score" if own_null == "learned" else "no learned null score"
        raise UserError(f"{what} has {has}, which does not fit null {null}.", f"Leave null out, or set {own_null}.")
    crossed = cross_load(own, head, what, force=force) if named and head is not None else None
    if crossed is not None and crossed.new_head:
        raise UserError(
            f"{what} has the score head {own}, whose tensors are not those of {head}.",
            f"Set head: {own}, or train a new head from this file (train_sft.py with init).",
        )
    return crossed


def file_head(state: Mapping[str, Tensor], known: Mapping[str, Any]) -> Head | None:
    """The head that a file's weights were trained with; None where they have one that the file does not name.

    Args:
        state: its tensors, tidied, of any shape.
        known: its config, see `read_config`.
    """
    if not any(key.startswith(SCORE) for key in state):
        return "none"
    return known.get("head")


def tidy(state: Mapping[str, Any], what: str) -> dict[str, Tensor]:
    """A state dict with the names and shapes of ours.

    Takes off `module.` and nesting under "weights", "model" or "state_dict"; drops tables that are computed; accepts
    (1, T, D) and (1, D) features of the empty text; an older file without the pooled one gets the mean over tokens.

    Raises:
        UserError: it holds something else than tensors.
    """
    for outer in ("state_dict", "weights", "model"):
        if isinstance(state.get(outer), Mapping):
            state = state[outer]
    tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(key)): value for key, value in state.items()}
    odd = [key for key, value in tensors.items() if not isinstance(value, Tensor)]
    if odd:
        raise UserError(
            f"{what} is not a state dict of the backbone: {odd[0]} is a {type(tensors[odd[0]]).__name__}.",
            "Take an exported file (ttmray checkpoint export) or a released state dict.",
        )
    tensors = {key: value for key, value in tensors.items() if key not in TABLES}
    for key, dims in (("empty_string_feat", 2), ("empty_string_feat_c", 1)):
        if key in tensors and tensors[key].ndim == dims + 1 and len(tensors[key]) == 1:
            tensors[key] = tensors[key][0]
    if "empty_string_feat" in tensors:
        tensors.setdefault("empty_string_feat_c", tensors["empty_string_feat"].mean(dim=0))
    return tensors


def read_config(path: Path) -> dict[str, Any]:
    """The config in a safetensors file's metadata; empty for other files.

    Raises:
        UserError: the metadata hold something else.
    """
    return dict(_described(path, "backbone"))


def read_support(path: Path) -> ScoreSupport | None:
    """The scores that a file says its model was trained on; None where it does not say it.

    Raises:
        UserError: the metadata hold something else.
    """
    try:
        described = _described(path, "score_support")
        return ScoreSupport.from_dict(described) if described else None
    except ValueError as error:
        raise UserError(f"{path}: its metadata {METADATA!r} hold {error}.", "Export it again.") from error


def score_warning(path: str, score: float | None, what: str) -> str | None:
    """A line about a score beyond those that the weights at `path` were trained on, printed now; None for one within,
    for no score, and for files that do not name their scores."""
    support = read_support(weights_file(path, "checkpoint"))
    warning = support.warning(score, what) if support else None
    if warning is not None:
        console.print(warning, style="yellow")
    return warning


def _described(path: Path, what: str) -> dict[str, Any]:
    """A part of the metadata of a safetensors file; empty where there is none."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(METADATA, "{}")
    try:
        return dict(read_json(text).get(what) or {})
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its metadata {METADATA!r} describe no backbone.", "Export it again.") from error


def config_of(state: Mapping[str, Tensor], known: Mapping[str, Any], what: str) -> BackboneConfig:
    """The config of a state dict: read from the shapes of its tensors, checked against what its file says.

    A learned null score is a tensor of its own; which of the other nulls it is, only `known` can say. Lengths and RoPE
    cannot be read from shapes: 430 latents for 40 channels, 312 for 20, and RoPE on, unless `known` says otherwise.

    Raises:
        UserError: the tensors are not those of a backbone, or contradict `known`.
    """
    try:
        hidden, latent_dim = state["audio_input_proj.0.weight"].shape[:2]
        text_len, text_dim = state["empty_string_feat"].shape
        shapes: dict[str, Any] = {
            "latent_dim": latent_dim,
            "hidden": hidden,
            "text_len": text_len,
            "text_dim": text_dim,
            "text_c_dim": len(state["empty_string_feat_c"]),
            "heads": hidden // len(state["joint_blocks.0.latent_block.attn.q_norm.weight"]),
            "fused_depth": _count(state, "fused_blocks"),
            "depth": _count(state, "fused_blocks") + _count(state, "joint_blocks"),
        }
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{what} does not hold a FluxAudio backbone ({len(state)} tensors, {error} is missing or odd).",
            "Take an exported file (ttmray checkpoint export) or a released state dict.",
        ) from error
    known = {key: value for key, value in known.items() if key in {field.name for field in fields(BackboneConfig)}}
    odd = {key: value for key, value in known.items() if not _plausible(key, value)}
    if odd:
        raise UserError(f"{what}: its config cannot be: {odd}.", "Export it again.")
    wrong = {key: value for key, value in shapes.items() if key in known and known[key] != value}
    if wrong:
        raise UserError(f"{what}: its config and its tensors disagree: config {known}, tensors {wrong}.")
    scored = any(key.startswith(SCORE) for key in state)
    if known.get("null") not in (None, *get_args(Null)):
        raise UserError(f"{what}: unknown null {known.get('null')!r} in its config.")
    if known.get("head") not in (None, *HEADS, *OWN):
        raise UserError(
            f"{what}: unknown head {known.get('head')!r} in its config.",
            "Name a head of your own in the config too (head, model.head), if you trust its module.",
        )
    learned = NULL_EMBEDDING in state
    defaults = {"latent_len": LATENT_LENGTHS.get(latent_dim, 430), "head": "v1" if scored else "none"}
    defaults |= {"null": "learned"} if learned else {}
    config = BackboneConfig(**{**defaults, **shapes, **known})
    if scored and (config.null == "learned") != learned:
        has = "are of a learned null score" if learned else f"lack {NULL_EMBEDDING}"
        raise UserError(f"{what}: its config says null {config.null}, and its tensors {has}.", "Export it again.")
    if gated_width(int(config.hidden * config.mlp_ratio)) != len(state["audio_input_proj.2.w1.weight"]):
        raise UserError(f"{what}: its MLPs are not {config.mlp_ratio} times as wide as its blocks.")
    return config


def _plausible(name: str, value: Any) -> bool:
    """Whether a field of a config, from a file, has a type and range that a backbone can be made of."""
    default = getattr(BackboneConfig(), name)
    if isinstance(default, bool | str):  # unknown heads and nulls have a message of their own
        return value is None or isinstance(value, str) if isinstance(default, str) else isinstance(value, bool)
    kinds = (int, float) if isinstance(default, float) else (int,)
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < 1_000_000


def _count(state: Mapping[str, Tensor], name: str) -> int:
    return len({key.split(".")[1] for key in state if key.startswith(f"{name}.")})


def transfer(model: FluxAudio, state: Mapping[str, Tensor]) -> Transfer:
    """Put every tensor that fits by name and shape into `model` (paper III-D, Stage 3: v1 -> v2 transfers all 203).

    Tensors of `state` may be of any shape; those that do not fit are listed.
    """
    own = model.state_dict()
    shared = own.keys() & state.keys()
    fits = sorted(key for key in shared if own[key].shape == state[key].shape)
    model.load_state_dict({key: state[key] for key in fits}, strict=False)
    return Transfer(
        loaded=fits,
        missing=sorted(own.keys() - state.keys()),
        unexpected=sorted(state.keys() - own.keys()),
        reshaped=sorted(key for key in shared if own[key].shape != state[key].shape),
    )


def with_head(
    model: FluxAudio, head: Head, null: Null | None = None, *, force: bool = False
) -> tuple[FluxAudio, Transfer]:
    """The same weights under another head, and what was transferred; a new head starts at zero.

    Raises:
        UserError: a cross-load that collapses, and not `force` (`models/cross_load.py`).
    """
    crossed = cross_load(model.config.head, head, "the model", force=force)
    with seeded(0):  # of a new head; the global generator stays as it was
        other = FluxAudio(model.config.with_head(head, null))
    report = transfer(other, usable(model.state_dict(), crossed))
    device = model.latent_mean.device
    return other.to(device).train(model.training), report


def usable(state: Mapping[str, Tensor], crossed: CrossLoad | None) -> Mapping[str, Tensor]:
    """A state dict (any shapes) without a score head that the model has no use for."""
    if crossed is None or not crossed.new_head:
        return state
    return {key: value for key, value in state.items() if not key.startswith(SCORE)}


def debug_backbone(
    seed: int,
    head: Head = "v1",
    *,
    width: int = 1,
    text_dim: int = 64,
    device: str | torch.device = "cpu",
    latent_dim: int = 40,
) -> FluxAudio:
    """A tiny, seeded, untrained backbone whose output depends on latents, time, text and score.

    Args:
        seed: of the weights; torch's global generator is left as it was.
        width: factor on the hidden width of 64.
        text_dim: of the text encoder.
        latent_dim: 40, or 20 for 16 kHz latents.
    """
    config = BackboneConfig(
        latent_dim=latent_dim,
        latent_len=LATENT_LENGTHS[latent_dim],
        text_dim=text_dim,
        hidden=64 * width,
        heads=2,
        depth=3,
        fused_depth=1,
        head=head,
    )
    with seeded(seed):
        model = FluxAudio(config)
        with torch.no_grad():
            # the reference starts with zeros here, and would answer zero to everything
            for name, parameter in model.named_parameters():
                if "adaLN_modulation" in name or name.startswith("final_layer.conv"):
                    parameter.normal_(std=0.1)
                elif name.startswith(("score_embed.mlp.2", "score_embed.gate", "empty_string")):
                    parameter.normal_(std=0.5)
            model.latent_mean.zero_()
            model.latent_std.fill_(1.0)
    return model.eval().requires_grad_(False).to(device)


def count_parameters(config: BackboneConfig) -> list[tuple[str, int, int]]:
    """(part, trainable, frozen) per part of a backbone, without making its weights."""
    with torch.device("meta"):
        model: nn.Module = FluxAudio(config)
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0] if parameter.requires_grad else "latent statistics, empty text"
        counts.setdefault(part, [0, 0])[not parameter.requires_grad] += parameter.numel()
    return [(part, trainable, frozen) for part, (trainable, frozen) in counts.items()]


def forward_flops(config: BackboneConfig) -> dict[str, float]:
    """FLOPs of one clip (a multiplication and an addition are two): `text` projections, and `velocity` of one step.

    Counts matrix products and direct convolutions; a method that needs fewer is faster than its bound.
    """
    d, n, t = config.hidden, config.latent_len, config.text_len
    inner = gated_width(int(d * config.mlp_ratio))
    joint = config.depth - config.fused_depth

    def mlp(length: int, taps: int = 1) -> float:
        return 2 * length * 3 * d * inner * taps

    def block(length: int, taps: int) -> float:
        return 2 * length * d * 3 * d + 2 * length * d * d * taps + mlp(length, taps)

    def attention(length: int) -> float:
        return 2 * 2 * length**2 * d

    modulation = 2 * d * d * (12 * joint - 4 + 6 * config.fused_depth + 2)
    velocity = 2 * n * config.latent_dim * d * 7 * 2 + mlp(n, 7) + 2 * (256 + d) * d + modulation
    velocity += joint * (block(n, 3) + block(t, 1) + attention(n + t)) - (2 * t * d * d + mlp(t))
    velocity += config.fused_depth * (block(n, 3) + attention(n))
    text = 2 * (t * config.text_dim + config.text_c_dim) * d + mlp(t) + mlp(1)
    return {"text": text, "velocity": velocity}


def show_params(size: Size, head: Head, path: str | None = None) -> int:
    """`ttmray params`: print the table of a size and head, or of a file's backbone."""
    from rich.table import Table

    config = SIZES[size].with_head(head)
    if path is not None:
        file = weights_file(path, "checkpoint")
        config = config_of(tidy(read_state_dict(file), path), read_config(file), path)
    counts = count_parameters(config)
    trainable, frozen = sum(row[1] for row in counts), sum(row[2] for row in counts)
    title = f"{path or size}, {head_label(config)}: {config.hidden} wide, {config.depth} blocks"
    table = Table("part", "trainable", "frozen", title=title)
    for row in [*counts, ("all", trainable, frozen)]:
        table.add_row(row[0], f"{row[1]:,}", f"{row[2]:,}")
    console.print(table)
    total = trainable + frozen
    verdict = "within" if total <= CHALLENGE_LIMIT else "over"
    console.print(
        f"{total:,} parameters, {total / CHALLENGE_LIMIT:.1%} of the challenge's {CHALLENGE_LIMIT:,}: {verdict}"
    )
    console.print("encoders, VAE, vocoder and separator are not counted: they are not trained here")
    return EXIT_OK


def head_label(config: BackboneConfig) -> str:
    """For logs and cards, e.g. `v2 InputAdd`."""
    return NAMES["none"] if config.head == "none" else f"{config.head} {NAMES.get(config.head, 'from outside')}"
