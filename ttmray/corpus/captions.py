"""Captions of the tables that users have, and joining them to tracks.

Captions change in white space only: runs of it, tabs and newlines included, become one space, because captions travel
in tab-separated files later.
"""

import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ttmray import tables
from ttmray.corpus.track import Track
from ttmray.errors import UserError
from ttmray.storage import Folder
from ttmray.tables import SUFFIXES, Table, is_table

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


def read_table(source: str) -> Table:
    """A table of tracks or captions: the columns of `COLUMNS`, and the header as it is.

    Raises:
        UserError: when the file is absent, of unknown format, damaged or not UTF-8, naming the line where
            there is one.
    """
    known = {alias for aliases in COLUMNS.values() for alias in aliases}
    return tables.read_table(source, known, only_known=True).named(COLUMNS)


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
    by_name = {name.lower(): name for name in names if "/" not in name and is_table(name)}
    suffixes = [suffix + gz for suffix in SUFFIXES for gz in ("", ".gz")]
    for stem, name in [(stem, stem + suffix) for stem in ("captions", "tracks") for suffix in suffixes]:
        if name in by_name:
            table = read_table(folder.path(by_name[name]))
            if "caption" in table.columns and {"path", "track_id"} & table.columns.keys():
                return table, passed
            if stem == "captions":
                header = ", ".join(table.header) or "no columns"
                passed.append(
                    f"{table.source} is not used: it has {header}, but not `caption` and `path` or `track_id`"
                )
    return None, passed


def join(tracks: Sequence[Track], captions: dict[str, str], stem: str = "") -> tuple[list[Track], dict[str, int]]:
    """Give every track its caption, by file stem.

    Tables may name paths with other leading folders and another extension than the audio has. Where several
    tracks or captions have one stem, equal paths, else the longest common end of the paths decides; what is
    ambiguous even then stays without caption and is counted.

    Args:
        stem: end of all file names that captions do not have.

    Returns:
        The tracks in the same order, and the counts `captions_matched` (tracks), `tracks_without_caption`,
        `captions_unmatched` and `captions_ambiguous` (tracks).
    """
    keys, names = list(captions), [without_extension(track.path).removesuffix(stem) for track in tracks]
    keys_by_end, names_by_end = _by_end(keys), _by_end(names)
    names_of_key = [{names[i] for i in _best(names, names_by_end, key)} for key in keys]
    joined: list[Track] = []
    used: set[str] = set()
    ambiguous = 0
    for track, name in zip(tracks, names, strict=True):
        mutual = [k for k in _best(keys, keys_by_end, name) if name in names_of_key[k]]
        texts = {captions[keys[k]] for k in mutual}
        caption = ""
        if len(texts) == 1 and all(len(names_of_key[k]) == 1 for k in mutual):
            caption = texts.pop()
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
