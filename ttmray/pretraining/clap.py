"""Training of CLAP: audio and captions into one space.

Full size: LAION-CLAP (Wu et al. 2023), HTSAT-base and RoBERTa-base, both pretrained, symmetric InfoNCE, batch 768 and
more, Adam (0.9, 0.99) with cosine decay from 1e-4. Here both towers and the tokenizer start from nothing, and the true
attributes of the clips help: beside InfoNCE each tower learns to tell them by a linear layer that is thrown away
(`attribute_weight: 0` is the plain recipe). Captions of the web speak of noisy and muffled recordings, and ours never
do; so that a reward head on its vectors can hear quality at all, the audio vector also tells the strengths of the
clip's faults (`fault_weight`, 0 for the plain recipe). The second CLAP may go on from the first (`start`), as LAION's
music checkpoints are of one family: what it lacks is not another beginning but hours.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from pydantic import Field
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import ClapConfig, ClapModel, RobertaTokenizer

from ttmray.config import added
from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.models import seeded
from ttmray.models.clap import TEXT_TOKENS, Clap, ClapFrontEnd, ten_second_windows
from ttmray.models.protocol import CLAP_SAMPLE_RATE
from ttmray.models.state_dicts import read_state_dict
from ttmray.pretraining.clips import ClipSet, place
from ttmray.pretraining.labels import Labels, fault_row, quality_r
from ttmray.pretraining.loop import Part, PartConfig, to_half, weights_of
from ttmray.pretraining.losses import info_nce
from ttmray.storage import Folder
from ttmray.synth.faults import KINDS, add_faults, draw_more
from ttmray.synth.instruments import RATE
from ttmray.training.tensors import pack


class CLAPConfig(PartConfig):
    """The micro CLAP: 2.5 M parameters, about 0.05 CPU seconds per pair."""

    steps: int = Field(2500, ge=1)
    batch: int = Field(32, ge=2)
    betas: tuple[float, float] = (0.9, 0.98)
    depths: tuple[int, int, int, int] = (1, 1, 2, 1)
    audio_dim: int = Field(32, ge=16, multiple_of=16)
    """Width of its first stage; each of the following doubles it."""
    text_dim: int = Field(128, ge=8)
    text_layers: int = Field(2, ge=1)
    vocabulary: int = Field(800, ge=300)
    embed_dim: int = Field(512, ge=8)
    attribute_weight: float = Field(3.0, ge=0)
    """Of the attributes' cross-entropy, against InfoNCE of weight 1."""
    fault_weight: float = Field(0.0, ge=0)
    """Of the squared error of the faults' strengths, in units of their deviation, read from the audio vector."""
    new_faults: float = Field(0.0, ge=0, le=1)
    """Share of the clips that get one or two audio faults more, drawn anew each time. Without it, the noises of some
    thousand clips are learned by heart."""
    start: Literal["clap"] | None = added(None)
    """Part whose weights are the first ones, of the same shape and vocabulary and trained before; None: drawn ones."""


class _Towers(nn.Module):
    """CLAP, and the layers that tell attributes, as one thing to train."""

    def __init__(self, clap: ClapModel, shares: np.ndarray) -> None:
        """`shares` (labels,): how often each label is true. Layers that begin there have only differences to learn;
        from zero, both towers collapse to one vector within 20 updates and stay there (measured)."""
        super().__init__()
        self.clap = clap
        odds = torch.from_numpy(np.log(shares / (1 - shares).clip(1e-4))).float()
        config: Any = clap.config
        self.from_audio = nn.Linear(config.audio_config.hidden_size, len(shares))
        self.from_text = nn.Linear(config.text_config.hidden_size, len(shares))
        self.faults = nn.Linear(config.projection_dim, len(KINDS))
        for layer in (self.from_audio, self.from_text):
            layer.bias.data.copy_(odds)


