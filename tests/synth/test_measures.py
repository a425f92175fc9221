"""Measures from audio alone follow the truth, each the fault that it is for."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from ttmray.synth.faults import BASE, FLOOR, KINDS
from ttmray.synth.instruments import RATE
from ttmray.synth.measures import SILENCE, estimate, measure, onsets, pitch
from ttmray.synth.world import clip

SEED = 2024
"""Not one that the models were fitted on."""

SHOWS = {
    "detune": ("tuning", 1),
    "wow": ("drift", 1),
    "timing": ("pulse", -1),
    "clash": ("in_key", -1),
    "dropped": ("gaps", 1),
    "noise": ("floor_high", 1),
    "clipping": ("flat", 1),
    "dull": ("air", -1),
    "thin": ("bass", -1),
}


def clicks(bpm: float, seconds: float = 8.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    wave = 1e-4 * rng.standard_normal(int(seconds * RATE))
    burst = rng.standard_normal(1500) * np.exp(-np.arange(1500) / 200)
    for i, start in enumerate(np.arange(0, seconds - 0.1, 60 / bpm)):
        wave[int(start * RATE) :][:1500] += burst * (1.0 if i % 2 == 0 else 0.7)
    return wave.astype(np.float32)


@pytest.mark.parametrize("bpm", [66.0, 97.3, 120.0, 151.0])
def test_the_tempo_of_clicks_is_found_within_two_percent_but_for_octaves(bpm):
    ratio = measure(clicks(bpm)[None]).tempo / bpm
    assert min(abs(ratio / multiple - 1) for multiple in (0.5, 1, 2)) < 0.02


def test_ripples_on_the_falling_side_of_something_lower_have_no_pitch():
    time = np.arange(2 * RATE) / RATE
    wave = np.sin(2 * np.pi * 20 * time) + 0.05 * np.sin(
        2 * np.pi * 3000 * time
    )  # all peaks of 60 to 75 Hz are negative
    hertz, clarity = pitch(wave, low=60.0, high=75.0)
    assert not hertz.any()
    assert not clarity.any()


def test_the_pitch_of_tones_is_found_within_five_cents():
    time = np.arange(RATE) / RATE
    for hertz in (82.4, 220.0, 466.2, 987.8):
        wave = sum(np.sin(2 * np.pi * hertz * k * time) / k for k in range(1, 6)).astype(np.float32)
        found, clear = pitch(wave)
        assert np.median(clear) > 0.9
        assert abs(1200 * np.log2(np.median(found) / hertz)) < 5


@pytest.mark.parametrize("kind", KINDS)
def test_each_fault_moves_its_measure(kind):
    name, sign = SHOWS[kind]
    moved = []
    for index in range(6):
        clean, faulty = (
            getattr(measure(clip(SEED, index, 5.0, start=8.0, faults=faults).mix), name) for faults in ({}, {kind: 1.0})
        )
        moved.append(sign * (faulty - clean))
    assert np.median(moved) > 0
    assert np.mean(np.array(moved) > 0) >= 5 / 6


@pytest.mark.slow
def test_estimated_quality_follows_true_quality_on_fresh_pieces():
    true, told = [], []
    for index in range(60):
        item = clip(SEED, 100 + index)
        true.append(item.quality)
        told.append(estimate(measure(item.mix))[1])
    assert spearmanr(true, told).statistic > 0.6


@pytest.mark.slow
def test_estimates_by_kind_and_tempo_words_on_many_fresh_pieces():
    strengths, guessed, true, told, words = [], [], [], [], []
    for index in range(300):
        item = clip(SEED, 1000 + index)
        measures = measure(item.mix)
        found, quality = estimate(measures)
        strengths.append([item.faults.get(kind, 0.0) for kind in KINDS])
        guessed.append([found[kind] for kind in KINDS])
        true.append(item.quality)
        told.append(quality)
        if item.heard.tempo_word != "medium" and not {"timing", "dropped"} & item.faults.keys():
            words.append((measures.tempo > 105) == (item.heard.tempo_word == "fast"))
    assert spearmanr(true, told).statistic > 0.72
    for i, kind in enumerate(KINDS):
        assert spearmanr(np.array(strengths)[:, i], np.array(guessed)[:, i]).statistic > 0.25, kind
    assert np.mean(words) > 0.75


@pytest.mark.parametrize("seconds", [0.01, 0.2, 1.0])
def test_silence_and_shreds_have_finite_measures_and_silence_the_least_quality(seconds):
    samples = int(seconds * RATE)
    assert measure(np.zeros((2, samples), np.float32)) == SILENCE
    assert estimate(SILENCE)[1] == FLOOR
    for wave in (np.ones((1, samples)), np.random.default_rng(0).standard_normal((2, samples))):
        measures = measure(wave.astype(np.float32))
        assert all(np.isfinite(value) for value in vars(measures).values())
        assert FLOOR <= estimate(measures)[1] <= BASE


def test_what_is_no_audio_is_refused():
    for bad in (np.zeros(100, np.float32), np.zeros((2, 0), np.float32), np.full((1, 100), np.nan, np.float32)):
        with pytest.raises(ValueError, match="expected finite samples"):
            measure(bad)


def test_loudness_does_not_change_the_estimate():
    wave = clip(SEED, 3).mix
    loud, soft = (estimate(measure(gain * wave))[1] for gain in (1.0, 0.1))
    assert loud == pytest.approx(soft, abs=1e-3)


def test_onsets_are_where_the_clicks_are():
    envelope = onsets(clicks(120.0) * 20)
    peaks = np.flatnonzero(envelope > 0.5 * envelope.max()) * 256 / RATE
    assert np.abs((peaks + 0.25 + 0.012) % 0.5 - 0.25).max() < 0.03
