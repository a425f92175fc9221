"""The index: one row per clip (or per track that gave no clip), one Parquet file per unit.

A unit's index file is written last and never replaced: that it exists *is* the commit. Its Parquet metadata
carries what belongs to the unit as a whole: file names, hashes and latent sums.
"""

import hashlib
import io
import json
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ttmray.corpus.unit import OK
from ttmray.errors import UserError
from ttmray.inventory import entry
from ttmray.json_text import read_json
from ttmray.storage import Folder, explained, parquet_table

INDEX = "index"
MERGED = "index.parquet"
METADATA_KEY = b"ttmray.unit"
DIGEST_KEY = b"ttmray.unit.sha256"
"""Of what stands under `METADATA_KEY`."""
BLOCK = 64
"""Units whose rows are joined at once."""
GROUP_ROWS = 1 << 15
"""Rows of a group of the merged index, or a few more."""
_PARQUET: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}

SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # <track_id>_<segment>; the track id alone where there is no clip
        ("status", pa.string()),  # ok | rejected | failed
        ("stage", pa.string()),  # the last stage that the row reached
        ("reason", pa.string()),  # countable slug, empty for ok rows
        ("message", pa.string()),  # details of the reason
        ("track_id", pa.string()),
        ("segment", pa.int32()),  # 0.. in order; -1 where there is no clip
        ("start_s", pa.float64()),
        (
            "duration_s",
            pa.float64(),
        ),  # audio that the clip really holds; the rest up to the clip length is zeros
        ("split", pa.string()),
        ("caption", pa.string()),
        ("caption_id", pa.string()),
        ("source", pa.string()),  # path relative to the input
        ("sha256", pa.string()),  # of the source file's bytes
        ("sample_rate", pa.int32()),  # of the source
        ("channels", pa.int32()),  # of the source
        ("lufs", pa.float64()),  # ITU-R BS.1770-4 integrated loudness of the mix
        ("true_peak_db", pa.float64()),  # dBTP of the mix, 4x oversampled
        ("silence", pa.float64()),  # share of 100 ms frames below -60 dBFS RMS, 0..1
        ("vocal_ratio", pa.float64()),  # energy of vocals over energy of the mix
        ("reward_score", pa.float64()),  # TuneJury on the mix
        ("instrumental_reward_score", pa.float64()),  # TuneJury on the instrumental
        ("track_reward_score", pa.float64()),  # mean of reward_score over the track's ok clips
        ("clap_score", pa.float64()),  # cosine of caption and mix; null without a caption
        ("instrumental_clap_score", pa.float64()),  # cosine of caption and instrumental
        ("shard", pa.string()),  # path below the run folder
        ("unit", pa.string()),
        ("protocol", pa.string()),  # how the scores were made
        ("latent_mean_at", pa.int64()),  # byte of the shard at which the numbers of the member start
        ("latent_std_at", pa.int64()),
        ("latent_frames", pa.int32()),
        ("latent_channels", pa.int32()),
        ("caption_file", pa.string()),  # with the caption's text features; path below the run folder
        ("caption_t5_at", pa.int64()),  # byte of that file at which the numbers start
        ("caption_clap_at", pa.int64()),
        ("caption_tokens", pa.int32()),
        ("caption_width", pa.int32()),
    ]
)
LATENT_PLACES = ("latent_mean_at", "latent_std_at", "latent_frames", "latent_channels")
TEXT_PLACES = ("caption_file", "caption_t5_at", "caption_clap_at", "caption_tokens", "caption_width")
"""Null in units' files: the features of a caption lie with the unit that is the first to hold it, which may be
committed later. `with_text_places` fills them in."""
PLACES = (*LATENT_PLACES, *TEXT_PLACES)
"""Columns that the index of runs by older versions does not have: `ttmray corpus upgrade` adds them."""


def new_row(track: dict[str, Any], unit: str, protocol: str) -> dict[str, Any]:
    """A row of `track` with everything that the plan knows; the rest is None until a stage fills it."""
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
    row.update(
        key=track["track_id"],
        status=OK,
        stage="plan",
        reason="",
        message="",
        track_id=track["track_id"],
        segment=-1,
        split=track["split"],
        caption=track["caption"],
        caption_id=track["caption_id"],
        source=track["path"],
        unit=unit,
        protocol=protocol,
    )
    return row


def to_bytes(
    rows: list[dict[str, Any]], metadata: dict[str, Any], columns: Mapping[str, pa.DataType] | None = None
) -> bytes:
    """Rows as a Parquet file. The same rows give the same bytes (with one version of pyarrow).

    Args:
        columns: beside those of `SCHEMA`.
    """
    for row in rows:
        for name, value in row.items():
            if isinstance(value, float) and math.isnan(value):
                raise AssertionError(f"{row['key']}: {name} is NaN; a stage must quarantine such a clip")
    table = pa.Table.from_pylist(rows, schema=pa.schema([*SCHEMA, *(columns or {}).items()]))
    if columns:
        metadata = metadata | {"columns": sorted(columns)}
    text = json.dumps(metadata, sort_keys=True).encode()
    # a unit has a few rows: nobody skips any by statistics, which no checksum covers
    return parquet_bytes(table.replace_schema_metadata({METADATA_KEY: text, DIGEST_KEY: _digest(text)}), False)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


