"""Shared fixtures. Golden and real data live outside the repository and their absence skips, never fails."""

import logging
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: equal bits, and two test processes on 2 cores
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")  # Ray kills workers where others use a machine's memory

import shutil
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from moto.server import ThreadedMotoServer

from ttmray import cost
from ttmray.cluster import leave

REPO = Path(__file__).resolve().parents[1]

# A run of the suite says something about the change at hand only if it draws the same examples as the run before.
# New ones: pytest --hypothesis-profile=default
hypothesis.settings.register_profile("same-examples", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same-examples")


def _outside(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, REPO.parent / "shared" / default))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set {variable} to the folder to run this test")
    return folder.resolve()


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of numeric parity data (environment variable TTMRAY_GOLDEN)."""
    return _outside("TTMRAY_GOLDEN", "golden")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real audio and metadata (environment variable TTMRAY_DATA)."""
    return _outside("TTMRAY_DATA", "data")


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A command that is interrupted keeps the signals until its process ends, and the suite goes on in it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Clock:
    """The time of accounts, which passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1e9

    def time(self) -> float:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(cost, "time", ticking := Clock())
    return ticking


@pytest.fixture(scope="module", autouse=True)
def _no_ray_of_other_modules() -> Iterator[None]:
    """An instance that this process has started has the CPUs that its first user asked for."""
    yield
    leave()


@pytest.fixture(scope="module")
def object_store() -> Iterator[Callable[[str], str]]:
    """Makes buckets, by name, of an object store that runs in this process."""
    import botocore.session
    from s3fs import S3FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line per request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        S3FileSystem.clear_instance_cache()  # instances remember the endpoint of the module before
        client = botocore.session.get_session().create_client("s3")

        def create(name: str) -> str:
            client.create_bucket(Bucket=name)
            return f"s3://{name}"

        yield create
        S3FileSystem.clear_instance_cache()
        server.stop()


@pytest.fixture
def bucket(object_store: Callable[[str], str]) -> str:
    """An empty bucket. Its name is new because moto's objects outlive its servers."""
    return object_store(f"bucket-{uuid.uuid4().hex}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium of this machine."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=["--mute-audio"])
        yield chromium
        chromium.close()
