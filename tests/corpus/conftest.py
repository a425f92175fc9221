"""Tiny songs, configs for them, and one finished run that tests copy before they change it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ttmray.config import load_config
from ttmray.corpus.assembly import CorpusJob
from ttmray.corpus.catalogue import build_catalogue
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.job import score_corpus
from ttmray.corpus.plan import Plan, build_plan
from ttmray.corpus.unit import Unit
from ttmray.models.bundle import open_bundle

MakeConfig = Callable[..., CorpusConfig]


def tone(seconds: float, rate: int, hertz: float, channels: int = 2) -> np.ndarray:
    """A seeded tone with a beat and some noise: (frames, channels) float32."""
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(round(hertz)).standard_normal((len(t), channels))
    beat = np.sin(2 * np.pi * 2 * t) > 0
    voice = 0.3 * np.sin(2 * np.pi * hertz * t) + 0.2 * np.sin(3 * np.pi * hertz * t) * beat
    return (voice[:, None] * np.linspace(1.0, 0.8, channels) + 0.02 * noise).astype(np.float32)


@pytest.fixture(scope="session")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four songs and a text file with an audio name: 4 clips ok, 1 rejected (silent), 1 track failed."""
    folder = tmp_path_factory.mktemp("songs")
    (folder / "amber").mkdir()
    soundfile.write(folder / "amber/tide.flac", tone(21, 44100, 220), 44100)
    (folder / "broken.mp3").write_text("no music\n" * 99)
    soundfile.write(folder / "kite.wav", tone(6, 48000, 330, channels=1), 48000)
    soundfile.write(folder / "silence.flac", np.zeros((44100 * 6, 2), np.float32), 44100)
    soundfile.write(folder / "wave.ogg", tone(7, 44100, 440), 44100)
    captions = {"amber/tide.flac": "Slow waves.", "kite.wav": "A kite.", "wave.ogg": "Slow waves."}
    (folder / "captions.json").write_text(json.dumps([{"path": p, "caption": c} for p, c in captions.items()]))
    return folder


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """`make_config(input, output, "a.b=value", ...)`: the local runner in this process, units of 2 clips."""

    def make(input: Path | str, output: Path | str, *sets: str) -> CorpusConfig:
        usual = ("runtime.runner=local", "runtime.workers=0", "segments.max_clips=2", "unit_clips=2", "max_failures=1")
        other = ("splits.validation=1", "splits.test=1", "runtime.device=cpu", "bundle=debug")
        return load_config(CorpusConfig, None, [f"input={input}", f"output={output}", *usual, *other, *sets])

    return make


@pytest.fixture(scope="session")
def finished_run(songs: Path, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a finished job over `songs`. Do not change it: see `run`."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert score_corpus(make_config(songs, output)) == 0
    return output


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def prepare() -> Callable[[CorpusConfig], tuple[CorpusJob, Plan, list[Unit]]]:
    """Plan of a config, as the job makes it, without running anything."""

    def prepare(config: CorpusConfig) -> tuple[CorpusJob, Plan, list[Unit]]:
        plan = build_plan(build_catalogue(config.input, config.catalogue), config)
        bundle = open_bundle(config.bundle)
        protocol = f"{bundle.name}/{bundle.protocol(config.reward_text).id()}"
        job = CorpusJob(config=config.model_dump_json(), root=plan.root, protocol=protocol)
        return job, plan, [Unit(name, tracks) for name, tracks in plan.units()]

    return prepare