def parquet_bytes(table: pa.Table, statistics: bool = True) -> bytes:
    """A table as the bytes of an index file, whose pages have checksums: a changed byte never gives other numbers."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, write_statistics=statistics, **_PARQUET)
    return buffer.getvalue()


def from_bytes(data: bytes, name: str) -> tuple[pa.Table, dict[str, Any]]:
    """Rows and unit metadata of an index file.

    Raises:
        UserError: when the bytes are no index file of ours.
    """
    table = _table(data, name)
    try:
        text = table.schema.metadata[METADATA_KEY]
        # checksums of pages do not cover it; older versions wrote none
        if table.schema.metadata.get(DIGEST_KEY, _digest(text)) != _digest(text):
            raise ValueError("what it says of its unit is damaged")
        metadata = read_json(text)
        for file, facts in metadata["files"].items():
            if not {"bytes", "sha256", "captions" if file.startswith("captions/") else "clips"} <= facts.keys():
                raise ValueError(f"it does not describe {file}")
        foreign = sorted(set(table.column_names) - set(SCHEMA.names))
        if foreign != metadata.get("columns", []):
            raise ValueError(f"nobody wrote the columns {', '.join(foreign)}")
        return table.replace_schema_metadata(None), metadata
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(name, error) from error


def _table(data: bytes, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of an index file, by default all, first those of `SCHEMA`. Those of `PLACES` are null where an older
    version wrote it."""
    try:
        return _columns(parquet_table(data, columns), columns)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise _unreadable(name, error) from error


def _columns(table: pa.Table, columns: Sequence[str] | None) -> pa.Table:
    for column in PLACES:
        if column in (columns or PLACES) and column not in table.column_names:
            nulls = pa.nulls(table.num_rows, SCHEMA.field(column).type)
            table = table.append_column(SCHEMA.field(column), nulls)
    if columns is None:
        columns = [*SCHEMA.names, *(name for name in table.column_names if name not in SCHEMA.names)]
    table = table.select(columns)
    for field in table.schema:  # a damaged footer may call text bytes
        if field.name in SCHEMA.names and field.type != SCHEMA.field(field.name).type:
            raise ValueError(f"column {field.name} is {field.type}, not {SCHEMA.field(field.name).type}")
    return table


def _unreadable(name: str, error: Exception) -> UserError:
    return UserError(
        f"{name} is not a readable index file: {error}",
        "Delete it and start the same command again: what it described is then made once more.",
    )


def committed_units(run: Folder) -> list[str]:
    """Names of the units whose index file exists."""
    return [
        entry.name.removesuffix(".parquet")
        for entry in run.files(INDEX, sizes=False)
        if entry.name.endswith(".parquet")
    ]


def read_units(run: Folder, units: list[str]) -> list[tuple[pa.Table, dict[str, Any]]]:
    """Index rows and metadata of some units, in the given order; files are read by 16 threads.

    The metadata also has `name`, that of the unit, and `entry`: size and SHA-256 of the index file itself.
    """
    from concurrent.futures import ThreadPoolExecutor

    def one(unit: str) -> tuple[pa.Table, dict[str, Any]]:
        name = f"{INDEX}/{unit}.parquet"
        data = run.read(name, small=True)
        rows, metadata = from_bytes(data, run.path(name))
        return rows, metadata | {"name": unit, "entry": entry(data)}

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, units))


def blocks(run: Folder, units: Sequence[str]) -> Iterator[tuple[pa.Table, list[dict[str, Any]]]]:
    """Index rows of some units, in the given order and a block of units at a time, and what `read_units` says beside.

    Thousands of tables of some rows would take ten times the memory of the rows.
    """
    for start in range(0, len(units), BLOCK):
        tables, metadata = zip(*read_units(run, list(units[start : start + BLOCK])), strict=True)
        yield pa.concat_tables(tables).combine_chunks(), list(metadata)


def read_together(run: Folder, units: Sequence[str]) -> tuple[pa.Table, list[dict[str, Any]]]:
    """`blocks` as one table, and what `read_units` says of all units."""
    tables, metadata = list[pa.Table](), list[dict[str, Any]]()
    for rows, of_units in blocks(run, units):
        tables.append(rows)
        metadata += of_units
    return pa.concat_tables(tables) if tables else SCHEMA.empty_table(), metadata


