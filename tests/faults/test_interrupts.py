"""Two Ctrl-C in a row, as a terminal sends them, to all processes of a command: one message, no traceback, and the same
command goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ttmray.cli import main
from ttmray.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_OK
from ttmray.signals import MESSAGE, PLAIN

REPO = Path(__file__).resolve().parents[2]
ENDED = (EXIT_INTERRUPTED, -signal.SIGINT)
"""By us, or by the interpreter at its own end, which shells show as 130, too."""


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, t = tmp_path_factory.mktemp("songs"), np.arange(int(5.2 * 44100)) / 44100
    for i in range(10):
        tone = 0.3 * np.sin(2 * np.pi * (110 + 20 * i) * t) * (1 + np.sin(2 * np.pi * 3 * t)) / 2
        soundfile.write(folder / f"song{i}.flac", np.stack([tone, tone[::-1]], axis=1), 44100)
    return folder


def sets(*assignments: str) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


def corpus(songs: Path, output: Path, *more: str) -> list[str]:
    usual = (f"input={songs}", f"output={output}", "splits.validation=1", "splits.test=1", "runtime.device=cpu")
    return ["score-corpus", *sets(*usual, "bundle=debug", "segments.max_clips=1", "unit_clips=1", *more)]


def interrupted_twice(words: list[str], begun: Callable[[], bool], gap_s: float) -> str:
    """Start a command, interrupt it twice once it has begun, and see how it ends; returns what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ttmray", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a process group of its own
        preexec_fn=default,
    )
    until = time.monotonic() + 500
    while not begun():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(gap_s)
    printed = process.communicate(timeout=500)[0]
    assert process.returncode in ENDED, printed
    assert "Traceback" not in printed, printed
    assert "Exception ignored" not in printed, printed
    assert printed.count(MESSAGE) == 1, printed
    return printed


def some(folder: Path, pattern: str) -> Callable[[], bool]:
    return lambda: any(folder.glob(pattern))


@pytest.mark.parametrize(
    ("begun", "gap_s"),
    [
        ("index/*.parquet", 0.05),  # all are at work
        *(pytest.param("index/*.parquet", gap_s, marks=pytest.mark.slow) for gap_s in (0.0, 0.6)),
        *(pytest.param("run.json", gap_s, marks=pytest.mark.slow) for gap_s in (0.0, 0.05, 0.6)),  # children start
    ],
)
def test_a_corpus_on_child_processes(songs: Path, tmp_path: Path, begun: str, gap_s: float) -> None:
    words = corpus(songs, tmp_path / "run", "runtime.runner=local", "runtime.workers=2")
    interrupted_twice(words, some(tmp_path / "run", begun), gap_s)
    assert main(["verify", str(tmp_path / "run")]) == EXIT_BAD_INPUT
    assert main(words) == EXIT_OK
    assert main(["verify", str(tmp_path / "run")]) == EXIT_OK


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("gap_s", [0.05, 1.0])
def test_a_corpus_on_ray(songs: Path, tmp_path: Path, gap_s: float) -> None:
    words = corpus(songs, tmp_path / "run", "runtime.runner=ray", "runtime.workers=2")
    interrupted_twice(words, some(tmp_path / "run", "index/*.parquet"), gap_s)
    assert main([*words, *sets("runtime.runner=local", "runtime.workers=0")]) == EXIT_OK
    assert main(["verify", str(tmp_path / "run")]) == EXIT_OK


def test_a_generation(tmp_path: Path) -> None:
    prompts, run = tmp_path / "prompts.json", tmp_path / "run"
    prompts.write_text(json.dumps([{"id": f"p{i}", "prompt": f"song {i}"} for i in range(30)]))
    usual = ("sampler.steps=4", "runtime.device=cpu", "runtime.threads=1")
    words = ["generate", "--bundle", "debug", *sets(f"prompts={prompts}", f"output={run}", *usual)]
    interrupted_twice(words, some(run, "manifest/*.json"), 0.05)
    assert len(list(run.glob("manifest/*.json"))) < 30
    assert main(words) == EXIT_OK
    assert main(["verify", str(run)]) == EXIT_OK


def test_a_second_signal_in_the_midst_of_the_cleaning_up_ends_it(tmp_path: Path) -> None:
    """Whatever hangs there: a thread that is waited for, a cluster that does not answer."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\n"
        "from ttmray import cli\n"
        "def hangs(command, typed):\n"
        "    try:\n"
        "        print('begun', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('cleaning up', flush=True)\n"
        "        time.sleep(60)\n"
        "cli.execute = hangs\n"
        "sys.exit(cli.main(['status', 'x']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=default
    )
    assert process.stdout is not None
    for line in ("begun", "cleaning up"):
        assert process.stdout.readline().strip() == line
        process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, shown = process.communicate(timeout=50)
    assert time.monotonic() - started < 20
    assert process.returncode == EXIT_INTERRUPTED
    assert shown.strip() == PLAIN  # `status` keeps nothing


def default() -> None:
    """A shell that runs the tests in the background has its children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
