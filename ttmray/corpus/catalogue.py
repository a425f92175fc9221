"""Which tracks there are: a folder or bucket of songs, or a table, as a sorted list with safe unique ids."""

import hashlib
import math
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from ttmray.audio.io import AUDIO_EXTENSIONS
from ttmray.corpus.captions import (
    Table,
    captions_of,
    find_captions,
    forward,
    join,
    load_captions,
    read_table,
)
from ttmray.corpus.config import CatalogueConfig
from ttmray.corpus.track import Track
from ttmray.errors import UserError
from ttmray.storage import BAD_NAME, Folder, ListedFile, absolute, name_problem, read_file, shown_name, split_path
from ttmray.tables import is_table

SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
HEAD_BYTES = 1 << 16
READ_BYTES = 1 << 22
THREADS = 8
UNREADABLE_FOLDER = "unreadable_folder"
_FEW = 0.1
"""Share of captions, or of tracks, that may go without the other and nobody is warned."""


@dataclass
class Catalogue:
    """All tracks, sorted by path; `report` holds counts and remarks for people."""

    root: Folder
    tracks: list[Track]
    report: dict[str, int | str]


def build_catalogue(input: str, config: CatalogueConfig) -> Catalogue:
    """List the tracks of a folder, a bucket prefix or a table.

    The id of a track is the stem of its file name where that is safe and unique (also in a table with an id
    column, because captions and clip names of existing corpora use the stem), else a readable form of the
    stem with a hash of the path. Only files of equal size are read, to find copies.

    Args:
        input: folder, `s3://bucket/prefix`, or a table (`tables.is_table`).

    Raises:
        UserError: for an input that is absent, empty or not readable, and for tables with bad rows, naming
            the file and the line.
    """
    if is_table(input) and not os.path.isdir(absolute(input)):
        root, tracks, report, captions = _from_table(input, config)
    else:
        root, tracks, report, captions = _from_folder(Folder.at(input), config)
    if config.limit is not None and config.limit < len(tracks):
        report["limit"] = f"first {config.limit} of {len(tracks)} tracks"
        tracks = tracks[: config.limit]
    if config.captions not in (None, "auto"):
        try:
            captions = load_captions(config.captions)
        except UserError as error:
            raise UserError(f"catalogue.captions: {error.message}", error.hint) from error
        report["captions_from"] = config.captions
    if captions is None:
        report["tracks_without_caption"] = sum(not track.caption for track in tracks)
    else:
        tracks, counts = join(tracks, captions, config.stem)
        report.update(counts)
        _check_join(tracks, captions, counts, report)
    if config.exclude is not None:
        tracks = _exclude(tracks, config.exclude, report)
    if config.duplicates == "reject":
        tracks = _reject_copies(root, tracks, report)
    report["tracks"] = len(tracks)
    for kind, count in sorted(Counter(track.reason or "ok" for track in tracks).items()):
        report[kind] = count
    return Catalogue(root, tracks, report)


def check_songs(input: str, config: CatalogueConfig) -> None:
    """Whether the songs of a catalogue are there, without reading any.

    Raises:
        UserError: for an input that is absent, empty or not readable, and for a table none of whose files is there.
    """
    if not is_table(input) or os.path.isdir(absolute(input)):
        _from_folder(Folder.at(input), config)
        return
    root, tracks, _, _ = _from_table(input, config)
    if all(track.size < 0 for track in tracks):
        raise UserError(
            f"{input}: none of its {len(tracks)} tracks, such as {tracks[0].path}, is there under {root}.",
            "Set catalogue.audio_root.",
        )


def _check_join(
    tracks: Sequence[Track], captions: Mapping[str, str], counts: Mapping[str, int], report: dict[str, int | str]
) -> None:
    """Refuse captions of which none joins, and warn where many do not.

    Raises:
        UserError: with examples of both sides.
    """
    source = report.get("captions_from", "the caption table")
    if not captions:
        report["warning, captions"] = f"{source} holds no caption"
        return
    without = [track.path for track in tracks if not track.caption]
    examples = f"for example {next(iter(captions))!r} in the table and {(without or ['-'])[0]!r} in the catalogue"
    if not counts["captions_matched"] and "limit" not in report:
        raise UserError(
            f"{source}: none of {len(captions)} captions belongs to one of {len(tracks)} tracks; {examples}.",
            "Paths or ids must agree up to folders in front and extension; catalogue.captions=null goes without any.",
        )
    unmatched, ambiguous = counts["captions_unmatched"], counts["captions_ambiguous"]
    if unmatched > _FEW * len(captions) or len(without) > _FEW * len(tracks) or ambiguous:
        report["warning, captions"] = (
            f"{len(without)} of {len(tracks)} tracks have none ({ambiguous} of them fit several), and {unmatched} of "
            f"{len(captions)} captions fit no track; {examples}"
        )


