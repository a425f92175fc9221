"""CLAP: LAION's numbers through our front end, the checkpoint's names, safe loading."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import ClapConfig, ClapModel

from ttmray.errors import UserError
from ttmray.models.clap import (
    CLAP_SAMPLE_RATE,
    CLAP_SAMPLES,
    UNRELATED_CAPTIONS,
    Clap,
    byte_roberta_tokenizer,
    check_text_tower,
    debug_clap,
    htsat_base_config,
    limit_band,
    load_laion_clap,
    quantise_int16,
    ten_second_windows,
)
from ttmray.models.clap_weights import (
    convert_laion_state_dict,
    laion_dropped_keys,
    laion_key_map,
)


@pytest.fixture(scope="module")
def clap() -> Clap:
    return debug_clap(0)


@pytest.fixture(scope="module")
def music() -> np.ndarray:
    """Four unrelated 10 s sounds, (4, 480000)."""
    t = np.arange(CLAP_SAMPLES) / CLAP_SAMPLE_RATE
    noise = np.random.default_rng(0).normal(size=CLAP_SAMPLES)
    chord = sum(np.sin(2 * np.pi * f * t) for f in (220, 277, 330)) * np.exp(-3 * (t % 0.5))
    sounds = [0.1 * noise, 0.5 * np.sin(2 * np.pi * 440 * t), 0.2 * chord, 0.3 * noise * (t % 0.25 < 0.02)]
    return np.stack(sounds).astype(np.float32)


def cosine_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return 1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


# ---- golden: numbers of laion_clap itself ----------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(golden_dir, tmp_path_factory):
    """(loaded model, recorded inputs and outputs, allowed cosine distance, names of the clips)."""
    about = json.loads((golden_dir / "clap.json").read_text())
    tokenizer_dir = tmp_path_factory.mktemp("tokenizer")
    byte_roberta_tokenizer().save_pretrained(tokenizer_dir)
    loaded = load_laion_clap(
        golden_dir / "clap_weights.safetensors", tokenizer_dir, config=ClapConfig(**about["hf_equivalent"])
    )
    tolerance = float(re.search(r"require <(\S+)", about["tolerance"]).group(1))
    return loaded, load_file(golden_dir / "clap_io.safetensors"), tolerance, about["order"]


def golden_waves(io: dict[str, torch.Tensor], order: list[str]) -> list[np.ndarray]:
    """float32 waves; those that are stored as int16 lie on the quantisation's grid of 32767 steps."""
    return [
        io[f"wav_{name}_f32"].numpy()
        if f"wav_{name}_f32" in io
        else io[f"wav_{name}_i16"].numpy().astype(np.float32) / 32767
        for name in order
    ]


def test_golden_audio_embeddings_come_out_of_our_front_end(golden):
    loaded, io, tolerance, order = golden
    found = loaded.embed_audio(golden_waves(io, order))
    assert cosine_distance(found, io["audio_embed"].numpy()).max() < tolerance
    np.testing.assert_allclose(found, io["audio_embed"].numpy(), atol=5e-6)


def test_golden_unquantised_path_is_reproduced_and_is_another_one(golden):
    loaded, io, tolerance, order = golden
    found = loaded.embed_audio(golden_waves(io, order), int16=False)
    expected = io["audio_embed_no_quant"].numpy()
    assert cosine_distance(found, expected).max() < tolerance
    assert cosine_distance(expected, io["audio_embed"].numpy()).max() > 10 * tolerance  # the hot clip


def test_golden_log_mel_agrees_in_decibels(golden):
    loaded, io, _, order = golden
    waves = dict(zip(order, golden_waves(io, order), strict=True))
    full = {name: io[f"logmel_{name}"] for name in order if f"logmel_{name}" in io and f"wav_{name}_i16" in io}
    assert full
    for name, expected in full.items():
        mel = loaded.front_end(torch.from_numpy(waves[name])[None])
        np.testing.assert_allclose(mel[0, 0].numpy(), expected.numpy(), atol=2e-3)


