"""Small corpora of random numbers, and Stage 1 runs on one of them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from synthetic_corpus import write_random_corpus

from ttmray.config import load_config
from ttmray.storage import Folder
from ttmray.training.checkpoint import load, newest_valid
from ttmray.training.config import TrainConfig
from ttmray.training.sft import train_sft
from ttmray.training.state import TrainingState

SIZES = {"latent": (5, 4), "text": (3, 8), "clips_per_track": 3}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 clips for training and 3 for validation in shards of 6; do not change it."""
    folder = tmp_path_factory.mktemp("data") / "corpus"
    write_random_corpus(str(folder), tracks=7, captions=3, validation=1, unit_clips=6, **SIZES)
    return folder


@pytest.fixture(scope="session")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 clips of another corpus."""
    folder = tmp_path_factory.mktemp("data") / "expert"
    write_random_corpus(str(folder), tracks=2, unit_clips=3, seed=1, **SIZES)
    return folder


@pytest.fixture(scope="session")
def debug_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 clips for training and 6 for validation, with text features of the debug bundle's shape; do not change it."""
    return write_debug_corpus(tmp_path_factory.mktemp("data") / "debug")


def write_debug_corpus(folder: Path, **sizes: Any) -> Path:
    """Short latents, so that an update takes a tenth of a second."""
    usual: dict[str, Any] = {"tracks": 8, "clips_per_track": 3, "captions": 4, "validation": 2, "unit_clips": 6}
    run = write_random_corpus(str(folder), **{**usual, "latent": (16, 40), "text": (77, 64), **sizes})
    described = json.loads(run.read("run.json"))
    described["config"]["bundle"] = "debug"
    run.write("run.json", json.dumps(described).encode())
    return folder


@pytest.fixture(scope="session")
def write_corpus() -> Callable[..., Path]:
    """`write_corpus(folder, tracks=2, ...)`: another one like it."""
    return write_debug_corpus


@pytest.fixture(scope="session")
def make_sets(debug_corpus: Path) -> Callable[..., list[str]]:
    """`make_sets(output, "a.b=value", ...)`: overrides of a Stage 1 run of 12 updates without audio."""

    def make(output: Path | str, *sets: str) -> list[str]:
        usual = [f"output={output}", f"data.sources=[{{corpus: {debug_corpus}}}]", "model.size=debug", "batch=4"]
        usual += ["steps=12", "optimizer.lr=1e-3", "optimizer.warmup=3", "precision=fp32", "checkpoint.every=5"]
        usual += ["validation.every=6", "runtime.log_every=4", "runtime.threads=1", "runtime.tensorboard=false"]
        return [*usual, *sets]

    return make


@pytest.fixture(scope="session")
def make_train_config(make_sets: Callable[..., list[str]]) -> Callable[..., TrainConfig]:
    """The same as a config."""
    return lambda output, *sets: load_config(TrainConfig, None, make_sets(output, *sets))


@pytest.fixture(scope="session")
def finished(make_train_config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of that run, which nobody disturbed; do not change it."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert train_sft(make_train_config(output)) == 0
    return output


def final_state(output: Path | str) -> TrainingState:
    """What the newest checkpoint of a run holds."""
    places = Folder.at(str(output)).sub("checkpoints")
    name = newest_valid(places)
    assert name is not None
    return load(places, name)


def metrics(output: Path | str) -> list[dict[str, Any]]:
    """Logged lines without what depends on the clock."""
    clock = {"seconds", "samples_per_s", "tflops_per_device", "mfu", "data_wait", "eta_s"}
    lines = Folder.at(str(output)).read("metrics.jsonl").decode().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in clock} for line in lines]


def largest_difference(a: TrainingState, b: TrainingState) -> float:
    """Over weights, averages and optimiser state; 0.0: the same bits."""
    pairs = [(getattr(a, part), getattr(b, part)) for part in ("model", "ema", "optimizer")]
    assert all(x.keys() == y.keys() for x, y in pairs)
    return max(float((x[name] - y[name]).abs().max()) for x, y in pairs for name in x)


@pytest.fixture(scope="session")
def look() -> SimpleNamespace:
    """Helpers that look at runs."""
    return SimpleNamespace(state=final_state, metrics=metrics, difference=largest_difference)
