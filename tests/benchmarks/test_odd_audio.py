"""The table of odd sound files sees what it is made for: files taken for shorter, or for other sound."""

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")


@pytest.fixture(scope="module")
def odd_audio() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("odd_audio")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("name", ["WAV", "FLAC", "MP3, no count", "Ogg Vorbis"])
def test_the_sound_that_ffmpeg_gives_is_right_and_no_other(odd_audio, name, tmp_path, monkeypatch):
    end, encode = odd_audio.FORMATS[name]
    wave = odd_audio.music(odd_audio.SECONDS, odd_audio.RATE, 2)
    content, path = encode(wave, odd_audio.RATE), tmp_path / f"song.{end}"
    assert odd_audio.cell(content, path, must=True) == ("12.0 s", "")
    audio, rate = odd_audio.ours(path)
    for result, wrong in (
        ((audio[:, : rate * 6], rate), "half-read"),
        ((np.roll(audio, rate, axis=1), rate), "sounds otherwise"),
        ("truncated", "refused"),
    ):
        monkeypatch.setattr(odd_audio, "ours", lambda path, result=result: result)
        assert odd_audio.cell(content, path, must=True)[1] == wrong