def track_ids(paths: Sequence[str]) -> list[str]:
    """One safe id per path, unique without regard to case (some file systems have none).

    Raises:
        UserError: should two paths get one id even so.
    """
    stems = [os.path.splitext(path.rpartition("/")[2])[0] for path in paths]
    count = Counter(stem.lower() for stem in stems)
    ids = [
        stem if count[stem.lower()] == 1 and SAFE_ID.fullmatch(stem) else f"{_slug(stem)}-{_digest(path)[:8]}"
        for stem, path in zip(stems, paths, strict=True)
    ]
    # 8 hex digits can meet in a large catalogue where every album has its 01.mp3
    count = Counter(track_id.lower() for track_id in ids)
    if len(count) < len(ids):
        ids = [
            track_id if count[track_id.lower()] == 1 else f"{_slug(stem)}-{_digest(path)[:16]}"
            for track_id, stem, path in zip(ids, stems, paths, strict=True)
        ]
        seen: dict[str, str] = {}
        for track_id, path in zip(ids, paths, strict=True):
            other = seen.setdefault(track_id.lower(), path)
            if other != path:
                raise UserError(f"{other} and {path} both get the track id {track_id}.", "Rename one of them.")
    return ids


def _plain(path: str, stem: str) -> str:
    """A path without the end that all names of the catalogue have."""
    name, ending = os.path.splitext(path)
    return name.removesuffix(stem) + ending


def _slug(stem: str) -> str:
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9]+", "-", plain).strip("-")[:40].rstrip("-") or "track"


def _digest(path: str) -> str:
    return hashlib.sha256(path.encode(errors="surrogatepass")).hexdigest()


_Found = tuple[Folder, list[Track], dict[str, int | str], dict[str, str] | None]


def _from_folder(folder: Folder, config: CatalogueConfig) -> _Found:
    if not folder.remote:
        if not os.path.exists(folder.uri):
            raise UserError(f"{folder}: there is no such folder.", "Check `input`.")
        if not os.path.isdir(folder.uri):
            raise UserError(
                f"{folder} is neither a folder nor a table of tracks.",
                "Give a folder of songs, or a .csv, .tsv, .json, .jsonl or .parquet file.",
            )
    unreadable: dict[str, str] = {}
    listing = folder.files(unreadable=unreadable)
    entries = [e for e in listing if not any(_is_hidden(part) for part in e.name.split("/"))]
    unreadable = {name: why for name, why in unreadable.items() if not any(map(_is_hidden, name.split("/")))}
    extension = [os.path.splitext(entry.name)[1].lower() for entry in entries]
    every = [entry for entry, kind in zip(entries, extension, strict=True) if kind in AUDIO_EXTENSIONS]
    audio = [entry for entry in every if os.path.splitext(entry.name)[0].endswith(config.stem)]
    others = Counter(kind or "(none)" for kind in extension if kind not in AUDIO_EXTENSIONS)
    listed = ", ".join(f"{shown_name(kind)} {count}" for kind, count in sorted(others.items()))
    if every and not audio:
        raise UserError(
            f"{folder} holds {len(every)} audio files, and none whose name ends in {config.stem}, such as "
            f"{every[0].name}.",
            "Set catalogue.stem to the end of the names, or leave it out.",
        )
    if not audio:
        nothing = f"only other files ({listed})." if others else "it is empty."
        raise UserError(
            f"{folder} holds no audio: " + (f"{_folders(unreadable)}." if unreadable else nothing),
            f"Searched, at any depth, for {', '.join(sorted(AUDIO_EXTENSIONS))}; hidden files do not count.",
        )
    problems = {entry.name: problem for entry in audio if (problem := name_problem(entry.name))}
    tracks = [
        Track(track_id=track_id, path=_path(entry.name, problems), size=entry.size, version=entry.version)
        for track_id, entry in zip(
            _ids(
                [_plain(entry.name, config.stem) for entry in audio], {_plain(name, config.stem) for name in problems}
            ),
            audio,
            strict=True,
        )
    ]
    tracks = [
        _rejected(track, BAD_NAME, problems[entry.name]) if entry.name in problems else track
        for track, entry in zip(tracks, audio, strict=True)
    ]
    tracks += _locked(unreadable, {track.track_id.lower() for track in tracks})
    tracks.sort(key=lambda track: track.path)
    report: dict[str, int | str] = {"other_files": others.total(), "other_extensions": listed}
    if config.stem:
        report["audio_without_stem"] = len(every) - len(audio)
    if unreadable:
        report["warning, folders"] = f"{_folders(unreadable)}; what they hold is not part of the run"
    captions = None
    if config.captions == "auto":
        table, passed = find_captions(folder, [entry.name for entry in entries])
        if passed:
            report["warning, captions"] = "; ".join(passed)
        if table is not None:
            captions = captions_of(table)
            report["captions_from"] = table.source
    return folder, tracks, report, captions


