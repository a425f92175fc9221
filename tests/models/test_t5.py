"""T5 caption features: all 77 rows, masks, precision, loading a full checkpoint."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import T5Config, T5ForConditionalGeneration

from ttmray.errors import UserError
from ttmray.models.t5 import TextEncoder, byte_t5_tokenizer, debug_text_encoder, load_text_encoder

CAPTIONS = ("slow piano in a minor key", "death metal", "8-bit video game music", "Bulgarian women's choir")
TOKENIZER = byte_t5_tokenizer()


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return debug_text_encoder(0)


def test_all_rows_are_kept_and_padding_rows_are_not_zero(encoder):
    features = encoder.encode(CAPTIONS)
    assert features.shape == (4, 77, 64)
    assert features.dtype == np.float32
    padding = features[1, len("death metal") + 1 :]
    assert (np.abs(padding).max(axis=1) > 0.1).all()


def test_the_mask_reaches_the_encoder(encoder):
    # With it, the rows of real tokens do not notice how many padding tokens follow (up to rounding).
    short = TextEncoder(encoder.model, encoder.tokenizer, max_length=40)
    tokens = len(CAPTIONS[0]) + 1
    np.testing.assert_allclose(
        encoder.encode(CAPTIONS[:1])[0, :tokens], short.encode(CAPTIONS[:1])[0, :tokens], atol=1e-4
    )


def test_captions_differ_and_do_not_depend_on_their_neighbours(encoder):
    features = encoder.encode(CAPTIONS)
    assert np.array_equal(features[2:3], encoder.encode(CAPTIONS[2:3]))
    pooled = features.mean(axis=1)
    unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    assert (unit @ unit.T)[np.triu_indices(4, 1)].min() < 0.9
    assert encoder.encode([]).shape == (0, 77, 64)


def test_empty_and_long_captions_have_77_rows_too(encoder):
    features = encoder.encode(["", "x" * 500])
    assert features.shape == (2, 77, 64)
    assert np.isfinite(features).all()
    assert np.array_equal(features[1], encoder.encode(["x" * 76])[0])


def test_float16_weights_are_refused_and_bfloat16_is_not():
    model = debug_text_encoder(0).model
    with pytest.raises(UserError, match="float16"):
        TextEncoder(model.to(torch.float16), byte_t5_tokenizer())
    half = TextEncoder(debug_text_encoder(0).model.to(torch.bfloat16), byte_t5_tokenizer())
    features = half.encode(CAPTIONS)
    assert features.dtype == np.float32
    # Eight bits of mantissa through two layers; another encoder would be off by far more.
    exact = debug_text_encoder(0).encode(CAPTIONS)
    assert np.linalg.norm(features - exact) < 0.2 * np.linalg.norm(exact)


def test_a_model_that_gives_nan_raises():
    dead = debug_text_encoder(0)
    with torch.no_grad():
        dead.model.encoder.final_layer_norm.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        dead.encode(CAPTIONS)


@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=20))
def test_the_byte_tokenizer_has_one_token_per_byte_and_ends_each_text(text):
    tokens = TOKENIZER(text)["input_ids"]
    if not any(special in text for special in ("<pad>", "</s>", "<unk>")):
        assert len(tokens) == len(text.encode()) + 1
    assert tokens[-1] == TOKENIZER.eos_token_id == 1
    assert TOKENIZER.unk_token_id not in tokens[:-1] or "<unk>" in text


@pytest.fixture(params=["relu", "gated-gelu"], ids=["T5", "FLAN-T5"])
def checkpoint(request, tmp_path):
    """A full encoder-decoder checkpoint as on the hub, with its tokenizer."""
    sizes = {"vocab_size": 259, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(**sizes, num_decoder_layers=1, feed_forward_proj=request.param)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    byte_t5_tokenizer().save_pretrained(tmp_path)
    return tmp_path, model


def test_the_encoder_of_a_full_checkpoint_is_loaded_without_its_decoder(checkpoint):
    folder, model = checkpoint
    loaded = load_text_encoder(folder)
    tokens = loaded.tokenizer(["choir"], padding="max_length", max_length=77, return_tensors="pt")
    with torch.inference_mode():
        expected = model.encoder(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    np.testing.assert_allclose(loaded.encode(["choir"]), expected.numpy(), atol=1e-6)
    with pytest.raises(UserError, match="float16"):
        load_text_encoder(folder, dtype=torch.float16)


def test_a_tokenizer_json_is_read_without_sentencepiece_and_nothing_else_is(checkpoint, monkeypatch):
    folder, _ = checkpoint
    find = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "sentencepiece" else find(name, *rest)
    )
    load_text_encoder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="sentencepiece") as caught:
        load_text_encoder(folder)
    assert "ttmray[sentencepiece]" in caught.value.hint


def test_incomplete_folders_are_refused(checkpoint):
    folder, _ = checkpoint
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_text_encoder(folder)


def test_debug_models_follow_their_seed_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (debug_text_encoder(seed).encode(["choir"]) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
