"""One file over HTTP(S): resumed, bounded retries, one clear message per failure.

urllib instead of huggingface_hub's downloader: hub files and plain addresses take one path, with our own partial files,
hashes and messages, and without a second cache layout.
"""

import http.client
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from ttmray import __version__
from ttmray.console import meter
from ttmray.errors import UserError
from ttmray.storage import explained

ATTEMPTS = 5
BACKOFF_S = 1.0  # before the second attempt; doubles
TIMEOUT_S = 30.0  # without a byte
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Remote:
    """An address, and for hub files the page where a person accepts the licence."""

    url: str
    page: str = ""


class _TransientError(Exception):
    """Worth another attempt."""


def hub_endpoint() -> str:
    """Address of the hub: HF_ENDPOINT, else https://huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def download(remote: Remote, part: Path, label: str, size: int | None, way_out: str) -> None:
    """Completes the partial file `part`; what it holds already is not fetched again.

    A resumed transfer asks for the rest with Range and If-Range, so a file that changed on the server (or a server that
    knows no ranges) starts from zero. `part` stays when it fails; `<part>.etag` beside it says what it is part of,
    until `forget`.

    Args:
        remote: what to fetch. HF_TOKEN is sent to the hub's own host and to no other, redirects included.
        part: local path; its folder exists.
        label: for progress and messages.
        size: expected bytes, if known.
        way_out: last sentence of the hint of errors that another attempt does not mend.

    Raises:
        UserError: not found, refused, unreachable, of another size, or the disk is full.
    """
    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(BACKOFF_S * 2 ** (attempt - 1))
        try:
            return _transfer(remote, part, label, size, way_out)
        except _TransientError as error:
            problem = str(error)
    raise UserError(
        f"{remote.url} was not fetched in {ATTEMPTS} attempts: {problem}.",
        f"What arrived is kept, the same command goes on from there. {way_out}",
    )


def _transfer(remote: Remote, part: Path, label: str, size: int | None, way_out: str) -> None:
    offset, etag = _held(remote.url, part)
    headers = {"User-Agent": f"ttmray/{__version__}", "Accept-Encoding": "identity"}
    if offset:
        headers |= {"Range": f"bytes={offset}-", "If-Range": etag}
    try:
        response = _open(remote.url, headers)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and offset and _number(error.headers["Content-Range"]) == offset:
            return  # complete already: an earlier process was stopped before it gave the file its name
        if error.code == 416:
            forget(part)
            raise _TransientError("the partial file is longer than the server's") from error
        if error.code in _TRANSIENT_STATUS:
            raise _TransientError(f"the server answered {error.code} {error.reason}") from error
        raise _refusal(remote, error, way_out) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise UserError(f"{remote.url}: the certificate is not trusted ({error.reason}).", way_out) from error
        raise _TransientError(str(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _TransientError(str(error) or type(error).__name__) from error

    with response:
        if response.status == 206:
            start, total = _content_range(response.headers)
            if start != offset:
                forget(part)
                raise _TransientError("the server sent another range than asked for")
        else:
            offset, total = 0, _number(response.headers["Content-Length"])
        if size is not None and total is not None and total != size:
            raise UserError(
                f"{remote.url} has {total} bytes, {label} must have {size}: it is another file.",
                f"The server may have answered with a page of its own. {way_out}",
            )
        with explained(str(part)):
            if not offset:
                _start(remote.url, part, response.headers["ETag"])
            end = _append(response, part, label, offset, total)
    if total is not None and end < total:
        raise _TransientError(f"the connection ended after {end} of {total} bytes")


def _append(response: Any, part: Path, label: str, offset: int, total: int | None) -> int:
    """Adds the body to `part`; returns its length."""
    if total is not None and shutil.disk_usage(part.parent).free < total - offset:
        raise UserError(
            f"{label} needs {(total - offset) / 1e9:.2f} GB, {part.parent} has no room for it: the disk is full.",
            "Free space, or set TTMRAY_WEIGHTS to a folder on another disk, and start the same command again.",
        )
    end, shown = offset, 0
    with open(part, "ab") as file, meter(f"{label}, MB", ((total or 0) - offset) // 1_000_000) as progress:
        while block := _read(response):
            file.write(block)
            end += len(block)
            progress.advance((end - offset) // 1_000_000 - shown)
            shown = (end - offset) // 1_000_000
    return end


def _read(response: Any) -> bytes:
    try:
        return response.read(1 << 18)
    except (OSError, http.client.HTTPException) as error:  # of the network: writing is outside
        raise _TransientError(str(error) or type(error).__name__) from error


def _etag_file(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _held(url: str, part: Path) -> tuple[int, str]:
    """Bytes that are here and the version that they belong to; (0, "") where that is not known."""
    with explained(str(part)):
        try:
            known_url, etag = _etag_file(part).read_text(encoding="utf-8").split("\n")
            return (part.stat().st_size, etag) if known_url == url and etag else (0, "")
        except (FileNotFoundError, ValueError):
            return 0, ""


def _start(url: str, part: Path, etag: str | None) -> None:
    """Empties `part` and says what comes into it, in this order: a stop in between leaves no old bytes under a new
    label."""
    part.write_bytes(b"")
    # a weak tag names similar contents, not the same bytes: no resumption then
    strong = etag if etag and not etag.startswith("W/") else ""
    _etag_file(part).write_text(f"{url}\n{strong}", encoding="utf-8")


def forget(part: Path) -> None:
    """Nothing is resumed from `part` any more."""
    _etag_file(part).unlink(missing_ok=True)


def _content_range(headers: Message) -> tuple[int, int | None]:
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers["Content-Range"] or "")
    if found is None:
        return -1, None
    return int(found[1]), None if found[2] == "*" else int(found[2])


def _number(text: str | None) -> int | None:
    """The number of a Content-Length, or the total of an unsatisfied Content-Range (`bytes */N`)."""
    found = re.fullmatch(r"(?:bytes \*/)?(\d+)", (text or "").strip())
    return int(found[1]) if found else None


def _refusal(remote: Remote, error: urllib.error.HTTPError, way_out: str) -> UserError:
    answer = f"{remote.url}: the server answered {error.code} {error.reason}."
    if error.code not in (401, 403):
        return UserError(answer, f"The file is not there, or not there any more. {way_out}")
    if not remote.page:
        return UserError(answer, f"It is not public. {way_out}")
    token = "HF_TOKEN has no access" if os.environ.get("HF_TOKEN") else "It is gated or private and HF_TOKEN is not set"
    return UserError(
        answer,
        f"{token}: accept the terms at {remote.page}, then set HF_TOKEN to a token of that account. {way_out}",
    )


def _open(url: str, headers: dict[str, str]) -> Any:
    """Response to a GET. Only http and https are spoken: no file: or ftp: addresses, from a redirect or elsewhere."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        _Redirect,
    ):
        opener.add_handler(handler())
    return opener.open(_authorised(urllib.request.Request(url, headers=headers)), timeout=TIMEOUT_S)


def _authorised(request: urllib.request.Request) -> urllib.request.Request:
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and _origin(request.full_url) == _origin(hub_endpoint()):
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # urllib hands other headers on
    return request


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


class _Redirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        allowed = ("https",) if urlsplit(req.full_url).scheme == "https" else ("http", "https")
        if urlsplit(newurl).scheme not in allowed:
            raise UserError(f"{req.full_url} redirects to {newurl}, which is refused: only {allowed[-1]} is followed.")
        redirected = super().redirect_request(req, fp, code, msg, headers, newurl)
        return _authorised(redirected) if redirected is not None else None
