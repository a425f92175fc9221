import json

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ttmray.audio.mel import LogMel, MelConfig, slaney_filter_bank


@pytest.fixture(scope="module")
def golden(golden_dir):
    info = json.loads((golden_dir / "mel_44k.json").read_text())
    return info, load_file(golden_dir / "mel_44k.safetensors")


def test_golden_log_mel_matches_the_reference_within_its_noise_floor(golden):
    _, tensors = golden
    got = LogMel()(tensors["in.wave"])
    difference = (got - tensors["out.mel"]).abs()
    assert difference.max() <= 2e-4
    assert difference.mean() <= 2e-6
    first = LogMel()(tensors["in.wave"][:, :20000])
    assert (first - tensors["out.mel_first20000"]).abs().max() <= 2e-4


def test_golden_filters_and_window_match_the_reference(golden):
    _, tensors = golden
    mel = LogMel()
    torch.testing.assert_close(mel.filters, tensors["ref.mel_basis"], rtol=0, atol=1e-8)
    torch.testing.assert_close(mel.window, tensors["ref.hann_window"], rtol=0, atol=1e-7)


def test_golden_config_and_frame_counts_are_the_defaults(golden):
    info, _ = golden
    config, expected = MelConfig(), info["config"]
    assert (config.sample_rate, config.n_fft, config.hop, config.n_mels, config.fmin, config.fmax) == tuple(
        expected[key] for key in ("sampling_rate", "n_fft", "hop", "n_mels", "fmin", "fmax")
    )
    assert config.padding == expected["pad_each_side"]
    assert {n: config.frames(int(n)) for n in info["frame_counts"]} == info["frame_counts"]


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
