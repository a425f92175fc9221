"""What a generation run has made: a row per clip, committed after its audio file, and all rows in one table."""

import csv
import hashlib
import io
import json
import os
import shutil
import uuid
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.local_files import TEMPORARY_PREFIX
from ttmray.storage import Folder, absolute, explained, is_remote

ROWS, CLIPS = "manifest", "clips"
DIGEST = "row_sha256"
"""In the file of a row: of all else in it."""
OK, FAILED = "ok", "failed"
READERS = 16
"""Files read at the same time; object stores answer slowly, but many requests at once."""
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("prompt_id", pa.string()),
        ("candidate", pa.int32()),
        ("prompt", pa.string()),
        ("text", pa.string()),
        ("seed", pa.int64()),
        ("score", pa.float64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("file", pa.string()),
        ("sha256", pa.string()),
        ("duration_s", pa.float64()),
        ("sample_rate", pa.int32()),
        ("channels", pa.int32()),
        ("lufs", pa.float64()),
        ("true_peak_db", pa.float64()),
        ("outcome", pa.string()),
        ("reward_score", pa.float64()),
        ("clap_score", pa.float64()),
        ("protocol", pa.string()),
        ("chosen", pa.int32()),
        ("tried", pa.string()),
        ("sampler", pa.string()),
        ("weights", pa.string()),
        ("settings", pa.string()),
    ]
)


def commit(run: Folder, row: Mapping[str, Any]) -> None:
    """Write the row of a clip, with a hash of itself; its audio file must be complete."""
    whole = {**row, DIGEST: _digest(row)}
    run.write(f"{ROWS}/{row['name']}.json", json.dumps(whole, ensure_ascii=False, indent=1).encode())


def _digest(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()  # levels may be infinite


def read_rows(run: Folder, damaged: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Committed rows by the name of the clip.

    Args:
        damaged: takes the names of files that are no rows, or not as they were written; else the first one is an error.

    Raises:
        UserError: for those.
    """

    def read(name: str) -> dict[str, Any] | None:
        try:
            row: dict[str, Any] = read_json(run.read(f"{ROWS}/{name}"))
            digest = row.pop(DIGEST, None)  # older versions wrote none
            whole = digest is None or digest == _digest(row)
            if whole and row.keys() == set(SCHEMA.names) and f"{row['name']}.json" == name:
                return row
        except (ValueError, AttributeError):  # no JSON, or no object
            pass
        return None

    names = [entry.name for entry in run.files(ROWS, sizes=False)]
    with ThreadPoolExecutor(READERS) as pool:
        rows = dict(zip(names, pool.map(read, names), strict=True))
    wrong = [f"{ROWS}/{name.partition('/')[0]}" for name, row in rows.items() if row is None]
    if wrong and damaged is None:
        raise UserError(
            f"{run.path(wrong[0])} is no row of this version, or damaged.",
            "Start the command that generated the clips once more: it makes this one again.",
        )
    if damaged is not None:
        damaged += wrong
    return {row["name"]: row for row in rows.values() if row is not None}


def intact(run: Folder, rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """Names of the clips whose audio file is there and has the bytes that its row says."""
    present = {entry.name for entry in run.files(CLIPS, sizes=False)}

    def check(row: Mapping[str, Any]) -> str | None:
        if row["file"].removeprefix(f"{CLIPS}/") not in present:
            return None
        return row["name"] if hashlib.sha256(run.read(row["file"])).hexdigest() == row["sha256"] else None

    with ThreadPoolExecutor(READERS) as pool:
        return {name for name in pool.map(check, rows) if name is not None}


def merge(run: Folder, rows: Sequence[Mapping[str, Any]], note: str = "") -> None:
    """Write `manifest.parquet` and `manifest.csv` with the rows in their order.

    Args:
        note: of a bundle whose numbers mean nothing: a column of the table for people says so in every row.
    """
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], SCHEMA), sink)
    run.write("manifest.parquet", sink.getvalue())
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*SCHEMA.names, *(["note"] if note else [])], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "note": note} if note else row for row in rows)
    run.write("manifest.csv", text.getvalue().encode())


def check_zip(path: str) -> Path:
    """The local file that an archive can be written to.

    Raises:
        UserError: `path` is remote or a folder, or does not end in .zip.
    """
    target = Path(absolute(path))
    if not target.is_dir() and target.suffix.lower() != ".zip":  # a slip would replace the table of prompts
        raise UserError(f"zip: {path} does not end in .zip.", "Give a path such as submission.zip.")
    if is_remote(path) or target.is_dir():
        raise UserError(f"zip: {path} is not a local file.", "Give a path such as submission.zip.")
    return target


def write_zip(run: Folder, rows: Iterable[Mapping[str, Any]], path: str) -> int:
    """Archive of the audio files, flat and sorted by name; returns their number. The same clips give the same bytes.

    Raises:
        UserError: `path` is no local file.
    """
    target = check_zip(path)
    files = sorted(row["file"] for row in rows)
    zip_files(run, {name: name.removeprefix(f"{CLIPS}/") for name in files}, target)
    return len(files)


def zip_files(folder: Folder, names: Mapping[str, str], target: Path) -> None:
    """Files of a folder as one archive, whole or not there; the same files give the same bytes.

    Args:
        names: of the files below the folder -> in the archive, in its order.

    Raises:
        UserError: the archive cannot be written.
    """
    temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    with explained(f"zip {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with zipfile.ZipFile(temporary, "w") as archive:  # stored: deflate differs between versions of zlib
                for name, inside in names.items():
                    entry = zipfile.ZipInfo(inside, date_time=(1980, 1, 1, 0, 0, 0))
                    entry.create_system, entry.external_attr = 3, 0o644 << 16
                    with folder.open(name) as source, archive.open(entry, "w") as member:
                        shutil.copyfileobj(source, member)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
