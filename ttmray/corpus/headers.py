"""Headers of audio files in a folder or bucket, read for the plan."""

from typing import Any

from ttmray.audio.io import probe
from ttmray.audio.limits import AudioInfo
from ttmray.errors import ClipError, UserError
from ttmray.storage import Folder, explained

HEADER_BYTES = 64 * 2**10
"""Read from a bucket at once: most headers need one or two of them, and a song has hundreds."""


def read_header(root: Folder, path: str) -> AudioInfo | Exception | None:
    """Header of one audio file; None where it is no audio or damaged, the error where it cannot be read at all."""
    try:
        with explained(root.path(path)):
            return _read(root, path)
    except ClipError:
        return None
    except (UserError, OSError) as error:
        return error


def _read(root: Folder, path: str) -> AudioInfo:
    if not root.remote:
        return probe(root.path(path))
    with root.open(path, HEADER_BYTES) as file:
        watched = _Watched(file)
        try:
            return probe(watched)  # type: ignore[arg-type]
        finally:
            if watched.error is not None:
                raise watched.error


class _Watched:
    """A remote file for libsndfile, which takes an exception from `read` for the end of the file."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: Exception | None = None

    def read(self, count: int = -1) -> bytes:
        try:
            return self.file.read(count)
        except Exception as error:
            self.error = error
            return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()
