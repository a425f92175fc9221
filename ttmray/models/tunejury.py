"""TuneJury: a preference score from CLAP and MERT features.

Protocol, feature order and head as in the public release (yonghyunk1m/TuneJury, CC-BY-NC 4.0; its audio-only
head is Apache-2.0). Only differences between scores mean something: the loss never sees a common offset.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.models import init_for_debug, micro_batch, require_finite, seeded, to_float32
from ttmray.models.state_dicts import read_state_dict

BLOCKS = ("clap_audio", "mert", "text")  # the order of the feature vector
BLOCK_DIMS = (512, 1024, 512)
VARIANTS = {
    "A1": ("clap_audio",),
    "A2": ("mert",),
    "A3": ("text",),
    "A4": ("clap_audio", "mert"),
    "A5": ("clap_audio", "text"),
    "A6": ("mert", "text"),
    "A7": ("clap_audio", "mert", "text"),
}
RELEASED_WIDTHS = (1024, 512, 256, 128)


class TuneJuryHead(nn.Module):
    """The score network: Linear, BatchNorm, ReLU, Dropout 0.5 per hidden width, then a Linear to a scalar.

    Args:
        widths: input width, then the hidden widths.
    """

    def __init__(self, widths: Sequence[int] = (sum(BLOCK_DIMS), *RELEASED_WIDTHS)) -> None:
        super().__init__()
        self.widths = tuple(widths)
        layers: list[nn.Module] = []
        for i, width in enumerate(widths[1:]):
            layers += [nn.Linear(widths[i], width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5)]
        layers.append(nn.Linear(widths[-1], 1))
        self.net = nn.Sequential(*layers)
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B,) raw scores, neither squashed nor scaled."""
        return self.net(features).squeeze(-1)


@dataclass(frozen=True)
class HeadLayout:
    """How a checkpoint was found: its key prefix, its widths (input first) and its inputs (A1 to A7)."""

    prefix: str
    widths: tuple[int, ...]
    variant: str


class TuneJury:
    """Scores clips from their features.

    Args:
        head: network whose input is the sum of the used blocks.
        variant: which blocks it uses, A1 to A7 (`VARIANTS`); A7 is all.
        block_dims: widths of CLAP audio, MERT and CLAP text.
        device: torch device.
        layout: what the loader found, for the record.

    Raises:
        UserError: the head's input width is not that of the variant's blocks.
    """

    def __init__(
        self,
        head: TuneJuryHead,
        variant: str = "A7",
        block_dims: tuple[int, int, int] = BLOCK_DIMS,
        device: str | torch.device = "cpu",
        layout: HeadLayout | None = None,
    ) -> None:
        expected = _input_dim(variant, block_dims)
        if head.widths[0] != expected:
            raise UserError(
                f"TuneJury head takes {head.widths[0]} inputs, variant {variant} of blocks {block_dims} has {expected}"
            )
        self.device = torch.device(device)
        self.head = head.eval().to(self.device)
        self.variant = variant
        self.block_dims = block_dims
        self.layout = layout

    @torch.inference_mode()
    def score(self, clap_audio: np.ndarray, mert: np.ndarray | None, clap_text: np.ndarray | None = None) -> np.ndarray:
        """Raw scores, higher is better liked. Blocks that the variant does not use are ignored.

        Args:
            clap_audio: (B, 512) unit vectors.
            mert: (B, 1024) time means, not normalised; None only if the variant does without.
            clap_text: (B, 512) unit vectors (zero rows for empty texts), or None for all zeros.

        Returns:
            (B,) float32.

        Raises:
            ValueError: a used block that is missing, of another shape or not finite.
            RuntimeError: a score that is not finite.
        """
        count = len(clap_audio)
        if clap_text is None:
            clap_text = np.zeros((count, self.block_dims[2]), np.float32)
        used = []
        for name, dim, block in zip(BLOCKS, self.block_dims, (clap_audio, mert, clap_text), strict=True):
            if name not in VARIANTS[self.variant]:
                continue
            if block is None or block.shape != (count, dim):
                shape = "None" if block is None else block.shape
                raise ValueError(f"{name} must have shape {(count, dim)}, not {shape}")
            if not np.isfinite(block).all():
                raise ValueError(f"{name} has features that are not finite")
            used.append(block.astype(np.float32, copy=False))
        if count == 0:
            return np.empty(0, np.float32)
        features = torch.from_numpy(np.concatenate(used, axis=1)).to(self.device)
        rows = features.split(micro_batch(self.device, count))
        scores = to_float32(torch.cat([self.head(row) for row in rows]), (count,), "TuneJury")
        return require_finite(scores, "TuneJury")


