"""Target loudness under a true-peak ceiling: exact where a gain is enough, smooth where it is not, never louder."""

import math

import numpy as np
import pyloudnorm
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import butter, resample_poly, sosfilt

from ttmray.audio import limiter
from ttmray.audio.limiter import block_peaks, block_samples, reduction_curve, to_loudness
from ttmray.audio.loudness import integrated_loudness, true_peak

RATE = 44100


def drums(seed: int, seconds: float = 4.0, rate: int = RATE, channels: int = 1) -> np.ndarray:
    """Decaying bursts of noise over a quiet tone: peaks far above the loudness. (channels, frames) float32.

    Up to 0.8 of the Nyquist frequency: above, interpolation filters are not flat and meters do not agree.
    """
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    beat = np.exp(-((t + rng.uniform()) % 0.5) * 20)
    noise = sosfilt(butter(8, 0.8, output="sos"), rng.standard_normal((channels, len(t))))
    return (0.15 * beat * noise + 0.03 * np.sin(2 * np.pi * 220 * t)).astype(np.float32)


def decibel(amplitude: float) -> float:
    return 20 * math.log10(amplitude)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000, 96000, 192000])
def test_loudness_and_peak_hold_by_independent_meters_at_any_rate(rate: int, channels: int) -> None:
    x = drums(rate, 2.0, rate, channels)
    y, levels = to_loudness(x, rate)
    assert (y.shape, y.dtype) == (x.shape, np.float32)
    assert levels.outcome == "reached"
    assert levels.reduction_db > 2
    lufs = pyloudnorm.Meter(rate, filter_class="DeMan").integrated_loudness(y.T.astype(np.float64))
    assert lufs == pytest.approx(-16.5, abs=0.05)
    assert true_peak(y, rate) <= -1.0
    assert decibel(np.abs(resample_poly(y.astype(np.float64), 8, 1, axis=1)).max()) <= -1.0 + 0.1
    assert levels.lufs_before == integrated_loudness(x, rate)
    assert levels.lufs_after == integrated_loudness(y, rate)
    assert levels.true_peak_before == pytest.approx(true_peak(x, rate), abs=1e-4)
    assert levels.true_peak_after == pytest.approx(true_peak(y, rate), abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    seconds=st.floats(0.5, 3.0),
    level_db=st.floats(-60, 20),
    spike=st.sampled_from([0.0, 1.0, 1e3]),
    lufs=st.floats(-30, -6),
    ceiling=st.floats(-6, 0),
)
def test_the_ceiling_holds_and_the_outcome_is_honest(seed, seconds, level_db, spike, lufs, ceiling):
    x = drums(seed, seconds, 16000)
    x[0, seed * 37] += spike * x.max()
    y, levels = to_loudness(x * np.float32(10 ** (level_db / 20)), 16000, lufs, ceiling)
    assert true_peak(y, 16000) <= ceiling
    after = integrated_loudness(y, 16000)
    assert levels.lufs_after == after
    close = abs(after - lufs) <= limiter.TOLERANCE_LU
    assert levels.outcome == ("silent" if levels.lufs_before == -math.inf else "reached" if close else "missed")
    assert levels.reduction_db <= 20 + 1e-9


def test_a_clip_that_stays_under_the_ceiling_gets_a_plain_gain() -> None:
    x = drums(1, channels=2)
    y, levels = to_loudness(x, RATE, lufs=-30.0)
    assert levels.reduction_db == 0
    assert levels.gain_db == pytest.approx(-30 - integrated_loudness(x, RATE), abs=1e-9)
    np.testing.assert_array_equal(y, x * np.float32(10 ** (levels.gain_db / 20)))


def test_the_gain_is_smooth_also_where_chunks_meet() -> None:
    rng = np.random.default_rng(0)
    t = np.arange(6 * RATE) / RATE
    x = (np.where(rng.random((1, len(t))) < 0.5, -1, 1) * (0.05 + 0.4 * (t % 0.7 < 0.02))).astype(np.float32)
    y, levels = to_loudness(x, RATE)
    assert levels.outcome == "reached"
    gain_db = 20 * np.log10(y[0].astype(np.float64) / x[0])  # no sample of x is zero
    assert gain_db.max() <= levels.gain_db + 1e-4
    assert gain_db.min() == pytest.approx(levels.gain_db - levels.reduction_db, abs=1e-4)
    # A Hann window of 4 ms moves by at most twice the step over its length; rounding to float32 adds 1e-6 dB.
    assert np.abs(np.diff(gain_db)).max() <= 2 * levels.reduction_db / (limiter.ATTACK_S * RATE) + 1e-5
    release = -np.diff(gain_db[np.argmin(gain_db) + round(0.05 * RATE) :][: round(0.2 * RATE)])
    assert release.max() <= 1e-5  # only back up
    assert levels.gain_db - gain_db[round(0.68 * RATE)] < 0.01 * levels.reduction_db  # 0.65 s after the burst