def test_golden_text_embeddings_need_the_attention_mask(golden):
    loaded, io, tolerance, _ = golden
    ids, mask, expected = io["text_input_ids"], io["text_attention_mask"], io["text_embed"].numpy()
    assert cosine_distance(loaded.embed_tokens(ids, mask), expected).max() < tolerance
    unmasked = loaded.embed_tokens(ids, torch.ones_like(mask))
    assert cosine_distance(unmasked, expected).max() > 1e-3


def test_golden_weights_refuse_another_architecture(golden_dir, tmp_path):
    byte_roberta_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not of the configured CLAP architecture"):
        load_laion_clap(golden_dir / "clap_weights.safetensors", tmp_path, config=debug_clap(0).model.config)


def test_golden_full_size_names_and_shapes_are_exactly_those_of_the_checkpoint(golden_dir):
    manifest = json.loads((golden_dir / "manifests/laion_clap_htsat_base.json").read_text())
    with torch.device("meta"):
        checkpoint = {key: torch.empty(shape) for key, shape in manifest.items()}
        model = ClapModel(htsat_base_config())
    converted = convert_laion_state_dict(checkpoint)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in converted.items()} == expected
    sources = {key.removeprefix("module.") for key in manifest}
    dropped = laion_dropped_keys([2, 2, 12, 2])
    assert sources - laion_key_map([2, 2, 12, 2], 12).keys() <= dropped
    assert len(sources & dropped) == 23
    # The last stage's mask does not exist in a checkpoint; every other name on the drop list does.
    assert dropped - sources == {"audio_branch.layers.3.blocks.1.attn_mask"}


# ---- names -----------------------------------------------------------------------------------------------


