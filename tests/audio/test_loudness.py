import json
import math
from pathlib import Path

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from scipy.signal import sosfilt

from ttmray.audio.io import decode
from ttmray.audio.limits import AudioLimits
from ttmray.audio.loudness import (
    integrated_loudness,
    silence_ratio,
    true_peak,
    true_peak_per_channel,
)


def music(seed: int, seconds: float, rate: int, channels: int = 2) -> np.ndarray:
    """Noise in bursts with a tone under it: loud and quiet passages on both sides of the relative gate."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    envelope = 10 ** (-1.5 * (1 + np.sin(2 * np.pi * 0.7 * t + seed)))
    tone = 0.02 * np.sin(2 * np.pi * rng.uniform(50, 2000, (channels, 1)) * t)
    return (envelope * rng.normal(0, 0.2, (channels, t.size)) + tone).astype(np.float32)


def sine(frequency: float, rate: int, seconds: float, phase: float = 0.0) -> np.ndarray:
    t = np.arange(int(seconds * rate)) / rate
    return np.sin(2 * np.pi * frequency * t + phase).astype(np.float32)[None]


def k_weighting(rate: int) -> np.ndarray:
    """Second-order sections (2, 6) of the standard's two filters at any rate, from their analogue prototypes."""
    k, q = math.tan(math.pi * 1681.974450955533 / rate), 0.7071752369554196
    high = 10 ** (3.999843853973347 / 20)
    band = high**0.4996667741545416
    a0 = 1 + k / q + k * k
    numerator = [(high + band * k / q + k * k) / a0, 2 * (k * k - high) / a0, (high - band * k / q + k * k) / a0]
    shelf = [*numerator, 1.0, 2 * (k * k - 1) / a0, (1 - k / q + k * k) / a0]
    k, q = math.tan(math.pi * 38.13547087602444 / rate), 0.5003270373238773
    a0 = 1 + k / q + k * k
    return np.array([shelf, [1.0, -2.0, 1.0, 1.0, 2 * (k * k - 1) / a0, (1 - k / q + k * k) / a0]])


def by_the_standard(x: np.ndarray, rate: int) -> float:
    """Integrated loudness in float64, for rates that are a multiple of 10 Hz (BS.1770-4, Annex 1)."""
    hop = rate // 10
    weights = np.array([1.0, 1.0, 1.0, 1.41, 1.41])[: len(x)]
    y = sosfilt(k_weighting(rate), x[:, : x.shape[1] // hop * hop].astype(np.float64)).reshape(len(x), -1, hop)
    energy = weights @ np.square(y).sum(axis=-1)
    blocks = np.convolve(energy, np.ones(4), mode="valid") / (4 * hop)
    gated = blocks[-0.691 + 10 * np.log10(blocks) > -70]
    gated = gated[gated > gated.mean() / 10]
    return -0.691 + 10 * math.log10(gated.mean())


def test_golden_loudness_and_true_peak_agree_with_libebur128(golden_dir: Path) -> None:
    expected = json.loads((golden_dir / "loudness.json").read_text())["clips"]
    samples = load_file(golden_dir / "loudness.safetensors")
    assert expected
    for name, clip in expected.items():
        x = (samples[f"{name}_i16"].T / int(clip["scale"].removeprefix("i16/"))).astype(np.float32)
        rate = clip["sample_rate"]
        assert integrated_loudness(x, rate) == pytest.approx(clip["integrated_lufs"], abs=0.001)
        np.testing.assert_allclose(true_peak_per_channel(x, rate), clip["true_peak_dbtp"], atol=0.1)
        assert true_peak(x, rate) == true_peak_per_channel(x, rate).max()


def test_filters_at_48_khz_are_those_tabulated_in_the_standard() -> None:
    # ITU-R BS.1770-4, Annex 1, Tables 1 and 2.
    shelf = [1.53512485958697, -2.69169618940638, 1.19839281085285, 1.0, -1.69065929318241, 0.73248077421585]
    highpass = [1.0, -2.0, 1.0, 1.0, -1.99004745483398, 0.99007225036621]
    np.testing.assert_allclose(k_weighting(48000), [shelf, highpass], atol=1e-10)


@pytest.mark.parametrize("rate", [16000, 22050, 44100, 48000, 96000, 192000])
def test_loudness_follows_the_standard_at_any_rate(rate: int) -> None:
    x = music(rate, 3.0, rate)
    assert integrated_loudness(x, rate) == pytest.approx(by_the_standard(x, rate), abs=1e-6)


def test_loudness_follows_the_standard_on_real_tracks(data_dir: Path) -> None:
    paths = sorted((data_dir / "tracks").rglob("*.mp3"))[:4]
    assert paths
    for path in paths:
        x, rate = decode(path, AudioLimits())
        x = x[:, : rate * 10]
        assert integrated_loudness(x, rate) == pytest.approx(by_the_standard(x, rate), abs=1e-6)


def test_surround_channels_weigh_more_than_front_channels() -> None:
    x = music(0, 2.0, 48000, channels=5)
    assert integrated_loudness(x, 48000) == pytest.approx(by_the_standard(x, 48000), abs=1e-6)


@pytest.mark.parametrize("rate", [44100, 48000])
def test_a_full_scale_997_hz_sine_is_at_minus_3_01_lufs(rate: int) -> None:
    tone = sine(997, rate, 5.0)
    assert integrated_loudness(tone, rate) == pytest.approx(-3.01, abs=0.01)
    assert integrated_loudness(np.concatenate([tone, np.zeros_like(tone)]), rate) == pytest.approx(-3.01, abs=0.01)
    assert integrated_loudness(np.concatenate([tone, tone]), rate) == pytest.approx(0.0, abs=0.01)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), gain_db=st.floats(-30, 10))
