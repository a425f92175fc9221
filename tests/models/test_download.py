"""Pulling weights: hub files and plain addresses by the real clients from HTTP servers on this machine; hashes."""

import errno
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from ttmray.console import console
from ttmray.errors import UserError
from ttmray.models import download, weights_cli
from ttmray.models.weights import Registry, Store, load_registry, open_store

BODY = bytes(range(256)) * 4000  # 1,024,000 bytes


@dataclass
class Resource:
    """What the server says at one path. Lists are used up, one item per request."""

    data: bytes = b""
    etag: str | None = '"v1"'
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)  # end the connection after so many bytes of the body
    statuses: list[int] = field(default_factory=list)
    token: str = ""
    redirect: str = ""
    silence: threading.Event | None = None  # say nothing until it is set
    stalls: list[tuple[int, threading.Event]] = field(default_factory=list)  # after so many bytes, until it is set
    headers: dict[str, str] = field(default_factory=dict)
    head_statuses: list[int] = field(default_factory=list)


@dataclass
class Server:
    """A loopback server, and what it was asked for and gave: (path, headers, bytes of the body)."""

    url: str
    heads: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    resources: dict[str, Resource] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str], int]] = field(default_factory=list)

    @property
    def served(self) -> list[int]:
        return [count for _, _, count in self.requests]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        """Answers; with `cut`, the connection ends after so many bytes of the body."""
        sent = body if cut is None else body[:cut]
        # before the client can see the end of the body and look
        self.server.state.requests.append((self.path, dict(self.headers), len(sent)))  # type: ignore[attr-defined]
        self.close_connection = True
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        resource = self.server.state.resources.get(self.path)  # type: ignore[attr-defined]
        if resource is not None and resource.stalls:
            length, go_on = resource.stalls.pop(0)
            self.wfile.write(sent[:length])
            go_on.wait(60)
        else:
            self.wfile.write(sent)

    def do_HEAD(self) -> None:
        """As the hub answers before it sends a file: commit, version and size, or where the bytes lie."""
        self.server.state.heads.append((self.path, dict(self.headers)))  # type: ignore[attr-defined]
        resource = self.server.state.resources.get(self.path)  # type: ignore[attr-defined]
        self.close_connection = True
        if resource is not None and resource.silence is not None:
            resource.silence.wait(10)
            return
        status, headers = 200, {"X-Repo-Commit": "abc", "Content-Length": "0"}
        if resource is None:
            status = 404
            headers |= {"X-Error-Code": "EntryNotFound"}
        elif resource.head_statuses:
            status = resource.head_statuses.pop(0)
        elif resource.token and self.headers["Authorization"] != f"Bearer {resource.token}":
            status = 401
            headers |= {"X-Error-Code": "GatedRepo"}
        elif resource.redirect:
            status = 302
            headers |= {"Location": resource.redirect, "X-Linked-ETag": resource.etag or ""}
            headers |= {"X-Linked-Size": str(len(resource.data))} if resource.data else {}
        else:
            headers |= {"Content-Length": str(len(resource.data))} | ({"ETag": resource.etag} if resource.etag else {})
        self.send_response(status)
        for name, value in (headers | (resource.headers if resource else {})).items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        resource = self.server.state.resources.get(self.path)  # type: ignore[attr-defined]
        if resource is None:
            return self.send(404, b"", {})
        if resource.silence is not None:
            resource.silence.wait(10)
            return None
        if resource.statuses:
            return self.send(resource.statuses.pop(0), b"", {})
        if resource.token and self.headers["Authorization"] != f"Bearer {resource.token}":
            return self.send(401, b"", {})
        if resource.redirect:
            return self.send(302, b"", {"Location": resource.redirect})
        headers = {"ETag": resource.etag} if resource.etag else {}
        cut = resource.cuts.pop(0) if resource.cuts else None
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if not asked or not resource.ranges or self.headers["If-Range"] not in (None, resource.etag):
            return self.send(200, resource.data, headers, cut)
        start, total = int(asked[1]), len(resource.data)
        if start >= total:
            return self.send(416, b"", {"Content-Range": f"bytes */{total}"})
        headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        return self.send(206, resource.data[start:], headers, cut)

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def serve() -> Iterator[Any]:
    """Starts loopback servers."""
    running = []

    def start() -> Server:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.state = Server(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((server, thread))
        return server.state  # type: ignore[attr-defined]

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("TTMRAY_") or name in ("HF_ENDPOINT", "HF_TOKEN") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.setattr(download, "BACKOFF_S", 0.0)
    monkeypatch.setattr(download, "CHUNK", 50_000)
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)  # what is written at a time


