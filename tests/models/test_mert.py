"""MERT: the authors' numbers through transformers' HubertModel, segments, ragged batches, loading."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import HubertConfig, HubertModel

from ttmray.errors import UserError
from ttmray.models.mert import (
    MERT_SAMPLE_RATE,
    SEGMENT_SAMPLES,
    Mert,
    debug_mert,
    load_mert,
    mert_330m_config,
    segment_bounds,
)

GOLDEN_ATOL = 1e-5  # mert.json names none; the record agrees across transformers versions to 2.7e-6


@pytest.fixture(scope="module")
def mert() -> Mert:
    return debug_mert(0)


def tones(*samples: int) -> list[np.ndarray]:
    """Waves of the given lengths with a partial each of their own."""
    noise = np.random.default_rng(0).normal(scale=0.05, size=max(samples))
    seconds = np.arange(max(samples)) / MERT_SAMPLE_RATE
    return [
        (np.sin(2 * np.pi * 220 * (i + 1) * seconds) * np.exp(-2 * (seconds % 0.5)) + noise)[:n].astype(np.float32)
        for i, n in enumerate(samples)
    ]


# ---- golden ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(golden_dir):
    """(weights of the authors' class, its config, recorded inputs and outputs)."""
    about = json.loads((golden_dir / "mert.json").read_text())
    weights = load_file(golden_dir / "mert_weights.safetensors")
    return weights, about["hubert_config"], load_file(golden_dir / "mert_io.safetensors")


@pytest.mark.parametrize(("normalize", "record"), [(False, "hidden_states"), (True, "hidden_states_normalised_input")])
def test_golden_last_hidden_state_and_time_mean(golden, tmp_path, normalize, record):
    weights, config, io = golden
    ((name, rate),) = ((key, 1000 * int(match[1])) for key in io if (match := re.fullmatch(r"wave_(\d+)k", key)))
    waves = io[name]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mert_model"}))
    preprocessor = {"do_normalize": normalize, "sampling_rate": rate, "feature_size": 1}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    loaded = load_mert(tmp_path)
    last = io[record][-1].numpy()
    np.testing.assert_allclose(loaded.last_hidden_state(waves).numpy(), last, atol=GOLDEN_ATOL)
    np.testing.assert_allclose(loaded.embed(waves.numpy()), last.mean(axis=1), atol=GOLDEN_ATOL)


def test_golden_weights_that_do_not_fit_are_refused(golden):
    weights, config, _ = golden
    known = HubertConfig().to_dict().keys() & config.keys()
    hubert = HubertConfig(**{key: config[key] for key in known})
    missing = {key: value for key, value in weights.items() if key != "encoder.layer_norm.bias"}
    for bad in (missing, weights | {"encoder.extra": torch.zeros(1)}):
        with pytest.raises(UserError, match=r"encoder\.(layer_norm\.bias|extra)"):
            load_mert(bad, config=hubert)
    hubert.feat_extract_norm = "layer"  # seven layer norms instead of one group norm
    with pytest.raises(UserError, match=r"conv_layers\.1\.layer_norm"):
        load_mert(weights, config=hubert)


def test_golden_full_size_names_and_shapes_are_exactly_those_of_the_checkpoint(golden_dir):
    manifest = json.loads((golden_dir / "manifests/mert_v1_330m.json").read_text())
    with torch.device("meta"):
        model = HubertModel(mert_330m_config())
    old_names = {
        "parametrizations.weight.original0": "weight_g",
        "parametrizations.weight.original1": "weight_v",
    }
    found = {}
    for key, value in model.state_dict().items():
        for new, old in old_names.items():
            key = key.replace(new, old)
        found[key] = list(value.shape)
    assert found == manifest
    with torch.device("meta"):
        checkpoint = {key: torch.empty(shape) for key, shape in manifest.items()}
    model.load_state_dict(checkpoint, strict=True, assign=True)  # torch renames weight_g and weight_v itself


def test_golden_frame_counts_at_full_size(mert):
    # The strides are the same at every width: 75 Hz, and 10 s give 749 frames.
    assert mert.frames(240_000) == 749
    assert mert.frames(120_000) == 374
    for samples in (400, 401, 719, 720, 23_999):
        assert mert.last_hidden_state(torch.randn(1, samples)).shape[1] == mert.frames(samples)
    assert mert.frames(399) == 0


# ---- embedding -------------------------------------------------------------------------------------------


@given(samples=st.integers(1, 4 * SEGMENT_SAMPLES))
@settings(deadline=None)
def test_segments_tile_the_wave_and_none_is_a_splinter(samples):
    bounds = segment_bounds(samples)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == samples
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(bounds))
    lengths = [end - start for start, end in bounds]
    assert all(length == SEGMENT_SAMPLES for length in lengths[:-1])
    assert len(bounds) == 1 or MERT_SAMPLE_RATE <= lengths[-1] < SEGMENT_SAMPLES + MERT_SAMPLE_RATE


