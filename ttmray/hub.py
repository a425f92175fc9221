"""The Hugging Face Hub as a place to read from: `hf://org/name/file` is a model's, `hf://datasets/org/name/...` a data
set's, and `@revision` after the name a commit or branch of either.

Files are read by `huggingface_hub`, with the token of `HF_TOKEN` or `hf auth login`, from `HF_ENDPOINT` where that is
set. Single files that must lie on this machine are kept in the hub's own cache, so they are there offline, too. Nothing
is written file by file: a run's folder is no git repository. `ttmray push` uploads what is finished.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttmray.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HfUri

SCHEME = "hf"
PREFIX = "hf://"
WEIGHTS = "model.safetensors"
"""The file that a repository stands for where weights are asked for."""
ABOUT = "ttmray.json"
"""What a repository that `ttmray push` has made is: `format`, `kind`, and what its use needs."""


class NotOnHub(UserError):
    """The hub was asked, and has no such repository, revision or file, or hides it."""


def is_hub(path: str) -> bool:
    """Whether a path is an address of the hub."""
    return path.startswith(PREFIX)


def endpoint() -> str:
    """Address of the hub: HF_ENDPOINT, else https://huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def offline() -> str:
    """The variable of the environment that forbids to use the network; empty where none does."""
    off = ("", "0", "false", "no", "off")
    names = ("HF_HUB_OFFLINE", "TTMRAY_OFFLINE")
    return next((name for name in names if os.environ.get(name, "").lower() not in off), "")


def options() -> dict[str, Any]:
    """Options of fsspec for the hub."""
    return {"endpoint": endpoint()}


def client() -> "HfApi":
    """The hub's own client.

    Raises:
        UserError: this is offline.
    """
    from huggingface_hub import HfApi

    if variable := offline():
        raise UserError(f"the hub was not asked: {variable} is set.", f"Unset {variable}.")
    _no_bars_in_files()
    return HfApi(endpoint=endpoint(), library_name="ttmray")


def _no_bars_in_files() -> None:
    """The client's own progress bars are for terminals."""
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()


def parsed(uri: str) -> "HfUri":
    """Type, repository, revision and path of an address.

    Raises:
        UserError: it is none of the hub's.
    """
    from huggingface_hub.utils import parse_hf_uri

    try:
        return parse_hf_uri(uri)
    except ValueError as error:
        raise UserError(f"{uri} is no address of the hub.", "hf://org/name/file, or hf://datasets/org/name.") from error


def file_of(path: str) -> str:
    """The address of a file: a repository alone stands for its weights."""
    if not is_hub(path) or parsed(path).path_in_repo:
        return path
    return f"{path.rstrip('/')}/{WEIGHTS}"


def local_copy(uri: str) -> Path:
    """A file of the hub on this machine, from the hub's cache where that has the newest one or this is offline.

    Raises:
        UserError: there is no such file, it may not be read, or the hub cannot be reached and it was never fetched.
    """
    from huggingface_hub import hf_hub_download

    asked = parsed(uri)
    with explained(uri):
        path = hf_hub_download(asked.id, asked.path_in_repo, **_how(asked))
    return Path(path)


def snapshot(uri: str) -> Path:
    """A whole repository on this machine, in the hub's cache.

    Raises:
        UserError: as `local_copy`.
    """
    from huggingface_hub import snapshot_download

    asked = parsed(uri)
    with explained(uri):
        path = snapshot_download(asked.id, **_how(asked))
    return Path(path)


def _how(asked: "HfUri") -> dict[str, Any]:
    """Arguments of the client's downloads, of a file or of all."""
    _no_bars_in_files()
    return {
        "repo_type": asked.type,
        "revision": asked.revision,
        "endpoint": endpoint(),
        "local_files_only": bool(offline()),
        "library_name": "ttmray",
    }


def refuse_writing(place: str) -> None:
    """
    Raises:
        UserError: the place is on the hub.
    """
    if is_hub(place):
        raise UserError(
            f"{place}: a run cannot be written to the hub, file by file.",
            "Write it to a folder or bucket, and upload it when it is finished: ttmray push RUN ORG/NAME",
        )


def refuse_offline(place: str) -> None:
    """
    Raises:
        UserError: the place is on the hub, and the environment forbids to use the network.
    """
    if is_hub(place) and (variable := offline()):
        raise UserError(f"{place} was not asked for: {variable} is set.", f"Unset {variable}, or name a local copy.")


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn errors of the hub's client into a `UserError` of one line that names `what`.

    Raises:
        UserError: for those.
    """
    # each of its five retries would be two lines before the one that says it
    for name in ("utils._http", "hf_api"):  # the second one says that nothing has changed
        logging.getLogger(f"huggingface_hub.{name}").setLevel(logging.ERROR)
    try:
        yield
    except Exception as error:
        if (told := _told(what, error)) is None:
            raise
        raise told from error


def passes(error: BaseException) -> bool | None:
    """Whether the same request may work later; None for what is no error of the hub's client."""
    kind, module = type(error).__name__, type(error).__module__.split(".")[0]
    if module not in ("huggingface_hub", "httpx2", "httpx"):
        return None
    if (status := getattr(getattr(error, "response", None), "status_code", None)) is not None:
        return int(status) in (408, 425, 429) or int(status) >= 500
    return module != "huggingface_hub" and kind not in ("InvalidURL", "UnsupportedProtocol", "CookieConflict")


def _told(what: str, error: Exception) -> UserError | None:
    kind, module = type(error).__name__, type(error).__module__.split(".")[0]
    ours = module in ("huggingface_hub", "httpx2", "httpx")
    if isinstance(error, FileNotFoundError) and not ours and is_hub(what):
        return _missing(what)
    if not ours:
        return None
    status = getattr(getattr(error, "response", None), "status_code", None)
    if kind == "OfflineModeIsEnabled":
        return UserError(f"{what} was not asked for: HF_HUB_OFFLINE is set.", "Unset it, or name a local copy.")
    if kind in ("LocalEntryNotFoundError", "IncompleteSnapshotError"):
        return UserError(
            f"{what} is not in the cache of this machine, and the hub ({endpoint()}) cannot be reached.",
            f"Check the network{f'; {offline()} is set' if offline() else ''}, or name a local copy.",
        )
    if kind in ("RepositoryNotFoundError", "RevisionNotFoundError", "RemoteEntryNotFoundError") or status == 404:
        return _missing(what)  # of a private repository the hub says no more than this
    if kind == "GatedRepoError" or status in (401, 403):
        return UserError(
            f"{what}: the hub refuses it ({status}).",
            "Accept the terms on the page of the repository, or get the right to it, and set HF_TOKEN.",
        )
    reason = str(error).strip().splitlines()
    said = f"{status} {kind}" if status is not None else kind
    return UserError(
        f"{what}: the hub ({endpoint()}) answered {said}: {reason[0] if reason else 'nothing more'}",
        "Check the network and HF_ENDPOINT, and start the same command again.",
    )


def _missing(what: str) -> UserError:
    return NotOnHub(
        f"{what}: not found.",
        "Check names of repository and file; data sets are hf://datasets/org/name, and private ones need HF_TOKEN.",
    )
