"""Parity with LAION's own package, in an environment of its own, because it holds numpy below 2: make test-laion-clap.

The weights are seeded and of full size (HTSAT-base, RoBERTa-base). Where TTMRAY_LAION_CLAP names a folder with the
released .pt file, vocab.json and merges.txt, those are compared as well.
"""

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from ttmray.models.clap import Clap, byte_roberta_tokenizer, load_laion_clap, ten_second_windows
from ttmray.models.clap_weights import unwrap_state_dict
from ttmray.models.state_dicts import read_state_dict

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("laion_clap") is None, reason="laion_clap is not here; run make test-laion-clap"
)

LARGEST_DIFFERENCE = 1e-5
"""Of any number of an embedding, whose norm is 1."""
TEXTS = ["a calm piano", "", "fast drum and bass, 174 BPM", "Bulgarian women's choir " * 20]


def roberta_of_full_size(*_: Any, **__: Any) -> transformers.RobertaModel:
    """RoBERTa-base as its config.json describes it, not trained."""
    config = transformers.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
    )
    return transformers.RobertaModel(config)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_roberta_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def laion(tokenizer_dir: Path) -> Iterator[Callable[[], Any]]:
    """What makes the package's module. Only what it would download is put in: three tokenizers when it is imported,
    and a text tower, whose weights are then replaced, when a module is made."""
    with pytest.MonkeyPatch.context() as patch:
        tokenizer = transformers.RobertaTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
        for name in ("BertTokenizer", "RobertaTokenizer", "BartTokenizer"):
            patch.setattr(getattr(transformers, name), "from_pretrained", lambda *_, **__: tokenizer)
        patch.setattr(transformers.RobertaModel, "from_pretrained", roberta_of_full_size)
        import laion_clap

        yield lambda: laion_clap.CLAP_Module(enable_fusion=False, amodel="HTSAT-base", device="cpu").eval()


def seeded_checkpoint(module: Any, path: Path) -> None:
    """Writes the weights of a module as LAION's trainer does, every statistic and norm drawn too."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in module.model.state_dict().items():
        if value.is_floating_point() and not any(part in name for part in ("stft.conv", "melW", "attn_mask")):
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_mean"):
                value = -30 + 5 * noise  # decibels of music
            elif name.endswith("running_var"):
                value = 400 * (1 + 0.1 * noise.abs())
            elif value.ndim == 0:
                value = value + 0.1 * noise
            elif value.ndim == 1:
                value = (0.1 * noise + 1) if name.endswith("weight") else 0.1 * noise
            elif "embeddings" in name:
                value = noise
            else:  # attention of a text tower with smaller weights looks at all tokens alike: one vector for all texts
                value = noise * (2.0 if name.startswith("text_branch") else 1.0) / math.sqrt(value[0].numel())
        state[f"module.{name}"] = value
    state.setdefault("module.text_branch.embeddings.position_ids", torch.arange(514)[None])
    torch.save({"epoch": 15, "name": "seeded", "state_dict": state}, path)


def load_into(module: Any, checkpoint: Path) -> Any:
    """The package's module with the weights of a checkpoint. Its own loader unpickles freely, so ours reads them."""
    state = unwrap_state_dict(read_state_dict(checkpoint))
    state.pop("text_branch.embeddings.position_ids", None)  # a buffer that newer transformers do not keep
    missing, unexpected = module.model.load_state_dict(state, strict=False)
    assert [name for name in missing if not name.endswith("position_ids")] == []
    assert unexpected == []
    return module


def sounds() -> dict[str, np.ndarray]:
    """Mono waves at 48 kHz: as long as the model takes, shorter, longer, quiet, louder than full scale."""
    generator = np.random.default_rng(0)
    t = np.arange(480_000) / 48_000
    chord = sum(np.sin(2 * np.pi * f * t) for f in (220, 277, 330)) * np.exp(-3 * (t % 0.5))
    waves = {
        "noise": 0.3 * generator.standard_normal(480_000),
        "chord": 0.2 * chord,
        "sine": 0.5 * np.sin(2 * np.pi * 440 * t),
        "short": 0.3 * generator.standard_normal(200_000),
        "long": 0.3 * generator.standard_normal(700_000),
        "quiet": 1e-3 * chord,
        "clipped": 2.0 * chord,
    }
    return {name: wave.astype(np.float32) for name, wave in waves.items()}


@torch.inference_mode()
def compare(ours: Clap, theirs: Any) -> None:
    """Asserts that both packages embed sounds and texts alike, and that inputs differ by far more; prints figures."""
    waves = sounds()
    audio = ours.embed_audio(list(waves.values()))
    for (name, wave), vector in zip(waves.items(), audio, strict=True):
        excerpt = ten_second_windows(wave, "center")  # LAION's own crop of longer waves is random
        reference = theirs.get_audio_embedding_from_data(x=excerpt, use_tensor=False)[0]
        difference = float(np.abs(vector - reference).max())
        print(f"audio {name:8} largest difference {difference:.1e}")
        assert difference < LARGEST_DIFFERENCE, name
    # LAION squeezes a batch of one away, so every text goes with a companion that is dropped
    text = ours.embed_text(TEXTS, empty_is_zero=False)
    for words, vector in zip(TEXTS, text, strict=True):
        reference = theirs.get_text_embedding([words, words], use_tensor=False)[0]
        difference = float(np.abs(vector - reference).max())
        print(f"text  {words[:12]!r:14} largest difference {difference:.1e}")
        assert difference < LARGEST_DIFFERENCE, words
    for kind, vectors in (("audio", audio), ("text", text)):
        apart = np.abs(vectors[:, None] - vectors[None]).max(-1)[np.triu_indices(len(vectors), 1)].min()
        print(f"{kind}: any two inputs differ by {apart:.1e} or more")
        assert apart > 10 * LARGEST_DIFFERENCE, kind


def test_seeded_weights_of_full_size_embed_alike_in_both_packages(
    laion: Callable[[], Any], tokenizer_dir: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "seeded.pt"
    module = laion()
    seeded_checkpoint(module, checkpoint)
    compare(load_laion_clap(checkpoint, tokenizer_dir), load_into(module, checkpoint))


def test_released_weights_embed_alike_in_both_packages(laion: Callable[[], Any]) -> None:
    folder = os.environ.get("TTMRAY_LAION_CLAP")
    if not folder:
        pytest.skip("set TTMRAY_LAION_CLAP to a folder with the released .pt file, vocab.json and merges.txt")
    (checkpoint,) = Path(folder).glob("*.pt")
    module = load_into(laion(), checkpoint)
    ours = load_laion_clap(checkpoint, folder)
    module.tokenize = ours.tokenizer
    compare(ours, module)
