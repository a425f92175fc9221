"""Files of a corpus run on the local disk: where they are, or as checked copies of a remote run's files."""

import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ttmray.corpus.shards import mend
from ttmray.errors import UserError
from ttmray.storage import Folder, explained

_COPIES = "ttmray-copies"  # below the cache folder: nothing else is ever evicted
_THREADS = 16  # that copy remote files side by side


def damaged(run: Folder, name: str, how: str) -> UserError:
    return UserError(f"{run.path(name)} is damaged: {how}.", mend(run))


@dataclass(frozen=True)
class Files:
    """The files of a run: those of a local one where they are, those of a remote one as copies in `cache`.

    A copy is written whole, once, and only if its SHA-256 starts with the 12 digits that its name carries.
    """

    run: Folder
    cache: Folder

    def local_path(self, name: str) -> str:
        return self.cache.path(name) if self.run.remote else self.run.path(name)

    def open(self, name: str) -> int:
        """A descriptor for reading.

        Raises:
            UserError: the file is absent, unreadable, or its bytes are not those that were committed.
        """
        path = self.local_path(name)
        with explained(self.run.path(name)):
            if self.run.remote:
                with suppress(FileNotFoundError):  # never copied, or evicted by another run
                    return os.open(path, os.O_RDONLY)
                self.fetch([name])
            return os.open(path, os.O_RDONLY)

    def fetch(self, names: Iterable[str]) -> None:
        """Copy the files that are not in the cache; nothing to do for local runs."""
        if not self.run.remote:
            return
        missing = [name for name in names if not os.path.exists(self.local_path(name))]
        if missing:
            with ThreadPoolExecutor(min(_THREADS, len(missing))) as pool:
                list(pool.map(self._copy, missing))

    def _copy(self, name: str) -> None:
        digest = name.rpartition("-")[2].partition(".")[0]
        with _locked(self.cache, digest[:2]):  # several ranks and workers want the same file at the same time
            if os.path.exists(self.local_path(name)):
                return
            data = self.run.read(name)
            if not digest or not hashlib.sha256(data).hexdigest().startswith(digest):
                raise damaged(self.run, name, "its SHA-256 is not that of its name")
            self.cache.write(name, data)


def make_room(cache: str, needed: dict[str, int], gib: float) -> None:
    """Evict copies until the needed ones fit into the cache, first those that no launch has asked for the longest.
    A running job that misses one of its copies fetches it again.

    Args:
        needed: local path -> bytes of every copy that the caller is going to use.

    Raises:
        UserError: they are larger than the cache: reading clips in random order would fetch all again and again.
    """
    if not needed:
        return
    size, bound = sum(needed.values()), int(gib * 2**30)
    if size > bound:
        raise UserError(
            f"cache_gib={gib:g} is too small: the chosen clips lie in {size / 2**30:.1f} GiB of remote files.",
            f"Use a disk with room and cache_gib={size // 2**30 + 1}, or copy the corpus to a local folder.",
        )
    copies = copies_folder(cache)
    copies.sweep_temporary()
    others = []
    for path in Path(copies.uri).glob("*/*/*"):
        with suppress(FileNotFoundError):  # another process evicts the same ones
            if str(path) in needed:
                os.utime(path)
            else:
                status = path.stat()
                others.append((status.st_mtime_ns, status.st_size, path))
    excess = size + sum(size for _, size, _ in others) - bound
    for _, freed, path in sorted(others):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= freed


def copies_folder(cache: str) -> Folder:
    """Where copies lie below the cache folder.

    Raises:
        UserError: an object store.
    """
    folder = Folder.at(cache)
    if folder.remote:
        raise UserError(f"{cache}: the cache must be a local folder.", "Name one on a fast local disk.")
    return folder.sub(_COPIES)


@contextmanager
def _locked(folder: Folder, name: str) -> Iterator[None]:
    """Only one process at a time is inside, per name."""
    with explained(str(folder)):
        os.makedirs(folder.uri, exist_ok=True)
        file = open(f"{folder.uri}/.lock-{name}", "ab")  # noqa: SIM115 (closed below)
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
