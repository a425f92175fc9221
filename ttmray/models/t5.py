"""Caption features: the encoder of T5 (Raffel et al. 2020; FLAN-T5-large of Chung et al. 2022, Apache-2.0).

MeanAudio's convention: captions are padded to 77 tokens, the mask goes to the encoder, and all 77 rows are
kept, padded ones included as the encoder gives them.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5EncoderModel, T5Tokenizer
from transformers.utils import logging

from ttmray.errors import UserError
from ttmray.models import init_for_debug, micro_batch, require_finite, seeded, to_float32


class TextEncoder:
    """Token features of captions.

    Args:
        model: any `T5EncoderModel` in float32 or bfloat16; switched to eval mode and moved to `device`.
        tokenizer: the model's, padding on the right.
        device: torch device.
        batch: most captions per forward pass on an accelerator; a CPU always takes one at a time (see
            `ttmray.models.micro_batch`).
        max_length: tokens per caption; longer ones are cut.

    Raises:
        UserError: float16 weights, or a tokenizer that does not belong to the model.
    """

    def __init__(
        self,
        model: T5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        device: str | torch.device = "cpu",
        batch: int = 32,
        max_length: int = 77,
    ) -> None:
        if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
            raise UserError(
                "T5 weights are float16, whose range its feed-forward layers exceed (infinities, then NaN)",
                "Load them as bfloat16 or float32.",
            )
        if tokenizer.pad_token_id != model.config.pad_token_id or len(tokenizer) > model.config.vocab_size:
            raise UserError(
                f"T5's tokenizer has {len(tokenizer)} tokens and pad id {tokenizer.pad_token_id}, its model "
                f"{model.config.vocab_size} and {model.config.pad_token_id}",
                "Use the tokenizer that lies beside the weights.",
            )
        self.device = torch.device(device)
        self.model = model.eval().to(self.device)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.dim: int = model.config.d_model
        self._batch = micro_batch(self.device, batch)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Encoder output for each token position.

        Returns:
            (B, max_length, D) float32; rows after the end-of-sequence token belong to padding.

        Raises:
            RuntimeError: the model's output is not finite.
        """
        parts = [np.empty((0, self.max_length, self.dim), np.float32)]
        for start in range(0, len(texts), self._batch):
            chunk = list(texts[start : start + self._batch])
            tokens = self.tokenizer(
                chunk,
                padding="max_length",
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.device)
            hidden = self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            shape = (len(chunk), self.max_length, self.dim)
            parts.append(to_float32(hidden.last_hidden_state, shape, "T5"))
        return require_finite(np.concatenate(parts), "T5")


class MeanTokens:
    """Pooled text vectors without CLAP: the mean of a caption's token features, padding included, as Resonate has it.

    It stands where a `Clap` gives the pooled condition of the backbone (role clap_condition).
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self.dim = encoder.dim

    def embed_text(self, texts: Sequence[str], *, empty_is_zero: bool = False) -> np.ndarray:
        """Vectors of texts.

        Args:
            empty_is_zero: "" gives the zero vector, as CLAP's does under TuneJury's protocol.

        Returns:
            (B, dim) float32.
        """
        vectors = self.encoder.encode(texts).mean(axis=1, dtype=np.float32)
        if empty_is_zero:
            vectors[[text == "" for text in texts]] = 0
        return vectors


def load_text_encoder(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    batch: int = 32,
    max_length: int = 77,
) -> TextEncoder:
    """T5's encoder from a local copy of a hub folder; the decoder in it is left out.

    Args:
        folder: with config.json, model.safetensors and the tokenizer's files.
        dtype: torch.float32 or torch.bfloat16.
        device: torch device.
        batch: most captions per forward pass on an accelerator.
        max_length: tokens per caption.

    Raises:
        UserError: files are missing, float16 was asked for, weights of the encoder are missing, or only sentencepiece,
            which is not here, can read the tokenizer.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name}", "Copy google/flan-t5-large there.")
    if not (folder / "tokenizer.json").is_file() and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"{folder} has no tokenizer.json, and sentencepiece, which reads spiece.model, is not installed.",
            "Copy tokenizer.json of google/flan-t5-large there, or: pip install 'ttmray[sentencepiece]'",
        )
    with without_bars():
        loaded: Any = T5EncoderModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
        )
    model, report = loaded
    foreign = [k for k in report["unexpected_keys"] if not k.startswith(("decoder.", "lm_head."))]
    if foreign or report["missing_keys"] or report["mismatched_keys"]:
        raise UserError(
            f"{folder} is not a T5 checkpoint of its config.json: missing {sorted(report['missing_keys'])}, "
            f"unknown {sorted(foreign)}, other shapes {sorted(map(str, report['mismatched_keys']))}"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return TextEncoder(model, tokenizer, device, batch, max_length)


@contextmanager
def without_bars() -> Iterator[None]:
    """transformers draws a bar for every model that it loads, be it of 2 MB, also into notebooks and logs."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def byte_t5_tokenizer() -> T5Tokenizer:
    """T5's tokenizer class with one token per byte and no files: pad 0, end of sequence 1, unknown 2."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = T5Tokenizer(vocab=specials + [(symbol, -1.0) for symbol in alphabet], extra_ids=0)
    # Bytes instead of T5's word pieces: printable stand-ins, split one by one, because an unknown character
    # would otherwise swallow its neighbours.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split(Regex("."), behavior="isolated"),
        ]
    )
    return tokenizer


def debug_text_encoder(
    seed: int, width: int = 1, device: str | torch.device = "cpu", batch: int = 32, max_length: int = 77
) -> TextEncoder:
    """Tiny untrained T5 encoder (d_model 64 x width) with seeded weights and a byte tokenizer.

    Args:
        seed: of the weights; the global generator is left alone.
        width: factor on all sizes, to make a costlier model for benchmarks.
        device: torch device.
        batch: most captions per forward pass on an accelerator.
        max_length: tokens (here bytes) per caption.
    """
    tokenizer = byte_t5_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64 * width,
        d_kv=16 * width,
        d_ff=128 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    with seeded(seed):
        model = T5EncoderModel(config)
        init_for_debug(model)
    return TextEncoder(model, tokenizer, device, batch, max_length)