def load_tunejury(
    source: str | Path | Mapping[str, Any],
    *,
    exclude: Collection[str] | None = None,
    block_dims: tuple[int, int, int] = BLOCK_DIMS,
    device: str | torch.device = "cpu",
) -> TuneJury:
    """TuneJury head from a checkpoint whose layout is read from its keys and shapes.

    Args:
        source: `.pt` or `.safetensors` file, or a state dict, possibly inside {"state_dict": ...} and under
            prefixes (net., score., module., model.).
        exclude: blocks that the head does not take (of clap_audio, mert, text). Default: the list in the
            sidecar `<stem>.json` beside the file, else the only variant with this input width.
        block_dims: widths of CLAP audio, MERT and CLAP text.
        device: torch device.

    Raises:
        UserError: missing or unsafe files, keys or shapes that are not a TuneJury head, a sidecar of other
            weights, or an input width that fits no variant or several.
    """
    sidecar = None
    if isinstance(source, Mapping):
        what, checkpoint = "the TuneJury state dict", source
    else:
        path = Path(source)
        what = str(path)
        checkpoint = read_state_dict(path)
        sidecar = path.with_suffix(".json")
    prefix, state = _strip_prefixes(checkpoint)
    widths = _widths(state, what)
    if exclude is None and sidecar is not None and sidecar.is_file():
        exclude = _sidecar_exclude(sidecar, widths[0])
    layout = HeadLayout(prefix, widths, _variant(widths[0], exclude, block_dims, what))
    head = TuneJuryHead(widths)
    head.net.load_state_dict(state, strict=True)
    return TuneJury(head, layout.variant, block_dims, device, layout)


def _strip_prefixes(checkpoint: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The innermost state dict and what was taken off its keys."""
    while isinstance(checkpoint.get("state_dict"), Mapping):
        checkpoint = checkpoint["state_dict"]
    state = {str(key): value for key, value in checkpoint.items()}
    stripped = ""
    while state:
        first = next(iter(state)).split(".", 1)[0] + "."
        known = first in ("net.", "score.", "module.", "model.")
        if not known or not all(key.startswith(first) for key in state):
            break
        state = {key.removeprefix(first): value for key, value in state.items()}
        stripped += first
    return stripped, state


def _widths(state: Mapping[str, Any], what: str) -> tuple[int, ...]:
    """Input and hidden widths of a head's Sequential, after checking every key and shape.

    Raises:
        UserError: any key or shape that a head of these widths does not have, or lacks.
    """
    shapes = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, torch.Tensor)}
    weights = [key for key in shapes if re.fullmatch(r"[0-9]{1,3}\.weight", key) and len(shapes[key]) == 2]
    linears = sorted(int(key.removesuffix(".weight")) for key in weights)
    if linears:
        widths = tuple(shapes[f"{i}.weight"][1] for i in linears)
        with torch.device("meta"):
            expected = {k: tuple(v.shape) for k, v in TuneJuryHead(widths).net.state_dict().items()}
        if shapes == expected and len(shapes) == len(state):
            return widths
        wrong = sorted(k for k in state.keys() | expected.keys() if k not in shapes or shapes[k] != expected.get(k))
    else:
        wrong = sorted(state)
    raise UserError(
        f"{what} is not a TuneJury head: {', '.join(wrong[:6]) or 'it is empty'} do not fit",
        "A head is Linear, BatchNorm, ReLU, Dropout per hidden layer and a last Linear to 1.",
    )


def _sidecar_exclude(path: Path, input_dim: int) -> list[str]:
    sidecar = read_json(path.read_text(encoding="utf-8"))
    if "exclude" not in sidecar or sidecar.get("input_dim", input_dim) != input_dim:
        raise UserError(
            f"{path} says {sidecar}, the weights beside it take {input_dim} inputs",
            'It must hold {"input_dim": ..., "exclude": [...]} of these weights.',
        )
    return list(sidecar["exclude"])


def _input_dim(variant: str, block_dims: Sequence[int]) -> int:
    return sum(dim for name, dim in zip(BLOCKS, block_dims, strict=True) if name in VARIANTS[variant])


def _variant(dim: int, exclude: Collection[str] | None, block_dims: tuple[int, int, int], what: str) -> str:
    if exclude is None:
        fitting = [variant for variant in VARIANTS if _input_dim(variant, block_dims) == dim]
        if len(fitting) == 1:
            return fitting[0]
        options = f"could be any of {', '.join(fitting)}" if fitting else f"no blocks of {block_dims} give"
        raise UserError(
            f"{what} takes {dim} inputs, which {options}",
            "Say which blocks it leaves out: exclude, or a sidecar JSON beside the file.",
        )
    used = tuple(name for name in BLOCKS if name not in exclude)
    by_blocks = {blocks: variant for variant, blocks in VARIANTS.items()}
    if not set(exclude) <= set(BLOCKS) or used not in by_blocks:
        raise UserError(f"{what}: exclude must be some, not all, of {', '.join(BLOCKS)}, not {list(exclude)}")
    if _input_dim(by_blocks[used], block_dims) != dim:
        raise UserError(
            f"{what} takes {dim} inputs, but {' + '.join(used)} of widths {block_dims} give "
            f"{_input_dim(by_blocks[used], block_dims)}"
        )
    return by_blocks[used]


def debug_tunejury(seed: int, mert_dim: int = 64, device: str | torch.device = "cpu", variant: str = "A7") -> TuneJury:
    """Small untrained TuneJury with seeded weights for the debug encoders (CLAP 512, MERT `mert_dim`)."""
    dims = (512, mert_dim, 512)
    with seeded(seed):
        head = TuneJuryHead((_input_dim(variant, dims), 64, 32))
        init_for_debug(head)
    return TuneJury(head, variant, dims, device)
