"""Rhythm and tuning of sounds whose deviations are known."""

import numpy as np
import pytest

from ttmray.synth.instruments import RATE
from ttmray.synth.regularity import onset_times, rhythm, tuning


def clicks(times: np.ndarray, seconds: float) -> np.ndarray:
    """(1, samples) of bursts that begin at these times."""
    rng = np.random.default_rng(0)
    wave = 1e-4 * rng.standard_normal(int(seconds * RATE))
    burst = rng.standard_normal(1500) * np.exp(-np.arange(1500) / 200)
    for start in times:
        wave[int(start * RATE) :][:1500] += burst
    return wave.astype(np.float32)[None]


def jittered(milliseconds: float, seconds: float = 20.0, period: float = 0.25) -> np.ndarray:
    """Times of eighths at 120 beats per minute, each off by a normal deviation."""
    grid = np.arange(0.5, seconds - 0.5, period)
    return grid + np.random.default_rng(1).normal(0, milliseconds / 1000, len(grid))


def chords(cents: float, concert: float = 440.0, overtones: int = 1) -> np.ndarray:
    """(1, samples) of forty tones of half a second, each off by a normal deviation."""
    rng = np.random.default_rng(2)
    time = np.arange(RATE // 2) / RATE
    tones = []
    for _ in range(40):
        midi = rng.integers(55, 80) + rng.normal(0, cents / 100)
        hertz = concert * 2 ** ((midi - 69) / 12)
        tones.append(sum(np.sin(2 * np.pi * hertz * k * time) / k**2 for k in range(1, overtones + 1)))
    return np.concatenate(tones).astype(np.float32)[None]


def test_onsets_are_where_the_clicks_are_within_a_few_milliseconds():
    times = jittered(20, seconds=8)
    heard, strengths = onset_times(clicks(times, 8)[0])
    assert len(heard) == len(times)
    assert np.std(heard - times) < 0.003
    assert strengths.min() > 0


@pytest.mark.parametrize("milliseconds", [10.0, 20.0, 30.0])
def test_jitter_of_known_milliseconds_is_measured(milliseconds):
    measured = rhythm(clicks(jittered(milliseconds), 20))
    assert measured["rhythm_jitter_ms"] == pytest.approx(milliseconds, rel=0.25)


def test_a_machine_is_regular_and_random_times_are_not():
    machine = rhythm(clicks(jittered(0.0), 20))
    assert machine["rhythm_regularity"] > 0.97
    assert machine["rhythm_jitter_ms"] < 5
    random = np.cumsum(np.random.default_rng(3).exponential(0.25, 70)) + 0.3
    assert rhythm(clicks(random[random < 19.5], 20))["rhythm_regularity"] < 0.5
    worse = [rhythm(clicks(jittered(ms), 20))["rhythm_regularity"] for ms in (0.0, 15.0, 30.0)]
    assert worse == sorted(worse, reverse=True)


@pytest.mark.parametrize("cents", [5.0, 10.0, 20.0])
@pytest.mark.parametrize("concert", [440.0, 449.0])
def test_tones_that_are_off_by_known_cents_have_that_deviation(cents, concert):
    assert tuning(chords(cents, concert))["tuning_deviation"] == pytest.approx(cents, rel=0.25, abs=1)


def test_overtones_add_a_few_cents_and_no_scale_at_all_is_the_bound():
    assert tuning(chords(0.0))["tuning_deviation"] < 2
    assert tuning(chords(0.0, overtones=6))["tuning_deviation"] < 6
    assert 20 < tuning(chords(60.0))["tuning_deviation"] <= 28.9


def test_silence_and_a_few_events_say_nothing():
    silence = np.zeros((2, RATE), np.float32)
    assert rhythm(silence) == {"rhythm_regularity": 0.0, "rhythm_jitter_ms": 0.0}
    assert tuning(silence) == {"tuning_deviation": 0.0}
    assert rhythm(clicks(np.array([0.5, 1.0]), 3))["rhythm_regularity"] == 0
