"""Training that is killed at any moment, also while it saves: the same bits and the same log as if it never was."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from ttmray.storage import Folder
from ttmray.training.checkpoint import committed, load
from ttmray.training.state import TrainingState

REPO = Path(__file__).resolve().parents[2]
STEPS = 60
CLOCK = {"seconds", "samples_per_s", "tflops_per_device", "mfu", "data_wait", "eta_s"}


class Run:
    """Stage 1 as a user starts it: 60 updates with a checkpoint after every second one."""

    def __init__(self, corpus: Path, output: Path) -> None:
        self.output = output
        sets = [f"output={output}", f"data.sources=[{{corpus: {corpus}}}]", "model.size=debug", "batch=4"]
        sets += [f"steps={STEPS}", "optimizer.lr=1e-3", "optimizer.warmup=3", "precision=fp32", "checkpoint.every=2"]
        sets += ["validation.every=9", "runtime.log_every=5", "runtime.threads=1", "ema.snapshot_every=7"]
        self.command = [sys.executable, str(REPO / "jobs/train_sft.py"), *(f"--set={text}" for text in sets)]

    def start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(self.command, stdout=subprocess.DEVNULL, cwd="/")

    def finish(self) -> None:
        assert self.start().wait(timeout=560) == 0

    def state(self) -> TrainingState:
        places = Folder.at(str(self.output / "checkpoints"))
        return load(places, committed(places)[0])

    def lines(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]

    def files(self) -> dict[str, bytes]:
        """Names, and the bytes of what is to be equal to the bit."""
        found = sorted(path for path in self.output.rglob("*") if path.is_file() and "tensorboard" not in path.parts)
        return {
            str(path.relative_to(self.output)): path.read_bytes() if path.suffix == ".safetensors" else b""
            for path in found
        }

    def kill_at_a_random_moment(self, chance: random.Random) -> str:
        """Kill it some time after it has begun to train; says what it was doing."""
        process, written = self.start(), self.progress()
        while process.poll() is None and self.progress() == written:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            return "done"
        saving = self.output / "checkpoints"
        if any(saving.rglob(".tmp-*")) or any(not (p / "state.json").exists() for p in saving.glob("step-*")):
            return "saving"
        return "training"

    def progress(self) -> int:
        """When it last wrote a checkpoint's file, in ns; older checkpoints may vanish meanwhile."""
        newest = 0
        for folder, _, names in os.walk(self.output / "checkpoints"):
            for name in names:
                with suppress(FileNotFoundError):
                    newest = max(newest, os.stat(os.path.join(folder, name)).st_mtime_ns)
        return newest


@pytest.fixture(scope="session")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(corpus, tmp_path_factory.mktemp("undisturbed") / "run")
    run.finish()
    return run


def assert_same(disturbed: Run, undisturbed: Run) -> None:
    ours, theirs = disturbed.state(), undisturbed.state()
    assert ours.step == theirs.step == STEPS
    for part in ("model", "ema", "optimizer"):
        found, expected = getattr(ours, part), getattr(theirs, part)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (ours.position, ours.rng, ours.ema_step) == (theirs.position, theirs.rng, theirs.ema_step)
    assert disturbed.lines() == undisturbed.lines()
    logged = [line["step"] for line in disturbed.lines() if "loss" in line]
    assert logged == list(range(5, STEPS + 1, 5))
    assert disturbed.files() == undisturbed.files()  # EMA snapshots too, and nothing half-written left


def kill_and_go_on(run: Run, kills: int, seed: int) -> list[str]:
    chance, moments = random.Random(seed), []
    for _ in range(kills):
        moments.append(run.kill_at_a_random_moment(chance))
    run.finish()
    return moments


def test_killed_twice_it_ends_with_the_bits_of_an_undisturbed_run(corpus: Path, undisturbed: Run, tmp_path: Path):
    run = Run(corpus, tmp_path / "run")
    assert "done" not in kill_and_go_on(run, 2, seed=1)
    assert_same(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_killed_ten_times_it_ends_with_the_bits_of_an_undisturbed_run(
    corpus: Path, undisturbed: Run, tmp_path: Path, seed: int
):
    run = Run(corpus, tmp_path / "run")
    moments = kill_and_go_on(run, 10, seed)
    print(f"killed while {moments}")
    assert "saving" in moments
    assert "done" not in moments
    assert_same(run, undisturbed)


@pytest.mark.slow
def test_a_run_that_hangs_says_where_and_ends(corpus: Path, tmp_path: Path):
    program = tmp_path / "hang.py"
    program.write_text(
        "import sys, time\n"
        "from ttmray.training.sft import SftTask\n"
        "def stuck_in_the_middle(self, samples, forward):\n"
        "    time.sleep(100)\n"
        "SftTask.losses = stuck_in_the_middle\n"
        "from ttmray.cli import main\n"
        "sys.exit(main(['train-sft', *sys.argv[1:]]))\n"
    )
    command = [sys.executable, str(program), *Run(corpus, tmp_path / "run").command[2:]]
    ended = subprocess.run(
        [*command, "--set=runtime.watchdog_s=1"], capture_output=True, text=True, timeout=90, env=dict(os.environ)
    )
    assert ended.returncode == 1
    assert "Timeout (0:00:01)!" in ended.stderr
    assert "in stuck_in_the_middle" in ended.stderr
