"""One weights file over HTTP(S): files of the hub by `huggingface_hub`, other addresses by `pooch`.

Both write to a partial file of ours, which outlives a failure and the process: the hub's own download function starts
from zero in another process, and pooch always does. Names, hashes and messages are the caller's and ours.
"""

import re
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ttmray import __version__, hub
from ttmray.errors import UserError
from ttmray.storage import explained

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

ATTEMPTS = 5
BACKOFF_S = 1.0  # before the second attempt; doubles
TIMEOUT_S = 30.0  # without a byte
CHUNK = 1 << 16  # bytes of an address that are written at a time; the client of the hub writes 10 MB
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Remote:
    """An address, and for files of the hub the page of their repository, where a person accepts the licence."""

    url: str
    page: str = ""


class _TransientError(Exception):
    """Worth another attempt."""


def download(remote: Remote, part: Path, label: str, size: int | None, way_out: str) -> None:
    """Completes the partial file `part`; what it holds already is not fetched again, unless it came through Xet.

    A file that changed on the server (or a server that knows no ranges) starts from zero. `part` stays when it fails;
    `<part>.etag` beside it says what it is part of, until `forget`.

    Args:
        remote: what to fetch. The token of the hub (HF_TOKEN, or that of `hf auth login`) is sent to the hub's own
            host and to no other, redirects included.
        part: local path; its folder exists.
        label: for messages.
        size: expected bytes, if known.
        way_out: last sentence of the hint of errors that another attempt does not mend.

    Raises:
        UserError: not found, refused, unreachable, of another size, or the disk is full.
    """
    transfer = _from_hub if remote.page else _from_address
    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(BACKOFF_S * 2 ** (attempt - 1))
        try:
            return transfer(remote, part, label, size, way_out)
        except _TransientError as error:
            problem = str(error)
    raise _given_up(remote, f"in {ATTEMPTS} attempts: {problem}", way_out)


def _from_hub(remote: Remote, part: Path, label: str, size: int | None, way_out: str) -> None:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get, is_xet_available
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(library_name="ttmray", library_version=__version__)
    about = _about(remote, headers, way_out)
    _check_size(remote, about.size, label, size, way_out)
    if about.xet_file_data is not None and is_xet_available():
        return _by_xet(remote, part, label, about, headers, way_out)
    _check_scheme(remote.url, about.location)
    if _origin(about.location) != _origin(remote.url):
        headers.pop("authorization", None)
    known, etag = _held(remote.url, part)
    offset = known if etag and etag == about.etag and known <= (about.size or 0) else 0
    _check_room(part, label, (about.size or 0) - offset)
    try:
        if not offset:
            _start(remote.url, part, about.etag)
        with open(part, "ab") as file:  # http_get tries broken connections again by itself
            http_get(
                about.location, file, resume_size=offset, headers=headers, expected_size=about.size,
                displayed_filename=label,
            )  # fmt: skip
    except HfHubHTTPError as error:
        raise _answered(remote, error.response.status_code, error.response.reason_phrase, way_out) from error
    except httpx2.HTTPError as error:
        raise _given_up(remote, str(error) or type(error).__name__, way_out) from error
    except OSError as error:
        with explained(str(part)):
            raise error


def _by_xet(
    remote: Remote, part: Path, label: str, about: "HfFileMetadata", headers: dict[str, str], way_out: str
) -> None:
    """The file from the hub's store of deduplicated chunks, from zero in parallel."""
    import httpx2
    from huggingface_hub.file_download import xet_get

    assert about.xet_file_data is not None  # the caller looked
    _check_room(part, label, about.size or 0)
    with explained(str(part)):
        _start(remote.url, part, None)
    try:
        xet_get(
            incomplete_path=part, xet_file_data=about.xet_file_data, headers=headers, expected_size=about.size,
            displayed_filename=label,
        )  # fmt: skip
    except (httpx2.HTTPError, OSError, RuntimeError) as error:  # of the hub, of the disk, of hf_xet
        raise UserError(
            f"{remote.url} was not fetched through Xet: {error}",
            f"HF_HUB_DISABLE_XET=1 fetches it without Xet. {way_out}",
        ) from error


def _about(remote: Remote, headers: dict[str, str], way_out: str) -> "HfFileMetadata":
    """What the hub says of a file: where it lies, how long it is, its version."""
    import httpx2
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return get_hf_file_metadata(remote.url, timeout=TIMEOUT_S, headers=headers, endpoint=hub.endpoint())
    except OfflineModeIsEnabled as error:
        raise UserError(f"{remote.url} was not asked for: HF_HUB_OFFLINE is set.", f"Unset it. {way_out}") from error
    except HfHubHTTPError as error:
        raise _answered(remote, error.response.status_code, error.response.reason_phrase, way_out) from error
    except httpx2.HTTPError as error:
        raise _TransientError(str(error) or type(error).__name__) from error