def test_ragged_waves_come_back_in_order_and_bitwise_as_if_alone(mert):
    waves = tones(24_000, 12_000, 24_000, 30_001)
    together = mert.embed(waves)
    assert together.shape == (4, 64)
    assert together.dtype == np.float32
    alone = np.concatenate([mert.embed([wave]) for wave in waves])
    assert np.array_equal(together, alone)
    assert np.array_equal(mert.embed(np.stack([waves[0], waves[2]])), together[[0, 2]])


def test_long_audio_is_the_frame_weighted_mean_of_its_segments():
    # Strides of 5120 instead of 320 samples, because 300 s take their time otherwise.
    strides = [5, 4, 4, 4, 4, 2, 2]
    config = HubertConfig(
        conv_dim=[8] * 7,
        conv_stride=strides,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mert = Mert(HubertModel(config))
    head = np.random.default_rng(1).normal(scale=0.1, size=SEGMENT_SAMPLES).astype(np.float32)
    tail = tones(20 * MERT_SAMPLE_RATE)[0]
    a, b = mert.embed([head])[0], mert.embed([tail])[0]
    n, m = mert.frames(len(head)), mert.frames(len(tail))
    found = mert.embed([np.concatenate([head, tail])])[0]
    np.testing.assert_allclose(found, (n * a + m * b) / (n + m), atol=1e-6)
    assert np.abs(found - a).max() > 1e-4 < np.abs(found - b).max()


def test_embeddings_tell_sounds_apart(mert):
    waves = [*tones(48_000, 48_000, 48_000), np.random.default_rng(2).normal(size=48_000).astype(np.float32)]
    vectors = mert.embed(waves)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (unit @ unit.T)[np.triu_indices(4, 1)].min() < 0.95


def test_normalisation_is_per_wave_and_removes_level_and_offset(mert):
    normalising = Mert(mert.model, normalize=True)
    wave = tones(24_000)[0]
    np.testing.assert_allclose(normalising.embed([wave]), normalising.embed([0.5 * wave + 0.1]), atol=1e-4)


def test_bad_waves_and_dead_models_raise(mert):
    with pytest.raises(ValueError, match="too few"):
        mert.embed(tones(399))
    with pytest.raises(ValueError, match="mono"):
        mert.embed([np.zeros((2, 24_000), np.float32)])
    dead = debug_mert(0)
    with torch.no_grad():
        dead.model.encoder.layer_norm.weight.fill_(torch.inf)
    with pytest.raises(RuntimeError, match=r"not finite for items \[0, 1\]"):
        dead.embed(tones(24_000, 12_000))


def test_debug_models_follow_their_seed_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (debug_mert(seed).embed(tones(6_000)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


# ---- loading ---------------------------------------------------------------------------------------------


def write_folder(folder, mert: Mert, weights="model.safetensors", **config):
    state = mert.model.state_dict()
    if weights == "model.safetensors":
        save_file(state, folder / weights)
    else:
        torch.save(state, folder / weights)
    (folder / "config.json").write_text(json.dumps(mert.model.config.to_dict() | config))


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_round_trips_and_its_remote_code_is_never_run(mert, tmp_path, weights):
    code = {"auto_map": {"AutoModel": "modeling_MERT.MERTModel"}, "architectures": ["MERTModel"]}
    write_folder(tmp_path, mert, weights, model_type="mert_model", attention_relax=32.0, **code)
    (tmp_path / "modeling_MERT.py").write_text("raise SystemExit('remote code ran')")
    loaded = load_mert(tmp_path)
    assert np.array_equal(loaded.embed(tones(24_000)), mert.embed(tones(24_000)))
    assert loaded.normalize is False


def test_do_normalize_and_sample_rate_are_taken_from_the_folder(mert, tmp_path):
    write_folder(tmp_path, mert)
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": true, "sampling_rate": 24000}')
    assert load_mert(tmp_path).normalize is True
    assert load_mert(tmp_path, normalize=False).normalize is False
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": true, "sampling_rate": 16000}')
    with pytest.raises(UserError, match="16000"):
        load_mert(tmp_path)


def test_folders_without_weights_or_with_another_arithmetic_are_refused(mert, tmp_path):
    with pytest.raises(UserError, match=r"neither model\.safetensors"):
        load_mert(tmp_path)
    write_folder(tmp_path, mert, deepnorm=True)
    with pytest.raises(UserError, match="deepnorm"):
        load_mert(tmp_path)
