import json
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
import yaml
from demucs.apply import BagOfModels, apply_model
from demucs.hf import load_safetensors_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ttmray.errors import ClipError, UserError
from ttmray.models.separator import Separator, debug_separator, load_separator, save_separator

FOUR = ("drums", "bass", "other", "vocals")


def noise(samples, seed=0, channels=2):
    return (np.random.default_rng(seed).standard_normal((channels, samples)) * 0.1 + 0.01).astype(np.float32)


def upstream(model, piece, **options):
    """Stems (sources, 2, T) as demucs' own interface computes them but for the mix's mean, which it adds to each."""
    wave = torch.from_numpy(piece)
    reference = wave.mean(0)
    mean, std = reference.mean(), reference.std() + 1e-8
    return (apply_model(model, ((wave - mean) / std)[None], **options)[0] * std).numpy()


def without_vocals(stems, piece):
    """Sum of the other stems, and the mix's mean once."""
    return stems[:3].sum(0) + piece.mean()


def assert_same(first, second):
    assert np.array_equal(first.instrumental, second.instrumental)
    assert np.array_equal(first.vocals, second.vocals)
    assert first.vocal_ratio == second.vocal_ratio


@pytest.fixture(scope="module")
def model():
    return debug_separator(0)


@pytest.fixture(scope="module")
def bag():
    """Two sub-models of different architecture, uneven weights, the HDemucs one with 1 s windows."""
    models = [debug_separator(1, sources=FOUR), debug_separator(2, "hdemucs", sources=FOUR)]
    return BagOfModels(models, [[1.0, 0.5, 2.0, 3.0], [0.0, 1.0, 1.0, 1.0]], segment=1)


@pytest.mark.parametrize("kind", ["htdemucs", "hdemucs"])
@pytest.mark.parametrize("samples", [700, 66_151, 150_000])
def test_stems_equal_those_of_demucs(kind, samples):
    model = debug_separator(3, kind, sources=FOUR)
    if kind == "hdemucs":
        model.segment = Fraction(3, 2)  # so that there are several windows and a short last one
    piece = noise(samples)
    result = Separator(model).separate([piece])[0]
    stems = upstream(model, piece, shifts=0, overlap=0.25)
    np.testing.assert_allclose(result.vocals, stems[3], rtol=0, atol=1e-6)
    np.testing.assert_allclose(result.instrumental, without_vocals(stems, piece), rtol=0, atol=1e-6)
    energy = np.square(stems[3], dtype=np.float64).sum() / np.square(piece, dtype=np.float64).sum()
    assert result.vocal_ratio == pytest.approx(energy, rel=1e-5)


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.6])
def test_a_bag_respects_its_weights_per_source_at_any_overlap(bag, overlap):
    piece = noise(70_000)
    result = Separator(bag, overlap=overlap).separate([piece])[0]
    stems = upstream(bag, piece, shifts=0, overlap=overlap)
    np.testing.assert_allclose(result.vocals, stems[3], rtol=0, atol=1e-6)
    np.testing.assert_allclose(result.instrumental, without_vocals(stems, piece), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["sum", "residual"])
@pytest.mark.parametrize("offset", [0.1, -0.02])
def test_a_dc_offset_of_the_mix_stays_as_it_is_in_the_instrumental_after_every_pass(bag, kind, offset):
    piece = noise(60_000)
    piece -= piece.mean()
    separator = Separator(bag, instrumental=kind)
    plain, moved = separator.separate([piece, piece + np.float32(offset)])
    np.testing.assert_allclose(moved.vocals, plain.vocals, rtol=0, atol=1e-5)
    plain, moved = separator.separate([plain.instrumental, moved.instrumental])
    np.testing.assert_allclose(moved.instrumental, plain.instrumental + offset, rtol=0, atol=1e-5)


