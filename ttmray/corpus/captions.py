"""Reading the tables that users have, and joining captions to tracks.

A table is CSV, TSV, a JSON list of objects, JSON lines or Parquet; text formats may be gzipped. Header
names are not case-sensitive. Captions change in white space only: runs of it, tabs and newlines included,
become one space, because captions travel in tab-separated files later.
"""

import csv
import gzip
import io
import json
import posixpath
import re
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ttmray.corpus.track import Track
from ttmray.errors import UserError
from ttmray.storage import Folder, read_file

TABLE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
COLUMNS = {
    "path": ("path",),
    "track_id": ("track_id", "id"),
    "artist_id": ("artist_id",),
    "album_id": ("album_id",),
    "caption": ("caption",),
    "duration_s": ("duration_s", "duration"),
}
"""Columns that are read, each with the header names that it goes by."""
_EXTENSION = re.compile(
    r"(?<=[^/])\.(wave?|flac|mp[1-4]|og[ga]|opus|m4a|aac|wma|aif[fc]?|au|snd|caf|w64|rf64|wv|ape|midi?|webm|np[yz]|pt|json"
    r"|txt|csv|lab)$",
    re.IGNORECASE,
)
_SEPARATORS = ",;\t|"


@dataclass(frozen=True)
class Table:
    """The known columns of a table, in file order.

    Attributes:
        source: path or URI of the file.
        columns: cells by canonical name (`COLUMNS`); text, numbers or None.
        header: all header names as they are in the file.
        places: number of each row in the file, counted from 1: lines of text, items of JSON, rows of Parquet.
        place_word: "line", "item" or "row".
    """

    source: str
    columns: dict[str, list[Any]]
    header: list[str]
    places: Sequence[int]
    place_word: str

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def row_name(self, row: int) -> str:
        """What to call a row in a message, e.g. "line 7"."""
        return f"{self.place_word} {self.places[row]}"

    def place(self, row: int) -> str:
        """File and row, for people."""
        return f"{self.source}, {self.row_name(row)}"

    def texts(self, column: str) -> list[str]:
        """A column as text, "" where it is empty or absent.

        Raises:
            UserError: for cells that are neither text nor an integer, and for lone surrogates.
        """
        cells = self.columns.get(column)
        if cells is None:
            return [""] * len(self)
        return [
            cell if type(cell) is str and cell.isascii() else self._text(row, cell) for row, cell in enumerate(cells)
        ]

    def _text(self, row: int, cell: Any) -> str:
        if cell is None:
            return ""
        if isinstance(cell, bool) or not isinstance(cell, str | int):
            raise UserError(f"{self.place(row)}: {cell!r} is a {type(cell).__name__}, not text.", "Write text there.")
        text = str(cell)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{self.place(row)}: {text!r} is not valid Unicode.", "Write the file as UTF-8.") from error
        return text


def is_table(path: str) -> bool:
    """True where the name says table: .csv, .tsv, .json, .jsonl (each also with .gz) or .parquet."""
    name = path.lower()
    return name.endswith(TABLE_SUFFIXES) or (name.endswith(".gz") and name[:-3].endswith(TABLE_SUFFIXES[:-1]))


