"""Whatever is killed and whenever: nothing lost, nothing twice, nothing half-written, nothing left behind."""

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from fault_schedules import differences
from processes import actors, workers

REPO = Path(__file__).resolve().parents[2]


class Job:
    """The corpus job as a user starts it, on one folder of songs."""

    def __init__(self, songs: Path, output: Path, runner: str, *sets: str) -> None:
        self.output = output
        common = (f"input={songs}", f"output={output}", f"runtime.runner={runner}", "splits.validation=1")
        small = ("bundle=debug", "splits.test=1", "segments.max_clips=2", "unit_clips=2", "max_failures=0", *sets)
        self.command = [sys.executable, str(REPO / "jobs/score_corpus.py")]
        for assignment in (*common, *small):
            self.command += ["--set", assignment]

    def start(self, **environment: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(self.command, env=os.environ | environment, stdout=subprocess.DEVNULL, cwd="/")

    def run(self, **environment: str) -> int:
        return self.start(**environment).wait(timeout=560)

    def committed(self) -> int:
        return len(list((self.output / "index").glob("*.parquet")))

    def files(self) -> set[str]:
        """Names below the run folder; shard and captions names carry their content's hash."""
        return {str(path.relative_to(self.output)) for path in self.output.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight different songs of 5 to 21 s: 12 clips in 8 units."""
    folder = tmp_path_factory.mktemp("songs")
    rng = np.random.default_rng(7)
    for i, seconds in enumerate((5, 21, 9, 20, 10, 21, 6, 20)):
        time = np.arange(seconds * 44100) / 44100
        tone = np.sin(2 * np.pi * (110 + 40 * i) * time) * (1 + np.sin(2 * np.pi * 2 * time)) / 5
        audio = np.stack([tone, tone[::-1]], axis=1) + 0.02 * rng.standard_normal((len(time), 2))
        soundfile.write(folder / f"song{i}.flac", audio, 44100)
    return folder


@pytest.fixture(scope="session")
def undisturbed(songs: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A finished run that nobody disturbed."""
    job = Job(songs, tmp_path_factory.mktemp("undisturbed") / "run", "local", "runtime.workers=2")
    assert job.run() == 0
    return job


KILLER = os.pathsep.join((str(Path(__file__).parent / "killer"), str(REPO)))


def assert_equal_runs(disturbed: Job, undisturbed: Job) -> None:
    assert differences(disturbed.output, undisturbed.output) == {}


def kill_at_random_moments(job: Job, kills: int, seed: int) -> int:
    """Kill the driver `kills` times, each time a random while after it commits or has had time to start."""
    rng = random.Random(seed)
    done = 0
    for _ in range(kills):
        driver = job.start()
        before, started = job.committed(), time.monotonic()
        while driver.poll() is None and job.committed() == before and time.monotonic() - started < 60:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 1.5))
        if driver.poll() is None:
            driver.send_signal(signal.SIGKILL)
            done += 1
        driver.wait()
    return done


def test_local_run_equals_an_undisturbed_one_after_its_driver_is_killed(
    songs: Path, undisturbed: Job, tmp_path: Path
) -> None:
    job = Job(songs, tmp_path / "run", "local", "runtime.workers=2")
    assert kill_at_random_moments(job, kills=2, seed=1) >= 1
    assert job.run() == 0
    assert_equal_runs(job, undisturbed)


@pytest.mark.slow
def test_local_run_goes_on_when_workers_are_killed(songs: Path, undisturbed: Job, tmp_path: Path) -> None:
    job = Job(songs, tmp_path / "run", "local", "runtime.workers=2")
    driver = job.start()
    rng, killed, deadline = random.Random(2), 0, time.monotonic() + 120
    while killed < 3 and driver.poll() is None and time.monotonic() < deadline:
        if job.committed() > killed and (victims := workers(driver.pid)):
            os.kill(rng.choice(victims), signal.SIGKILL)
            killed += 1
        time.sleep(0.05)
    assert driver.wait(timeout=400) == 0
    assert killed >= 2
    assert_equal_runs(job, undisturbed)


def statuses(job: Job) -> dict[str, tuple[str, str]]:
    index = pq.read_table(job.output / "index.parquet", columns=["key", "status", "reason"])
    return {row["key"]: (row["status"], row["reason"]) for row in index.to_pylist()}


