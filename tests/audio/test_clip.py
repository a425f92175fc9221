"""A file becomes a measured clip in one way, whoever asks."""

import hashlib

import numpy as np
import pytest
import soundfile

from ttmray.audio import clip
from ttmray.audio.clip import SAMPLE_RATE, levels, read_clip
from ttmray.evaluation.measure import _decoded
from ttmray.evaluation.score import read_mono
from ttmray.ranker import features

RATE = 32000


def noise(seconds: float, channels: int = 2) -> np.ndarray:
    return np.random.default_rng(1).uniform(-0.3, 0.3, (round(seconds * RATE), channels)).astype(np.float32)


@pytest.fixture
def path(tmp_path):
    soundfile.write(tmp_path / "x.wav", noise(6), RATE, subtype="FLOAT")
    return str(tmp_path / "x.wav")


def test_score_evaluation_and_ranker_hear_the_same_samples_and_levels(path):
    row, wave = _decoded(path, 10.0, middle=False)
    mono, facts = read_mono(path)
    np.testing.assert_array_equal(mono, wave.mean(axis=0))
    np.testing.assert_array_equal(features.read_clip(path), mono)
    assert facts == {name: row[name] for name in facts}
    assert wave.shape == (2, 10 * SAMPLE_RATE)  # padded as in the corpus job
    with open(path, "rb") as file:
        assert row["sha256"] == hashlib.sha256(file.read()).hexdigest()
    assert {name: row[name] for name in ("lufs", "true_peak_db")} == levels(wave)


@pytest.mark.parametrize(
    ("seconds", "middle", "length"), [(2, False, 2), (5, True, 10), (14, False, 14), (14, True, 10)]
)
def test_only_what_is_one_clip_of_the_corpus_is_padded_and_the_middle_is_one_clip_long(
    tmp_path, seconds, middle, length
):
    soundfile.write(tmp_path / "x.wav", noise(seconds, 1), RATE)
    reading = read_clip(str(tmp_path / "x.wav"), middle=middle)
    assert reading.wave.shape == (1, length * SAMPLE_RATE)
    assert reading.facts["duration_s"] == seconds


def test_a_silent_file_is_rejected_with_what_is_known_of_it(tmp_path):
    soundfile.write(tmp_path / "x.wav", 0 * noise(6), RATE)
    reading = read_clip(str(tmp_path / "x.wav"))
    assert (reading.wave, reading.error.status, reading.error.reason) == (None, "rejected", "silent")
    assert (reading.facts["silence"], reading.facts["channels"]) == (1.0, 2)
    assert "lufs" not in reading.facts


def test_an_unforeseen_exception_of_a_decoder_is_the_file_s_and_one_of_the_disk_is_not(path, monkeypatch):
    def broken(*_):
        raise TypeError("unexpected")

    monkeypatch.setattr(clip.audio_io, "decode", broken)
    assert str(read_clip(path).error) == "error: TypeError: unexpected"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(clip.audio_io, "decode", full)
    with pytest.raises(OSError, match="No space left"):
        read_clip(path)