def read_table(source: str) -> Table:
    """Read a table of tracks or captions.

    A row may be longer than the header only where the last column is called TAGS, as in the TSV files of
    MTG-Jamendo; elsewhere an additional cell is an unquoted separator in some text.

    Raises:
        UserError: when the file is absent, of unknown format, damaged or not UTF-8, naming the line where
            there is one.
    """
    if not is_table(source):
        raise UserError(f"{source} is not a table.", f"Known: {', '.join(TABLE_SUFFIXES)}; text also as .gz.")
    data, name = read_file(source), source.lower()
    if name.endswith(".gz"):
        try:
            data, name = gzip.decompress(data), name[:-3]
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{source} is not a whole gzip file: {error}", "Download it again.") from error
    if name.endswith(".parquet"):
        return _read_parquet(source, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{source}, line {line}: not UTF-8 ({error.reason}).", "Save it as UTF-8.") from error
    if name.endswith((".json", ".jsonl")):
        return _read_json(source, text, lines=name.endswith(".jsonl"))
    known = {alias for aliases in COLUMNS.values() for alias in aliases}
    return _read_delimited(source, text, delimiter(text, "\t" if name.endswith(".tsv") else ",", known))


def load_captions(source: str) -> dict[str, str]:
    """Captions of a table file; see `captions_of`."""
    return captions_of(read_table(source))


def captions_of(table: Table) -> dict[str, str]:
    """Captions by track: keys are paths without extension, or track ids in a table without paths.

    Rows without a caption are skipped. `join` takes the last part of a key, the stem, for the track id and
    looks at folders only where stems are not unique.

    Raises:
        UserError: without a caption column, without path and id columns, and for two different captions of
            one track.
    """
    if "caption" not in table.columns or not {"path", "track_id"} & table.columns.keys():
        raise UserError(
            f"{table.source} has the columns {', '.join(table.header) or '(none)'}: no captions.",
            "A caption table needs `caption`, and `path` or `track_id`.",
        )
    captions: dict[str, str] = {}
    first: dict[str, int] = {}
    columns = (table.texts("path"), table.texts("track_id"), table.texts("caption"))
    for row, (path, track_id, raw) in enumerate(zip(*columns, strict=True)):
        caption = " ".join(raw.split())
        if not caption:
            continue
        key = without_extension(forward(path)) if path else track_id
        if not key:
            raise UserError(f"{table.place(row)}: a caption without path or id.", "Fill it or remove the row.")
        if captions.setdefault(key, caption) != caption:
            raise UserError(
                f"{table.place(row)}: {key!r} has another caption in {table.row_name(first[key])}.",
                "Keep one of the two.",
            )
        first.setdefault(key, row)
    return captions


def find_captions(folder: Folder, names: Iterable[str]) -> tuple[Table | None, list[str]]:
    """The caption table that lies at the root of a folder of songs, for `catalogue.captions: auto`.

    `captions.*` comes before `tracks.*`; a table without the needed columns is passed over.

    Args:
        names: the files of the folder, as listed; only those at its root are looked at.

    Returns:
        The table, and what to tell of tables called `captions.*` that have none.
    """
    passed: list[str] = []
    tables = {name.lower(): name for name in names if "/" not in name and is_table(name)}
    suffixes = [suffix + gz for suffix in TABLE_SUFFIXES for gz in ("", ".gz")]
    for stem, name in [(stem, stem + suffix) for stem in ("captions", "tracks") for suffix in suffixes]:
        if name in tables:
            table = read_table(folder.path(tables[name]))
            if "caption" in table.columns and {"path", "track_id"} & table.columns.keys():
                return table, passed
            if stem == "captions":
                header = ", ".join(table.header) or "no columns"
                passed.append(
                    f"{table.source} is not used: it has {header}, but not `caption` and `path` or `track_id`"
                )
    return None, passed


def join(tracks: Sequence[Track], captions: dict[str, str]) -> tuple[list[Track], dict[str, int]]:
    """Give every track its caption, by file stem.

    Tables may name paths with other leading folders and another extension than the audio has. Where several
    tracks or captions have one stem, equal paths, else the longest common end of the paths decides; what is
    ambiguous even then stays without caption and is counted.

    Returns:
        The tracks in the same order, and the counts `captions_matched` (tracks), `tracks_without_caption`,
        `captions_unmatched` and `captions_ambiguous` (tracks).
    """
    keys, names = list(captions), [without_extension(track.path) for track in tracks]
    keys_by_end, names_by_end = _by_end(keys), _by_end(names)
    names_of_key = [{names[i] for i in _best(names, names_by_end, key)} for key in keys]
    joined: list[Track] = []
    used: set[str] = set()
    ambiguous = 0
    for track, name in zip(tracks, names, strict=True):
        mutual = [k for k in _best(keys, keys_by_end, name) if name in names_of_key[k]]
        found = {captions[keys[k]] for k in mutual}
        caption = ""
        if len(found) == 1 and all(len(names_of_key[k]) == 1 for k in mutual):
            caption = found.pop()
            used.update(keys[k] for k in mutual)
        elif mutual:
            ambiguous += 1
        elif track.track_id in captions:
            caption = captions[track.track_id]
            used.add(track.track_id)
        joined.append(replace(track, caption=caption) if caption != track.caption else track)
    without = sum(not track.caption for track in joined)
    return joined, {
        "captions_matched": len(joined) - without,
        "tracks_without_caption": without,
        "captions_unmatched": len(captions) - len(used),
        "captions_ambiguous": ambiguous,
    }


def without_extension(path: str) -> str:
    """`path` without the file extension of sound or of what is kept beside it: `Op. 9 No. 2` keeps its dots."""
    return _EXTENSION.sub("", path)


def forward(path: str) -> str:
    """A path of a table as names below a folder: Windows' separators turned, and without a leading `./`."""
    return path.replace("\\", "/").removeprefix("./")


def _by_end(paths: Sequence[str]) -> dict[str, list[int]]:
    """Positions of paths by each of their ends: `a/b/c` is found under `c`, `b/c` and `a/b/c`."""
    index: dict[str, list[int]] = {}
    for position, path in enumerate(paths):
        end = posixpath.basename(path)
        while True:
            index.setdefault(end, []).append(position)
            if len(end) == len(path):
                break
            end = path[path.rfind("/", 0, len(path) - len(end) - 1) + 1 :]
    return index


def _best(paths: Sequence[str], index: dict[str, list[int]], path: str) -> list[int]:
    """Positions of the paths equal to `path`, else of those that share the longest end with it, if any."""
    equal = [position for position in index.get(path, []) if paths[position] == path]
    if equal:
        return equal
    while True:
        if path in index:
            return index[path]
        _, slash, path = path.partition("/")
        if not slash:
            return []


def delimiter(text: str, usual: str, known: Collection[str]) -> str:
    """The separator under which the header has most columns that are known; spreadsheets of some countries write `;`.

    Args:
        text: of the table.
        usual: what its name lets expect, and what holds where others are no better.
        known: names of columns in lower case.
    """
    header = text.partition("\n")[0]

    def columns(separator: str) -> int:
        return sum(cell.strip().strip('"').lower() in known for cell in header.split(separator))

    return max(usual + _SEPARATORS, key=columns)  # the first of equals


def _read_delimited(source: str, text: str, delimiter: str) -> Table:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        header = next(reader, [])
        width, ragged = len(header), bool(header) and header[-1].strip().lower() == "tags"
        for row in reader:
            if len(row) != width:
                if not row:
                    continue
                if not ragged or len(row) < width - 1:
                    raise UserError(
                        f"{source}, line {reader.line_num}: {len(row)} cells, but the header has {width}.",
                        "Put text that holds the separator in double quotes.",
                    )
                row = [*row[:width], ""][:width]
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise UserError(
            f"{source}, line {reader.line_num}: {error}.", "Inside a quoted cell, double the quotation marks."
        ) from error
    cells = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in header]
    return _table(source, header, dict(zip(range(width), cells, strict=True)), lines, "line")