@pytest.fixture
def hub(serve: Any, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server that stands for the hub, with the file w.bin of the repository someone/model."""
    server = serve()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.resources["/someone/model/resolve/abc/w.bin"] = Resource(BODY)
    return server


def registry(*files: dict[str, Any], **entry: Any) -> Registry:
    files = files or ({"name": "w.bin"},)
    hub = {"repo": "someone/model", "revision": "abc"}
    plain = {"name": "model", "role": "mert", "bundles": ["paper"], "hub": hub, "licence": "MIT", "credit": "someone"}
    return Registry.model_validate({"entries": [plain | {"files": files} | entry]})


def store_of(folder: Path, *files: dict[str, Any], **options: Any) -> Store:
    return Store(registry(*files), folder, **options)


def remote(hub: Server) -> Resource:
    return hub.resources["/someone/model/resolve/abc/w.bin"]


@pytest.fixture(params=["hub", "address"])
def model(request: pytest.FixtureRequest, hub: Server) -> dict[str, Any]:
    """w.bin of the same server, as a file of the hub and as one at a plain address."""
    return {"name": "w.bin", "url": None if request.param == "hub" else f"{hub.url}/someone/model/resolve/abc/w.bin"}


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "model").iterdir()}


SHA256 = hashlib.sha256(BODY).hexdigest()
MD5 = hashlib.md5(BODY).hexdigest()
PUBLISHED = {"name": "w.bin", "size": len(BODY), "sha256": SHA256, "md5": MD5}


# downloads


def test_a_pull_brings_the_file_and_records_its_hash(hub, tmp_path):
    store = store_of(tmp_path)
    store.pull("model")
    assert store.find("model")["w.bin"].read_bytes() == BODY
    assert store.hashes("model") == {"w.bin": SHA256}
    assert names(tmp_path) == {"w.bin"}
    assert json.loads((tmp_path / "hashes.json").read_text())["files"]["model/w.bin"]["sha256"] == SHA256


def test_a_second_pull_checks_and_fetches_nothing(hub, tmp_path):
    store = store_of(tmp_path, PUBLISHED)
    store.pull("model")
    store.pull("model")
    assert hub.served == [len(BODY)]


def test_a_cut_connection_is_resumed_where_it_ended(hub, tmp_path, model):
    remote(hub).cuts = [300_000, 400_000]
    store = store_of(tmp_path, PUBLISHED | model)
    store.pull("model")
    assert store.find("model")["w.bin"].read_bytes() == BODY
    assert hub.served == [300_000, 400_000, len(BODY) - 700_000]
    assert [headers.get("Range") for _, headers, _ in hub.requests] == [None, "bytes=300000-", "bytes=700000-"]


def test_a_pull_that_failed_is_resumed_by_the_next_one(hub, tmp_path, model):
    remote(hub).cuts = [500_000] + [0] * 6
    store = store_of(tmp_path, PUBLISHED | model)
    with pytest.raises(UserError, match=r"was not fetched") as caught:
        store.pull("model")
    assert "goes on from there" in caught.value.hint
    assert "w.bin" not in names(tmp_path)
    remote(hub).cuts = []
    hub.requests.clear()
    store.pull("model")
    assert hub.served == [len(BODY) - 500_000]
    assert store.find("model")["w.bin"].read_bytes() == BODY


def test_a_pull_that_was_killed_is_resumed_by_another_process(hub, tmp_path, model):
    stop = threading.Event()
    remote(hub).stalls = [(600_000, stop)]
    path = tmp_path / "weights.yaml"
    path.write_text(yaml.safe_dump(registry(PUBLISHED | model).model_dump(mode="json")))
    program = (
        "import sys; from ttmray.models.weights import Store, load_registry; from pathlib import Path; "
        "import huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE = 50_000; "
        "Store(load_registry(sys.argv[1]), Path(sys.argv[2])).pull('model')"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path), str(tmp_path / "cache")])
    part = tmp_path / "cache" / "model" / "w.bin.part"
    deadline = time.monotonic() + 60
    while not (part.is_file() and part.stat().st_size >= 400_000) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    stop.set()
    held = part.stat().st_size
    assert 400_000 <= held <= 600_000
    hub.requests.clear()
    store = Store(load_registry(path), tmp_path / "cache")
    store.pull("model")
    assert hub.served == [len(BODY) - held]
    assert store.find("model")["w.bin"].read_bytes() == BODY


def test_a_server_without_ranges_sends_everything_again(hub, tmp_path, model):
    remote(hub).cuts, remote(hub).ranges = [300_000], False
    store = store_of(tmp_path, model)
    store.pull("model")
    assert store.find("model")["w.bin"].read_bytes() == BODY
    assert hub.served == [300_000, len(BODY)]


def test_a_file_that_changed_on_the_server_starts_from_zero(hub, tmp_path, model):
    remote(hub).cuts = [300_000] + [0] * 6
    store = store_of(tmp_path, model)
    with pytest.raises(UserError):
        store.pull("model")
    remote(hub).data, remote(hub).etag, remote(hub).cuts = BODY[::-1], '"v2"', []
    store.pull("model")
    assert store.find("model")["w.bin"].read_bytes() == BODY[::-1]
    assert hub.served[-1] == len(BODY)


@pytest.mark.parametrize("etag", [None, 'W/"v1"'])
def test_without_a_strong_etag_an_address_is_not_resumed(hub, tmp_path, etag):
    remote(hub).cuts, remote(hub).etag = [300_000], etag
    store = store_of(tmp_path, {"name": "w.bin", "url": f"{hub.url}/someone/model/resolve/abc/w.bin"})
    store.pull("model")
    assert hub.served == [300_000, len(BODY)]
    assert store.find("model")["w.bin"].read_bytes() == BODY


def test_a_complete_partial_file_needs_only_its_name(hub, tmp_path, monkeypatch, model):
    store = store_of(tmp_path, PUBLISHED | model)
    monkeypatch.setattr("ttmray.models.weights.digest_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.pull("model")
    monkeypatch.undo()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    store.pull("model")
    assert sum(hub.served) == len(BODY)
    assert store.find("model")["w.bin"].read_bytes() == BODY


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_passing_server_errors_are_tried_again(hub, tmp_path, model):
    # fewer than attempts: one on a connection that the server closed meanwhile never reaches it
    remote(hub).head_statuses = [429] if model["url"] is None else []
    remote(hub).statuses = [503, 500]
    store = store_of(tmp_path, PUBLISHED | model)
    store.pull("model")
    assert store.find("model")["w.bin"].read_bytes() == BODY


def test_a_server_that_is_down_is_tried_a_bounded_number_of_times(hub, tmp_path, model):
    remote(hub).head_statuses, remote(hub).statuses = [503] * 99, [503] * 99
    with pytest.raises(UserError, match=r"5 attempts.*503"):
        store_of(tmp_path, model).pull("model")
    # an attempt on a connection that the server closed meanwhile never reaches it
    assert 1 < len(hub.requests) + len(hub.heads) <= download.ATTEMPTS


def test_nobody_listening_gives_one_message(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="refused"):
        store_of(tmp_path).pull("model")


def test_a_silent_server_runs_into_the_timeout(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_S", 0.05)
    remote(hub).silence = threading.Event()
    with pytest.raises(UserError, match="timed out"):
        store_of(tmp_path).pull("model")
    remote(hub).silence.set()


def test_a_missing_file_is_said_at_once(hub, tmp_path, model):
    hub.resources.clear()
    with pytest.raises(UserError, match="404") as caught:
        store_of(tmp_path, model).pull("model")
    assert "TTMRAY_WEIGHTS_MODEL" in caught.value.hint
    assert len(hub.heads) + len(hub.requests) <= 1
    assert names(tmp_path) <= {"w.bin.part"}
    assert sum(path.stat().st_size for path in (tmp_path / "model").iterdir()) == 0


def test_a_gated_file_says_how_to_get_access(hub, tmp_path, monkeypatch):
    remote(hub).token = "secret"
    with pytest.raises(UserError, match="401") as caught:
        store_of(tmp_path).pull("model")
    assert f"{hub.url}/someone/model" in caught.value.hint
    assert "HF_TOKEN is not set" in caught.value.hint
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(UserError) as caught:
        store_of(tmp_path).pull("model")
    assert "HF_TOKEN has no access" in caught.value.hint
    assert "wrong" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "secret")
    store_of(tmp_path).pull("model")
    assert (tmp_path / "model" / "w.bin").read_bytes() == BODY


def test_the_token_goes_to_the_hub_and_to_no_other_host(hub, serve, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    storage = serve()
    storage.resources["/blob"] = Resource(BODY)
    remote(hub).redirect, remote(hub).data = f"{storage.url}/blob", BODY
    store_of(tmp_path / "redirected").pull("model")
    store_of(tmp_path / "plain", {"name": "w.bin", "url": f"{storage.url}/blob"}).pull("model")
    assert [headers.get("authorization") for _, headers in hub.heads] == ["Bearer secret"]
    assert hub.requests == []  # the client goes to where the hub says that the bytes lie
    assert len(storage.requests) == 2
    assert all("secret" not in str(headers) for _, headers, _ in storage.requests)


def test_the_token_follows_a_redirect_within_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.resources["/renamed"] = Resource(BODY, token="secret")
    remote(hub).redirect = "/renamed"
    store_of(tmp_path).pull("model")
    assert (tmp_path / "model" / "w.bin").read_bytes() == BODY


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x"])
def test_redirects_to_other_protocols_are_refused(hub, tmp_path, target, model):
    remote(hub).redirect = target
    with pytest.raises(UserError, match=f"redirects to {target}, which is refused"):
        store_of(tmp_path, model).pull("model")
    assert "w.bin" not in names(tmp_path)


def test_resuming_works_through_a_redirect(hub, serve, tmp_path, model):
    storage = serve()
    storage.resources["/blob"] = Resource(BODY, cuts=[300_000])
    remote(hub).redirect, remote(hub).data = f"{storage.url}/blob", BODY
    store_of(tmp_path, PUBLISHED | model).pull("model")
    assert storage.served == [300_000, len(BODY) - 300_000]


def test_a_full_disk_is_one_message_and_the_next_pull_resumes(hub, tmp_path, monkeypatch, model):
    class FullAfter:
        """A file on a disk with room for 500,000 bytes more."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 500_000

        def write(self, block: bytes) -> int:
            self.room -= len(block)
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(block)

        def flush(self) -> None:
            self.file.flush()

        def __enter__(self) -> "FullAfter":
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

    store = store_of(tmp_path, PUBLISHED | model)
    with monkeypatch.context() as patch:
        patch.setattr(download, "open", lambda *args: FullAfter(open(*args)), raising=False)  # noqa: SIM115
        with pytest.raises(UserError, match="disk is full"):
            store.pull("model")
    assert "w.bin" not in names(tmp_path)
    kept = (tmp_path / "model" / "w.bin.part").stat().st_size
    assert 0 < kept <= 500_000
    store.pull("model")
    assert hub.served[-1] == len(BODY) - kept
    assert store.find("model")["w.bin"].read_bytes() == BODY


def test_a_file_that_cannot_fit_is_refused_before_it_is_fetched(hub, tmp_path, monkeypatch, model):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="disk is full"):
        store_of(tmp_path, model).pull("model")
    assert sum(path.stat().st_size for path in (tmp_path / "model").glob("w.bin*")) < 200  # the etag's file


