"""A run folder on a mounted drive: no hard links, renames that are not atomic, no fsync, slow listings."""

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mounted_drive
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from ttmray.corpus.verify import problems
from ttmray.storage import Folder
from ttmray.training.checkpoint import committed, load

REPO = Path(__file__).resolve().parents[2]
CLOCK = {"seconds", "samples_per_s", "tflops_per_device", "mfu", "data_wait", "eta_s"}
KILLS = [3, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]
PRELOAD = ["ttmray.cli", "ttmray.corpus.assembly", "ttmray.corpus.pipeline", "ttmray.training.sft", "demucs.htdemucs"]


class Command:
    """A command of ttmray whose run folder lies on the drive. Its processes are forks of one that has imported all."""

    def __init__(self, name: str, output: Path, *sets: str) -> None:
        self.output = output
        self.words = [name, *(f"--set={text}" for text in (f"output={output}", *sets))]
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)

    def run(self, die_at: int = 0) -> int | None:
        """Exit code; minus the signal of a process that was killed."""
        arguments = (self.words, str(self.output.parent), die_at)
        process = self._context.Process(target=mounted_drive.command, args=arguments)
        process.start()
        process.join(timeout=600)
        assert not process.is_alive()
        return process.exitcode

    def die(self, times: int, seed: int, most: int) -> None:
        """Killed again and again, each time in the middle of one of its next `most` writes; then it ends."""
        chance = random.Random(seed)
        codes = [self.run(chance.randint(1, most)) for _ in range(times)]
        assert codes == [-signal.SIGKILL] * times
        assert self.run() == 0

    def files(self) -> dict[str, bytes]:
        """Names, and the bytes of weights."""
        paths = sorted(path for path in self.output.rglob("*") if path.is_file() and "tensorboard" not in path.parts)
        return {
            str(path.relative_to(self.output)): path.read_bytes() if path.suffix == ".safetensors" else b""
            for path in paths
        }


