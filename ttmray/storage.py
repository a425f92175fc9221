"""Where files live: one way to list, read and write, for local folders and object stores.

Rules that everything else relies on:

- A file is complete or absent. Local writes go to a temporary name in the same folder, are fsynced and
  renamed; object stores get one complete PUT. Nothing is ever encoded into an open remote file, because
  an exception inside such a block commits a truncated object.
- `create` refuses to replace: the first writer wins, which is what makes an index file a commit.
- Names inside a folder are relative, with forward slashes, and can never leave the folder.
"""

import errno
import hashlib
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from ttmray import hub, local_files, object_store
from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.listing import ListedFile, walk
from ttmray.object_store import PatientFile, patiently

if TYPE_CHECKING:
    import pyarrow as pa

_READS = 3
UNPACKED = "/runtime_resources/working_dir_files/"
"""Where a node's Ray unpacks what `--working-dir` has sent, below the folder of its session."""


def absolute(path: str) -> str:
    """`path` as an absolute local path or an unchanged URI (Ray jobs run in another working directory).

    Raises:
        UserError: it is empty, or a scheme alone.
    """
    scheme, separator, place = path.partition("://")
    if not (place if separator else path).strip():
        raise UserError(f"{path!r} names no place.", "Give a path, or an address such as s3://bucket/prefix.")
    path = path.removeprefix("file://")  # atomic writes and create-only are ours for local files
    if "://" in path:
        if not place.partition("/")[0].strip():
            raise UserError(f"{path!r} names no bucket.", f"Give an address such as {scheme}://bucket/prefix.")
        return path.rstrip("/")
    return os.path.abspath(os.path.expanduser(path))


def is_remote(path: str) -> bool:
    """True for URIs such as `s3://bucket/prefix`."""
    return "://" in path


def refuse_vanishing(place: str) -> None:
    """Refuse a place to write on the hub, or at which Ray deletes after a job: its copy of the folder of
    `--working-dir`.

    Raises:
        UserError: the place is in there.
    """
    hub.refuse_writing(place)
    if UNPACKED in place:
        raise UserError(
            f"{place} would vanish with this job: it lies in the copy that Ray has made of the working directory.",
            "Give an absolute path that all nodes share, or an address such as s3://bucket/prefix.",
        )


def safe_relative(name: str) -> str:
    """Check that `name` stays inside the folder that it is joined to.

    Raises:
        UserError: for absolute names, `..`, backslashes, control characters and empty parts.
    """
    parts = name.split("/")
    bad = not name or any(part in ("", ".", "..") for part in parts)
    if bad or "\\" in name or any(ord(c) < 32 for c in name):
        raise UserError(
            f"{name!r} is not a safe relative path.",
            "Use names without '..', '//', a leading '/', backslashes and line breaks.",
        )
    return name


BAD_NAME = "bad_name"
"""Reason of a file whose name no table, archive or page can hold: one failed file, which stops no other."""


def name_problem(name: str) -> str:
    """What is wrong with the name of somebody's file, from its folder on; "" where nothing is."""
    try:
        safe_relative(name)
        name.encode()
    except UserError as error:
        return error.message
    except UnicodeEncodeError:
        return f"the file name {name!r} is not valid Unicode."
    return ""


def shown_name(name: str) -> str:
    """`name` with escapes for all that text cannot hold; itself where it is ordinary."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn the storage errors that a user can act on into a `UserError` that names `what`.

    Raises:
        UserError: for those.
    """
    try:
        with hub.explained(what):
            yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{what}: not found.", "Check the path or the bucket name.") from error
    except (IsADirectoryError, NotADirectoryError) as error:
        if isinstance(error, IsADirectoryError):
            wrong = "is a folder, not a file"
        else:
            wrong = "is a file, not a folder" if os.path.isfile(what) else "lies below a file, not a folder"
        raise UserError(
            f"{what}: {wrong}.", "Check the path; a folder that is in the way of a file must be moved."
        ) from error
    except PermissionError as error:
        raise UserError(
            f"{what}: permission denied ({error}).",
            "Check the rights of the file, or the credentials of the bucket.",
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{what}: the disk is full.",
                "What was committed stays valid: free space and start the same command again.",
            ) from error
        if error.errno == errno.EROFS:
            raise UserError(f"{what}: the file system is read-only.", "Choose another output folder.") from error
        raise
    except Exception as error:
        # botocore is optional, so its exceptions are recognised by module instead of by import.
        if type(error).__module__.split(".")[0] in ("botocore", "aiobotocore", "aiohttp"):
            raise UserError(
                f"{what}: the object store answered {type(error).__name__}: {error}",
                "Check the bucket, AWS_ENDPOINT_URL and the credentials (AWS_PROFILE or AWS_ACCESS_KEY_ID).",
            ) from error
        raise


