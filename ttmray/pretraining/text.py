"""Training of the caption encoder: T5's masked spans on captions.

Full size: T5 (Raffel et al. 2020), 770 M parameters on C4: 15 % of the tokens in spans of mean length 3 are replaced by
sentinels, and a decoder writes them down; Adafactor at 0.01 with an inverse square root schedule. Here the same on
captions of training wordings, with AdamW and a tokenizer learned from them. The decoder is thrown away. Filling gaps
needs little of what a whole caption says, so that the true attributes of its clip may help, as they help CLAP
(`attribute_weight`, 0 for the plain recipe).
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Tokenizer

from ttmray.config import added
from ttmray.models import seeded
from ttmray.models.t5 import TextEncoder
from ttmray.pretraining.clips import UNSEEN, ClipSet, place
from ttmray.pretraining.labels import Labels, probe
from ttmray.pretraining.loop import Part, PartConfig, weights_of
from ttmray.storage import Folder
from ttmray.training.tensors import pack

TOKENS = 77
SENTINELS = 32


class TextConfig(PartConfig):
    """The micro encoder: 0.5 M parameters with its tokenizer's vectors; seconds per thousand captions."""

    steps: int = Field(3000, ge=1)
    batch: int = Field(32, ge=1)
    half: bool = False
    """T5's feed-forward layers overflow half precision in use, so its loader refuses that; the file is small."""
    dim: int = Field(128, ge=16)
    layers: int = Field(2, ge=1)
    vocabulary: int = Field(600, ge=200)
    noise: float = Field(0.25, gt=0, lt=1)
    """Share of the tokens that are masked (T5: 0.15; captions are short and regular)."""
    span: float = Field(3.0, ge=1)
    """Mean length of a masked span."""
    attribute_weight: float = added(0.0, ge=0)
    """Of the cross-entropy of the clip's attributes, told from the mean over the tokens by a layer that is thrown away,
    against the gaps of weight 1."""


class _Reader(nn.Module):
    """T5, and the layer that tells attributes, if any, as one thing to train."""

    def __init__(self, t5: T5ForConditionalGeneration, told: nn.Linear | None) -> None:
        super().__init__()
        self.t5, self.told = t5, told


