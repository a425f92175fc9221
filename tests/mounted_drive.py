"""A mounted drive that can do less than a disk: Google Drive and other FUSE mounts, SMB, exFAT.

What lies below the folder has no hard links, no rename that refuses to replace, no fsync, slow listings, and renames
that are not atomic: for a while a name that is replaced is nobody's, and then the file has two names. `install` does
that to the calls of the running process, so that the package needs no seam for it. A process can be told to die, by
SIGKILL, in the middle of one of these calls.
"""

import ctypes
import errno
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

WINDOW_S, LISTING_S = 0.002, 0.005


class MountedDrive:
    """The drive below `folder`, as this process sees it.

    Args:
        die_at: number, from 1, of the write (link, rename or deletion) in whose middle the process dies; 0: never.
    """

    def __init__(self, folder: str, die_at: int = 0) -> None:
        self.folder, self.die_at, self.writes = os.path.abspath(folder), die_at, 0
        self._real = {name: getattr(os, name) for name in ("link", "replace", "rename", "unlink", "fsync", "scandir")}
        self._real["listdir"] = os.listdir

    def has(self, path: Any) -> bool:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        full = os.path.abspath(os.fsdecode(path))
        return full == self.folder or full.startswith(self.folder + os.sep)

    def _middle(self) -> None:
        """Of a write: time passes, or the process ends."""
        self.writes += 1
        if self.writes == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(WINDOW_S)

    def link(self, source: Any, target: Any, **options: Any) -> None:
        if self.has(target):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), target)
        self._real["link"](source, target, **options)

    def rename(self, source: Any, target: Any, **options: Any) -> None:
        if not self.has(target):
            self._real["rename"](source, target, **options)
            return
        if os.path.lexists(target):
            self._real["unlink"](target)
        self._middle()
        self._real["link"](source, target)
        time.sleep(WINDOW_S)
        self._real["unlink"](source)

    def unlink(self, path: Any, **options: Any) -> None:
        if options.get("dir_fd") is None and self.has(path):
            self._middle()
        self._real["unlink"](path, **options)

    def fsync(self, descriptor: Any) -> None:
        if self.has(descriptor if isinstance(descriptor, int) else descriptor.fileno()):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._real["fsync"](descriptor)

    def scandir(self, path: Any = ".") -> Any:
        if not isinstance(path, int) and self.has(path):
            time.sleep(LISTING_S)
        return self._real["scandir"](path)

    def listdir(self, path: Any = ".") -> Any:
        if not isinstance(path, int) and self.has(path):
            time.sleep(LISTING_S)
        return self._real["listdir"](path)


def _without_renameat2(library: Any, name: str) -> Any:
    if name != "renameat2":
        return _getattr(library, name)

    def renameat2(*_: Any) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    return renameat2


_getattr = ctypes.CDLL.__getattr__


def install(folder: str, die_at: int = 0) -> MountedDrive:
    """From here on this process sees the folder as such a drive."""
    drive = MountedDrive(folder, die_at)
    for name in ("link", "rename", "unlink", "fsync", "scandir", "listdir"):
        setattr(os, name, getattr(drive, name))
    os.replace, os.remove = drive.rename, drive.unlink
    ctypes.CDLL.__getattr__ = _without_renameat2  # type: ignore[method-assign]
    return drive


def command(words: Sequence[str], folder: str, die_at: int = 0) -> None:
    """A command of ttmray in a process of its own, on the drive; the process ends with its exit code."""
    from ttmray.cli import main

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    install(folder, die_at)
    sys.exit(main(words))