class CLAPPart(Part):
    """Pairs of a clip and one of its captions; a clip and its caption come back in other wordings every epoch."""

    name = "clap"

    def __init__(self, config: CLAPConfig, clips: ClipSet, device: torch.device, start: Path | None = None) -> None:
        """`start`: the file of the weights to go on from.

        Raises:
            UserError: they are of another shape.
        """
        self.config, self.clips, self.device = config, clips, device
        truths = clips.truths()
        self.labels = Labels.of([truth.attributes for truth in truths])
        self.tokenizer = caption_tokenizer([text for truth in truths for text in truth.captions], config.vocabulary)
        self.front_end = ClapFrontEnd().to(device)
        with seeded(config.seed):
            shares = np.mean([self.labels.row(truth.attributes) for truth in truths], axis=0)
            self.model: _Towers = _Towers(ClapModel(clap_config(config, len(self.tokenizer))), shares)
        norm = self.model.clap.audio_model.audio_encoder.batch_norm
        norm.running_mean.fill_(-30.0)  # dB; music lies about there
        norm.running_var.fill_(20.0**2)
        if start is not None:
            self._go_on_from(start)
        self.model.to(device)

    def _go_on_from(self, start: Path) -> None:
        state = {name: value.float() if value.is_floating_point() else value
                 for name, value in read_state_dict(start).items()}  # fmt: skip
        try:
            self.model.clap.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f"{start} is of another shape: {error}", "Give both CLAPs the same depths, widths and vocabulary."
            ) from error

    def batch(self, position: int, count: int) -> dict[str, Tensor]:
        """Log-mels (count, 1, 1001, 64), tokens (count, 77) and their mask, labels (count, labels), faults
        (count, kinds)."""
        mels, texts, rows, faults = [], [], [], []
        for i in range(position, position + count):
            index = place(self.config.seed, i, self.clips.count)
            rng = np.random.default_rng([self.config.seed, i])
            truth = self.clips.truth(index)
            mix, strengths = self.clips.mix(index), truth.faults
            if rng.random() < self.config.new_faults:
                more = draw_more(strengths, rng)
                mix, strengths = add_faults(mix, more, rng), strengths | more
            mels.append(self._mel(mix.mean(axis=0) * np.float32(10 ** (rng.uniform(-12, 3) / 20))))
            texts.append(truth.captions[int(rng.integers(len(truth.captions)))])
            rows.append(self.labels.row(truth.attributes))
            faults.append(fault_row(strengths))
        labels, told = (torch.from_numpy(np.stack(part)).to(self.device) for part in (rows, faults))
        return {"mel": torch.cat(mels), "labels": labels, "faults": told, **self._tokens(texts)}

    def _mel(self, wave: np.ndarray) -> Tensor:
        resampled = soxr.resample(wave, RATE, CLAP_SAMPLE_RATE, quality="HQ")
        with torch.no_grad():
            window = torch.from_numpy(ten_second_windows(resampled, "center")).to(self.device)
            return self.front_end(window)

    def _tokens(self, texts: list[str]) -> dict[str, Tensor]:
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=TEXT_TOKENS, return_tensors="pt")
        return {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        clap = self.model.clap
        heard = clap.audio_model(input_features=batch["mel"]).pooler_output
        read = clap.text_model(batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
        audio, text = F.normalize(clap.audio_projection(heard)), F.normalize(clap.text_projection(read))
        contrast, right = info_nce(audio, text, clap.logit_scale_a)
        losses, loss = {"contrast": contrast, "right": right}, contrast
        if self.config.fault_weight:
            told = self.model.faults(audio * audio.shape[1] ** 0.5)  # elements of about 1
            losses["faults"] = F.mse_loss(told, batch["faults"])
            loss = loss + self.config.fault_weight * losses["faults"]
        if self.config.attribute_weight:
            entropy = F.binary_cross_entropy_with_logits
            losses["of_audio"] = entropy(self.model.from_audio(heard), batch["labels"])
            losses["of_text"] = entropy(self.model.from_text(read), batch["labels"])
            loss = loss + self.config.attribute_weight * (losses["of_audio"] + losses["of_text"])
        return {"loss": loss, **losses}

    def measure(self, fresh: ClipSet) -> dict[str, float]:
        """Share of captions that find their own clip first among 50 (chance 0.02), in both kinds of wordings; and
        how true quality correlates with what a linear probe reads from the audio vector."""
        state = weights_of(self.model.clap, half=False)
        model = ClapModel(self.model.clap.config)
        model.load_state_dict(state)
        clap = Clap(model, self.tokenizer)
        waves = [soxr.resample(fresh.mono(i), RATE, CLAP_SAMPLE_RATE, quality="HQ") for i in range(fresh.count)]
        audio = clap.embed_audio(waves)
        truths = fresh.truths()
        seen = clap.embed_text([truth.captions[0] for truth in truths])
        unseen = clap.embed_text([truth.unseen[0] for truth in truths])
        quality = quality_r(audio.astype(np.float64), [truth.quality for truth in truths])
        recalls = {"r1_of_50": recall_at_1(audio, seen), "r1_of_50_unseen": recall_at_1(audio, unseen)}
        return recalls | {"quality_r": quality}

    def export(self, out: Folder, half: bool) -> None:
        """Weights in transformers' names, its `config.json` and the tokenizer, as `load_laion_clap` reads them."""
        state = weights_of(self.model.clap, half=False)
        out.write("config.json", json.dumps(self.model.clap.config.to_dict(), indent=1, sort_keys=True).encode())
        write_bpe(self.tokenizer, out)
        out.write("model.safetensors", pack(to_half(state) if half else state))


def clap_config(config: CLAPConfig, vocabulary: int) -> ClapConfig:
    """Of transformers, for a trainer's config."""
    width = config.audio_dim
    return ClapConfig(
        audio_config={
            "patch_embeds_hidden_size": width,
            "hidden_size": 8 * width,
            "depths": list(config.depths),
            "num_attention_heads": [width // 16 * 2**i for i in range(4)],
            "num_classes": 1,
            "drop_path_rate": 0.0,
        },
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": config.text_dim,
            "intermediate_size": 2 * config.text_dim,
            "num_hidden_layers": config.text_layers,
            "num_attention_heads": 4,
            "max_position_embeddings": TEXT_TOKENS + 3,
            "layer_norm_eps": 1e-5,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": config.text_dim**-0.5,
        },
        projection_dim=config.embed_dim,
    )


def caption_tokenizer(texts: Sequence[str], vocabulary: int) -> RobertaTokenizer:
    """RoBERTa's tokenizer with byte-level merges learned from captions: the same texts give the same one."""
    learner = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    learner.train_from_iterator(texts, vocabulary, min_frequency=2, special_tokens=specials, show_progress=False)
    model: Any = read_json(learner.to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]
    return RobertaTokenizer(vocab=model["vocab"], merges=merges)


def write_bpe(tokenizer: RobertaTokenizer, out: Folder) -> None:
    """`vocab.json` and `merges.txt`."""
    model: Any = read_json(tokenizer.backend_tokenizer.to_str())["model"]
    out.write("vocab.json", json.dumps(model["vocab"], ensure_ascii=False).encode())
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    out.write("merges.txt", f"#version: 0.2\n{merges}".encode())


def recall_at_1(audio: np.ndarray, text: np.ndarray, of: int = 50) -> float:
    """Text to audio, rows i of (n, d) a pair: the mean over all whole groups of `of` rows; of fewer rows, of all."""
    size = min(of, len(text))
    groups = [slice(start, start + size) for start in range(0, len(text) - size + 1, size)]
    hits = [(text[group] @ audio[group].T).argmax(axis=1) == np.arange(size) for group in groups]
    return float(np.mean(hits))