def test_residual_is_the_mix_minus_the_vocals_and_spares_models_without_a_say_on_them(bag):
    specialists = BagOfModels(list(bag.models), [[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    piece = noise(60_000)
    calls = []
    hook = specialists.models[0].register_forward_hook(lambda *_: calls.append(0))
    result = Separator(specialists, instrumental="residual").separate([piece])[0]
    hook.remove()
    assert not calls
    np.testing.assert_allclose(result.instrumental, piece - result.vocals, rtol=0, atol=1e-7)
    summed = Separator(specialists).separate([piece])[0]
    np.testing.assert_allclose(summed.vocals, result.vocals, rtol=0, atol=1e-7)


def test_a_piece_gets_the_same_bits_alone_in_a_batch_and_in_any_order(bag):
    separator = Separator(bag, batch=8)
    pieces = [noise(30_000, 1), noise(20_000, 2), noise(30_000, 3)]
    for piece in pieces:
        piece.flags.writeable = False  # as arrays from a shared object store are
    together = separator.separate(pieces)
    backwards = separator.separate(pieces[::-1])[::-1]
    for piece, one, other in zip(pieces, together, backwards, strict=True):
        assert one.instrumental.shape == piece.shape
        assert_same(one, other)
        assert_same(one, separator.separate([piece])[0])


@pytest.mark.parametrize("kind", ["htdemucs", "hdemucs"])
def test_building_and_separating_leave_the_global_generators_alone(kind):
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    Separator(debug_separator(0, kind)).separate([noise(30_000)])
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_silence_stays_silence_without_a_forward_pass(model):
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(0))
    separator = Separator(model)
    silent = separator.separate([np.zeros((1, 1000), np.float32)])[0]
    assert not calls
    assert silent.vocal_ratio == 0.0
    assert silent.instrumental.shape == silent.vocals.shape == (2, 1000)
    assert not silent.instrumental.any()
    mixed = separator.separate([np.zeros((2, 500), np.float32), noise(500)])
    hook.remove()
    assert not mixed[0].instrumental.any()
    assert mixed[1].instrumental.any()
    assert separator.separate([]) == []


def test_mono_is_duplicated(model):
    mono = noise(20_000, channels=1)
    stereo = np.repeat(mono, 2, axis=0)
    assert_same(Separator(model).separate([mono])[0], Separator(model).separate([stereo])[0])


def test_bad_pieces_are_named(model):
    separator = Separator(model)
    broken = noise(1000)
    broken[1, 3] = np.inf
    for piece, reason in ((broken, "non_finite"), (np.zeros((2, 0), np.float32), "empty_audio")):
        with pytest.raises(ClipError, match=r"piece 1") as caught:
            separator.separate([noise(1000), piece])
        assert (caught.value.status, caught.value.reason) == ("failed", reason)
    for piece in (np.zeros(1000, np.float32), np.zeros((3, 10), np.float32), np.ones((2, 9), np.int16)):
        with pytest.raises(ValueError, match=r"piece 0 must be float"):
            separator.separate([piece])


def test_weights_that_give_nan_are_reported():
    model = debug_separator(0)
    model.decoder[-1].conv_tr.weight.fill_(torch.nan)
    with pytest.raises(ClipError, match=r"piece 0: the model gave NaN"):
        Separator(model).separate([noise(1000)])


@pytest.mark.parametrize("kind", ["htdemucs", "hdemucs"])
def test_bf16_on_a_cpu_stays_close_to_fp32(kind):
    model = debug_separator(0, kind)
    piece = noise(20_000)
    exact = Separator(model).separate([piece])[0]
    rounded = Separator(model, precision="bf16").separate([piece])[0]
    assert rounded.instrumental.dtype == np.float32
    error = np.square(rounded.instrumental - exact.instrumental).sum() / np.square(exact.instrumental).sum()
    assert 0 < error < 1e-3  # 30 dB; full-size models were measured at 46 to 50 dB


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "needs an accelerator"),
        ({"precision": "int8"}, "unknown separator precision"),
        ({"instrumental": "difference"}, "unknown separator precision"),
        ({"overlap": 1.0}, "out of range"),
        ({"overlap": -0.1}, "out of range"),
    ],
)
def test_options_that_cannot_work_are_refused(model, options, message):
    with pytest.raises(UserError, match=message):
        Separator(model, **options)


def test_models_that_cannot_serve_are_refused(bag):
    with pytest.raises(UserError, match=r"needs vocals"):
        Separator(debug_separator(0, sources=("drums", "bass")))
    with pytest.raises(UserError, match=r"not a separation model: Linear"):
        Separator(torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"without a model"):
        Separator(BagOfModels(list(bag.models), [[0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]]))


