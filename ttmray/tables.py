"""Tables that users have: captions, tracks, prompts, votes, scores, clip keys.

A table is CSV, TSV, a JSON list of objects, JSON lines or Parquet; all but Parquet may be gzipped. Names of columns are
not case-sensitive.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.storage import parquet_table, read_file

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
READERS: dict[str, Callable[[str], list[dict[str, Any]]]] = {}
"""Further formats of text, by their suffix with its dot: a function from the text of a file to its rows, cells by
column. It raises ValueError where the text is not of that format. A program of one's own adds to it."""
_SEPARATORS = ",;\t|"


@dataclass(frozen=True)
class Table:
    """Columns of a table, in file order.

    Attributes:
        source: path or URI of the file.
        columns: cells by name in lower case; text, numbers or what else JSON and Parquet hold, None where a row has
            nothing.
        header: all names of columns as they are in the file.
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

    def rows(self) -> Iterator[dict[str, Any]]:
        """Cells of each row by name, without those that are None."""
        if not self.columns:  # there are rows all the same
            yield from ({} for _ in self.places)
        for cells in zip(*self.columns.values(), strict=True):
            yield {name: cell for name, cell in zip(self.columns, cells, strict=True) if cell is not None}

    def named(self, aliases: Mapping[str, Sequence[str]]) -> "Table":
        """Columns by other names: each by the key of its aliases, of which the first that is there counts."""
        first = {
            name: next((alias for alias in others if alias in self.columns), None) for name, others in aliases.items()
        }
        return replace(self, columns={name: self.columns[alias] for name, alias in first.items() if alias is not None})

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
    texts = (*SUFFIXES[:-1], *READERS)
    return name.endswith((*texts, SUFFIXES[-1])) or (name.endswith(".gz") and name[:-3].endswith(texts))


def read_table(source: str, known: Collection[str], only_known: bool = False) -> Table:
    """The table in a file; see `parse_table`.

    Raises:
        UserError: no table by its name, or one that cannot be read.
    """
    if not is_table(source):
        raise UserError(f"{source} is not a table.", f"Known: {', '.join((*SUFFIXES, *READERS))}; text also as .gz.")
    return parse_table(source, read_file(source), known, only_known)


def parse_table(
    source: str, data: bytes, known: Collection[str], only_known: bool = False, *, short: bool = False, bare: str = ""
) -> Table:
    """The table in the bytes of a file.

    A row may be longer than the header only where the last column is called TAGS, as in the TSV files of
    MTG-Jamendo; elsewhere an additional cell is an unquoted separator in some text.

    Args:
        source: name of the file, which says the format (`is_table`).
        known: names of columns in lower case that the reader looks for. They tell the separator of a CSV file, and none
            of them may be there twice.
        only_known: leave out all other columns; Parquet then reads no more than those.
        short: rows of text may have fewer cells than the header; the others are "".
        bare: column of JSON items that are no objects; "" refuses them.

    Raises:
        UserError: damaged or not UTF-8, naming the line where there is one; other numbers of cells than the header's;
            a known column twice.
    """
    name = source.lower()
    if name.endswith(".gz"):
        try:
            data, name = gzip.decompress(data), name[:-3]
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{source} is not a whole gzip file: {error}", "Download it again.") from error
    if name.endswith(".parquet"):
        return _parquet(source, data, known, only_known)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{source} cannot be read: line {line}: not UTF-8 ({error.reason}).", "Save it as UTF-8."
        ) from error
    own = next((reader for suffix, reader in READERS.items() if name.endswith(suffix)), None)
    if own is not None:
        table = _own(source, text, own, known)
    elif name.endswith((".json", ".jsonl")):
        table = _json(source, text, name.endswith(".jsonl"), bare, known)
    else:
        table = _delimited(source, text, delimiter(text, "\t" if name.endswith(".tsv") else ",", known), short, known)
    if only_known:
        return replace(table, columns={name: cells for name, cells in table.columns.items() if name in known})
    return table


def read_rows(source: str, known: Collection[str]) -> list[tuple[str, dict[str, Any]]]:
    """(place, cells by lower-case column name) of every row of a table; the place is for messages and counts rows.

    Raises:
        UserError: as `read_table`.
    """
    table = read_table(source, known)
    word = "row" if is_delimited(source) else table.place_word
    return [(f"{source}, {word} {number}", row) for number, row in enumerate(table.rows(), 1)]


def is_delimited(path: str) -> bool:
    """True for names of CSV and TSV files."""
    return path.lower().removesuffix(".gz").endswith((".csv", ".tsv"))


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


def _delimited(source: str, text: str, delimiter: str, short: bool, known: Collection[str]) -> Table:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        header = next(reader, [])
        width, tags = len(header), bool(header) and header[-1].strip().lower() == "tags"
        for row in reader:
            if len(row) != width:
                if not row:
                    continue
                if len(row) > width and not tags:
                    raise _other_width(source, reader.line_num, len(row), width, "more")
                if len(row) < width and not short and not (tags and len(row) == width - 1):
                    raise _other_width(source, reader.line_num, len(row), width, "fewer")
                row = [*row[:width], *[""] * (width - len(row))]
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise UserError(
            f"{source}, line {reader.line_num}: {error}.", "Inside a quoted cell, double the quotation marks."
        ) from error
    cells = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in header]
    return _table(source, header, cells, lines, "line", known)


def _other_width(source: str, line: int, cells: int, width: int, word: str) -> UserError:
    return UserError(
        f"{source}, line {line}: {cells} cells, {word} cells than the header (number of cells: {width}).",
        "Put text that holds the separator in double quotes.",
    )


def _own(source: str, text: str, reader: Callable[[str], list[dict[str, Any]]], known: Collection[str]) -> Table:
    try:
        rows = reader(text)
    except ValueError as error:
        raise UserError(f"{source} cannot be read: {error}", "Look at the place that is named.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{source} holds no list of rows.", "A reader of tables returns a list of dictionaries.")
    header = list(dict.fromkeys(str(key) for row in rows for key in row))
    cells = [[row.get(key) for row in rows] for key in header]
    return _table(source, header, cells, range(1, len(rows) + 1), "row", known)


def _json(source: str, text: str, lines: bool, bare: str, known: Collection[str]) -> Table:
    places: Sequence[int] = []
    at = ""
    try:
        if lines:
            numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
            places, items = [number for number, _ in numbered], []
            for number, line in numbered:
                at = f"line {number}: "
                items.append(read_json(line))
        else:
            items = read_json(text)
            places = range(1, len(items) + 1) if isinstance(items, list) else []
    except ValueError as error:
        raise UserError(
            f"{source} is not valid JSON and cannot be read: {at}{error}", "Check brackets and quotes near that place."
        ) from error
    word = "line" if lines else "item"
    if not isinstance(items, list):
        raise UserError(f"{source} holds a {type(items).__name__}, not a list of objects.", "Write [{...}, {...}].")
    if bare:
        items = [item if isinstance(item, dict) else {bare: item} for item in items]
    for place, item in zip(places, items, strict=True):
        if not isinstance(item, dict):
            raise UserError(
                f"{source}, {word} {place}: not an object, but a table is a list of objects.", "Write {...} there."
            )
    header = list(dict.fromkeys(key for item in items for key in item))
    return _table(source, header, [[item.get(key) for item in items] for key in header], places, word, known)


def _parquet(source: str, data: bytes, known: Collection[str], only_known: bool) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        header = list(pq.read_schema(pa.BufferReader(data)).names)
        chosen = [name for name in header if not only_known or name.strip().lower() in known]
        table = parquet_table(data, chosen if only_known else None)
        cells = [table.column(name).to_pylist() for name in dict.fromkeys(chosen)]
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise UserError(f"{source} cannot be read as Parquet: {error}", "Write it again.") from error
    return replace(
        _table(source, list(dict.fromkeys(chosen)), cells, range(1, table.num_rows + 1), "row", known), header=header
    )


def _table(
    source: str,
    header: Sequence[str],
    cells: Sequence[list[Any]],
    places: Sequence[int],
    place_word: str,
    known: Collection[str],
) -> Table:
    columns: dict[str, list[Any]] = {}
    for name, column in zip(header, cells, strict=True):
        plain = name.strip().lower()
        if plain in columns and plain in known:
            raise UserError(f"{source} has two columns called {plain!r}.", "Rename one of them.")
        columns[plain] = column
    return Table(source, columns, [name.strip() for name in header], places, place_word)