class TextPart(Part):
    """Captions in training wordings; tempo, style and the rest must be told from each other to fill the gaps."""

    name = "text"

    def __init__(self, config: TextConfig, clips: ClipSet, device: torch.device) -> None:
        self.config, self.clips, self.device = config, clips, device
        texts = [text for truth in clips.truths() for text in truth.captions]
        self.labels = Labels.of([truth.attributes for truth in clips.truths()])
        self.tokenizer = unigram_tokenizer(texts, config.vocabulary)
        shape = cast(Any, T5Config)(  # it takes more than its signature says
            vocab_size=len(self.tokenizer),
            d_model=config.dim,
            d_kv=config.dim // 4,
            d_ff=2 * config.dim,
            num_layers=config.layers,
            num_decoder_layers=config.layers,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
        with seeded(config.seed):
            t5 = T5ForConditionalGeneration(shape)
            told = nn.Linear(config.dim, self.labels.size) if config.attribute_weight else None
        self.model: _Reader = _Reader(t5, told)
        self.model.to(device)

    def batch(self, position: int, count: int) -> dict[str, Tensor]:
        """Token rows with gaps (count, n), their mask (count, n), what was in the gaps (count, m), -100 beyond, and
        attributes (count, labels)."""
        inputs, targets, rows = [], [], []
        for i in range(position, position + count):
            rng = np.random.default_rng([self.config.seed, i])
            truth = self.clips.truth(place(self.config.seed, i, self.clips.count))
            captions = truth.captions
            tokens = self.tokenizer(captions[int(rng.integers(len(captions)))])["input_ids"][: TOKENS - 1]
            source, target = corrupt(tokens[:-1], self.tokenizer, rng, self.config.noise, self.config.span)
            inputs.append(source)
            targets.append(target)
            rows.append(self.labels.row(truth.attributes))
        ids, labels = _padded(inputs, 0), _padded(targets, -100)
        batch = {"input_ids": ids, "mask": ids != 0, "labels": labels, "attributes": torch.from_numpy(np.stack(rows))}
        return {name: value.to(self.device) for name, value in batch.items()}

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        out = self.model.t5(input_ids=batch["input_ids"], attention_mask=batch["mask"], labels=batch["labels"])
        known = batch["labels"] >= 0
        right = (out.logits.argmax(dim=2)[known] == batch["labels"][known]).float().mean()
        if self.model.told is None:
            return {"loss": out.loss, "right": right}
        mask = batch["mask"].float()[..., None]
        mean = (out.encoder_last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
        attributes = F.binary_cross_entropy_with_logits(self.model.told(mean), batch["attributes"])
        loss = out.loss + self.config.attribute_weight * attributes
        return {"loss": loss, "gaps": out.loss, "attributes": attributes, "right": right}

    def measure(self, fresh: ClipSet) -> dict[str, float]:
        """Linear probes of the mean over a caption's tokens, in held-out wordings, of what the caption tells."""
        encoder = TextEncoder(self._encoder(), self.tokenizer)
        texts, attributes = [], []
        for truth in fresh.truths():
            texts += truth.unseen
            attributes += [truth.attributes] * len(truth.unseen)
        lengths = [min(len(self.tokenizer(text)["input_ids"]), TOKENS) for text in texts]
        rows = encoder.encode(texts)
        means = np.stack([row[:length].mean(axis=0) for row, length in zip(rows, lengths, strict=True)])
        return probe(means.astype(np.float64), attributes, per_clip=UNSEEN)

    def _encoder(self) -> T5EncoderModel:
        encoder = T5EncoderModel(T5Config(**self.model.t5.config.to_dict() | {"is_encoder_decoder": False}))
        state = weights_of(self.model.t5, half=False)
        encoder.load_state_dict({name: state[name] for name in encoder.state_dict()})
        return encoder

    def export(self, out: Folder, half: bool) -> None:
        """A hub folder, as `load_text_encoder` reads it; half precision means bfloat16 there and is not written."""
        encoder = self._encoder()
        out.write("config.json", json.dumps(encoder.config.to_dict(), indent=1, sort_keys=True).encode())
        out.write("tokenizer.json", self.tokenizer.backend_tokenizer.to_str(pretty=True).encode())
        about = {"tokenizer_class": "T5Tokenizer", "extra_ids": SENTINELS, "model_max_length": TOKENS}
        out.write("tokenizer_config.json", json.dumps(about, indent=1).encode())
        state = weights_of(encoder, half=False)
        out.write(
            "model.safetensors", pack({name: state[name] for name in state if name != "encoder.embed_tokens.weight"})
        )


def unigram_tokenizer(texts: Sequence[str], vocabulary: int) -> T5Tokenizer:
    """T5's tokenizer class with pieces learned from captions: the same texts give the same one.

    The pieces are those of byte-pair merges, with log frequencies as scores of the unigram model. (The library's own
    unigram trainer gives other pieces at every call, so a run could not go on.)
    """
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - 3, special_tokens=["<unk>"], show_progress=False)
    learner.train_from_iterator(texts, trainer)
    counts = Counter(dict.fromkeys(learner.get_vocab(), 1))
    for encoding in learner.encode_batch(list(texts)):
        counts.update(encoding.tokens)
    del counts["<unk>"]
    total = sum(counts.values())
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    pieces = [(piece, math.log(count / total)) for piece, count in ranked]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces], extra_ids=SENTINELS)


def corrupt(
    tokens: Sequence[int], tokenizer: T5Tokenizer, rng: np.random.Generator, noise: float, span: float
) -> tuple[list[int], list[int]]:
    """T5's span corruption of the tokens of a text without its end.

    Returns:
        The text with a sentinel for each masked span, and each sentinel followed by its span; both with an end.
    """
    masked = max(1, round(len(tokens) * noise))
    spans = min(max(1, round(masked / span)), masked, SENTINELS, max(1, len(tokens) - masked))
    lengths = _parts(masked, spans, rng)
    gaps = _parts(len(tokens) - masked, spans, rng) if len(tokens) - masked >= spans else [0] * spans
    end = tokenizer.eos_token_id
    source: list[int] = []
    target: list[int] = []
    at = 0
    for i, (gap, length) in enumerate(zip(gaps, lengths, strict=True)):
        sentinel = cast(int, tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>"))
        source += [*tokens[at : at + gap], sentinel]
        target += [sentinel, *tokens[at + gap : at + gap + length]]
        at += gap + length
    return [*source, *tokens[at:], end], [*target, end]


def _parts(total: int, count: int, rng: np.random.Generator) -> list[int]:
    """`total` as `count` positive numbers, each composition as likely as any other."""
    cuts = np.sort(rng.choice(np.arange(1, total), count - 1, replace=False)) if count > 1 else np.array([], int)
    return [int(n) for n in np.diff([0, *cuts, total])]


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