def test_a_gain_shifts_loudness_and_true_peak_by_as_many_decibels(seed: int, gain_db: float) -> None:
    x = music(seed, 1.0, 16000)
    louder = (x * 10 ** (gain_db / 20)).astype(np.float32)
    assert integrated_loudness(louder, 16000) == pytest.approx(integrated_loudness(x, 16000) + gain_db, abs=0.001)
    assert true_peak(louder, 16000) == pytest.approx(true_peak(x, 16000) + gain_db, abs=0.001)


def test_a_quiet_passage_below_the_relative_gate_does_not_count() -> None:
    rate = 48000
    loud, quiet = 0.5 * sine(997, rate, 4.0), 0.005 * sine(997, rate, 4.0)
    both = np.concatenate([loud, quiet], axis=1)
    # Only the three blocks across the border are left of the quiet half.
    assert integrated_loudness(both, rate) == pytest.approx(integrated_loudness(loud, rate), abs=0.2)
    assert integrated_loudness(both, rate) > -10


@pytest.mark.parametrize("rate", [11025, 44100, 48000])
@pytest.mark.parametrize("share", [0.01, 0.51, 0.99])
def test_an_incomplete_last_block_is_discarded(rate: int, share: float) -> None:
    x = music(3, 2.0, rate)
    loud_tail = np.full((2, int(share * rate / 10)), 0.9, dtype=np.float32)
    assert integrated_loudness(np.concatenate([x, loud_tail], axis=1), rate) == integrated_loudness(x, rate)


def test_half_precision_samples_are_measured_in_single_precision() -> None:
    x = music(5, 1.0, 44100).astype(np.float16)
    assert integrated_loudness(x, 44100) == integrated_loudness(x.astype(np.float32), 44100)


def test_loudness_does_not_depend_on_the_memory_layout() -> None:
    x = music(4, 2.0, 44100)
    assert integrated_loudness(np.asfortranarray(x), 44100) == integrated_loudness(x, 44100)


@pytest.mark.parametrize("channels", [1, 2])
def test_digital_silence_is_minus_infinity(channels: int) -> None:
    x = np.zeros((channels, 44100), dtype=np.float32)
    assert integrated_loudness(x, 44100) == -math.inf
    assert true_peak(x, 44100) == -math.inf
    assert silence_ratio(x, 44100) == 1.0


def test_a_clip_below_the_absolute_gate_is_minus_infinity() -> None:
    assert integrated_loudness(1e-4 * sine(997, 44100, 2.0), 44100) == -math.inf


def test_less_than_one_gating_block_is_refused() -> None:
    x = music(0, 0.4, 44100)
    assert math.isfinite(integrated_loudness(x, 44100))
    with pytest.raises(ValueError, match="gating block"):
        integrated_loudness(x[:, :-1], 44100)


@pytest.mark.parametrize("channels", [3, 4, 6])
def test_unknown_channel_layouts_are_refused(channels: int) -> None:
    with pytest.raises(ValueError, match=f"not {channels}"):
        integrated_loudness(np.zeros((channels, 44100), dtype=np.float32), 44100)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loudness_of_non_finite_samples_is_refused(bad: float) -> None:
    x = music(0, 1.0, 44100)
    x[1, 20_000] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        integrated_loudness(x, 44100)


@pytest.mark.parametrize("x", [np.zeros(44100, np.float32), np.zeros((2, 44100), np.int16)])
def test_samples_of_another_shape_or_type_are_refused(x: np.ndarray) -> None:
    for measure in (integrated_loudness, true_peak, silence_ratio):
        with pytest.raises(ValueError, match="floating-point samples"):
            measure(x, 44100)


def test_true_peak_finds_the_peak_between_samples() -> None:
    # A tone at a quarter of the rate, 45 degrees off: samples at -3.01 dBFS, true peak 0 dBTP.
    x = sine(12000, 48000, 1.0, phase=math.pi / 4)
    fade = np.minimum(1, np.minimum(np.arange(48000), np.arange(48000)[::-1]) / 4800)
    assert true_peak((x * fade).astype(np.float32), 48000) == pytest.approx(0.0, abs=0.02)


def test_true_peak_counts_samples_that_the_interpolation_filter_removes() -> None:
    # A tone at the Nyquist frequency, faded in and out so that its edges do not ring.
    x = (0.5 * np.hanning(4001) * (-1.0) ** np.arange(4001)).astype(np.float32)[None]
    assert np.abs(soxr.resample(x[0], 44100, 4 * 44100, quality="HQ")).max() < 0.4
    assert true_peak(x, 44100) == pytest.approx(20 * math.log10(0.5), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_true_peak_is_never_below_the_sample_peak(seed: int) -> None:
    x = np.random.default_rng(seed).uniform(-1, 1, (2, 500)).astype(np.float32)
    assert (true_peak_per_channel(x, 44100) >= 20 * np.log10(np.abs(x).max(axis=1)) - 1e-6).all()


def test_silence_ratio_is_the_share_of_silent_frames() -> None:
    x = sine(440, 44100, 2.0)
    x[:, : 44100 // 2] = 0
    assert silence_ratio(x, 44100) == 0.25
    assert silence_ratio(np.concatenate([x, sine(440, 44100, 2.0)]), 44100) == 0.0


def test_silence_threshold_is_the_rms_level() -> None:
    x = 0.001 * math.sqrt(2) * sine(1000, 48000, 1.0)  # RMS of -60 dBFS
    assert silence_ratio(x, 48000, threshold_dbfs=-59.9) == 1.0
    assert silence_ratio(x, 48000, threshold_dbfs=-60.1) == 0.0


def test_silence_of_less_than_one_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="one frame"):
        silence_ratio(np.zeros((1, 4409), dtype=np.float32), 44100)