def _read_json(source: str, text: str, lines: bool) -> Table:
    places: Sequence[int]
    try:
        if lines:
            numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
            places, items = [number for number, _ in numbered], []
            for number, line in numbered:
                try:
                    items.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise UserError(f"{source}, line {number}: not JSON ({error}).", "One object per line.") from error
        else:
            items = json.loads(text)
            places = range(1, len(items) + 1) if isinstance(items, list) else []
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not valid JSON: {error}", "Check it near that place.") from error
    word = "line" if lines else "item"
    if not isinstance(items, list):
        raise UserError(f"{source} holds a {type(items).__name__}, not a list of objects.", "Write [{...}, {...}].")
    for place, item in zip(places, items, strict=True):
        if not isinstance(item, dict):
            raise UserError(f"{source}, {word} {place}: not an object.", 'Write {"path": ..., "caption": ...}.')
    header = list(dict.fromkeys(key for item in items for key in item))
    cells = {position: [item.get(key) for item in items] for position, key in enumerate(header)}
    return _table(source, header, cells, places, word)


def _read_parquet(source: str, data: bytes) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = {alias for aliases in COLUMNS.values() for alias in aliases}
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        header = list(file.schema_arrow.names)
        wanted = [position for position, name in enumerate(header) if name.strip().lower() in known]
        read = file.read(columns=[header[position] for position in wanted])
        cells = {position: read.column(header[position]).to_pylist() for position in wanted}
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{source} is not a readable Parquet file: {error}", "Write it again.") from error
    return _table(source, header, cells, range(1, file.metadata.num_rows + 1), "row")


def _table(
    source: str, header: Sequence[str], cells: dict[int, list[Any]], places: Sequence[int], place_word: str
) -> Table:
    """Pick the known columns; of two names for one column the first in `COLUMNS` counts."""
    positions: dict[str, int] = {}
    for position, name in enumerate(header):
        plain = name.strip().lower()
        if plain in positions and any(plain in aliases for aliases in COLUMNS.values()):
            raise UserError(f"{source} has two columns called {plain!r}.", "Rename one of them.")
        positions[plain] = position
    columns = {}
    for canonical, aliases in COLUMNS.items():
        found = [alias for alias in aliases if alias in positions]
        if found:
            columns[canonical] = cells[positions[found[0]]]
    return Table(source, columns, [name.strip() for name in header], places, place_word)
