"""Training one TuneJury head on packed arrays: RankNet loss, early stopping, exact resume.

Settings and data flow are those of the public release but for two (see `HeadConfig`); what it leaves open is a config
field. Every epoch draws its order, its sides and its dropout masks from (seed, epoch), so a checkpoint between epochs
needs no random state.
"""

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ttmray.config import Config
from ttmray.errors import UserError
from ttmray.models import seeded
from ttmray.models.state_dicts import reason
from ttmray.models.tunejury import BLOCKS, RELEASED_WIDTHS, VARIANTS, TuneJuryHead

ROWS_AT_ONCE = 4096


class HeadConfig(Config):
    """The head and its training. Defaults are the release's, but for `batch_norm` and `random_sides`, which mend a flaw
    of it; the release's are `per_side` and false."""

    widths: tuple[int, ...] = RELEASED_WIDTHS
    """Hidden widths."""
    batch: int = Field(32, ge=2)
    """Pairs per step."""
    lr: float = Field(1e-4, gt=0)
    """AdamW, constant."""
    weight_decay: float = Field(1e-3, ge=0)
    """On all parameters, as in the release."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """After every hidden layer, in steps of 1/256."""
    max_epochs: int = Field(1000, ge=1)
    patience: int = Field(30, ge=1)
    """Epochs without improvement of the validation loss before training stops."""
    min_improvement: float = Field(1e-4, ge=0)
    """What counts as improvement of the validation loss."""
    batch_norm: Literal["single", "per_side"] = "single"
    """Whose statistics normalise in training. `single`: those of both sides, in one forward. `per_side`: A and B are
    normalised apart in two forwards, as in the release, where a difference that all winners of one side share is lost
    in training and there in use. The paper does not say."""
    random_sides: bool = True
    """Swap A and B of a random half of the pairs in every epoch. It matters to `per_side` only."""

    @field_validator("widths")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 1:
            raise ValueError("needs at least one hidden width, all of them positive")
        return value


@dataclass(frozen=True)
class PackedPairs:
    """Pairs as rows of packed features.

    Attributes:
        clips: (n, D) float32, audio blocks of a variant.
        texts: (m, E) float32, text block; E is 0 where the variant has none.
        a, b: (P,) int64 rows of `clips`.
        text: (P,) int64 rows of `texts`.
        target: (P,) float32 in {0, 0.5, 1}, 1 where a was preferred.
    """

    clips: torch.Tensor
    texts: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    text: torch.Tensor
    target: torch.Tensor

    def __len__(self) -> int:
        return len(self.target)

    def rows(self, which: np.ndarray | torch.Tensor) -> "PackedPairs":
        """Some of the pairs, over the same features."""
        index = torch.as_tensor(which, device=self.a.device)
        return PackedPairs(self.clips, self.texts, *(x[index] for x in (self.a, self.b, self.text, self.target)))

    def inputs(self, clip: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """(B,) rows -> (B, D + E) head inputs."""
        parts = ([self.clips.index_select(0, clip)] if self.clips.shape[1] else []) + (
            [self.texts.index_select(0, text)] if self.texts.shape[1] else []
        )
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def pack(
    blocks: dict[str, np.ndarray], pairs: dict[str, np.ndarray], variant: str, device: str | torch.device = "cpu"
) -> PackedPairs:
    """Features of a variant on a device; blocks that it does without are left out, not zeroed.

    Args:
        blocks: `clap_audio` and `mert` (n, d) of any d, and `text` (m, d), float32.
        pairs: (P,) row numbers `a`, `b` (clips) and `prompt` (of `text`), and `target`.
        variant: A1 to A7.
    """
    used = VARIANTS[variant]
    audio = [torch.from_numpy(blocks[name]) for name in BLOCKS[:2] if name in used]
    clips = torch.cat(audio, 1) if audio else torch.zeros(len(blocks["clap_audio"]), 0)
    texts = torch.from_numpy(blocks["text"]) if "text" in used else torch.zeros(len(blocks["text"]), 0)
    indices = [torch.from_numpy(pairs[name].astype(np.int64)) for name in ("a", "b", "prompt")]
    target = torch.from_numpy(pairs["target"].astype(np.float32))
    return PackedPairs(*(x.to(device) for x in (clips.contiguous(), texts, *indices, target)))


@dataclass(frozen=True)
class Trained:
    """The head of the best epoch, and what happened: per epoch `train_loss` and `validation_loss`."""

    head: TuneJuryHead
    best_epoch: int
    history: list[dict[str, float]]


def new_head(inputs: int, config: HeadConfig, seed: int) -> TuneJuryHead:
    """An untrained head for training with `config`."""
    with seeded(seed):
        head = TuneJuryHead((inputs, *config.widths))
    for layer in head.net:
        if isinstance(layer, nn.Dropout):
            layer.p = config.dropout
    return head


def train_head(
    train: PackedPairs,
    validation: PackedPairs,
    config: HeadConfig,
    seed: int,
    *,
    resume: bytes | None = None,
    save: Callable[[bytes], None] | None = None,
    save_every: int = 10,
) -> Trained:
    """Train until the validation loss has not improved for `patience` epochs; the best weights count.

    Equal bits for equal seeds on one machine with one number of threads, also when a run is cut into pieces.

    Args:
        train: on the device that trains.
        seed: of the weights, and with the epoch of everything else that is drawn.
        resume: what `save` got last.
        save: keeps the state, called every `save_every` epochs.

    Raises:
        UserError: too few pairs, a damaged `resume`, or a loss that is not finite.
    """
    if len(train) < 2 or len(validation) < 1:
        raise UserError(f"{len(train)} pairs to train on and {len(validation)} to validate: 2 and 1 are the fewest.")
    device = train.clips.device
    head = new_head(train.clips.shape[1] + train.texts.shape[1], config, seed).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    state: dict[str, Any] = {"best_loss": float("inf"), "best_epoch": -1, "best": _copy(head), "history": []}
    if resume is not None:
        state = _resumed(resume, head, optimizer)
    for epoch in range(len(state["history"]), config.max_epochs):
        if epoch - state["best_epoch"] > config.patience:
            break
        train_loss = _epoch(head, optimizer, train, config, seed, epoch)
        loss = validation_loss(head, validation)
        if not np.isfinite([train_loss, loss]).all():
            raise UserError(f"epoch {epoch}: the loss is not finite.", "Lower head.lr, or look for broken features.")
        state["history"].append({"train_loss": train_loss, "validation_loss": loss})
        if loss < state["best_loss"] - config.min_improvement:
            state |= {"best_loss": loss, "best_epoch": epoch, "best": _copy(head)}
        if save is not None and (epoch + 1) % save_every == 0:
            buffer = io.BytesIO()
            torch.save(state | {"head": head.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
            save(buffer.getvalue())
    head.load_state_dict(state["best"])
    return Trained(head.eval(), state["best_epoch"], state["history"])


def _resumed(resume: bytes, head: TuneJuryHead, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What `save` got, with head and optimizer as they were then."""
    names = {"best_loss", "best_epoch", "best", "history"}
    try:
        with zipfile.ZipFile(io.BytesIO(resume)) as archive:  # torch looks at the checksums of tensors alone
            if (record := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {record} is not that of its bytes")
        state = torch.load(io.BytesIO(resume), map_location=next(head.parameters()).device, weights_only=True)
        for weights in (state["best"], state.pop("head")):
            head.load_state_dict(weights)
        optimizer.load_state_dict(state.pop("optimizer"))
        return {name: state[name] for name in names}
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(
            f"the kept state of an unfinished head is damaged: {reason(error)}",
            "Delete heads/*.checkpoint: these heads are then trained from the start.",
        ) from error


def margins(head: TuneJuryHead, pairs: PackedPairs) -> torch.Tensor:
    """(P,) s(a) - s(b) in eval mode. Sides are scored in two calls of one shape: equal inputs then give exactly 0."""
    return scores(head, pairs, "a") - scores(head, pairs, "b")


@torch.inference_mode()
def scores(head: TuneJuryHead, pairs: PackedPairs, side: Literal["a", "b"]) -> torch.Tensor:
    """(P,) scores of one side of the pairs, in eval mode."""
    head.eval()
    clips = pairs.a if side == "a" else pairs.b
    parts = zip(clips.split(ROWS_AT_ONCE), pairs.text.split(ROWS_AT_ONCE), strict=True)
    return torch.cat([head(pairs.inputs(clip, text)) for clip, text in parts])


def validation_loss(head: TuneJuryHead, pairs: PackedPairs) -> float:
    """Mean binary cross-entropy of the margins against the targets, ties included."""
    return float(binary_cross_entropy_with_logits(margins(head, pairs), pairs.target))


def flops_per_pair(inputs: int, widths: tuple[int, ...]) -> int:
    """Floating-point operations of the matrix products of one training step, per pair.

    2 per weight and side in the forward pass and 4 in the backward pass, of which the first layer needs half only:
    features have no gradient.
    """
    first = inputs * widths[0]
    rest = sum(a * b for a, b in zip(widths, (*widths[1:], 1), strict=True))
    return 2 * (4 * first + 6 * rest)


def _epoch(
    head: TuneJuryHead, optimizer: torch.optim.Optimizer, pairs: PackedPairs, config: HeadConfig, seed: int, epoch: int
) -> float:
    """One pass over the pairs in a drawn order; mean training loss."""
    draw = np.random.default_rng((seed, epoch))
    order = draw.permutation(len(pairs))
    flip = draw.random(len(pairs)) < (0.5 if config.random_sides else 0.0)
    pairs = pairs.rows(order)
    device = pairs.clips.device
    swap = torch.from_numpy(flip).to(device)
    sides = torch.where(swap, pairs.b, pairs.a), torch.where(swap, pairs.a, pairs.b)
    target = torch.where(swap, 1 - pairs.target, pairs.target)
    total = torch.zeros((), device=device)
    head.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(draw.integers(2**62)))  # dropout
        for start, end in _batches(len(pairs), config.batch):
            a, b, text = sides[0][start:end], sides[1][start:end], pairs.text[start:end]
            if config.batch_norm == "single":
                score_a, score_b = head(pairs.inputs(torch.cat((a, b)), torch.cat((text, text)))).chunk(2)
            else:
                score_a, score_b = head(pairs.inputs(a, text)), head(pairs.inputs(b, text))
            loss = binary_cross_entropy_with_logits(score_a - score_b, target[start:end])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * (end - start)
    return float(total) / len(pairs)


def _batches(count: int, size: int) -> list[tuple[int, int]]:
    """Bounds of the batches; a remainder of one pair joins the batch before it (batch statistics need two)."""
    bounds = [*range(0, count, size), count]
    if count > size and count % size == 1:
        del bounds[-2]
    return list(pairwise(bounds))


def _copy(head: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in head.state_dict().items()}