def _from_table(source: str, config: CatalogueConfig) -> _Found:
    table = read_table(source)
    if "path" not in table.columns:
        raise UserError(
            f"{source} has no column `path`; it has {', '.join(table.header) or 'none'}.",
            "A table of tracks needs one path per row, relative to catalogue.audio_root.",
        )
    if len(table) == 0:
        raise UserError(f"{source} holds no tracks.", "Check that it is the right file.")
    paths, problems = _paths(table)
    durations = _durations(table)
    artists, albums = table.texts("artist_id"), table.texts("album_id")
    captions = table.texts("caption") if config.captions == "auto" else [""] * len(table)
    root = Folder.at(config.audio_root) if config.audio_root is not None else split_path(source)[0]
    unreadable: dict[str, str] = {}
    there = {entry.name: entry for entry in root.files(unreadable=unreadable)}
    report: dict[str, int | str] = {}
    if unreadable:
        report["warning, folders"] = _folders(unreadable)
    has_audio = any(path in there for path in paths)
    if not has_audio:
        report["audio"] = f"audio not found under {root}: planning from the table alone (see catalogue.audio_root)"
    if config.captions == "auto" and "caption" in table.columns:
        report["captions_from"] = source
    tracks = []
    order = sorted(range(len(paths)), key=paths.__getitem__)
    ids = _ids([paths[row] for row in order], problems)
    for track_id, row in zip(ids, order, strict=True):
        path = paths[row]
        entry = there.get(path, ListedFile(path, -1))
        track = Track(
            track_id=track_id,
            path=_path(path, problems),
            size=entry.size,
            version=entry.version,
            duration_s=durations[row],
            caption=" ".join(captions[row].split()),
            artist_id=artists[row],
            album_id=albums[row],
        )
        if path in problems:
            track = _rejected(track, BAD_NAME, f"{table.place(row)}: {problems[path]}")
        elif entry.size < 0 and (locked := _locked_part(path, unreadable)):
            track = _rejected(track, UNREADABLE_FOLDER, f"{root.path(locked)}: {unreadable[locked]}")
        elif has_audio and entry.size < 0 and path not in there:
            track = _rejected(track, "missing", f"not found under {root}")
        tracks.append(track)
    return root, tracks, report, None


def _folders(unreadable: Mapping[str, str]) -> str:
    shown = ", ".join(f"{shown_name(name)} ({why})" for name, why in sorted(unreadable.items())[:5])
    more = f" and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
    return f"{len(unreadable)} folders cannot be read: {shown}{more}"


def _locked(unreadable: Mapping[str, str], taken: set[str]) -> list[Track]:
    """A row for each folder that cannot be read: nobody knows how many songs it holds.

    Args:
        taken: ids of the tracks, in small letters.
    """
    tracks = []
    for name, why in unreadable.items():
        stem, digest = _slug(name.rpartition("/")[2])[:20], _digest(name)
        length = next(n for n in range(8, 41) if f"{stem}-{digest[:n]}".lower() not in taken)
        track = Track(track_id=f"{stem}-{digest[:length]}", path=shown_name(name))
        tracks.append(_rejected(track, UNREADABLE_FOLDER, f"the folder cannot be read: {why}"))
    return tracks


def _locked_part(path: str, unreadable: Collection[str]) -> str:
    """The unreadable folder that a path leads through; "" where there is none."""
    parts = path.split("/")
    heads = ("/".join(parts[:count]) for count in range(1, len(parts)))
    return next((head for head in heads if head in unreadable), "")


def _paths(table: Table) -> tuple[list[str], dict[str, str]]:
    """Paths by row, and what is wrong with those that cannot be used.

    Raises:
        UserError: none can be used, or one is there twice.
    """
    paths = [forward(path) for path in table.texts("path")]
    problems = {path: problem for path in paths if (problem := name_problem(path))}
    if all(path in problems for path in paths):
        raise UserError(
            f"{table.place(0)}: {problems[paths[0]]} No path of the {len(paths)} rows can be used.",
            "Use names below catalogue.audio_root without '..', '//' or a leading '/'.",
        )
    if len(set(paths)) < len(paths):
        first: dict[str, int] = {}
        for row, path in enumerate(paths):
            if first.setdefault(path, row) != row:
                raise UserError(
                    f"{table.place(row)}: {path} is also in {table.row_name(first[path])}.",
                    "Keep one row per file.",
                )
    return paths, problems


