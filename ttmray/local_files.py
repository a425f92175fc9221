"""Files of local folders, complete or absent: on disks, and on mounted drives that can do less.

Google Drive and other FUSE mounts, SMB and exFAT may have no hard links, no fsync, and renames that are not atomic.
"""

import errno
import os
import uuid
from contextlib import suppress
from pathlib import Path

from ttmray.console import errors

TEMPORARY_PREFIX = ".tmp-"


def write(target: Path, data: bytes, replace: bool) -> None:
    """Write a temporary file and give it its name. Once it has it, nothing turns the write into an error any more.

    Args:
        replace: what is there; else it must not be there.

    Raises:
        FileExistsError: the name is taken.
        OSError: it cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # not what `create` means by it
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target.parent)) from error
    if replace and _holds(target, data):
        return
    temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            sync(file.fileno())
        if replace:
            os.replace(temporary, target)
        else:
            _name_new(temporary, target)
        fsync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _holds(target: Path, data: bytes) -> bool:
    """Whether a file has these bytes already. On a mounted drive renames are not atomic: a file that is replaced may be
    nobody's for a while, so what a relaunch writes again (`run.json`, plans) stays as it is."""
    try:
        return target.stat().st_size == len(data) and target.is_file() and target.read_bytes() == data
    except OSError:
        return False  # not there, or the write says what is wrong


def _name_new(temporary: Path, target: Path) -> None:
    """Give a file its final name unless that is taken; of several writers one succeeds.

    By a hard link; where the file system has none (FUSE, SMB, exFAT) by a rename that does not replace; where it has
    not even that by looking first, which keeps apart all but writers at the very same moment, and is said.

    Raises:
        FileExistsError: the name is taken.
    """
    try:
        os.link(temporary, target)
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    try:
        _rename_new(temporary, target)
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    device = os.stat(target.parent).st_dev
    if device not in _said:
        _said.add(device)
        errors.print(
            f"{target.parent}: this file system cannot create a file that never replaces another one. Do not start two "
            "launches with one output folder at once here.",
            markup=False,
        )
    os.replace(temporary, target)


_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)
_said: set[int] = set()
"""File systems (device numbers) of which it was said that they keep no writers apart."""


def _rename_new(source: Path, target: Path) -> None:
    """Linux's rename that fails where the target exists (`renameat2` with RENAME_NOREPLACE)."""
    import ctypes

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    here, no_replace = -100, 1  # AT_FDCWD, RENAME_NOREPLACE
    if rename(here, os.fsencode(source), here, os.fsencode(target), no_replace) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def sync(descriptor: int) -> None:
    """Make an open file survive a power cut, where its file system can do that: mounted drives may have no such call.

    Raises:
        OSError: the bytes are not where they should be (disk full, input/output error).
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def fsync(path: Path) -> None:
    """Make a file survive a power cut, where its file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut, where its file system can do that."""
    with suppress(OSError):
        fsync(path)