def _from_address(remote: Remote, part: Path, label: str, size: int | None, way_out: str) -> None:
    import pooch
    import requests

    offset, etag = _held(remote.url, part)
    headers = {"User-Agent": f"ttmray/{__version__}", "Accept-Encoding": "identity"}
    if offset:
        headers |= {"Range": f"bytes={offset}-", "If-Range": etag}

    def before_body(response: requests.Response, **_: Any) -> None:
        """Looks at every answer before its body is read: pooch's downloader would append whatever comes."""
        _check_scheme(remote.url, response.headers.get("Location") if response.is_redirect else response.url)
        if response.status_code == 206:
            start, total = _content_range(response.headers)
            if start != offset:
                forget(part)
                raise _TransientError("the server sent another range than asked for")
            _check_size(remote, total, label, size, way_out)
            _check_room(part, label, (total or 0) - offset)
        elif response.ok and not response.is_redirect:
            total = _number(response.headers.get("Content-Length"))
            _check_size(remote, total, label, size, way_out)
            with explained(str(part)):
                tag = response.headers.get("ETag", "")
                # a weak tag names similar contents, not the same bytes: no resumption then
                _start(remote.url, part, "" if tag.startswith("W/") else tag)
            _check_room(part, label, total or 0)

    fetch = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(),
        chunk_size=CHUNK,
        headers=headers,
        timeout=TIMEOUT_S,
        hooks={"response": before_body},
    )
    try:
        with open(part, "ab") as file:
            fetch(remote.url, file, None)
    except requests.HTTPError as error:
        answer = error.response
        assert answer is not None  # raise_for_status gives it
        if answer.status_code == 416 and offset and _number(answer.headers.get("Content-Range")) == offset:
            return  # complete already: an earlier process was stopped before it gave the file its name
        if answer.status_code == 416:
            forget(part)
            raise _TransientError("the partial file is longer than the server's") from error
        raise _answered(remote, answer.status_code, answer.reason, way_out) from error
    except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL) as error:
        raise UserError(f"{remote.url}: {error}", way_out) from error
    except requests.RequestException as error:
        raise _TransientError(str(error) or type(error).__name__) from error
    except OSError as error:
        with explained(str(part)):
            raise error


def _answered(remote: Remote, status: int, reason: str, way_out: str) -> Exception:
    """What an answer that is no file is to us."""
    if status in _TRANSIENT_STATUS:
        return _TransientError(f"the server answered {status} {reason}")
    answer = f"{remote.url}: the server answered {status} {reason}."
    if status not in (401, 403):
        return UserError(answer, f"The file is not there, or not there any more. {way_out}")
    if not remote.page:
        return UserError(answer, f"It is not public. {way_out}")
    from huggingface_hub import get_token

    token = "HF_TOKEN has no access" if get_token() else "It is gated or private and HF_TOKEN is not set"
    return UserError(
        answer,
        f"{token}: accept the terms at {remote.page}, then set HF_TOKEN to a token of that account. {way_out}",
    )


def _given_up(remote: Remote, problem: str, way_out: str) -> UserError:
    return UserError(
        f"{remote.url} was not fetched: {problem}.",
        f"What arrived is kept, the same command goes on from there. {way_out}",
    )


def _check_size(remote: Remote, total: int | None, label: str, size: int | None, way_out: str) -> None:
    if size is not None and total is not None and total != size:
        raise UserError(
            f"{remote.url} has {total} bytes, {label} must have {size}: it is another file.",
            f"The server may have answered with a page of its own. {way_out}",
        )


def _check_room(part: Path, label: str, missing: int) -> None:
    if shutil.disk_usage(part.parent).free < missing:
        raise UserError(
            f"{label} needs {missing / 1e9:.2f} GB, {part.parent} has no room for it: the disk is full.",
            "Free space, or set TTMRAY_WEIGHTS to a folder on another disk, and start the same command again.",
        )


def _check_scheme(url: str, location: str | None) -> None:
    """Only http and https are spoken, and https is not left: no file: or ftp: addresses, from a redirect either."""
    scheme = urlsplit(location or url).scheme or urlsplit(url).scheme
    if scheme not in (("https",) if urlsplit(url).scheme == "https" else ("http", "https")):
        raise UserError(f"{url} redirects to {location}, which is refused.", "Only https is followed from https.")


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
    _etag_file(part).write_text(f"{url}\n{etag or ''}", encoding="utf-8")


def forget(part: Path) -> None:
    """Nothing is resumed from `part` any more."""
    _etag_file(part).unlink(missing_ok=True)


def _content_range(headers: Mapping[str, str]) -> tuple[int, int | None]:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    if match is None:
        return -1, None
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _number(text: str | None) -> int | None:
    """The number of a Content-Length, or the total of an unsatisfied Content-Range (`bytes */N`)."""
    match = re.fullmatch(r"(?:bytes \*/)?(\d+)", (text or "").strip())
    return int(match[1]) if match else None


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port