def _durations(table: Table) -> list[float]:
    cells: Iterable[Any] = table.columns.get("duration_s") or [None] * len(table)
    durations = []
    for row, cell in enumerate(cells):
        try:
            value = math.nan if cell is None or cell == "" else float(cell)
        except (TypeError, ValueError):
            value = -1.0
        if value < 0 or value == math.inf:
            raise UserError(f"{table.place(row)}: the duration {cell!r} is not a number of seconds.", "Correct it.")
        durations.append(value)
    return durations


def _is_hidden(part: str) -> bool:
    return part.startswith(".") and part not in (".", "..")  # which object stores take for names


def _path(path: str, problems: Collection[str]) -> str:
    return shown_name(path) if path in problems else path


def _ids(paths: Sequence[str], problems: Collection[str]) -> list[str]:
    """`track_ids` of the good names, which bad ones do not change, and ids by content for these."""
    good = [path for path in paths if path not in problems]
    ids = dict(zip(good, track_ids(good), strict=True))
    taken = {track_id.lower() for track_id in ids.values()}
    for path in paths:
        if path in problems:
            stem, digest = _slug(os.path.splitext(path.rpartition("/")[2])[0])[:20], _digest(path)
            length = next(n for n in range(8, 41) if f"{stem}-{digest[:n]}".lower() not in taken)
            ids[path] = f"{stem}-{digest[:length]}"
            taken.add(ids[path].lower())
    return [ids[path] for path in paths]


def _rejected(track: Track, reason: str, message: str) -> Track:
    return replace(track, status="rejected", reason=reason, message=message)


def _exclude(tracks: list[Track], source: str, report: dict[str, int | str]) -> list[Track]:
    try:
        lines = read_file(source).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8: {error.reason}.", "Write one track id per line.") from error
    ids = {line.split("#")[0].strip() for line in lines} - {""}
    report["exclude_unmatched"] = len(ids - {track.track_id for track in tracks})
    return [_rejected(track, "excluded", f"listed in {source}") if track.track_id in ids else track for track in tracks]


def _reject_copies(root: Folder, tracks: list[Track], report: dict[str, int | str]) -> list[Track]:
    """Reject all but the first of files with equal bytes, and every copy of an excluded one.

    Files of equal size are compared by SHA-256: of their first 64 KiB, and where these agree, as a whole.
    Empty files are left to the decoder, which says what is wrong with them.
    """
    hashed = Counter[str]()

    def same(groups: Iterable[list[int]], limit: int | None) -> list[list[int]]:
        members = [(number, i) for number, group in enumerate(groups) for i in group]
        with ThreadPoolExecutor(THREADS) as pool:
            digests = list(pool.map(lambda m: _hash(root, tracks[m[1]].path, limit), members))
        apart = defaultdict(list)
        for (number, i), (digest, read) in zip(members, digests, strict=True):
            hashed["bytes"] += read
            if digest:
                apart[number, digest].append(i)
            else:
                hashed["unreadable"] += 1
        return [group for group in apart.values() if len(group) > 1]

    by_size = defaultdict(list)
    for i, track in enumerate(tracks):
        if track.size > 0 and track.reason != BAD_NAME:
            by_size[track.size].append(i)
    alike = same([group for group in by_size.values() if len(group) > 1], HEAD_BYTES)
    large = [group for group in alike if tracks[group[0]].size > HEAD_BYTES]
    copies = [group for group in alike if tracks[group[0]].size <= HEAD_BYTES] + same(large, None)
    tracks = list(tracks)
    for group in copies:
        excluded = [i for i in group if tracks[i].reason == "excluded"]
        first = excluded[0] if excluded else group[0]
        of = f"same bytes as {tracks[first].track_id}" + (", which is excluded" if excluded else "")
        for i in group:
            if i != first and tracks[i].status == "ok":
                tracks[i] = _rejected(tracks[i], "duplicate", of)
    report["hashed_bytes"] = hashed["bytes"]
    if hashed["unreadable"]:
        report["not_compared"] = hashed["unreadable"]
    return tracks


def _hash(root: Folder, path: str, limit: int | None) -> tuple[str, int]:
    """Hex SHA-256 of the first `limit` bytes (None: all) and how many were read.

    A file that cannot be read has no hash, "": it stays in the catalogue, and decoding it records why.
    """
    digest, read = hashlib.sha256(), 0
    try:
        with root.open(path, limit) as file:
            while block := file.read(READ_BYTES if limit is None else limit - read):
                digest.update(block)
                read += len(block)
    except (UserError, OSError):
        return "", read
    return digest.hexdigest(), read