@dataclass(frozen=True)
class Folder:
    """A local folder or an object-store prefix. Cheap to pickle: it holds nothing but its address."""

    uri: str

    @classmethod
    def at(cls, path: str) -> "Folder":
        """The folder at `path` (local or URI); it need not exist yet."""
        return cls(absolute(path))

    @property
    def remote(self) -> bool:
        return is_remote(self.uri)

    @property
    def hub(self) -> bool:
        return hub.is_hub(self.uri)

    @property
    def name(self) -> str:
        """Last part of the address."""
        return self.uri.rpartition("/")[2]

    @property
    def typed(self) -> str:
        """The address as a shell takes it, for commands that people are to copy."""
        return shlex.quote(self.uri)

    def __str__(self) -> str:
        return self.uri

    def _filesystem(self) -> tuple[Any, str]:
        import fsspec

        hub.refuse_offline(self.uri)
        try:
            # listing caches would hide what other workers committed
            fs, root = fsspec.core.url_to_fs(
                self.uri, use_listings_cache=False, skip_instance_cache=False, **object_store.options(self.uri)
            )
            if hasattr(fs, "retries"):
                fs.retries = 1  # `patiently` tries again
            return fs, root
        except ImportError as error:
            scheme = self.uri.split("://")[0]
            raise UserError(
                f"{self.uri}: {error}", "pip install 'ttmray[s3]'" if scheme == "s3" else f"Install fsspec's {scheme}."
            ) from error
        except ValueError as error:
            raise UserError(f"{self.uri}: {error}", "Use a local path, or an s3:// or hf:// address.") from error

    def path(self, name: str) -> str:
        """Full local path or URI of `name`."""
        return f"{self.uri}/{safe_relative(name)}"

    def sub(self, name: str) -> "Folder":
        return Folder(self.path(name))

    def exists(self, name: str) -> bool:
        if not self.remote:
            return os.path.exists(self.path(name))
        fs, root = self._filesystem()
        full = f"{root}/{safe_relative(name)}"
        with explained(self.path(name)):
            # the hub's own `exists` answers no where it was not reached
            return bool(patiently(self.path(name), lambda: _there(fs, full) if self.hub else fs.exists(full)))

    def files(self, under: str = "", sizes: bool = True, unreadable: dict[str, str] | None = None) -> list[ListedFile]:
        """All files below `under`, in sorted order; empty where the folder does not exist.

        Temporary files of writers are left out. Names are as they are there, also those that `safe_relative` refuses.

        Args:
            unreadable: takes the local folders below `under` that cannot be listed, with the reason; else the first
                one is an error, as is `under` itself.

        Raises:
            UserError: for those, and where the store does not answer.
        """
        where = self.path(under) if under else self.uri
        with explained(where):
            if self.remote:
                fs, root = self._filesystem()
                base = f"{root}/{under}" if under else root
                listed = [
                    ListedFile(full[len(base) :].removeprefix("/"), int(info.get("size") or 0), _version(info))
                    for full, info in patiently(where, lambda: _find(fs, base, self.hub)).items()
                    if info.get("type") == "file"
                ]
            else:
                listed = list(walk(where, sizes, unreadable))
        return sorted((e for e in listed if _is_ours(e.name)), key=lambda e: e.name)

    def read(self, name: str, small: bool = False) -> bytes:
        """All bytes of a file.

        Args:
            small: it has some kilobytes: S3 is not asked for its size first, which decides on how many connections it
                is read.

        Raises:
            UserError: when it is missing or cannot be read.
        """
        with explained(self.path(name)):
            if not self.remote:
                return Path(self.path(name)).read_bytes()
            fs, root = self._filesystem()
            how = {"max_concurrency": 1} if small and hasattr(fs, "max_concurrency") else {}
            return patiently(self.path(name), lambda: bytes(fs.cat_file(f"{root}/{safe_relative(name)}", **how)))

    def read_json(self, name: str, *fields: str) -> dict[str, Any]:
        """The object that a JSON file holds.

        Args:
            fields: that it must have.

        Raises:
            UserError: it is missing, cannot be read, or holds no JSON object with those fields.
        """
        try:
            value = read_json(self.read(name))
            if not isinstance(value, dict):
                raise ValueError(f"it holds a {type(value).__name__}, no object")
            if missing := [field for field in fields if field not in value]:
                raise ValueError(f"it has no field {missing[0]}")
            return value
        except ValueError as error:
            problem = str(error)
        raise UserError(f"{self.path(name)} is damaged: {problem}.", "Restore it, or make it again.")

    def read_as(self, name: str) -> tuple[bytes, str]:
        """All bytes of a file and their version (see `ListedFile`), which belong together: of an object that is
        replaced in the meantime, those of the new one.

        Raises:
            UserError: when it is missing or cannot be read.
        """
        for _ in range(_READS):
            with self.open(name) as file, explained(self.path(name)):
                try:
                    if not self.remote:
                        return file.read(), str(os.fstat(file.fileno()).st_mtime_ns)
                    details = getattr(file, "details", None) or {}
                    return file.read(), _version(details)
                except OSError as error:
                    if type(error).__name__ != "FileExpired":  # of s3fs: each range is asked for by its ETag
                        raise
        raise UserError(f"{self.path(name)} is replaced again and again while it is read.", "Wait until it is whole.")

    def open(self, name: str, block_bytes: int | None = None) -> BinaryIO:
        """A seekable reader of the file; ranges are fetched on demand from object stores.

        Args:
            block_bytes: of a range, where little is read; default: the store's own, for s3 50 MiB.
        """
        with explained(self.path(name)):
            if not self.remote:
                return open(self.path(name), "rb")
            fs, root = self._filesystem()
            size = {} if block_bytes is None else {"block_size": block_bytes}
            file = patiently(self.path(name), lambda: fs.open(f"{root}/{safe_relative(name)}", "rb", **size))
            return cast(BinaryIO, PatientFile(self.path(name), file))

    def write(self, name: str, data: bytes) -> None:
        """Write the whole file atomically, replacing what was there."""
        refuse_vanishing(self.uri)
        with explained(self.path(name)):
            if self.remote:
                fs, root = self._filesystem()
                patiently(self.path(name), lambda: fs.pipe_file(f"{root}/{safe_relative(name)}", data))
            else:
                local_files.write(Path(self.path(name)), data, replace=True)

    def create(self, name: str, data: bytes) -> bool:
        """Write the whole file atomically unless it exists; False (and no change) if it does.

        Of several concurrent writers exactly one gets True: `os.link` locally, a conditional PUT
        (`If-None-Match: *`) on S3.
        """
        refuse_vanishing(self.uri)
        with explained(self.path(name)):
            try:
                if self.remote:
                    return self._create_remote(name, data)
                local_files.write(Path(self.path(name)), data, replace=False)
            except FileExistsError:
                if not self.remote and os.path.isdir(self.path(name)):  # nobody's commit
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self.path(name)) from None
                if not self.remote and not os.path.exists(self.path(name)):
                    raise UserError(f"{self.path(name)} is a link to nothing.", "Delete it.") from None
                return False
            return True

    def _create_remote(self, name: str, data: bytes) -> bool:
        fs, root = self._filesystem()
        full = f"{root}/{safe_relative(name)}"
        try:
            patiently(self.path(name), lambda: fs.pipe_file(full, data, mode="create"))
        except OSError as error:
            if object_store.taken(error):
                return False
            raise
        return True

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens when it is gone already (another worker may have been faster)."""
        hub.refuse_writing(self.uri)
        with explained(self.path(name)):
            try:
                if self.remote:
                    fs, root = self._filesystem()
                    patiently(self.path(name), lambda: fs.rm_file(f"{root}/{safe_relative(name)}"))
                else:
                    os.unlink(self.path(name))
            except FileNotFoundError:
                return

    def sweep_temporary(self, older_than_s: float = 3600.0) -> int:
        """Remove temporary files that killed writers left behind; returns how many. Local folders only:
        object stores never show an unfinished PUT."""
        if self.remote or not os.path.isdir(self.uri):
            return 0
        import time

        swept = 0
        for folder, _, names in os.walk(self.uri):
            for name in names:
                if not name.startswith(local_files.TEMPORARY_PREFIX):
                    continue
                full = os.path.join(folder, name)
                try:
                    if time.time() - os.stat(full).st_mtime >= older_than_s:
                        os.unlink(full)
                        swept += 1
                except FileNotFoundError:
                    continue  # its writer finished in between
        return swept


def parquet_table(data: bytes, columns: Sequence[str] | None = None) -> "pa.Table":
    """The table in the bytes of a Parquet file, checked against the checksums of its pages where it has them.

    Texts that are no UTF-8 are damage, too: Arrow hands them out, and Python fails where they are used.

    Without Arrow's threads: a command that ends right after their start may abort (seen in 1 of 25 on a busy CPU).

    Args:
        columns: only these, in the order of the file; names that it does not have are passed over. Default: all.

    Raises:
        pyarrow.ArrowException, OSError: they are no Parquet file, or a damaged one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    table = file.read(columns=None if columns is None else list(columns), use_threads=False)
    table.validate(full=True)
    return table


