"""What a job has computed so far, as Parquet files named by what is in them.

A part is written whole when all its members are done and never changed. It says what made it (models, protocol, the way
of reading), and parts of other makers in the same folder are passed over. So the same command goes on where it was
killed, and what was added is all that is computed. `models/cache.py` is for embeddings of single clips that several
jobs share within a bound of bytes.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ttmray.config import fingerprint
from ttmray.errors import UserError
from ttmray.storage import Folder, parquet_table, split_path

MADE_BY = "ttmray.made_by"
READERS = 16
Rows = TypeVar("Rows")


def digests(paths: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Path -> SHA-256 of the file, and path -> reason where it cannot be read; read side by side."""

    def one(path: str) -> tuple[str, str]:
        try:
            folder, name = split_path(path)
            return hashlib.sha256(folder.read(name)).hexdigest(), ""
        except UserError as error:
            return "", error.message

    with ThreadPoolExecutor(READERS) as pool:
        results = dict(zip(paths, pool.map(one, paths), strict=True))
    known = {path: digest for path, (digest, _) in results.items() if digest}
    return known, {path: reason for path, (digest, reason) in results.items() if not digest}


def write_part(folder: Folder, prefix: str, table: pa.Table, made_by: str, members: Any, **about: str) -> None:
    """Write a part.

    Args:
        prefix: of its name, with the folder that parts are in.
        members: plain data that tells this part from others by the same maker.
        about: more metadata, under `ttmray.`.
    """
    metadata = {MADE_BY: made_by} | {f"ttmray.{name}": value for name, value in about.items()}
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), buffer, compression="none")
    folder.write(f"{prefix}{fingerprint([made_by, *members])[:16]}.parquet", buffer.getvalue())


def read_parts(folder: Folder, place: str, made_by: str, parse: Callable[[pa.Table], Rows]) -> Iterator[Rows]:
    """What `parse` makes of every part in a folder that was made in the same way.

    Raises:
        UserError: a damaged part.
    """
    for entry in folder.files(place, sizes=False):
        name = f"{place}/{entry.name}"
        try:
            table = parquet_table(folder.read(name))
            if table.schema.metadata[MADE_BY.encode()] != made_by.encode():
                continue
            rows = parse(table)
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder.path(name)} is damaged: {error}", "Delete it: it is then made again.") from error
        yield rows