def test_offline_never_asks_the_network(hub, tmp_path):
    with pytest.raises(UserError, match="offline") as caught:
        store_of(tmp_path, offline=True).pull("model")
    assert "ttmray weights pull model" in caught.value.hint
    assert hub.requests == []
    store_of(tmp_path).pull("model")
    hub.requests.clear()
    store = store_of(tmp_path, offline=True)
    store.pull("model")
    assert weights_cli.list_weights(store) == 0
    assert weights_cli.verify(store) == 0
    assert hub.requests == []


# hashes


@pytest.mark.parametrize("wrong", [{"sha256": "0" * 64}, {"md5": "0" * 32}])
def test_a_file_with_another_hash_never_gets_its_name(hub, tmp_path, wrong):
    store = store_of(tmp_path, PUBLISHED | wrong)
    with pytest.raises(UserError) as caught:
        store.pull("model")
    (kind, expected), found = next(iter(wrong.items())), {"sha256": SHA256, "md5": MD5}
    assert expected in caught.value.message
    assert found[kind] in caught.value.message
    assert names(tmp_path) == {"w.bin.rejected"}  # nothing is thrown away
    with pytest.raises(UserError):
        store.find("model")


def test_a_file_of_another_size_is_not_even_fetched(hub, tmp_path, model):
    with pytest.raises(UserError, match=r"1024000 bytes.* 77"):
        store_of(tmp_path, model | {"size": 77}).pull("model")
    assert names(tmp_path) <= {"w.bin.part"}
    assert sum(path.stat().st_size for path in (tmp_path / "model").iterdir()) == 0


