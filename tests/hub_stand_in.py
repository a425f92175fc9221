"""The HTTP interface of the Hugging Face Hub, as far as its own client uses it here, on this machine.

Repositories are dictionaries in memory. Answers have the shapes and headers that `huggingface_hub` reads; files over
`LFS_BYTES`, and those of some endings, travel as LFS objects, as they do there.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_stand_in"
LFS_BYTES = 10_000
LFS_ENDINGS = (".tar", ".parquet", ".safetensors", ".pth")


@dataclass
class Repo:
    """A repository: its files now, and what each commit did."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def sha(self) -> str:
        content = sorted((name, hashlib.sha256(data).hexdigest()) for name, data in self.files.items())
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()

    def entries(self, under: str, recursive: bool) -> list[dict[str, Any]]:
        """Files and folders below a folder, or the file of that name."""
        if under in self.files:
            return [described(under, self.files[under])]
        prefix = f"{under}/" if under else ""
        below = [name for name in self.files if name.startswith(prefix)]
        folders: set[str] = set()
        for name in below:
            parts = name[len(prefix) :].split("/")[:-1]
            folders |= {
                prefix + "/".join(parts[: i + 1]) for i in range(len(parts) if recursive else min(1, len(parts)))
            }
        shown = [described(name, self.files[name]) for name in below if recursive or "/" not in name[len(prefix) :]]
        return [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)] + shown


