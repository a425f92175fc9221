"""Object stores: what passes by itself is tried again for minutes, and one attempt that hangs is given up on.

All retries are here: those of the client libraries below end after seconds, or not for many minutes.
"""

import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar, cast

from ttmray import hub
from ttmray.console import errors
from ttmray.errors import UserError

Result = TypeVar("Result")
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
"""Without a byte from the store for so long, an attempt ends. While a shard is sent there is none."""
PATIENCE_S = 300.0
FIRST_PATIENCE_S = 15.0
"""For a store that has never answered this process: usually its address is wrong."""
SAY_AFTER_S = 30.0
_PASSING = {"HTTPClientError", "ResponseStreamingError", "IncompleteReadError", "ResponseParserError", "IncompleteRead"}
"""Of botocore and what is below it, by name, since they are optional."""
_answered: set[str] = set()
"""Stores, by scheme and bucket, that have answered this process."""


def options(uri: str) -> dict[str, Any]:
    """Options of fsspec for an address: time-outs, and no retries beside ours."""
    if hub.is_hub(uri):
        return hub.options()
    if uri.partition("://")[0] not in ("s3", "s3a"):
        return {}
    import fsspec

    own = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "read_timeout": READ_TIMEOUT_S,
        "retries": {"mode": "standard", "total_max_attempts": 1},
    }
    return {"config_kwargs": own | fsspec.config.conf.get("s3", {}).get("config_kwargs", {})}


def patiently(where: str, act: Callable[[], Result]) -> Result:
    """What `act` returns, which is tried again while the store is busy, broken or out of reach.

    `TTMRAY_STORE_PATIENCE_S` says for how many seconds; default 300. A store that has never answered this process is
    given up on after 15 s.

    Args:
        where: the address.

    Raises:
        UserError: it took too long.
        Exception: what does not pass by itself, at once.
    """
    store, begun, pause, said = "/".join(where.split("/")[:3]), time.monotonic(), 0.25, False
    while True:
        try:
            result = act()
        except Exception as error:
            status = http_status(error)
            if status is not None:
                _answered.add(store)
            if not passes(error):
                raise
            patience = float(os.environ.get("TTMRAY_STORE_PATIENCE_S", PATIENCE_S))
            if store not in _answered:
                patience = min(patience, FIRST_PATIENCE_S)
            spent = time.monotonic() - begun
            if spent + pause > patience and hub.is_hub(where):
                raise  # says what to do by itself
            if spent + pause > patience:
                raise UserError(
                    f"{where}: the object store has failed for {spent:.0f} s: {type(error).__name__}: {error}",
                    "Check the store, the bucket, AWS_ENDPOINT_URL and the credentials, and start the same command "
                    "again: what was committed stays.",
                ) from error
            if spent > SAY_AFTER_S and not said:
                said = True
                errors.print(
                    f"{where}: the object store fails, and is tried again for {patience:g} s: {error}",
                    markup=False,
                )
            # many workers must not come back at the same moment
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, 20.0)
        else:
            _answered.add(store)
            return result


def taken(error: BaseException) -> bool:
    """Whether a conditional PUT was refused since the name is taken, also where the answer has no body."""
    return isinstance(error, FileExistsError) or http_status(error) == 412


def passes(error: BaseException) -> bool:
    """Whether the same request may work later: the store is busy, broken, or cannot be reached."""
    if (known := hub.passes(error)) is not None:
        return known
    status = http_status(error)
    if status is not None:
        # 409: another conditional PUT of the same name was under way
        return status in (408, 409, 425, 429) or (status >= 500 and status != 501)
    for cause in _causes(error):
        kind = type(cause)
        if isinstance(cause, TimeoutError | ConnectionError) or kind.__module__.split(".")[0] == "aiohttp":
            return True
        names = {base.__name__ for base in kind.__mro__}
        if names & _PASSING or (kind.__module__ == "botocore.exceptions" and "ConnectionError" in names):
            return True
    return False


def http_status(error: BaseException) -> int | None:
    """Of the answer that an error stands for; None where there was none."""
    for cause in _causes(error):
        answer = getattr(cause, "response", None)
        if isinstance(answer, dict) and "HTTPStatusCode" in answer.get("ResponseMetadata", {}):
            return int(answer["ResponseMetadata"]["HTTPStatusCode"])
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    node: BaseException | None = error
    for _ in range(9):
        if node is None:
            return
        yield node
        node = node.__cause__ or node.__context__


class PatientFile:
    """A remote file whose ranges are fetched patiently; all else is the file's own."""

    def __init__(self, where: str, file: Any) -> None:
        self._where, self._file = where, file

    def read(self, count: int = -1) -> bytes:
        """As of a file; the position stays where a fetch failed."""
        return cast(bytes, patiently(self._where, lambda: self._file.read(count)))

    def __enter__(self) -> BinaryIO:
        return cast(BinaryIO, self)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