@pytest.fixture
def songs_with_killer(songs: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "songs"
    folder.mkdir()
    for name in ("song0.flac", "song4.flac"):
        shutil.copy(songs / name, folder / name)
    # longer by one sample's worth of bytes than its twin, so that it is no duplicate
    (folder / "killer.flac").write_bytes((songs / "song6.flac").read_bytes())
    return folder


def test_file_that_kills_its_decoder_is_quarantined_and_the_job_goes_on(
    songs_with_killer: Path, tmp_path: Path
) -> None:
    sets = (
        "runtime.workers=2",
        "unit_clips=10",
        "segments.max_clips=10",
        "splits.validation=0",
        "splits.test=0",
    )
    job = Job(songs_with_killer, tmp_path / "run", "local", *sets)
    assert job.run(PYTHONPATH=KILLER) == 3  # one failure, none allowed
    assert statuses(job) == {"killer": ("failed", "killed"), "song0_0": ("ok", ""), "song4_0": ("ok", "")}
    assert not [name for name in job.files() if name.startswith("attempts")]


@pytest.mark.slow
def test_file_that_hangs_its_decoder_is_quarantined(songs_with_killer: Path, tmp_path: Path) -> None:
    # the time-out of a unit is clip_timeout_s x unit_clips, and it is spent three times before clips run alone
    sets = ("runtime.workers=1", "runtime.clip_timeout_s=6", "splits.validation=0", "splits.test=0")
    job = Job(songs_with_killer, tmp_path / "run", "local", *sets)
    assert job.run(PYTHONPATH=KILLER, KILLER_HANGS="1") == 3
    assert statuses(job)["killer"] == ("failed", "killed")


@pytest.mark.slow
def test_ray_run_equals_an_undisturbed_one_after_five_kills_of_its_driver(
    songs: Path, undisturbed: Job, tmp_path: Path
) -> None:
    job = Job(songs, tmp_path / "run", "ray")
    assert kill_at_random_moments(job, kills=5, seed=3) >= 4
    assert job.run() == 0
    assert_equal_runs(job, undisturbed)


@pytest.mark.slow
def test_ray_run_goes_on_when_five_actors_are_killed(songs: Path, undisturbed: Job, tmp_path: Path) -> None:
    job = Job(songs, tmp_path / "run", "ray", "runtime.fuse=none")
    driver = job.start()
    rng, killed, deadline, last = random.Random(4), 0, time.monotonic() + 240, math.inf
    while killed < 5 and driver.poll() is None and time.monotonic() < deadline:
        victims = actors(driver.pid, "MapWorker")
        last = min(last, time.monotonic()) if victims else last  # the first sight of one
        # on a busy machine what waited for the first victim is committed all at once
        if victims and (job.committed() > killed or time.monotonic() > last + 8):
            os.kill(rng.choice(victims), signal.SIGKILL)
            killed, last = killed + 1, time.monotonic()
        time.sleep(0.05)
    assert driver.wait(timeout=560) == 0
    assert killed >= 4
    assert_equal_runs(job, undisturbed)


@pytest.mark.slow
def test_file_that_kills_its_decoder_under_ray_is_quarantined(songs_with_killer: Path, tmp_path: Path) -> None:
    sets = ("runtime.fuse=none", "unit_clips=10", "segments.max_clips=10", "splits.validation=0", "splits.test=0")
    job = Job(songs_with_killer, tmp_path / "run", "ray", *sets)
    assert job.run(PYTHONPATH=KILLER) == 3
    assert statuses(job) == {"killer": ("failed", "killed"), "song0_0": ("ok", ""), "song4_0": ("ok", "")}


@pytest.mark.slow
def test_file_that_hangs_its_decoder_under_ray_is_quarantined(songs_with_killer: Path, tmp_path: Path) -> None:
    """Nobody waits for it: its processes end by themselves."""
    sets = ("runtime.fuse=none", "runtime.clip_timeout_s=10", "splits.validation=0", "splits.test=0")
    job = Job(songs_with_killer, tmp_path / "run", "ray", *sets)
    assert job.run(PYTHONPATH=KILLER, KILLER_HANGS="1") == 3
    assert statuses(job) == {"killer": ("failed", "killed"), "song0_0": ("ok", ""), "song4_0": ("ok", "")}
