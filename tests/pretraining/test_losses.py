"""Shared losses and measures against values known otherwise."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ttmray.audio.mel import LogMel
from ttmray.models.griffin_lim import GriffinLim
from ttmray.pretraining.clap import recall_at_1
from ttmray.pretraining.fidelity import compare_waves, mel_errors, pitch_error
from ttmray.pretraining.labels import Labels, probe
from ttmray.pretraining.losses import MEL_FLOOR, MultiResolutionSTFT, heard, info_nce, kl_to_normal
from ttmray.pretraining.separator import si_sdr

RATE = 44_100


def tone(hertz: float, seconds: float = 1.0) -> np.ndarray:
    times = np.arange(int(seconds * RATE)) / RATE
    return (0.3 * sum(np.sin(2 * np.pi * k * hertz * times) / k for k in range(1, 8))).astype(np.float32)


def test_kl_is_that_of_torch():
    mean, logvar = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).mean()
    assert torch.allclose(kl_to_normal(mean, logvar), expected, atol=1e-6)


def test_contrast_of_unrelated_pairs_is_chance_and_of_matching_pairs_is_nothing():
    vectors = torch.eye(8)
    loss, right = info_nce(vectors, vectors, torch.tensor(4.0))
    assert loss < 1e-6
    assert right == 1
    loss, _ = info_nce(vectors, torch.ones(8, 8) / math.sqrt(8), torch.tensor(4.0))
    assert loss == pytest.approx(math.log(8), abs=1e-4)
    swapped, right = info_nce(vectors, vectors.roll(1, 0), torch.tensor(4.0))
    assert swapped > 10
    assert right == 0


def test_spectra_of_equal_waves_do_not_differ_and_of_others_the_more_the_louder_the_error():
    loss, wave = MultiResolutionSTFT(), torch.from_numpy(tone(220.0))[None]
    noise = torch.randn(wave.shape, generator=torch.Generator().manual_seed(0))
    assert loss(wave, wave) == 0
    assert 0 < loss(wave + 1e-3 * noise, wave) < loss(wave + 1e-2 * noise, wave) < loss(noise, wave)


def test_below_the_floor_nothing_counts():
    assert torch.equal(heard(torch.tensor([-11.5, MEL_FLOOR - 1, -2.0])), torch.tensor([MEL_FLOOR, MEL_FLOOR, -2.0]))


def test_silence_is_the_unit_of_the_mel_error():
    mel = LogMel()
    music, silence = mel(torch.from_numpy(tone(220.0))[None]), mel(torch.zeros(1, RATE))
    assert mel_errors(silence, music)["mel_of_silence"] == pytest.approx(1.0, abs=1e-4)
    assert mel_errors(music, music)["mel_db"] == 0


def test_griffin_lim_keeps_pitch_and_spectrum():
    wave = tone(330.0)
    copy = GriffinLim()(LogMel()(torch.from_numpy(wave)[None]))[0, 0].numpy()
    assert pitch_error(copy, wave) < 0.1
    assert compare_waves(copy, wave)["mel_heard_db"] < 4


def test_a_tone_of_another_pitch_is_off_by_its_interval():
    assert pitch_error(tone(440.0), tone(440.0 * 2 ** (3 / 12))) == pytest.approx(3, abs=0.05)
    assert math.isnan(pitch_error(tone(440.0), np.zeros(RATE, np.float32)))


def test_si_sdr_knows_scale_and_noise():
    rng = np.random.default_rng(0)
    signal, noise = rng.standard_normal(20_000), rng.standard_normal(20_000)
    assert si_sdr(0.5 * signal, signal) == 80
    assert si_sdr(signal + 0.1 * noise, signal) == pytest.approx(20, abs=0.2)


def test_retrieval_is_counted_in_groups():
    rows = np.eye(100)
    assert recall_at_1(rows, rows) == 1
    swapped = rows[np.arange(100) ^ 1]
    assert recall_at_1(rows, swapped) == 0
    assert recall_at_1(rows, np.concatenate([rows[:50], swapped[50:]])) == 0.5


def test_a_probe_reads_what_is_in_the_features_and_nothing_from_noise(clips):
    truths = [clips.truth(i).attributes for i in range(clips.count)] * 4
    labels = Labels.of(truths)
    rng = np.random.default_rng(0)
    rows = np.stack([labels.row(row) for row in truths]) + 0.01 * rng.standard_normal((len(truths), labels.size))
    assert probe(rows, truths)["drums"] > 0.95
    noise = probe(rng.standard_normal((len(truths), 8)), truths)
    assert noise["style"] < 0.3