def read_parquet(path: str, columns: Sequence[str] | None = None) -> "pa.Table":
    """The table of one local or remote Parquet file, see `parquet_table`.

    Raises:
        UserError: it is not there, or is none.
    """
    import pyarrow as pa

    try:
        return parquet_table(read_file(path), columns)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}", "Make it again, or name another file.") from error


def split_path(path: str) -> tuple[Folder, str]:
    """The folder and the file name of a path or URI to one file; a repository of the hub stands for its weights."""
    full = hub.file_of(absolute(path))
    parent, _, name = full.rpartition("/")
    return Folder(parent or "/"), name


def read_file(path: str) -> bytes:
    """All bytes of one local or remote file."""
    folder, name = split_path(path)
    return folder.read(name)


def local_file(path: str) -> Path:
    """`path` itself where it is local, else its copy on this machine, made once per version of the remote file.

    Copies lie in the folder that TTMRAY_COPIES names, else in ~/.cache/ttmray/copies, those of the hub in its own
    cache; nothing evicts them.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    folder, name = split_path(path)
    if not folder.remote:
        if not os.path.isfile(folder.path(name)):
            raise UserError(f"{path} is not a file.", "Check the path.")
        return Path(folder.path(name))
    if folder.hub:
        return hub.local_copy(folder.path(name))
    with explained(path):
        fs, root = folder._filesystem()
        key = patiently(path, lambda: fs.ukey(f"{root}/{safe_relative(name)}"))
        version = hashlib.sha256(f"{path} {key}".encode()).hexdigest()
    copy = Folder.at(os.environ.get("TTMRAY_COPIES") or "~/.cache/ttmray/copies").sub(version[:32])
    if not copy.exists(name):
        copy.write(name, folder.read(name))
    return Path(copy.path(name))


def _there(fs: Any, path: str) -> bool:
    """Whether the hub has a file or folder."""
    try:
        fs.info(path)
    except FileNotFoundError:
        return False
    return True


def _find(fs: Any, base: str, on_hub: bool) -> dict[str, Any]:
    """All files below a folder, none where it is not there."""
    if on_hub and not _there(fs, base):
        return {}
    return dict(fs.find(base, detail=True))


def _version(info: Mapping[str, Any]) -> str:
    """Of a remote file: its ETag, or on the hub the id of its content."""
    return str(info.get("ETag") or info.get("blob_id") or "").strip('"')


def _is_ours(name: str) -> bool:
    return not name.rsplit("/", 1)[-1].startswith(local_files.TEMPORARY_PREFIX)