@given(samples=st.integers(2, 5000), segment=st.integers(300, 3000), overlap=st.floats(0, 0.9))
@settings(max_examples=20, deadline=None)
def test_windows_cover_every_sample_whatever_the_lengths(samples, segment, overlap):
    """A model that returns its input as every source must give the piece back."""
    model = debug_separator(0, "hdemucs")
    model.segment = Fraction(segment, 44_100)
    model.forward = lambda mix: mix[:, None].expand(-1, 2, -1, -1)
    piece = noise(samples)
    result = Separator(model, overlap=overlap).separate([piece])[0]
    np.testing.assert_allclose(result.vocals, piece - piece.mean(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(result.instrumental, piece, rtol=0, atol=1e-6)


def test_a_saved_bag_is_read_back_to_the_bit_by_us_and_by_demucs(bag, tmp_path):
    save_separator(bag, tmp_path, "mix")
    loaded = load_separator(tmp_path)
    assert loaded.weights == bag.weights
    piece = noise(20_000)
    assert_same(Separator(loaded).separate([piece])[0], Separator(bag).separate([piece])[0])
    for index, ours in enumerate(loaded.models):
        theirs = load_safetensors_model(tmp_path / f"mix-{index}.safetensors")
        assert theirs.segment == ours.segment
        for name, parameter in theirs.state_dict().items():
            assert torch.equal(parameter, ours.state_dict()[name]), name


def test_half_precision_weights_and_options_of_older_versions_are_read(model, tmp_path):
    save_separator(model, tmp_path, "old")
    path = tmp_path / "old-0.safetensors"
    rewrite(path, half=True, change=lambda kwargs: kwargs | {"an_old_option": 1})
    with pytest.warns(UserWarning, match="an_old_option"):
        loaded = load_separator(tmp_path / "old.yaml")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def rewrite(path, half=False, change=None, **metadata):
    """Saves a model file again with other weights or another description."""
    with safe_open(path, framework="pt") as file:
        described = dict(file.metadata())
    if change:
        described["kwargs"] = json.dumps(change(json.loads(described["kwargs"])))
    state = {key: value.half() if half else value for key, value in load_file(path).items()}
    save_file(state, path, {**described, **metadata})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"klass": "subprocess.Popen", "args": '[["touch", "owned"]]', "kwargs": "{}"}, r"names the class"),
        ({"klass": "os.system"}, r"names the class"),
        ({"structure": "{}"}, r"quantised"),
        ({"kwargs": "{"}, r"description is not usable"),
        (
            {"kwargs": '{"channels": 8, "segment": 2}'},
            r"weights (missing|unexpected|of another shape)",
        ),
    ],
)
def test_files_that_describe_something_else_are_refused_and_run_nothing(
    model, tmp_path, monkeypatch, metadata, message
):
    monkeypatch.chdir(tmp_path)
    save_separator(model, tmp_path, "bad")
    rewrite(tmp_path / "bad-0.safetensors", **metadata)
    with pytest.raises(UserError, match=message):
        load_separator(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("bag_file", "message"),
    [
        ({"models": ["../bad-0"]}, r"not a model signature"),
        ({"models": []}, r"list of signatures"),
        ({"models": ["absent"]}, r"weights not found"),
        ({"models": ["bad-0"], "weights": [[1.0]]}, r"1 rows of 2 numbers"),
        ({"models": ["bad-0"], "segment": "long"}, r"segment must be seconds"),
        ([1, 2], r"not a bag"),
    ],
)
def test_bags_that_are_inconsistent_are_refused(model, tmp_path, bag_file, message):
    save_separator(model, tmp_path, "bad")
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(bag_file))
    with pytest.raises(UserError, match=message):
        load_separator(tmp_path)


def test_a_name_instead_of_a_folder_is_refused_and_nothing_is_downloaded(tmp_path):
    with pytest.raises(UserError, match=r"not a folder with exactly one bag"):
        load_separator("htdemucs")
    with pytest.raises(UserError, match=r"not a folder with exactly one bag"):
        load_separator(tmp_path)