class Merging:
    """The merged index in the making: it takes rows as they come, and memory for their compressed bytes."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []

    def add(self, rows: pa.Table) -> None:
        self._waiting.append(rows)
        if sum(table.num_rows for table in self._waiting) >= GROUP_ROWS:
            self._write()

    def _write(self) -> None:
        rows = pa.concat_tables(self._waiting).combine_chunks()
        self._waiting = []
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._buffer, rows.schema, **_PARQUET)
        self._writer.write_table(rows)

    def bytes(self) -> bytes:
        """The file of all rows; nothing can be added afterwards."""
        if self._waiting or self._writer is None:
            self._waiting = self._waiting or [SCHEMA.empty_table()]
            self._write()
        assert self._writer is not None
        self._writer.close()
        return self._buffer.getvalue()


def read_index(run: Folder, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows that are committed so far: those of the merged file of a finished run, else of the units' files.

    Args:
        columns: only these; default: all, those of `SCHEMA` first.
    """
    if run.exists(MERGED):
        return read_merged(run, columns)
    rows, metadata = read_together(run, committed_units(run))
    return with_text_places(rows, metadata).select(columns or rows.column_names)


def read_merged(run: Folder, columns: Sequence[str] | None = None) -> pa.Table:
    """The merged index of a finished run; only some of its columns where they are named.

    Raises:
        UserError: when it is missing or damaged.
    """
    return _table(run.read(MERGED), run.path(MERGED), columns)


class MergedRows:
    """The merged index of a finished run, read in order and in parts.

    Raises:
        UserError: when it is missing or damaged, here or in `take`.
    """

    def __init__(self, run: Folder) -> None:
        self._name = run.path(MERGED)
        self._source = run.open(MERGED)
        with self._readable():
            self._file = pq.ParquetFile(self._source, page_checksum_verification=True)
            self._batches = self._file.iter_batches(GROUP_ROWS, use_threads=False)
        self._waiting = list[pa.Table]()

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            with explained(self._name):
                yield
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise _unreadable(self._name, error) from error

    def take(self, count: int, columns: Sequence[str]) -> pa.Table:
        """The next rows, fewer at the end: as `read_merged` gives them."""
        with self._readable():
            while sum(part.num_rows for part in self._waiting) < count:
                batch = next(self._batches, None)
                if batch is None:
                    break
                self._waiting.append(pa.Table.from_batches([batch]))
            rows = pa.concat_tables(self._waiting) if self._waiting else self._file.schema_arrow.empty_table()
            self._waiting = [rows.slice(count)] if rows.num_rows > count else []
            taken = _columns(rows.slice(0, count).combine_chunks(), columns)
            taken.validate(full=True)  # as `parquet_table` does of whole files
            return taken

    def close(self) -> None:
        self._source.close()


def with_text_places(rows: pa.Table, metadata: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows with `TEXT_PLACES` of their captions; null where no unit holds one.

    Args:
        metadata: of all units that are committed.
    """
    places = TextPlaces()
    for unit in metadata:
        places.note(unit["files"])
    return places.fill(rows)


class TextPlaces:
    """Where the text features of captions lie, of the units so far. Rows need those of units up to their own: the
    first one that holds a caption of a usable track has its features."""

    def __init__(self) -> None:
        self._of: dict[str, int] = {}
        self._files: list[str] = []
        self._numbers = array("q")  # per caption: position of the file, then as in TEXT_PLACES

    def note(self, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Take the places of captions from what is said of a unit's files."""
        for name, facts in files.items():
            if places := facts.get("places"):
                self._files.append(name)
                for caption_id, (t5, clap) in places.items():
                    if caption_id not in self._of:
                        self._of[caption_id] = len(self._of)
                        self._numbers.extend((len(self._files) - 1, t5, clap, *facts["shape"]))

    def fill(self, rows: pa.Table) -> pa.Table:
        """Rows with `TEXT_PLACES`; null where no unit so far holds the caption."""
        captions = rows["caption_id"].combine_chunks().dictionary_encode()
        known = [self._of.get(caption) for caption in captions.dictionary.to_pylist()]
        width = len(TEXT_PLACES)
        for number, column in enumerate(TEXT_PLACES):
            field = SCHEMA.field(column)
            cells: list[Any] = [None if at is None else self._numbers[at * width + number] for at in known]
            if not number:
                cells = [None if cell is None else self._files[cell] for cell in cells]
            values = pa.array(cells, field.type).take(captions.indices)
            rows = rows.set_column(rows.schema.get_field_index(column), field, values)
        return rows


def latent_sums(mean: np.ndarray, std: np.ndarray) -> dict[str, Any]:
    """Per-channel sums from which latent statistics follow without reading shards again.

    Args:
        mean, std: posterior (clips, frames, channels), as stored (float16).
    """
    mean64, std64 = mean.astype(np.float64), std.astype(np.float64)
    axes = (0, 1)
    return {
        "count": int(mean.shape[0] * mean.shape[1]),
        "sum": mean64.sum(axes).tolist(),
        "sum_of_squares": (mean64**2).sum(axes).tolist(),
        "sum_of_variances": (std64**2).sum(axes).tolist(),
    }