def described(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if is_lfs(name, len(data)):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def is_lfs(name: str, size: int) -> bool:
    return size > 0 and (name.endswith(LFS_ENDINGS) or size > LFS_BYTES)


@dataclass
class Hub:
    """A running stand-in.

    Attributes:
        repos: (`models` or `datasets`, id) -> repository.
        requests: (method, path) of all requests.
        refuse: answers of the next requests whose path matches: (pattern, status), used up.
    """

    url: str = ""
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    refuse: list[tuple[str, int]] = field(default_factory=list)

    def model(self, name: str) -> Repo:
        return self.repos.setdefault(("models", name), Repo())

    def dataset(self, name: str) -> Repo:
        return self.repos.setdefault(("datasets", name), Repo())


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        self.body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        where = urlsplit(self.path)
        path, self.query = unquote(where.path), parse_qs(where.query)
        hub.requests.append((self.command, path))
        for i, (pattern, status) in enumerate(hub.refuse):
            if re.search(pattern, path):
                del hub.refuse[i]
                return self.say(status, b"refused")
        for pattern, act in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return act(self, hub, **match.groupdict())
        return self.say(404, b"no such route")

    do_GET = do_POST = do_PUT = do_HEAD = answer

    def say(self, status: int, body: bytes | Any = b"", **headers: str) -> None:
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def repo(self, hub: Hub, kind: str, name: str, revision: str | None = None) -> Repo | None:
        """The repository that is asked for, or None where that was answered already."""
        repo = hub.repos.get((kind, name))
        if repo is None or (repo.private and self.headers["Authorization"] != f"Bearer {TOKEN}"):
            self.say(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        if revision not in (None, "main", repo.sha):
            self.say(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
            return None
        return repo

    def info(self, hub: Hub, kind: str, name: str, revision: str | None = None) -> None:
        if repo := self.repo(hub, kind, name, revision):
            siblings = [{"rfilename": file} for file in repo.files]
            facts = {"id": name, "sha": repo.sha, "private": repo.private, "siblings": siblings, "tags": []}
            self.say(200, facts | {"downloads": 0, "likes": 0, "lastModified": "2026-01-01T00:00:00.000Z"})

    def tree(self, hub: Hub, kind: str, name: str, revision: str, under: str | None) -> None:
        if repo := self.repo(hub, kind, name, revision):
            entries = repo.entries(under or "", self.query.get("recursive", ["false"])[0].lower() == "true")
            if under and not entries:
                return self.say(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            self.say(200, entries)

    def paths(self, hub: Hub, kind: str, name: str, revision: str) -> None:
        if repo := self.repo(hub, kind, name, revision):
            asked = parse_qs(self.body.decode()).get("paths", [])
            known = [described(path, repo.files[path]) for path in asked if path in repo.files]
            folders = [path for path in asked if any(file.startswith(f"{path}/") for file in repo.files)]
            self.say(200, known + [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders])

    def resolve(self, hub: Hub, kind: str | None, name: str, revision: str, file: str) -> None:
        if repo := self.repo(hub, (kind or "models/").rstrip("/"), name, revision):
            data = repo.files.get(file)
            if data is None:
                return self.say(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=repo.sha)
            facts = described(file, data)
            headers = {
                "X_Repo_Commit": repo.sha,
                "ETag": f'"{facts.get("lfs", facts)["oid"]}"',
                "Accept_Ranges": "bytes",
            }
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
                start, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
                headers["Content_Range"] = f"bytes {start}-{end}/{len(data)}"
                return self.say(206, data[start : end + 1], **headers)
            if self.command == "HEAD":
                return self.say(200, b"", **headers | {"Content_Length": str(len(data))})
            self.say(200, data, **headers)

    def create(self, hub: Hub) -> None:
        if self.allowed():
            asked = json.loads(self.body)
            kind = f"{asked.get('type') or 'model'}s"
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            url = f"{hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
            if (kind, name) in hub.repos:
                return self.say(409, {"error": "You already created this repo", "url": url})
            private = asked.get("private") is True or asked.get("visibility") == "private"
            hub.repos[kind, name] = Repo(private)
            self.say(200, {"url": url, "name": name})

    def preupload(self, hub: Hub, kind: str, name: str, revision: str) -> None:
        """Of large files the hub says the SHA-256 of their content, of small ones git's hash."""
        if (repo := self.repo(hub, kind, name, revision)) and self.allowed():
            files = []
            for file in json.loads(self.body)["files"]:
                path = file["path"]
                facts = described(path, repo.files[path]) if path in repo.files else {"oid": None}
                mode = "lfs" if is_lfs(path, file["size"]) else "regular"
                facts = {"oid": facts.get("lfs", facts)["oid"], "uploadMode": mode, "shouldIgnore": False}
                files.append({"path": path, **facts})
            self.say(200, {"files": files})

    def batch(self, hub: Hub, name: str) -> None:
        if self.allowed():
            objects = []
            for asked in json.loads(self.body)["objects"]:
                upload = {"upload": {"href": f"{hub.url}/lfs/{asked['oid']}", "header": {}}}
                objects.append(asked | ({} if asked["oid"] in hub.objects else {"actions": upload}))
            self.say(200, {"transfer": "basic", "objects": objects})

    def put(self, hub: Hub, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.say(400, b"another hash")
        hub.objects[oid] = self.body
        self.say(200, b"")

    def commit(self, hub: Hub, kind: str, name: str, revision: str) -> None:
        if (repo := self.repo(hub, kind, name, revision)) and self.allowed():
            changes: dict[str, Any] = {"added": [], "deleted": []}
            for line in self.body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "header":
                    changes["summary"] = value["summary"]
                elif item["key"] == "deletedFile":
                    changes["deleted"].append(value["path"])
                    del repo.files[value["path"]]
                else:
                    own = base64.b64decode(value["content"]) if item["key"] == "file" else hub.objects[value["oid"]]
                    changes["added"].append(value["path"])
                    repo.files[value["path"]] = own
            repo.commits.append(changes)
            url = f"{hub.url}/{name}/commit/{repo.sha}"
            self.say(200, {"success": True, "commitOid": repo.sha, "commitUrl": url, "hookOutput": ""})

    def yaml(self, hub: Hub) -> None:
        self.say(200, {"errors": [], "warnings": []})

    def allowed(self) -> bool:
        if self.headers["Authorization"] == f"Bearer {TOKEN}":
            return True
        self.say(403, {"error": "no right to write"})
        return False

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


_API = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES = (
    (rf"GET {_API}", HubHandler.info),
    (rf"GET {_API}/revision/{_REVISION}", HubHandler.info),
    (rf"GET {_API}/tree/{_REVISION}(?:/(?P<under>.*))?", HubHandler.tree),
    (rf"POST {_API}/paths-info/{_REVISION}", HubHandler.paths),
    (rf"POST {_API}/preupload/{_REVISION}", HubHandler.preupload),
    (rf"POST {_API}/commit/{_REVISION}", HubHandler.commit),
    (r"POST /api/repos/create", HubHandler.create),
    (r"POST /api/validate-yaml", HubHandler.yaml),
    (r"POST /(?:datasets/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", HubHandler.batch),
    (r"PUT /lfs/(?P<oid>\w+)", HubHandler.put),
    (
        rf"(?:GET|HEAD) /(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/{_REVISION}/(?P<file>.+)",
        HubHandler.resolve,
    ),
)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A stand-in on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.daemon_threads = True
    server.hub = hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(patch: pytest.MonkeyPatch, hub: Hub, cache: str) -> None:
    """Point the hub's client of this process to a stand-in, with the token of one who may write there."""
    from huggingface_hub import HfFileSystem, constants

    patch.setenv("HF_ENDPOINT", hub.url)
    patch.setenv("HF_TOKEN", TOKEN)
    patch.delenv("HF_HUB_OFFLINE", raising=False)
    patch.delenv("TTMRAY_OFFLINE", raising=False)
    patch.setattr(constants, "HF_HUB_CACHE", cache)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    HfFileSystem.clear_instance_cache()
