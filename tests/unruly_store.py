"""An object store of one process that speaks S3, and misbehaves when it is told to."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

WHIMS = ("busy", "slow", "cut", "done, but cut", "half", "stale")
"""What a request may meet: 503; some time; the end of the connection before, or after, it was carried out; half of the
bytes that a read promises; a listing without the newest objects."""
NEWEST = 3


class Store(ThreadingHTTPServer):
    """Keeps what is PUT. Before it does, it gives the answers that stand in `answers`: a status, or seconds of silence
    as a negative number.

    Attributes:
        objects: path (`/bucket/key`) -> bytes, the newest last.
        page: objects of one answer to a listing, as S3 has it.
        whim: method and path of a request -> one of `WHIMS`, or "".
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.answers: list[int] = []
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.page = 1000
        self.whim: Callable[[str, str], str] = lambda method, path: ""
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing is said of clients that went away."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables of whoever shall use it."""
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        return {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_port}", **keys}


@contextmanager
def serving() -> Iterator[Store]:
    """A store that answers for the time of the block."""
    store = Store()
    threading.Thread(target=store.serve_forever, daemon=True).start()
    try:
        yield store
    finally:
        store.shutdown()
        store.server_close()


class Request(BaseHTTPRequestHandler):
    server: Store
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        return

    def _answer(self, status: int, body: bytes = b"", half: bool = False, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if half:
            body = body[: len(body) // 2]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(body)

    def _serve(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if self.server.answers:
            status = self.server.answers.pop(0)
            if status > 0:
                return self._answer(status)
            time.sleep(-status)
        whim = self.server.whim(self.command, path)
        if whim == "busy":
            return self._answer(503)
        if whim == "cut":
            self.close_connection = True
            return None
        if whim == "slow":
            time.sleep(0.05)
        status, body, headers = self._carried_out(path, data, whim == "stale")
        if whim == "done, but cut":
            self.close_connection = True
            return None
        return self._answer(status, body, whim == "half" and self.command == "GET", **headers)

    def _carried_out(self, path: str, data: bytes, stale: bool) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers of the answer."""
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        with self.server.lock:
            objects = self.server.objects
            if self.command == "PUT":
                if self.headers.get("If-None-Match") and path in objects:
                    return 412, b"", {}  # without a body, as some stores do
                objects.pop(path, None)
                objects[path] = data
                return 200, b"", {}
            if self.command == "DELETE":
                objects.pop(path, None)
                return 204, b"", {}
            if "list-type" in query:
                return 200, self._listing(path, query, stale), {"Content_Type": "application/xml"}
            if path not in objects:
                return 404, b"", {}
            body = objects[path]
        about = {"ETag": f'"{hash(body)}"', "Last_Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if self.command == "GET" and (asked := self.headers.get("Range")):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            part = body[int(first) : int(last or len(body)) + 1]
            about["Content_Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}"
            return 206, part, about
        return 200, body, about

    def _listing(self, path: str, query: dict[str, list[str]], stale: bool) -> bytes:
        bucket, prefix = path.strip("/"), query.get("prefix", [""])[0]
        names = [name for name in self.server.objects if name.startswith(f"/{bucket}/{prefix}")]
        if stale:
            names = [name for name in names if name not in list(self.server.objects)[-NEWEST:]]
        keys = sorted(name.removeprefix(f"/{bucket}/") for name in names)
        folders: list[str] = []
        if delimiter := query.get("delimiter", [""])[0]:
            inner = [key for key in keys if delimiter in key[len(prefix) :]]
            folders = sorted({prefix + key[len(prefix) :].partition(delimiter)[0] + delimiter for key in inner})
            keys = [key for key in keys if key not in inner]
        after = query.get("continuation-token", [""])[0]
        keys = [key for key in keys if not after or key > unquote(after)]
        keys, rest = keys[: self.server.page], keys[self.server.page :]
        contents = "".join(
            f"<Contents><Key>{escape(quote(key))}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{hash(self.server.objects[f'/{bucket}/{key}'])}&quot;</ETag>"
            f"<Size>{len(self.server.objects[f'/{bucket}/{key}'])}</Size></Contents>"
            for key in keys
        )
        contents += "".join(f"<CommonPrefixes><Prefix>{quote(folder)}</Prefix></CommonPrefixes>" for folder in folders)
        about = f"<Name>{bucket}</Name><Prefix>{quote(prefix)}</Prefix><KeyCount>{len(keys) + len(folders)}</KeyCount>"
        about += f"<EncodingType>url</EncodingType><IsTruncated>{str(bool(rest)).lower()}</IsTruncated>"
        about += f"<NextContinuationToken>{quote(keys[-1])}</NextContinuationToken>" if rest else ""
        namespace = "http://s3.amazonaws.com/doc/2006-03-01/"
        return f'<ListBucketResult xmlns="{namespace}">{about}{contents}</ListBucketResult>'.encode()

    do_PUT = do_GET = do_HEAD = do_DELETE = _serve
