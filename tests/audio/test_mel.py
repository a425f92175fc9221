import json
import re
from dataclasses import replace

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ttmray.audio.mel import LogMel, MelConfig, slaney_filter_bank

NAMES = {
    "sampling_rate": "sample_rate",
    "n_fft": "n_fft",
    "hop": "hop",
    "n_mels": "n_mels",
    "fmin": "fmin",
    "fmax": "fmax",
    "clamp": "floor",
    "mag_eps": "magnitude_eps",
}
"""Of the golden config's numbers those of ours."""


@pytest.fixture(scope="module")
def golden(golden_dir):
    """Facts, tensors, and our config of the reference's."""
    info = json.loads((golden_dir / "mel_44k.json").read_text())
    config = MelConfig(**{ours: info["config"][name] for name, ours in NAMES.items()})
    return info, load_file(golden_dir / "mel_44k.safetensors"), config


def assert_mel(tensors, config):
    difference = (LogMel(config)(tensors["in.wave"]) - tensors["out.mel"]).abs()
    assert difference.max() <= 2e-4
    assert difference.mean() <= 2e-6
    starts = {name: int(n[1]) for name in tensors if (n := re.fullmatch(r"out\.mel_first(\d+)", name))}
    assert starts
    for name, samples in starts.items():
        first = LogMel(config)(tensors["in.wave"][:, :samples])
        assert (first - tensors[name]).abs().max() <= 2e-4


def test_golden_log_mel_matches_the_reference_within_its_noise_floor(golden):
    _, tensors, config = golden
    assert_mel(tensors, config)


@pytest.mark.parametrize(
    ("name", "value"),
    [("fmin", 30.0), ("fmax", 20000.0), ("magnitude_eps", 1e-6), ("floor", 1e-4), ("sample_rate", 48000)],
)
def test_another_value_of_any_parameter_gives_another_mel(golden, name, value):
    _, tensors, config = golden
    with pytest.raises(AssertionError):
        assert_mel(tensors, replace(config, **{name: value}))


def test_golden_filters_and_window_match_the_reference(golden):
    _, tensors, config = golden
    mel = LogMel(config)
    torch.testing.assert_close(mel.filters, tensors["ref.mel_basis"], rtol=0, atol=1e-8)
    torch.testing.assert_close(mel.window, tensors["ref.hann_window"], rtol=0, atol=1e-7)


def test_golden_frame_counts_follow_from_the_config_and_nothing_in_it_is_left_out(golden):
    info, _, config = golden
    rest = {key: value for key, value in info["config"].items() if key not in NAMES}
    assert rest.pop("win") == config.n_fft
    assert rest.pop("pad_each_side") == config.padding
    kinds = {"log": "natural", "pad_mode": "reflect", "center": False, "window": "periodic Hann"}
    assert rest == kinds | {"mel": "librosa Slaney scale, Slaney area norm"}, "what the code has no choice of"
    assert {n: config.frames(int(n)) for n in info["frame_counts"]} == info["frame_counts"]


def test_golden_sequence_lengths_are_those_of_their_samples(golden_dir):
    cases = json.loads((golden_dir / "rules.json").read_text())["sequence_lengths"]
    assert cases
    for case in cases:
        config = MelConfig(sample_rate=case["sampling_rate"], hop=case["hop"], n_fft=4 * case["hop"])
        frames = 2 * case["latent_seq_len"]  # the VAE halves
        assert frames * config.hop == case["num_audio_samples"]
        assert config.frames(case["num_audio_samples"]) == frames
        wanted = round(case["duration"] * case["sampling_rate"])
        assert 0 <= case["num_audio_samples"] - wanted < 2 * config.hop


def test_the_defaults_are_those_of_the_released_vocoder():
    released = {"sample_rate": 44100, "n_fft": 2048, "hop": 512, "n_mels": 128, "fmin": 0.0, "fmax": 22050.0}
    assert MelConfig(**released, magnitude_eps=1e-9, floor=1e-5) == MelConfig()


def test_filter_bank_equals_librosa():
    ours = slaney_filter_bank(MelConfig())
    theirs = librosa.filters.mel(sr=44100, n_fft=2048, n_mels=128, fmin=0, fmax=22050)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-8)


@given(samples=st.integers(769, 6000))
@settings(max_examples=15, deadline=None)
def test_the_number_of_frames_is_predicted_from_the_number_of_samples(samples):
    config = MelConfig()
    assert LogMel()(torch.zeros(1, samples)).shape == (1, 128, config.frames(samples))


def test_silence_is_the_logarithm_of_the_smallest_mel_value_and_loud_samples_are_clamped():
    mel = LogMel()
    magnitude_floor = 1e-9**0.5 * mel.filters.sum(1).max()
    assert magnitude_floor < 1e-5  # so silence is decided by the clamp of the mel values
    assert torch.equal(mel(torch.zeros(1, 4096)), torch.full((1, 128, 8), 1e-5).log())
    square = torch.where(torch.arange(4096) % 100 < 50, 1.0, -1.0)[None]
    assert torch.equal(mel(7 * square), mel(square))


def test_a_clip_gets_the_same_bits_alone_and_in_a_batch():
    waves = torch.randn(3, 20000, generator=torch.Generator().manual_seed(0)) * 0.3
    mel = LogMel()
    assert torch.equal(mel(waves)[1:2], mel(waves[1:2]))


@pytest.mark.parametrize("shape", [(4096,), (1, 1, 4096), (1, 768)])
def test_waves_of_another_layout_or_too_short_are_refused(shape):
    with pytest.raises(ValueError, match=r"waves must be|too few"):
        LogMel()(torch.zeros(shape))
