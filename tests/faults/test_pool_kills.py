"""Whoever makes a pool, and whoever is killed in between: the same index bytes, the same shards."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from processes import actors

from ttmray.corpus.verify import problems
from ttmray.generation.filter import FilterConfig, filter_pool
from ttmray.storage import Folder

PROGRAM = """
import sys
from ttmray.config import load_config
from ttmray.generation.pool import generate_pool
from ttmray.generation.pool_worker import CandidatesConfig
sys.exit(generate_pool(load_config(CandidatesConfig, None, sys.argv[1:])))
"""


class Job:
    """The pool job in a process of its own: 12 clips in 6 units."""

    def __init__(self, folder: Path, *sets: str) -> None:
        self.output = folder / "pool"
        prompts = folder / "prompts.txt"
        folder.mkdir(exist_ok=True)
        prompts.write_text("".join(f"a song of number {i}\n" for i in range(6)))
        common = (f"prompts={prompts}", f"output={self.output}", "bundle=debug", "candidates=2", "unit_clips=2")
        self.command = [
            sys.executable,
            "-c",
            PROGRAM,
            *common,
            "sampler.steps=2",
            "runtime.device=cpu",
            "runtime.threads=1",
            *sets,
        ]

    def start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(self.command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def committed(self) -> int:
        return len(list((self.output / "index").glob("*.parquet")))

    def made(self) -> dict[str, bytes]:
        """Bytes of all index files and texts; of shards the names, which carry their hashes."""
        files = {str(path.relative_to(self.output)): path for path in self.output.rglob("*") if path.is_file()}
        exact = ("index", "plan", "stats")
        return {name: path.read_bytes() if name.startswith(exact) else b"" for name, path in sorted(files.items())}


def selected(job: Job) -> dict[str, bytes]:
    """Files of the top decile of a pool, without gates, which noise does not pass."""
    out = job.output.with_name("selection")
    filter_pool(str(job.output), str(out), FilterConfig(max_silence=None, max_clipping=None, max_similarity=None))
    assert len((out / "kept.txt").read_text().split()) == 2
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job(tmp_path_factory.mktemp("undisturbed"))
    assert job.start().wait(timeout=400) == 0
    return job


def kill_at(job: Job, commits: int, victim: Callable[[int], list[int]]) -> int:
    """Start the job, kill a process once so many units are committed; the exit code of the job."""
    driver = job.start()
    deadline = time.monotonic() + 150
    while driver.poll() is None and time.monotonic() < deadline:
        if job.committed() >= commits and (found := victim(driver.pid)):
            os.kill(found[0], signal.SIGKILL)
            break
        time.sleep(0.01)
    else:
        driver.kill()
        pytest.fail(f"nothing was killed; the job ended with {driver.poll()}")
    return driver.wait(timeout=300)


@pytest.mark.slow
def test_a_relaunch_after_the_job_was_killed_gives_the_pool_of_an_undisturbed_run(undisturbed, tmp_path):
    job = Job(tmp_path)
    assert kill_at(job, 2, lambda driver: [driver]) == -signal.SIGKILL
    assert 2 <= job.committed() < 6
    assert not (job.output / "_SUCCESS.json").exists()
    assert job.start().wait(timeout=400) == 0
    assert job.made() == undisturbed.made()
    assert selected(job) == selected(undisturbed)
    assert list(problems(Folder(str(job.output)))) == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ray_actors_give_the_same_pool_although_one_of_them_is_killed(undisturbed, tmp_path, workers):
    job = Job(tmp_path, "runtime.runner=ray", f"runtime.workers={workers}")
    assert kill_at(job, 1, partial(actors, name="_Actor")) == 0
    assert job.made() == undisturbed.made()
    assert selected(job) == selected(undisturbed)
