"""CLAP embeddings of audio and text: LAION's front end, transformers' `ClapModel`.

The contrastive audio-text model of Wu et al., "Large-scale Contrastive Language-Audio Pretraining
with Feature Fusion and Keyword-to-Caption Augmentation" (ICASSP 2023); weights and front end as in
LAION-AI/CLAP (laion_clap 1.1.7, HTSAT-base without fusion).
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import soxr
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import ClapConfig, ClapModel, PreTrainedTokenizerBase, RobertaTokenizer
from transformers.audio_utils import mel_filter_bank

from ttmray.errors import UserError
from ttmray.models import as_waves, init_for_debug, micro_batch, require_finite, seeded, side_by_side, to_float32
from ttmray.models.clap_weights import convert_laion_state_dict
from ttmray.models.protocol import CLAP_SAMPLE_RATE, Crop
from ttmray.models.state_dicts import read_state_dict

CLAP_SAMPLES = 480_000  # 10 s, the only length that the audio tower takes
TEXT_TOKENS = 77

N_FFT, HOP, MEL_BINS = 1024, 480, 64


class ClapFrontEnd(torch.nn.Module):
    """Waves to the log-mel input of the audio tower, as laion_clap computes it.

    STFT (1024, hop 480, periodic Hann, centred with reflection), power, 64 Slaney-scaled and -normalised mel
    bands from 50 to 14,000 Hz, 10 log10 with a floor of 1e-10, no top limit.
    """

    window: torch.Tensor
    mel: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            # The lowest filters are narrower than an STFT bin; so they are in the original.
            warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
            mel = mel_filter_bank(
                num_frequency_bins=N_FFT // 2 + 1,
                num_mel_filters=MEL_BINS,
                min_frequency=50.0,
                max_frequency=14_000.0,
                sampling_rate=CLAP_SAMPLE_RATE,
                norm="slaney",
                mel_scale="slaney",
            )
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)
        self.register_buffer("mel", torch.from_numpy(mel).float(), persistent=False)

    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        """(B, 480000) float32 -> (B, 1, 1001, 64) float32 in dB."""
        spectrum = torch.stft(waves, N_FFT, HOP, window=self.window, pad_mode="reflect", return_complex=True)
        power = spectrum.abs().square().transpose(1, 2)
        return (power @ self.mel).clamp_min(1e-10).log10().mul(10.0).unsqueeze(1)


def quantise_int16(waves: torch.Tensor) -> torch.Tensor:
    """Clips waves of any shape to [-1, 1] and rounds toward zero on the int16 grid, as laion_clap does first."""
    return waves.clamp(-1.0, 1.0).mul(32767.0).trunc().div(32767.0)


def limit_band(wave: np.ndarray, bandlimit_hz: int) -> np.ndarray:
    """A (T,) wave at 48 kHz without what lies above `bandlimit_hz`: down to twice that rate and up again.

    TuneJury's training features took this detour through 16 kHz (its released scorer does not).
    """
    down = soxr.resample(wave, CLAP_SAMPLE_RATE, 2 * bandlimit_hz, quality="HQ")
    up = soxr.resample(down, 2 * bandlimit_hz, CLAP_SAMPLE_RATE, quality="HQ")[: len(wave)]
    return np.pad(up, (0, len(wave) - len(up)))


def ten_second_windows(wave: np.ndarray, crop: Crop, seed: int | None = None) -> np.ndarray:
    """The (N, 480000) excerpts of a (T,) wave that are embedded.

    Shorter than 10 s: repeated a whole number of times, then zero-padded ("repeatpad"). Longer: `center`
    takes the middle, `random` one offset drawn from `seed`, `windows` every whole non-overlapping window from
    the start (a remainder below 10 s is left out).
    """
    if len(wave) <= CLAP_SAMPLES:
        repeated = np.tile(wave, CLAP_SAMPLES // len(wave))
        return np.pad(repeated, (0, CLAP_SAMPLES - len(repeated)))[None]
    if crop == "windows":
        count = len(wave) // CLAP_SAMPLES
        return wave[: count * CLAP_SAMPLES].reshape(count, CLAP_SAMPLES)
    overflow = len(wave) - CLAP_SAMPLES
    if crop == "center":
        start = overflow // 2
    elif seed is None:
        raise ValueError("crop='random' needs a seed, so that the embedding can be repeated")
    else:
        start = int(np.random.default_rng(seed).integers(overflow + 1))
    return wave[None, start : start + CLAP_SAMPLES]


class Clap:
    """Audio and text embeddings of one CLAP model.

    Args:
        model: any `ClapModel` without fusion; switched to eval mode and moved to `device`.
        tokenizer: RoBERTa's, with the pad id of the model.
        device: torch device.
        batch: most windows or texts per forward pass on an accelerator; a CPU always takes one at a time
            (see `ttmray.models.micro_batch`).
        threads: windows that a CPU computes side by side, each in one thread.

    Raises:
        UserError: the tokenizer does not belong to the model, or the model uses fusion.
    """

    def __init__(
        self,
        model: ClapModel,
        tokenizer: PreTrainedTokenizerBase,
        device: str | torch.device = "cpu",
        batch: int = 16,
        threads: int = 1,
    ) -> None:
        text: Any = model.config.text_config
        audio: Any = model.config.audio_config
        if tokenizer.pad_token_id != text.pad_token_id or len(tokenizer) > text.vocab_size:
            raise UserError(
                f"CLAP's tokenizer has {len(tokenizer)} tokens and pad id {tokenizer.pad_token_id}, "
                f"its model {text.vocab_size} and {text.pad_token_id}",
                "Use the tokenizer of FacebookAI/roberta-base.",
            )
        if audio.enable_fusion:
            raise UserError("CLAP models with feature fusion are not supported", "Use one without.")
        self.device = torch.device(device)
        self.model = model.eval().to(self.device)
        self.tokenizer = tokenizer
        self.front_end = ClapFrontEnd().to(self.device)
        self.dim: int = model.config.projection_dim
        self._batch = micro_batch(self.device, batch)
        self._threads = threads if self.device.type == "cpu" else 1

    @torch.inference_mode()
    def embed_audio(
        self,
        waves: np.ndarray | list[np.ndarray],
        crop: Crop = "center",
        seed: int | Sequence[int] | None = None,
        *,
        int16: bool = True,
        bandlimit_hz: int | None = None,
    ) -> np.ndarray:
        """Unit vectors of mono waves at 48 kHz.

        Args:
            waves: (B, T) float32, or a list of (T_i,) float32.
            crop: what is taken of waves longer than 10 s, see `ten_second_windows`; for `windows` the unit
                vectors of the windows are averaged and normalised again.
            seed: for crop="random": one for all waves, or one per wave. A wave's offset depends on its own
                seed and length only, never on a global generator.
            int16: clip and quantise as laion_clap's file interface does.
            bandlimit_hz: see `limit_band`; None keeps the full band.

        Returns:
            (B, dim) float32.

        Raises:
            ValueError: waves that are not mono float audio, an unknown crop, or no (or too few) seeds.
            RuntimeError: the model's output is not finite or not of unit norm.
        """
        if crop not in get_args(Crop):
            raise ValueError(f"crop must be one of {get_args(Crop)}, not {crop!r}")
        checked = as_waves(waves)
        if bandlimit_hz is not None:
            checked = [limit_band(wave, bandlimit_hz) for wave in checked]
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(checked)
        if len(seeds) != len(checked):
            raise ValueError(f"{len(seeds)} seeds for {len(checked)} waves")
        excerpts = [ten_second_windows(wave, crop, s) for wave, s in zip(checked, seeds, strict=True)]
        vectors = self._embed_windows([window for excerpt in excerpts for window in excerpt], int16)
        ends = np.cumsum([len(excerpt) for excerpt in excerpts])
        out = np.empty((len(checked), self.dim), np.float32)
        for i, (end, excerpt) in enumerate(zip(ends, excerpts, strict=True)):
            own = vectors[end - len(excerpt) : end]
            mean = own.mean(axis=0)
            out[i] = own[0] if len(own) == 1 else mean / np.linalg.norm(mean)
        return _unit(out, "CLAP audio")

    def _embed_windows(self, windows: list[np.ndarray], int16: bool) -> np.ndarray:
        def embed(part: list[np.ndarray]) -> np.ndarray:
            x = torch.from_numpy(np.stack(part)).to(self.device)
            mel = self.front_end(quantise_int16(x) if int16 else x)
            # From transformers 5 on an output object, whose pooler_output is projected and of unit norm.
            features = self.model.get_audio_features(input_features=mel.to(self.model.dtype)).pooler_output
            return to_float32(features, (len(x), self.dim), "CLAP audio")

        parts = [windows[start : start + self._batch] for start in range(0, len(windows), self._batch)]
        embedded = side_by_side(embed, parts, self._threads)
        return np.concatenate([np.empty((0, self.dim), np.float32), *embedded])

    def embed_text(self, texts: Sequence[str], *, empty_is_zero: bool = True) -> np.ndarray:
        """Unit vectors of texts; the empty string gives the zero vector (TuneJury's protocol).

        Texts are cut at 77 tokens and padded to 77 with a mask. Only "" is empty: " " is encoded.

        Args:
            empty_is_zero: off: the empty string is encoded like any other, as its start and end.

        Returns:
            (B, dim) float32.

        Raises:
            RuntimeError: the model's output is not finite or not of unit norm.
        """
        out = np.zeros((len(texts), self.dim), np.float32)
        filled = [i for i, text in enumerate(texts) if text != "" or not empty_is_zero]
        if filled:
            tokens = self.tokenizer(
                [texts[i] for i in filled],
                padding="max_length",
                truncation=True,
                max_length=TEXT_TOKENS,
                return_tensors="pt",
            )
            out[filled] = self._embed_tokens(tokens["input_ids"], tokens["attention_mask"])
            _unit(require_finite(out, "CLAP text")[filled], "CLAP text")
        return out

    def embed_tokens(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> np.ndarray:
        """Unit vectors of token rows.

        Args:
            input_ids: (B, L) int64 with RoBERTa's special tokens and padding.
            attention_mask: (B, L), 0 on padding.

        Returns:
            (B, dim) float32.

        Raises:
            RuntimeError: the model's output is not finite or not of unit norm.
        """
        return _unit(self._embed_tokens(input_ids, attention_mask), "CLAP text")

    @torch.inference_mode()
    def _embed_tokens(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> np.ndarray:
        parts = [np.empty((0, self.dim), np.float32)]
        for ids, mask in zip(input_ids.split(self._batch), attention_mask.split(self._batch), strict=True):
            features = self.model.get_text_features(
                input_ids=ids.to(self.device), attention_mask=mask.to(self.device)
            ).pooler_output
            parts.append(to_float32(features, (len(ids), self.dim), "CLAP text"))
        return np.concatenate(parts)


def _unit(vectors: np.ndarray, what: str) -> np.ndarray:
    require_finite(vectors, what)
    norms = np.linalg.norm(vectors, axis=1)
    if not np.allclose(norms, 1.0, atol=1e-2):  # loose for half precision; a dead tower gives 0
        raise RuntimeError(f"{what}: norms {norms.min():.3g} to {norms.max():.3g} instead of 1")
    return vectors


def htsat_base_config() -> ClapConfig:
    """HTSAT-base with RoBERTa-base, the architecture of LAION's music checkpoints (193.9 M parameters).

    Two defaults of transformers are wrong for it: the audio width (1024, not 768) and RoBERTa's LayerNorm
    epsilon (1e-5, not 1e-12).
    """
    return ClapConfig(
        audio_config={
            "patch_embeds_hidden_size": 128,
            "hidden_size": 1024,
            "depths": [2, 2, 12, 2],
            "num_attention_heads": [4, 8, 16, 32],
        },
        text_config={"layer_norm_eps": 1e-5},
        projection_dim=512,
    )


def load_laion_clap(
    path: str | Path,
    tokenizer_dir: str | Path,
    *,
    config: ClapConfig | None = None,
    device: str | torch.device = "cpu",
    batch: int = 16,
    threads: int = 1,
) -> Clap:
    """CLAP from a LAION checkpoint, or from a safetensors file made by `convert_laion_state_dict`.

    Args:
        path: `.pt` or `.safetensors`, in LAION's or in transformers' names.
        tokenizer_dir: local folder with RoBERTa's vocab.json and merges.txt (or tokenizer.json).
        config: architecture, default `htsat_base_config()`; the weights are checked against it.
        device: torch device.
        batch: most items per forward pass on an accelerator.
        threads: as in `Clap`.

    Raises:
        UserError: files that are absent or unsafe, weights of another architecture, another tokenizer, or a
            text tower that gives unrelated captions the same vector.
    """
    path, tokenizer_dir = Path(path), Path(tokenizer_dir)
    if not any((tokenizer_dir / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise UserError(f"{tokenizer_dir}: no RoBERTa tokenizer", "Put vocab.json and merges.txt there.")
    state = read_state_dict(path)
    if not any(key.startswith("audio_model.") for key in state):
        state = convert_laion_state_dict(state)
    model = ClapModel(config or htsat_base_config())
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(f"{path} is not of the configured CLAP architecture: {error}") from error
    clap = Clap(model, RobertaTokenizer.from_pretrained(tokenizer_dir, local_files_only=True), device, batch, threads)
    check_text_tower(clap)
    return clap


def check_text_tower(clap: Clap) -> None:
    """Refuses a collapsed text tower, as found in a public conversion (embeddings-benchmark/mteb issue 5069).

    Raises:
        UserError: all pairwise cosines of four unrelated captions exceed 0.95.
    """
    vectors = clap.embed_text(UNRELATED_CAPTIONS)
    cosines = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]
    if cosines.min() > 0.95:
        raise UserError(
            f"CLAP's text tower gives unrelated captions the same vector (cosines from {cosines.min():.4f})",
            "Use LAION's own checkpoint and convert it with load_laion_clap.",
        )


UNRELATED_CAPTIONS = (
    "a slow piano piece in a minor key",
    "fast death metal with screaming vocals",
    "8-bit video game music",
    "Bulgarian women's choir",
)


def byte_roberta_tokenizer() -> RobertaTokenizer:
    """RoBERTa's tokenizer class with one token per byte and no merges (261 tokens); needs no files."""
    # RoBERTa's order of special tokens; 256 printable stand-ins of the bytes, then the mask.
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet()), "<mask>"]
    return RobertaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def debug_clap(
    seed: int, width: int = 1, device: str | torch.device = "cpu", batch: int = 16, threads: int = 1
) -> Clap:
    """Tiny untrained CLAP with seeded weights and a byte tokenizer; 512-dimensional like the real one.

    Args:
        seed: of the weights; the global generator is left alone.
        width: factor on the hidden sizes, to make a costlier model for benchmarks.
        device: torch device.
        batch: most items per forward pass on an accelerator.
        threads: as in `Clap`.
    """
    config = ClapConfig(
        audio_config={
            "patch_embeds_hidden_size": 8 * width,
            "hidden_size": 64 * width,
            "depths": [1, 1, 2, 1],
            "num_attention_heads": [1, 2, 4, 8],
            "num_classes": 1,
        },
        text_config={
            "vocab_size": 261,
            "hidden_size": 32 * width,
            "intermediate_size": 64 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": TEXT_TOKENS + 3,
            "layer_norm_eps": 1e-5,
        },
        projection_dim=512,
    )
    with seeded(seed):
        model = ClapModel(config)
        init_for_debug(model)
    # Untrained batch statistics would leave every input as one large offset; music lies around -30 dB.
    norm = model.audio_model.audio_encoder.batch_norm
    norm.running_mean.fill_(-30.0)
    norm.running_var.fill_(20.0**2)
    return Clap(model, byte_roberta_tokenizer(), device, batch, threads)
