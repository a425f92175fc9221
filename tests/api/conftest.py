"""A folder as the examples assume it, and loaded models."""

import json
from pathlib import Path

import pytest
import soundfile
from synthetic_corpus import write_random_corpus
from synthetic_music import RATE, music

import ttmray


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random latents, with text features of the debug bundle's shape; do not change it."""
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    sizes = {"clips_per_track": 3, "captions": 4, "validation": 2, "unit_clips": 6}
    run = write_random_corpus(str(folder), tracks=8, latent=(16, 40), text=(77, 64), **sizes)
    described = json.loads(run.read("run.json"))
    described["config"]["bundle"] = "debug"
    run.write("run.json", json.dumps(described).encode())
    return folder


@pytest.fixture
def workplace(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with songs and a corpus, as the documents speak of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-songs/album").mkdir(parents=True)
    for i in (1, 2):
        soundfile.write(tmp_path / f"my-songs/album/song{i}.flac", music(1.0 + i).T, RATE)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/my-corpus").symlink_to(corpus)
    return tmp_path


@pytest.fixture(scope="session")
def studio() -> "ttmray.LoadedBundle":
    """The debug bundle on the CPU, loaded once."""
    return ttmray.load("debug", device="cpu", threads=1)
