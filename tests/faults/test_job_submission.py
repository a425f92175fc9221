"""`ray job submit` against a real head, with the command of the README: logs, exit codes, stop, resume, working folder.

The head's dashboard listens on loopback and asks for a token, as in `cluster/`. Its GPU is a number: the models run on
the CPU. Songs and runs are in a bucket of an object store in this process, and in local folders.
"""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from ttmray.corpus.index import committed_units
from ttmray.corpus.verify import problems
from ttmray.storage import Folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

REPO = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).parent / "ray")
SONGS = 12


def readme_command() -> list[str]:
    """The words after `ray job submit --address ... --` in the README."""
    (line,) = re.findall(r"^ray job submit .*$", (REPO / "README.md").read_text(), re.MULTILINE)
    words = shlex.split(line)
    return [word.replace("/opt/ttmray/", f"{REPO}/") for word in words[words.index("--") + 1 :]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Head:
    """A head of its own, and `ray job` commands to it, as a user types them."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self.environment = environment
        self.port = free_port()
        self.folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short: sockets have paths of at most 107 bytes
        options = ["--head", "--block", f"--port={free_port()}", "--num-cpus=4", "--num-gpus=1"]
        options += ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.port}", f"--temp-dir={self.folder}"]
        options += ["--object-store-memory=200000000", "--disable-usage-stats"]
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [RAY, "start", *options], env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def job(self, command: str, *words: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        address = ("--address", f"http://127.0.0.1:{self.port}")
        return subprocess.run(
            [RAY, "job", command, *address, *words],
            env=self.environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=1200,
        )

    def details(self, name: str) -> dict[str, Any]:
        """Details of a job, as the dashboard has them."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/api/jobs/{name}")
        request.add_header("Authorization", f"Bearer {self.environment['RAY_AUTH_TOKEN']}")
        with urllib.request.urlopen(request, timeout=120) as answer:
            return dict(json.load(answer))

    def wait(self, name: str, status: str, limit_s: float = 240) -> None:
        until = time.monotonic() + limit_s
        while self.details(name)["status"] != status:
            assert time.monotonic() < until, (self.details(name), self.job("logs", name).stdout[-3000:])
            time.sleep(0.5)

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def bucket_uri(object_store: Callable[[str], str]) -> str:
    return object_store("jobs")


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory, bucket_uri: str) -> Path:
    """Songs of 5.2 s in a folder and in the bucket; in the folder also one that is broken."""
    folder = tmp_path_factory.mktemp("songs")
    bucket = Folder.at(bucket_uri).sub("songs")
    seconds = np.arange(int(5.2 * 44100)) / 44100
    for i in range(SONGS):
        tone = 0.3 * np.sin(2 * np.pi * (110 + 20 * i) * seconds) * (1 + np.sin(2 * np.pi * 3 * seconds)) / 2
        soundfile.write(folder / f"song{i:02d}.flac", np.stack([tone, tone[::-1]], axis=1), 44100)
        bucket.write(f"song{i:02d}.flac", (folder / f"song{i:02d}.flac").read_bytes())
    (folder / "broken.mp3").write_text("no music\n" * 50)
    return folder


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, songs: Path) -> Iterator[Head]:
    log = tmp_path_factory.mktemp("head") / "log.txt"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | token | {"PATH": path, "OMP_NUM_THREADS": "1", "RAY_DISABLE_IMPORT_WARNING": "1"}
    environment.pop("RAY_ADDRESS", None)
    running = Head(environment, log)
    try:
        until = time.monotonic() + 180
        while running.job("list").returncode != 0:
            assert running.process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(1)
        yield running
    finally:
        running.end()


def test_the_readmes_job_is_followed_stopped_submitted_again_and_goes_on(head: Head, bucket_uri: str) -> None:
    run = Folder.at(bucket_uri).sub("runs/corpus")
    words = [word.replace("s3://my-bucket", bucket_uri) for word in readme_command()]
    words += [
        "--set",
        "bundle=debug",
        "--set",
        "segments.max_clips=1",
        "--set",
        "unit_clips=1",
        "--set",
        "runtime.device=cpu",
    ]
    submitted = head.job("submit", "--no-wait", "--submission-id", "corpus-1", "--", *words)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    until = time.monotonic() + 900
    while not committed_units(run):
        assert time.monotonic() < until, head.job("logs", "corpus-1").stdout[-3000:]
        time.sleep(0.2)
    stopped = head.job("stop", "corpus-1")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    head.wait("corpus-1", "STOPPED")
    before = committed_units(run)
    assert 0 < len(before) < SONGS
    assert "interrupted; what was committed is kept" in head.job("logs", "corpus-1").stdout

    again = head.job("submit", "--submission-id", "corpus-2", "--", *words)  # follows the log until the end
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-2000:]
    assert f"resuming: {len(before)} of {SONGS} units are committed" in again.stdout
    assert f"{SONGS} clips ok" in again.stdout
    assert head.details("corpus-2")["driver_exit_code"] == 0
    assert list(problems(run)) == []


