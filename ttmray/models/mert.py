"""MERT embeddings, in transformers' own `HubertModel`.

The music encoder of Li et al., "MERT: Acoustic Music Understanding Model with Large-Scale Self-supervised
Training" (ICLR 2024), has HuBERT's shape.

The released weights (m-a-p/MERT-v1-330M, CC-BY-NC 4.0) fit it name for name; the Python code that lies beside
them is never run.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import HubertConfig, HubertModel

from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.models import as_waves, init_for_debug, micro_batch, require_finite, seeded, side_by_side, to_float32
from ttmray.models.protocol import MERT_SAMPLE_RATE
from ttmray.models.state_dicts import read_state_dict

TEN_SECONDS = 10 * MERT_SAMPLE_RATE
SEGMENT_SAMPLES = 300 * MERT_SAMPLE_RATE
SHORTEST_SEGMENT_SAMPLES = 1 * MERT_SAMPLE_RATE


def segment_bounds(samples: int) -> list[tuple[int, int]]:
    """Consecutive 300 s segments [start, end) of a wave; a last one below 1 s joins the one before.

    The cut is that of TuneJury's released score tables.
    """
    starts = list(range(0, samples, SEGMENT_SAMPLES))
    if len(starts) > 1 and samples - starts[-1] < SHORTEST_SEGMENT_SAMPLES:
        starts.pop()
    return list(zip(starts, [*starts[1:], samples], strict=True))


class Mert:
    """Time means of the last hidden state of one MERT model.

    Args:
        model: any `HubertModel`; switched to eval mode and moved to `device`.
        normalize: zero mean and unit variance per segment before the model (`do_normalize` of the weights'
            preprocessor_config.json).
        device: torch device.
        batch: most 10 s clips per forward pass on an accelerator, and proportionally fewer longer segments
            (activations grow with the length); a CPU always takes one at a time, see
            `ttmray.models.micro_batch`.
    """

    def __init__(
        self,
        model: HubertModel,
        normalize: bool = False,
        device: str | torch.device = "cpu",
        batch: int = 16,
        threads: int = 1,
    ) -> None:
        self.device = torch.device(device)
        self.model = model.eval().to(self.device)
        self._threads = threads if self.device.type == "cpu" else 1
        self.normalize = normalize
        self.dim: int = model.config.hidden_size
        self._batch = micro_batch(self.device, batch)

    def frames(self, samples: int) -> int:
        """Hidden states that the convolutions make of a wave, 0 if it is too short (240,000 samples: 749)."""
        config = self.model.config
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            samples = max((samples - kernel) // stride + 1, 0)
        return samples

    def embed(self, waves: np.ndarray | list[np.ndarray]) -> np.ndarray:
        """Mean over time of the last hidden state (TuneJury's MERT feature).

        Longer waves than 300 s are cut into segments (`segment_bounds`) and averaged by their frame counts.
        Padding would change the result (group norm over time), so only segments of equal length share a
        forward pass, and no mask exists.

        Args:
            waves: mono at 24 kHz: (B, T) float32, or a list of (T_i,) float32.

        Returns:
            (B, H) float32.

        Raises:
            ValueError: waves that are not mono float audio, or too short for a single frame.
            RuntimeError: the model's output is not finite.
        """
        checked = as_waves(waves)
        by_length: dict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)
        for i, wave in enumerate(checked):
            if self.frames(len(wave)) == 0:
                raise ValueError(f"wave {i} has {len(wave)} samples, too few for one frame of MERT")
            for start, end in segment_bounds(len(wave)):
                by_length[end - start].append((i, wave[start:end]))
        # Float64, so that a wave of one segment keeps its mean bit for bit.
        total = np.zeros((len(checked), self.dim), np.float64)
        weight = np.zeros((len(checked), 1), np.float64)
        for length, segments in by_length.items():
            per_pass = max(min(self._batch, self._batch * TEN_SECONDS // length), 1)
            chunks = [segments[start : start + per_pass] for start in range(0, len(segments), per_pass)]
            stacked = [np.stack([segment for _, segment in chunk]) for chunk in chunks]
            for chunk, means in zip(chunks, side_by_side(self._time_means, stacked, self._threads), strict=True):
                for (i, _), mean in zip(chunk, means, strict=True):
                    total[i] += self.frames(length) * mean.astype(np.float64)
                    weight[i] += self.frames(length)
        return require_finite((total / weight).astype(np.float32), "MERT")

    @torch.inference_mode()
    def _time_means(self, segments: np.ndarray) -> np.ndarray:
        hidden = self.last_hidden_state(torch.from_numpy(segments).to(self.device))
        return to_float32(hidden.float().mean(dim=1), (len(segments), self.dim), "MERT")

    @torch.inference_mode()
    def last_hidden_state(self, waves: torch.Tensor) -> torch.Tensor:
        """(B, T) float32 waves of equal length -> (B, frames, H) after the final LayerNorm."""
        if self.normalize:
            centred = waves - waves.mean(dim=1, keepdim=True)
            waves = centred / (waves.var(dim=1, keepdim=True, correction=0) + 1e-7).sqrt()
        # Not hidden_states[-1]: from transformers 5 that is taken before the final LayerNorm.
        return self.model(waves.to(self.model.dtype)).last_hidden_state


def mert_330m_config() -> HubertConfig:
    """Architecture of MERT-v1-330M (315.4 M parameters), from the authors' 330M training configuration."""
    return HubertConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        do_stable_layer_norm=True,
        feat_extract_norm="group",
        conv_bias=False,
        mask_time_prob=0.075,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
    )