def test_a_hub_that_offers_xet_is_asked_for_it_and_a_failure_names_the_way_around(hub, tmp_path, monkeypatch):
    remote(hub).headers = {
        "X-Xet-Hash": "a" * 64,
        "Link": f'<{hub.url}/xet-token>; rel="xet-auth"',
    }
    with pytest.raises(UserError, match="Xet") as caught:
        store_of(tmp_path, PUBLISHED).pull("model")
    assert "HF_HUB_DISABLE_XET" in caught.value.hint
    assert any("xet" in path for path, _, _ in hub.requests)
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    store_of(tmp_path, PUBLISHED).pull("model")
    assert hub.served == [len(BODY)]


def test_an_offline_switch_of_the_hub_s_client_is_respected(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        store_of(tmp_path).pull("model")
    assert hub.heads == hub.requests == []


def test_a_hash_recorded_at_first_pull_is_said_aloud_and_checked_ever_after(hub, tmp_path):
    store = store_of(tmp_path)
    with console.capture() as capture:
        store.pull("model")
    assert SHA256 in capture.get()
    (tmp_path / "model" / "w.bin").unlink()
    remote(hub).data = BODY[::-1]
    with pytest.raises(UserError, match="recorded at the first pull") as caught:
        store.pull("model")
    assert SHA256 in caught.value.message
    assert "hashes.json" in caught.value.hint
    assert "w.bin" not in names(tmp_path)


def test_a_file_that_was_put_there_by_hand_is_recorded_by_pull(hub, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "w.bin").write_bytes(b"mine")
    store = store_of(tmp_path)
    store.pull("model")
    assert hub.requests == []
    assert store.records()["model/w.bin"]["sha256"] == hashlib.sha256(b"mine").hexdigest()


def test_a_changed_file_is_found_by_pull_and_verify_and_left_alone(hub, tmp_path):
    store = store_of(tmp_path)
    store.pull("model")
    assert weights_cli.verify(store) == 0
    changed = BODY[:-1] + b"!"
    (tmp_path / "model" / "w.bin").write_bytes(changed)
    assert weights_cli.verify(store) == 2
    with pytest.raises(UserError, match="not the file") as caught:
        store.pull("model")
    assert "Delete it" in caught.value.hint
    assert (tmp_path / "model" / "w.bin").read_bytes() == changed


def test_verify_compares_with_published_hashes_too(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "w.bin").write_bytes(BODY)
    assert weights_cli.verify(store_of(tmp_path, PUBLISHED)) == 0
    assert weights_cli.verify(store_of(tmp_path, PUBLISHED | {"md5": "0" * 32})) == 2


def test_a_truncated_file_is_found_before_it_is_used(hub, tmp_path):
    store = store_of(tmp_path)
    store.pull("model")
    os.truncate(tmp_path / "model" / "w.bin", 1000)
    with pytest.raises(UserError, match="1000 bytes, expected 1024000"):
        store.find("model")


def test_processes_that_pull_at_once_fetch_once(hub, tmp_path):
    threads = [threading.Thread(target=store_of(tmp_path, PUBLISHED).pull, args=("model",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hub.served == [len(BODY)]


def test_local_copies_replace_the_cache(hub, tmp_path, monkeypatch):
    local = tmp_path / "local"
    local.mkdir()
    (local / "w.bin").write_bytes(b"local")
    monkeypatch.setenv("TTMRAY_WEIGHTS_MODEL", str(local))
    store = open_store(tmp_path / "cache", registry=registry())
    assert store.find("model") == {"w.bin": local / "w.bin"}
    assert store.hashes("model") == {"w.bin": hashlib.sha256(b"local").hexdigest()}
    store.pull("model")
    assert weights_cli.verify(store) == 0
    assert hub.requests == []
    (local / "other.safetensors").write_bytes(b"x")
    file = open_store(tmp_path / "cache", {"model": str(local / "other.safetensors")}, registry=registry())
    assert file.find("model") == {"w.bin": local / "other.safetensors"}


def test_pulling_a_bundle_brings_its_entries_only(hub, tmp_path):
    first = registry().entries[0]
    other = first.model_copy(update={"name": "other", "bundles": ()})
    store = Store(Registry(entries=(first, other)), tmp_path)
    assert weights_cli.pull(bundle="paper", store=store) == 0
    assert (tmp_path / "model").exists()
    assert not (tmp_path / "other").exists()
    assert weights_cli.pull(everything=True, store=store) == 0
    assert (tmp_path / "other" / "w.bin").read_bytes() == BODY
    with pytest.raises(UserError, match="Which"):
        weights_cli.pull(store=store)


def test_where_prints_one_path_per_line(hub, tmp_path):
    store = store_of(tmp_path)
    store.pull("model")
    with console.capture() as capture:
        assert weights_cli.where("model", store) == 0
    assert capture.get().splitlines() == [str(tmp_path / "model" / "w.bin")]