def test_codes_of_bad_input_and_of_too_many_failures_are_in_the_details(
    head: Head, songs: Path, tmp_path: Path
) -> None:
    wrong = [*readme_command(), "--set", "input=/nowhere/at/all", "--set", f"output={tmp_path / 'none'}"]
    done = head.job("submit", "--submission-id", "wrong", "--", *wrong)
    assert done.returncode == 1, "Ray's own code for every failure"
    assert "error: " in done.stdout
    assert "Traceback" not in done.stdout
    assert head.details("wrong")["driver_exit_code"] == 2

    output = tmp_path / "run"
    failing = [*readme_command(), "--set", f"input={songs}", "--set", f"output={output}"]
    failing += ["--set", "max_failures=0", "--set", "runtime.device=cpu"]
    done = head.job("submit", "--submission-id", "failing", "--", *failing)
    assert done.returncode == 1
    assert "1 rows failed, 0 are allowed (max_failures)" in done.stdout
    facts = head.details("failing")
    assert facts["driver_exit_code"] == 3
    assert "exit code 3" in facts["message"]
    listed = head.job("list")
    assert "driver_exit_code=3" in listed.stdout + listed.stderr, "where cluster/README.md says that it is"
    assert (output / "_SUCCESS.json").exists(), "it is done all the same"


def test_a_working_folder_brings_config_and_stage_and_takes_no_output(head: Head, songs: Path, tmp_path: Path) -> None:
    """`--working-dir` and `runtime_env`: what the driver and every worker then have, and what is refused."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "my.yaml").write_text(
        "bundle: debug\nsplits: {validation: 1, test: 1}\nextra_stages: [{stage: 'marking_stage:Marking'}]\n"
    )
    (folder / "marking_stage.py").write_text(
        "import os\n"
        "import pyarrow as pa\n"
        "from ttmray.corpus.stage import Stage\n\n\n"
        "class Marking(Stage):\n"
        "    name, reads, columns, version = 'marking', ('mix',), {'mark': pa.string()}, '1'\n\n"
        "    def __init__(self, models, load):\n"
        "        self.mark = os.environ['MY_MARK']\n\n"
        "    def __call__(self, unit):\n"
        "        for row in unit.ok_rows():\n"
        "            row.update(stage=self.name, mark=self.mark)\n"
        "        return unit\n"
    )
    environment = ["--runtime-env-json", json.dumps({"env_vars": {"MY_MARK": "seen"}}), "--working-dir", "."]
    command = ["python", str(REPO / "jobs/score_corpus.py"), "--config", "my.yaml", "--set", f"input={songs}"]
    command += ["--set", "runtime.device=cpu", "--set", "max_failures=1", "--set", "catalogue.limit=5"]

    relative = [*command, "--set", "output=runs/corpus"]
    done = head.job("submit", *environment, "--submission-id", "relative", "--", *relative, cwd=folder)
    assert done.returncode == 1
    assert "would vanish with this job" in done.stdout
    assert "Traceback" not in done.stdout
    assert head.details("relative")["driver_exit_code"] == 2

    output = tmp_path / "run"
    absolute = [*command, "--set", f"output={output}"]
    done = head.job("submit", *environment, "--submission-id", "absolute", "--", *absolute, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert head.details("absolute")["driver_exit_code"] == 0
    rows = pq.read_table(output / "index.parquet").to_pylist()
    assert {row["mark"] for row in rows if row["status"] == "ok"} == {"seen"}
    assert list(problems(Folder.at(str(output)))) == []


def test_who_has_no_token_is_not_let_in(head: Head) -> None:
    stranger = {k: v for k, v in head.environment.items() if not k.startswith("RAY_AUTH")} | {"HOME": "/nonexistent"}
    done = subprocess.run(
        [RAY, "job", "list", "--address", f"http://127.0.0.1:{head.port}"], env=stranger, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "401" in done.stdout + done.stderr or "token" in (done.stdout + done.stderr).lower()
