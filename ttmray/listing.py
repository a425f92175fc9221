"""Files of local folders."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ListedFile:
    """One listed file: its name relative to the listed folder, and its size in bytes (-1 for a broken link).

    `version` changes with the content: the ETag of an object, the time of the last change of a local file. It is empty
    where sizes were not asked for, or the store has none.
    """

    name: str
    size: int
    version: str = ""


def walk(base: str, sizes: bool, unreadable: dict[str, str] | None) -> Iterator[ListedFile]:
    """Files below a folder, at any depth and through links; nothing where there is no such folder.

    Args:
        sizes: also look at every file.
        unreadable: takes the folders below it that cannot be listed, and why; None: the first one is an error.

    Raises:
        OSError: a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        if isinstance(error, FileNotFoundError):
            return
        where = os.path.relpath(error.filename, base).replace(os.sep, "/") if error.filename else "."
        if unreadable is None or where == ".":
            raise error
        unreadable[where] = error.strerror or str(error)

    for folder, folders, names in os.walk(base, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not _leads_back(folder, name))
        prefix = os.path.relpath(folder, base).replace(os.sep, "/")
        for name in names:
            full = os.path.join(folder, name)
            relative = name if prefix == "." else f"{prefix}/{name}"
            try:
                status = os.stat(full)
            except FileNotFoundError:
                if os.path.islink(full):  # a broken link; else gone since it was listed
                    yield ListedFile(relative, -1)
                continue
            except OSError:  # its folder may be listed and no more: whoever reads the file says why
                yield ListedFile(relative, -1)
                continue
            if stat.S_ISREG(status.st_mode):
                yield (
                    ListedFile(relative, status.st_size, str(status.st_mtime_ns)) if sizes else ListedFile(relative, -1)
                )


def _leads_back(folder: str, name: str) -> bool:
    """A link to a folder that it lies in itself would be walked without end."""
    full = os.path.join(folder, name)
    return os.path.islink(full) and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(full))