@pytest.fixture(scope="session")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten songs of 5.2 s."""
    folder = tmp_path_factory.mktemp("songs")
    rng = np.random.default_rng(3)
    times = np.arange(int(5.2 * 44100)) / 44100
    for i in range(10):
        tone = np.sin(2 * np.pi * (110 + 40 * i) * times) * (1 + np.sin(2 * np.pi * 2 * times)) / 5
        audio = np.stack([tone, tone[::-1]], axis=1) + 0.02 * rng.standard_normal((len(times), 2))
        soundfile.write(folder / f"song{i}.flac", audio, 44100)
    return folder


def corpus_job(songs: Path, output: Path, *sets: str) -> Command:
    small = (
        "bundle=debug",
        "splits.validation=1",
        "splits.test=1",
        "unit_clips=1",
        "segments.max_clips=1",
        "separation.scope=none",
    )
    return Command("score-corpus", output, f"input={songs}", *small, "runtime.runner=local", "runtime.workers=0", *sets)


@pytest.fixture(scope="session")
def undisturbed_corpus(songs: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """A run on a drive, too, that nobody disturbed."""
    job = corpus_job(songs, tmp_path_factory.mktemp("undisturbed") / "run")
    assert job.run() == 0
    return job


def assert_equal_corpora(disturbed: Command, undisturbed: Command) -> None:
    index = pq.read_table(disturbed.output / "index.parquet")
    assert index.equals(pq.read_table(undisturbed.output / "index.parquet"))
    assert disturbed.files() == undisturbed.files()
    assert list(problems(Folder.at(str(disturbed.output)))) == []


@pytest.mark.slow
@pytest.mark.parametrize("kills", KILLS)
def test_a_corpus_on_a_drive_is_that_of_an_undisturbed_run(
    songs: Path, undisturbed_corpus: Command, tmp_path: Path, kills: int
) -> None:
    job = corpus_job(songs, tmp_path / "drive/run")
    job.die(kills, seed=kills, most=9)
    assert_equal_corpora(job, undisturbed_corpus)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_workers_on_a_drive_that_are_killed_with_their_job_make_the_same_corpus(
    songs: Path, undisturbed_corpus: Command, tmp_path: Path
) -> None:
    """The real command with two processes, each on the drive, killed at any moment."""
    job = corpus_job(songs, tmp_path / "drive/run", "runtime.workers=2")
    path = os.pathsep.join((str(Path(__file__).parent / "drive"), str(REPO / "tests"), str(REPO)))
    environment = os.environ | {"PYTHONPATH": path, "MOUNTED_DRIVE": str(tmp_path / "drive")}
    chance = random.Random(5)

    def units() -> int:
        return len(list((job.output / "index").glob("*.parquet")))

    def start() -> "subprocess.Popen[bytes]":
        words = [sys.executable, "-m", "ttmray", *job.words]
        return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, cwd="/")

    for _ in range(4):
        driver, before, started = start(), units(), time.monotonic()
        while driver.poll() is None and units() == before and time.monotonic() - started < 60:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.3))
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert start().wait(timeout=1500) == 0
    assert_equal_corpora(job, undisturbed_corpus)


def training(corpus: Path, output: Path) -> Command:
    sets = [f"data.sources=[{{corpus: {corpus}}}]", "model.size=debug", "batch=2", "steps=40", "optimizer.lr=1e-3"]
    sets += ["optimizer.warmup=3", "precision=fp32", "checkpoint.every=2", "validation.every=9", "runtime.log_every=5"]
    return Command("train-sft", output, *sets, "runtime.threads=1", "ema.snapshot_every=7", "runtime.tensorboard=false")


@pytest.fixture(scope="session")
def undisturbed_training(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    run = training(corpus, tmp_path_factory.mktemp("undisturbed") / "run")
    assert run.run() == 0
    return run


def log_of(run: Command) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("kills", KILLS)
def test_a_training_on_a_drive_has_the_bits_of_an_undisturbed_one(
    corpus: Path, undisturbed_training: Command, tmp_path: Path, kills: int
) -> None:
    run = training(corpus, tmp_path / "drive/run")
    run.die(kills, seed=kills, most=25)
    assert run.files() == undisturbed_training.files()
    assert log_of(run) == log_of(undisturbed_training)
    places = Folder.at(str(run.output / "checkpoints"))
    assert load(places, committed(places)[0]).step == 40


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """This process on the drive."""
    for name in ("link", "rename", "replace", "unlink", "remove", "fsync", "scandir", "listdir"):
        monkeypatch.setattr(os, name, getattr(os, name))
    monkeypatch.setattr(mounted_drive.ctypes.CDLL, "__getattr__", mounted_drive._getattr)
    mounted_drive.install(str(tmp_path / "drive"))
    return Folder.at(str(tmp_path / "drive"))


def test_the_drive_can_do_as_little_as_it_says(drive: Folder, tmp_path: Path) -> None:
    (tmp_path / "drive").mkdir()
    file = tmp_path / "drive/a"
    file.write_bytes(b"1")
    with pytest.raises(PermissionError):
        os.link(file, tmp_path / "drive/b")
    with open(file, "rb") as opened, pytest.raises(OSError, match="Invalid argument"):
        os.fsync(opened.fileno())
    library = mounted_drive.ctypes.CDLL(None, use_errno=True)
    assert (library.renameat2(0), mounted_drive.ctypes.get_errno()) == (-1, errno.EINVAL)
    os.rename(file, tmp_path / "drive/c")
    assert (tmp_path / "drive/c").read_bytes() == b"1"
    (tmp_path / "disk").write_bytes(b"2")
    os.link(tmp_path / "disk", tmp_path / "disk2")
    assert [entry.name for entry in os.scandir(tmp_path / "drive")] == ["c"]


def test_files_are_written_and_created_on_a_drive(drive: Folder) -> None:
    drive.write("a", b"1")
    drive.write("a", b"2")
    assert drive.create("b", b"1") is True
    assert drive.create("b", b"2") is False
    assert (drive.read("a"), drive.read("b")) == (b"2", b"1")
    assert [file.name for file in drive.files()] == ["a", "b"]


def test_what_is_there_already_is_not_replaced_by_itself(drive: Folder) -> None:
    """On a drive a file that is replaced is not there for a while, and whoever is killed then has lost it."""
    drive.write("run.json", b"1")
    before = os.stat(drive.path("run.json")).st_ino
    drive.write("run.json", b"1")
    assert os.stat(drive.path("run.json")).st_ino == before
    drive.write("run.json", b"2")
    assert drive.read("run.json") == b"2"


def test_an_error_of_the_disk_is_none_that_a_drive_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        Folder.at(str(tmp_path)).write("a", b"1")
    assert os.listdir(tmp_path) == []
