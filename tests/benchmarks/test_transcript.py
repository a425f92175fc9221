"""What jobs print where nobody watches a terminal: not one line of a library, and no colour codes."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
from synthetic_corpus import write_random_corpus

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def transcript() -> ModuleType:
    """`benchmarks/transcript.py`."""
    spec = importlib.util.spec_from_file_location("transcript", REPO / "benchmarks/transcript.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, t = tmp_path_factory.mktemp("work") / "songs", np.arange(int(5.2 * 44100)) / 44100
    folder.mkdir()
    for i in range(4):
        tone = 0.3 * np.sin(2 * np.pi * (110 + 30 * i) * t) * (1 + np.sin(2 * np.pi * 3 * t)) / 2
        soundfile.write(folder / f"song{i}.flac", np.stack([tone, tone[::-1]], axis=1), 44100)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A small corpus of random numbers for trainings of the debug backbone."""
    sizes = {"tracks": 6, "clips_per_track": 3, "validation": 1, "unit_clips": 6, "latent": (16, 40), "text": (77, 64)}
    run = write_random_corpus(str(tmp_path / "corpus"), **sizes)
    described = json.loads(run.read("run.json"))
    described["config"]["bundle"] = "debug"
    run.write("run.json", json.dumps(described).encode())
    return tmp_path / "corpus"


def sets(*assignments: str) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


def train(corpus: Path, folder: Path, *more: str) -> list[str]:
    usual = [f"output={folder / 'stage1'}", f"data.sources.0.corpus={corpus}", "steps=2", "batch=4", "samples.every=0"]
    usual += ["checkpoint.every=2", "runtime.log_every=1", "validation.every=2", "validation.clips=2"]
    return ["jobs/train_sft.py", "--config", str(REPO / "configs/debug/stage1.yaml"), *sets(*usual, *more)]


def ours(lines: list[str], transcript: ModuleType) -> None:
    """All lines are, and there are some."""
    assert len(lines) > 3, lines
    assert [line for line in lines if line.startswith(transcript.FOREIGN) or "\x1b" in line] == []
    assert not lines[-1].startswith("(exit code"), lines


def test_lines_of_others_and_colour_codes_are_told_from_ours(transcript, tmp_path):
    code = "import warnings; from ttmray.console import console; console.print('[x] ours', style='red')\n"
    (tmp_path / "noisy.py").write_text(f"{code}print('theirs')\nwarnings.warn('old')\n")
    lines = transcript.transcript([str(tmp_path / "noisy.py")], tmp_path)
    assert lines[0] == "[x] ours"
    assert "!! theirs" in lines
    assert any(line.startswith("!! .../noisy.py:3: UserWarning: old") for line in lines)
    (judged,) = transcript._judged([f"{transcript.OURS}\x1b[31mred"], tmp_path)
    assert judged == "!! \\x1b[31mred"


@pytest.mark.slow
def test_nothing_but_our_lines_comes_from_a_training_and_a_generation(transcript, corpus, tmp_path):
    ours(transcript.transcript(train(corpus, tmp_path), tmp_path), transcript)
    options = sets("samples=1", "sampler.steps=1", "postprocess=null", "texts=[slow piano]", f"output={tmp_path / 'g'}")
    generate = ["jobs/generate.py", "--config", str(REPO / "configs/debug/generate.yaml"), *options]
    ours(transcript.transcript(generate, tmp_path), transcript)


@pytest.mark.slow
def test_nothing_but_our_lines_comes_from_jobs_on_ray(transcript, songs, corpus, tmp_path):
    options = sets(f"input={songs}", f"output={tmp_path / 'run'}", "splits.validation=1", "splits.test=1")
    score = ["jobs/score_corpus.py", "--config", str(REPO / "configs/debug/corpus.yaml"), *options]
    lines = transcript.transcript([*score, *sets("runtime.runner=ray", "runtime.workers=1")], tmp_path)
    ours(lines, transcript)
    assert any("clips ok" in line for line in lines)
    lines = transcript.transcript(train(corpus, tmp_path, "runtime.runner=ray", "runtime.workers=2"), tmp_path)
    ours(lines, transcript)
    assert sum(line.startswith("step 1/2 | loss") for line in lines) == 1, "workers' own lines come through, once"


def test_the_committed_transcript_has_no_line_of_others_and_every_job_can_be_run_for_it(transcript):
    text = (REPO / "docs/console.md").read_text("utf-8")
    assert [line for line in text.splitlines() if line.startswith((transcript.FOREIGN, "(exit code"))] == []
    assert {path.stem for path in (REPO / "jobs").glob("*.py")} == set(transcript.JOBS)
    assert {"score_corpus", "train_sft", "generate"} <= transcript._sections(REPO / "docs/console.md").keys()
    assert "\x1b" not in text
    assert sys.executable not in text