@given(depths=st.lists(st.integers(1, 3), min_size=1, max_size=4), text_layers=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_no_two_source_names_share_a_target_or_are_dropped_as_well(depths, text_layers):
    names = laion_key_map(depths, text_layers)
    targets = [target for group in names.values() for target in group]
    assert len(targets) == len(set(targets))
    assert not names.keys() & laion_dropped_keys(depths)


def laion_state_dict(model: ClapModel) -> dict[str, torch.Tensor]:
    """The model's weights under LAION's names, made by running the map backwards."""
    weights = model.state_dict()
    names = laion_key_map(list(model.config.audio_config.depths), model.config.text_config.num_hidden_layers)
    return {
        f"module.{source}": torch.cat([weights[t] for t in targets]) if targets[1:] else weights[targets[0]]
        for source, targets in names.items()
    }


@pytest.fixture(scope="module")
def laion_weights(clap) -> dict[str, torch.Tensor]:
    return laion_state_dict(clap.model)


def test_conversion_undoes_the_renaming_bit_for_bit(clap, laion_weights):
    converted = convert_laion_state_dict({"epoch": 15, "state_dict": laion_weights})
    weights = clap.model.state_dict()
    assert converted.keys() == weights.keys()
    assert all(torch.equal(converted[key], weights[key]) for key in weights)


def test_unknown_missing_and_half_prefixed_keys_are_refused_by_name(laion_weights):
    extra = laion_weights | {"module.audio_branch.fusion_model.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"Unknown: audio_branch\.fusion_model\.weight"):
        convert_laion_state_dict(extra)
    absent = "audio_branch.layers.0.blocks.0.attn.qkv.bias"
    with pytest.raises(UserError, match=f"Missing: {absent}"):
        convert_laion_state_dict({k: v for k, v in laion_weights.items() if k != f"module.{absent}"})
    with pytest.raises(UserError, match=r"some keys lack 'module\.'"):
        convert_laion_state_dict(laion_weights | {"logit_scale_b": torch.zeros(())})


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_released_style_checkpoint_gives_the_same_embeddings(clap, laion_weights, tmp_path):
    checkpoint = {"epoch": np.int64(15), "loss": np.float64(0.5), "state_dict": laion_weights}
    torch.save(checkpoint, tmp_path / "laion.pt", pickle_protocol=4)
    byte_roberta_tokenizer().save_pretrained(tmp_path)
    again = load_laion_clap(tmp_path / "laion.pt", tmp_path, config=clap.model.config)
    assert np.array_equal(again.embed_text(["piano"]), clap.embed_text(["piano"]))


def test_converted_weights_travel_as_safetensors(clap, laion_weights, tmp_path):
    save_file(convert_laion_state_dict(laion_weights), tmp_path / "clap.safetensors")
    byte_roberta_tokenizer().save_pretrained(tmp_path)
    again = load_laion_clap(tmp_path / "clap.safetensors", tmp_path, config=clap.model.config)
    assert np.array_equal(again.embed_text(["piano"]), clap.embed_text(["piano"]))


# ---- the adapter -----------------------------------------------------------------------------------------


@example(samples=CLAP_SAMPLES + 2001, crop="center")
@example(samples=2 * CLAP_SAMPLES + 7, crop="windows")
@given(samples=st.integers(1, 3 * CLAP_SAMPLES), crop=st.sampled_from(["center", "random", "windows"]))
@settings(max_examples=30, deadline=None)
def test_every_crop_gives_ten_seconds_of_the_wave(samples, crop):
    wave = np.arange(1, samples + 1, dtype=np.float32)
    excerpts = ten_second_windows(wave, crop, seed=samples)
    assert excerpts.shape == (max(samples // CLAP_SAMPLES, 1) if crop == "windows" else 1, CLAP_SAMPLES)
    if samples >= CLAP_SAMPLES:
        assert (np.diff(excerpts, axis=1) == 1).all()
    if crop == "center" and samples >= CLAP_SAMPLES:
        before, after = excerpts[0, 0] - 1, samples - excerpts[0, -1]
        assert 0 <= after - before <= 1
    if samples < CLAP_SAMPLES:
        repeats = CLAP_SAMPLES // samples
        assert np.array_equal(excerpts[0, : repeats * samples], np.tile(wave, repeats))
        assert not excerpts[0, repeats * samples :].any()


def test_quantisation_clips_and_rounds_toward_zero():
    wave = np.array([0.5, -0.5, 1.7, -1.7, 3.9 / 32767, -3.9 / 32767, 0.9 / 32767], np.float32)
    expected = (np.clip(wave, -1, 1) * np.float32(32767)).astype(np.int16)  # numpy's cast truncates
    assert expected.tolist() == [16383, -16383, 32767, -32767, 3, -3, 0]
    found = quantise_int16(torch.from_numpy(wave)).numpy()
    assert np.array_equal(found, expected.astype(np.float32) / np.float32(32767))


def test_random_crops_follow_their_own_seed_and_leave_the_global_generators_alone(clap, music):
    long = np.concatenate([music[2], music[0]])
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = clap.embed_audio([long, music[1]], crop="random", seed=[5, 6])
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(clap.embed_audio([long], crop="random", seed=5), first[:1])
    assert not np.array_equal(clap.embed_audio([long], crop="random", seed=7), first[:1])
    with pytest.raises(ValueError, match="seed"):
        clap.embed_audio([long], crop="random")


def test_windows_average_the_unit_vectors_of_whole_windows(clap, music):
    long = np.concatenate([music[0], music[1], music[2][:1000]])
    mean = clap.embed_audio(music[:2]).mean(axis=0)
    np.testing.assert_allclose(clap.embed_audio([long], crop="windows")[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_a_clips_bits_do_not_depend_on_its_neighbours(clap, music):
    together = clap.embed_audio(music)
    alone = np.concatenate([clap.embed_audio(music[i : i + 1]) for i in range(len(music))])
    assert np.array_equal(together, alone)
    texts = clap.embed_text(UNRELATED_CAPTIONS)
    assert np.array_equal(texts[2:], clap.embed_text(UNRELATED_CAPTIONS[2:]))


def test_embeddings_are_unit_float32_and_tell_inputs_apart(clap, music):
    for vectors in (clap.embed_audio(music), clap.embed_text(UNRELATED_CAPTIONS)):
        assert vectors.dtype == np.float32
        assert vectors.shape == (4, 512)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert (vectors @ vectors.T)[np.triu_indices(4, 1)].min() < 0.9


def test_only_the_empty_string_is_the_zero_vector(clap):
    vectors = clap.embed_text(["", " ", "piano", ""])
    assert not vectors[[0, 3]].any()
    np.testing.assert_allclose(np.linalg.norm(vectors[1:3], axis=1), 1, atol=1e-5)
    assert np.array_equal(vectors[2:3], clap.embed_text(["piano"]))
    assert clap.embed_text([]).shape == (0, 512)
    assert clap.embed_audio([]).shape == (0, 512)


def test_the_empty_string_can_be_encoded_like_any_other(clap):
    vectors = clap.embed_text(["", "piano"], empty_is_zero=False)
    ids = torch.full((1, 77), clap.tokenizer.pad_token_id)
    ids[0, :2] = torch.tensor([clap.tokenizer.bos_token_id, clap.tokenizer.eos_token_id])
    np.testing.assert_allclose(vectors[:1], clap.embed_tokens(ids, (torch.arange(77) < 2)[None].long()), atol=1e-6)
    assert np.array_equal(vectors[1:], clap.embed_text(["piano"]))


def test_captions_beyond_77_tokens_are_cut(clap):
    assert np.array_equal(clap.embed_text(["x" * 75]), clap.embed_text(["x" * 300]))


def test_a_collapsed_text_tower_is_noticed():
    collapsed = debug_clap(0)
    check_text_tower(collapsed)
    with torch.no_grad():
        collapsed.model.text_projection.linear2.weight.mul_(1e-3)
        collapsed.model.text_projection.linear2.bias.fill_(1.0)
    with pytest.raises(UserError, match="same vector"):
        check_text_tower(collapsed)


def test_bad_audio_and_dead_models_raise(clap, music):
    for bad in (music[:, None], [music[0][None]], [np.zeros(0, np.float32)], [np.full(9, np.nan, np.float32)],
                [np.zeros(9, np.int16)]):  # fmt: skip
        with pytest.raises(ValueError, match="wave"):
            clap.embed_audio(bad)
    with pytest.raises(ValueError, match="crop"):
        clap.embed_audio(music[:1], crop="centre")
    dead = debug_clap(0)
    with torch.no_grad():
        dead.model.audio_projection.linear2.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        dead.embed_audio(music[:1])


def test_a_foreign_tokenizer_is_refused(clap):
    tokenizer = byte_roberta_tokenizer()
    tokenizer.pad_token = "</s>"
    with pytest.raises(UserError, match="pad id"):
        Clap(clap.model, tokenizer)


def test_band_limit_removes_what_lies_above_and_keeps_the_rest():
    t = np.arange(CLAP_SAMPLE_RATE) / CLAP_SAMPLE_RATE
    low, high = np.sin(2 * np.pi * 1000 * t), np.sin(2 * np.pi * 12_000 * t)
    limited = limit_band((low + high).astype(np.float32), 8000)
    middle = slice(4000, -4000)
    np.testing.assert_allclose(limited[middle], low[middle], atol=1e-3)
    assert limited.shape == low.shape


def test_debug_models_follow_their_seed_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (debug_clap(seed).model.state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["audio_projection.linear1.weight"], other["audio_projection.linear1.weight"])


def test_the_package_itself_imports_neither_torch_nor_transformers():
    code = "import sys, ttmray.models; sys.exit(bool({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_clips_embedded_side_by_side_keep_their_bits() -> None:
    waves = [0.1 * np.random.default_rng(i).standard_normal(480_000).astype(np.float32) for i in range(3)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = debug_clap(0).embed_audio(waves)
        assert np.array_equal(debug_clap(0, threads=3).embed_audio(waves), alone)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
