"""What the C code of decoders prints (libmpg123 does, whatever it is told) stays off the console.

It goes to file descriptor 2, past Python. While any thread decodes, that descriptor leads to a file; what is in it
and is no decoder's is then passed on.
"""

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

_DECODERS = re.compile(
    rb"\[src/libmpg123/|\[.*(?:parse|layer[123]|id3|frame|readers|format)\.c:\d+\]"
    rb"|Warning: (?:Xing|Encountered|Real sample)"
    rb"|(?:Note|Warning|error): .*(?:MPEG|mpg123|frame|header|stream|resync|junk|ID3)|^\s*$",
)
_lock = threading.Lock()
_inside = 0
_console: int | None = None
_held: IO[bytes] | None = None


@contextmanager
def held_back() -> Iterator[None]:
    """Nothing that decoders print inside reaches the console. Threads may overlap."""
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _inside, _console, _held
    with _lock:
        _inside += 1
        if _inside == 1:
            try:
                _console = os.dup(2)
            except OSError:  # closed: there is no console
                return
            _held = tempfile.TemporaryFile()  # noqa: SIM115 (closed by the last to leave)
            os.dup2(_held.fileno(), 2)


def _leave() -> None:
    global _inside, _console, _held
    with _lock:
        _inside -= 1
        if _inside or _console is None or _held is None:
            return
        os.dup2(_console, 2)
        os.close(_console)
        _held.seek(0)
        others = [line for line in _held.read().splitlines(keepends=True) if not _DECODERS.search(line)]
        _held.close()
        _console, _held = None, None
    if others:
        os.write(2, b"".join(others))