def load_mert(
    source: str | Path | Mapping[str, torch.Tensor],
    *,
    config: HubertConfig | None = None,
    normalize: bool | None = None,
    device: str | torch.device = "cpu",
    batch: int = 16,
    threads: int = 1,
) -> Mert:
    """MERT from a local copy of the hub's folder, or from a state dict.

    Args:
        source: folder with model.safetensors or pytorch_model.bin, or one such file (config.json and
            preprocessor_config.json beside it are read if present), or a state dict in the shapes of the
            architecture. Weight-norm tensors may be named weight_g / weight_v.
        config: architecture; default: the folder's config.json, else `mert_330m_config()`. Weights are
            checked against it.
        normalize: input normalisation; default: the folder's `do_normalize`, else False (as in training).
        device: torch device.
        batch: most 10 s clips per forward pass on an accelerator.

    Raises:
        UserError: missing or unsafe files, another sample rate, an architecture that `HubertModel` is not,
            or weights that do not fit.
    """
    if isinstance(source, Mapping):
        what, state = "the MERT state dict", dict(source)
    else:
        path = Path(source)
        folder = path if path.is_dir() else path.parent
        what, state = str(path), _read_weights(path)
        if config is None and (folder / "config.json").is_file():
            config = _hubert_config(folder / "config.json")
        if normalize is None and (folder / "preprocessor_config.json").is_file():
            normalize = _do_normalize(folder / "preprocessor_config.json")
    model = HubertModel(config or mert_330m_config())
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"{what} does not fit the configured MERT architecture: {error}",
            "Check config.json beside the weights.",
        ) from error
    return Mert(model, bool(normalize), device, batch, threads)


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    for file in (path, path / "model.safetensors", path / "pytorch_model.bin"):
        if file.is_file():
            return read_state_dict(file)
    raise UserError(f"{path}: neither model.safetensors nor pytorch_model.bin", "Copy m-a-p/MERT-v1-330M there.")


def _hubert_config(path: Path) -> HubertConfig:
    settings = read_json(path.read_text(encoding="utf-8"))
    # deepnorm changes the arithmetic without changing any shape. attention_relax is an identity in exact
    # arithmetic and unused with do_stable_layer_norm; a CQT input would show in the shapes.
    if settings.get("deepnorm"):
        raise UserError(f"{path}: deepnorm is not supported", "Use MERT-v1-330M.")
    known = HubertConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version", "dtype"}
    return HubertConfig(**{key: value for key, value in settings.items() if key in known})


def _do_normalize(path: Path) -> bool:
    settings = read_json(path.read_text(encoding="utf-8"))
    rate = settings.get("sampling_rate", MERT_SAMPLE_RATE)
    if rate != MERT_SAMPLE_RATE:
        raise UserError(f"{path}: sampling_rate is {rate}, MERT v1 runs at {MERT_SAMPLE_RATE}")
    return bool(settings.get("do_normalize", True))  # transformers' default where the file is silent


def debug_mert(
    seed: int, width: int = 1, device: str | torch.device = "cpu", batch: int = 16, threads: int = 1
) -> Mert:
    """Tiny untrained MERT (hidden size 64 x width) with seeded weights.

    Args:
        seed: of the weights; the global generator is left alone.
        width: factor on all sizes, to make a costlier model for benchmarks.
        device: torch device.
        batch: most 10 s clips per forward pass on an accelerator.
    """
    config = HubertConfig(
        conv_dim=[16 * width] * 7,
        hidden_size=64 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128 * width,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        do_stable_layer_norm=True,
        mask_time_prob=0.075,
    )
    with seeded(seed):
        model = HubertModel(config)
        init_for_debug(model)
    return Mert(model, normalize=False, device=device, batch=batch, threads=threads)