@pytest.mark.parametrize(("hz", "most"), [(50, -70), (110, -70), (997, -80), (6000, -80)])
def test_a_limited_sine_keeps_its_shape(hz: float, most: float) -> None:
    t = np.arange(4 * RATE) / RATE
    x = (np.where(t < 2, 1.0, 0.4) * np.sin(2 * np.pi * hz * t))[None].astype(np.float32)
    loud = integrated_loudness(x[:, : 2 * RATE], RATE)
    y, levels = to_loudness(x, RATE, lufs=loud - 2.0)
    assert levels.outcome == "reached"
    assert levels.reduction_db > 2
    part = y[0, RATE // 2 : RATE // 2 + RATE].astype(np.float64)  # whole periods
    spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part)))) ** 2
    tone = spectrum[round(hz) - 3 : round(hz) + 4].sum()
    assert 10 * math.log10((spectrum.sum() - tone) / tone) < most


def test_polarity_changes_nothing_and_channels_share_one_gain() -> None:
    x = drums(2, channels=2)
    x[1] *= 0.25
    y, levels = to_loudness(x, RATE)
    flipped, same = to_loudness(-x, RATE)
    np.testing.assert_array_equal(flipped, -y)
    assert same == levels
    audible = np.abs(x).min(axis=0) > 1e-3
    gains = (y / np.where(x == 0, 1, x))[:, audible]
    np.testing.assert_allclose(gains[0], gains[1], rtol=1e-6)
    assert gains.max() / gains.min() > 1.3  # it did limit
    swapped, _ = to_loudness(x[::-1].copy(), RATE)
    np.testing.assert_allclose(swapped[::-1], y, atol=1e-6)


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((1, RATE)),
        np.full((2, RATE), 1e-5) * np.sin(np.arange(RATE)),
        np.eye(1, RATE, RATE // 2 - 1) * 1e-3,
    ],
)
def test_what_is_silent_or_under_the_gate_is_left_as_it_is(x: np.ndarray) -> None:
    x = x.astype(np.float32)
    y, levels = to_loudness(x, RATE)
    np.testing.assert_array_equal(y, x)
    assert (levels.outcome, levels.lufs_before, levels.gain_db) == ("silent", -math.inf, 0.0)


def test_a_clip_that_would_need_too_much_limiting_is_scaled_to_the_ceiling() -> None:
    x = drums(3)
    x[0, 999] = 30.0
    y, levels = to_loudness(x, RATE)
    assert (levels.outcome, levels.reduction_db) == ("missed", 0.0)
    np.testing.assert_array_equal(y, x * np.float32(10 ** (levels.gain_db / 20)))
    assert true_peak(y, RATE) == pytest.approx(-1.0 - limiter.MARGIN_DB, abs=0.001)
    assert to_loudness(x, RATE, max_reduction_db=math.inf)[1].outcome == "reached"
    assert to_loudness(drums(3), RATE, max_reduction_db=0)[1].outcome == "missed"


@pytest.mark.parametrize(
    "x", [np.full((1, RATE), np.nan), np.full((1, RATE), np.inf), drums(0, 0.3), drums(0)[0], np.zeros((1, RATE), int)]
)
def test_what_cannot_be_measured_is_refused(x: np.ndarray) -> None:
    with pytest.raises(ValueError):
        to_loudness(x, RATE)


@settings(max_examples=60, deadline=None)
@given(
    peaks=st.lists(st.tuples(st.integers(0, 1999), st.floats(0.01, 24)), max_size=12),
    rate=st.sampled_from([8000, 16000, 44100, 192000]),
)
def test_the_curve_is_deep_enough_at_every_block_and_no_deeper_than_the_worst(peaks, rate):
    excess = np.full(2000, -3.0)
    for at, value in peaks:
        excess[at] = value
    curve = reduction_curve(excess, rate)
    assert curve.shape == excess.shape
    for shifted in (excess[1:-1], excess[:-2], excess[2:]):  # neighbours too: the gain is linear between centres
        assert (curve[1:-1] >= shifted - 1e-9).all()
    assert curve.min() >= 0
    assert curve.max() <= max(0, excess.max()) + 1e-9
    first = min((at for at, _ in peaks), default=2000)
    attack = 2 + round(2 * limiter.ATTACK_S * rate / block_samples(rate))
    assert not curve[: max(0, first - attack)].any()


def test_block_peaks_are_the_true_peak_of_the_whole_in_every_block() -> None:
    x = drums(4, 5.0, channels=2)  # three chunks
    block = block_samples(RATE)
    over = np.abs(soxr.resample(x.T, RATE, 4 * RATE, quality="HQ")).max(axis=1)
    peaks = block_peaks(x, RATE)
    assert len(peaks) == -(-x.shape[1] // block)
    whole = over[: len(over) // (4 * block) * (4 * block)].reshape(-1, 4 * block).max(axis=1)
    samples = np.abs(x[:, : len(whole) * block]).max(axis=0).reshape(-1, block).max(axis=1)
    np.testing.assert_allclose(peaks[: len(whole)], np.maximum(whole, samples), atol=1e-6)
    assert decibel(peaks.max()) == pytest.approx(true_peak(x, RATE), abs=1e-4)
