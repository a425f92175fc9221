"""What a run has written, noted at its end, so that whoever comes next finds what is missing or changed.

`_SUCCESS.json` is written last. It has size and SHA-256 of the run's files, a copy of `run.json`, and a hash of itself.
More than `MANY` files of units are listed in a table beside it (`FILES`), and the table in it: what only asks whether a
run is finished, and what came of it, reads some kilobytes, however large the run is.
Folders that are no runs (selections, pairs, references, reports, ...) have one, too: with their kind, and no such copy.
A relaunch compares all sizes and the hashes of the smallest files (`damage`): seconds for any run. `ttmray corpus
verify` compares every hash. Files that are no result of the run (costs, events for TensorBoard) are not listed.
"""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from ttmray import runs
from ttmray.config import fingerprint
from ttmray.console import console
from ttmray.errors import UserError
from ttmray.json_text import as_read, read_json
from ttmray.runs import RUN, SUCCESS
from ttmray.storage import Folder, explained, parquet_table, split_path

FILES = "_FILES.parquet"
MANY = 1000
"""Files of one folder."""
HASHED_FILES, HASHED_BYTES = 500, 64 << 20
"""Of a relaunch: it hashes so many files of a run, and so many bytes, the smallest first."""
_THREADS, _BLOCK = 16, 8 << 20


class Written(NamedTuple):
    """A file as it was written."""

    bytes: int
    sha256: str


class Damage(NamedTuple):
    """A file that is not what was written, and in which way."""

    name: str
    how: str

    def __str__(self) -> str:
        return f"{self.name}: {self.how}"


def entry(data: bytes) -> Written:
    return Written(len(data), hashlib.sha256(data).hexdigest())


def entries(run: Folder, names: Iterable[str]) -> dict[str, Written]:
    """Entries of files as they are now, read block by block, several side by side.

    Raises:
        UserError: one of them cannot be read.
    """

    chosen = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(chosen, pool.map(partial(_hashed, run), chosen), strict=True))


def _hashed(run: Folder, name: str) -> Written:
    size, digest = 0, hashlib.sha256()
    with run.open(name) as file, explained(run.path(name)):
        while block := file.read(_BLOCK):
            size += len(block)
            digest.update(block)
    return Written(size, digest.hexdigest())


def seal(
    run: Folder,
    described: Mapping[str, Any],
    body: Mapping[str, Any],
    files: Mapping[str, Written],
    aside: Collection[str] = (),
) -> None:
    """Write `_SUCCESS.json`: the run is complete.

    Args:
        described: `run.json`.
        body: what the marker says beside.
        files: all that the run has written and nothing makes again by itself.
        aside: folders whose files are listed in a table of their own where they are many.
    """
    count = Counter(name.partition("/")[0] for name in files)
    many = {name: files[name] for name in files if (top := name.partition("/")[0]) in aside and count[top] > MANY}
    if many:
        data = _table_of(many)
        run.write(FILES, data)
        files = {name: known for name, known in files.items() if name not in many} | {FILES: entry(data)}
    _write(run, {"fingerprint": described["fingerprint"], **body, "run": dict(described)}, files)


def note(folder: Folder, kind: str, names: Iterable[str]) -> None:
    """Write `_SUCCESS.json` of a folder that is no run: it is complete.

    Args:
        kind: what it holds.
        names: its files, as they are now.
    """
    _write(folder, {"kind": kind}, entries(folder, sorted(set(names))))


def _write(folder: Folder, body: Mapping[str, Any], files: Mapping[str, Written]) -> None:
    listed = {name: f"{known.bytes} {known.sha256}" for name, known in sorted(files.items())}
    marker = as_read({**body, "files": listed})  # as it will be read
    folder.write(SUCCESS, json.dumps({"sha256": fingerprint(marker), **marker}, indent=1).encode())


def _table_of(files: Mapping[str, Written]) -> bytes:
    """Files as a Parquet table: name, bytes, and the 32 bytes of the SHA-256."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = sorted(files)
    digests = [bytes.fromhex(files[name].sha256) for name in names]
    columns = {
        "name": names,
        "bytes": [files[name].bytes for name in names],
        "sha256": pa.array(digests, pa.binary(32)),
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    return buffer.getvalue()


class Reopened(NamedTuple):
    """A folder that its command goes on with: whether one of this kind was complete, and what was damaged in it."""

    complete: bool
    damaged: list[Damage]


def reopen(folder: Folder, kind: str) -> Reopened:
    """Before the command of a folder that is no run, or of a run that needs no other care, writes again: what is
    damaged is said and deleted, so that it is made once more, and the marker is gone until the end. `run.json` is the
    business of `restore_run`.

    Args:
        kind: as of `note`, or of the run.

    Raises:
        UserError: a folder with something in it has the name of a file.
    """
    marker = read_marker(folder)
    complete = marker is not None and kind in (marker.get("kind"), marker.get("run", {}).get("kind"))
    damaged = [problem for problem in damage(folder, marker or {}) if problem.name != RUN] if complete else []
    for problem in damaged:
        console.print(f"{folder.path(problem.name)} {problem.how}; it is made again", style="yellow")
        clear(folder, problem.name)
    if folder.exists(SUCCESS):
        clear(folder, SUCCESS)
    return Reopened(complete, damaged)


def checked(path: str) -> bytes:
    """All bytes of a file, which must be those that `_SUCCESS.json` beside it lists, where there is one that does.

    Raises:
        UserError: they are others, or the file cannot be read.
    """
    folder, name = split_path(path)
    data = folder.read(name)
    marker = read_marker(folder) or {}
    known = _inline(marker).get(name) or promised(folder, marker).get(name)
    if known is not None and known != entry(data):
        raise UserError(
            f"{path} is not what was written.",
            "Start the command that made it once more; a file of your own making belongs in another folder.",
        )
    return data


def read_marker(run: Folder) -> dict[str, Any] | None:
    """`_SUCCESS.json`, where there is one and it is whole: else the run is not finished, and its command ends it."""
    return _parsed(run)[0]


def finished(run: Folder) -> bool:
    """Whether the run has a success marker that is whole."""
    return read_marker(run) is not None


def kind_of(run: Folder) -> str:
    """Kind of a run by `run.json` or the copy of it in `_SUCCESS.json`, or of a folder that is none by that.

    Raises:
        UserError: the folder holds no run.
    """
    if not run.exists(RUN) and not run.exists(SUCCESS):
        raise UserError(f"{run} is no run: it has no {RUN}.", "Give the output folder of a command.")
    try:
        return str(read_json(run.read(RUN))["kind"])
    except (UserError, ValueError, KeyError, TypeError):
        marker = read_marker(run) or {}
        return str(marker.get("run", {}).get("kind") or marker.get("kind", "corpus"))


def marker_problem(run: Folder) -> str:
    """What is wrong with `_SUCCESS.json`; empty where nothing is."""
    return _parsed(run)[1]


def _parsed(run: Folder) -> tuple[dict[str, Any] | None, str]:
    if not run.exists(SUCCESS):
        return None, f"{SUCCESS} is missing: the run is not finished"
    try:
        marker: dict[str, Any] = read_json(run.read(SUCCESS))
        promised = marker.pop("sha256", None)  # those of earlier versions have none
        if promised is not None and promised != fingerprint(marker):
            return None, f"{SUCCESS} is damaged: its hash differs"
        if promised is None and "files" in marker:
            return None, f"{SUCCESS} is damaged: it has no hash"
        if not marker:
            return None, f"{SUCCESS} is damaged: it says nothing"
        if promised is None and not _of_an_earlier_version(marker):
            return None, f"{SUCCESS} is damaged: it holds something else"
    except (ValueError, AttributeError, TypeError) as error:
        return None, f"{SUCCESS} is damaged: {error}"
    except UserError as error:
        return None, error.message
    return marker, ""


def _of_an_earlier_version(marker: Mapping[str, Any]) -> bool:
    """Whether these are the fields of a marker without a hash, and not those of another file of the run."""
    return ("fingerprint" in marker or "created" in marker) and "config" not in marker


def promised(run: Folder, marker: Mapping[str, Any]) -> dict[str, Written]:
    """The files that `_SUCCESS.json` and the table beside it list; none where an earlier version wrote it.

    Raises:
        UserError: the table is missing or damaged.
    """
    files = _inline(marker)
    if (table := files.pop(FILES, None)) is None:
        return files
    data = run.read(FILES)
    if entry(data) != table:
        raise UserError(f"{run.path(FILES)} is not what was written.", "Start the command of the run again.")
    names, sizes, digests = (parquet_table(data)[column].to_pylist() for column in ("name", "bytes", "sha256"))
    files |= zip(names, map(Written, sizes, map(bytes.hex, digests)), strict=True)
    return files


def _inline(marker: Mapping[str, Any]) -> dict[str, Written]:
    parts = {name: text.partition(" ") for name, text in marker.get("files", {}).items()}
    return {name: Written(int(size), digest) for name, (size, _, digest) in parts.items()}


def damage(
    run: Folder, marker: Mapping[str, Any], every_hash: bool = False, leave_out: Sequence[str] = ()
) -> list[Damage]:
    """Files that are missing or not what `_SUCCESS.json` says, by name; none where an earlier version wrote it.

    Where the table beside it is damaged, nothing is known of the files that it lists.

    Args:
        marker: of `read_marker`.
        every_hash: read all files; else the sizes of all and the hashes of the smallest (`HASHED_FILES`).
        leave_out: folders whose files are not looked at.
    """
    listed, wrong = _by_size(run, marker, leave_out)
    same = {name: listed[name].bytes for name in listed.keys() - wrong.keys()}
    hashed = list(same) if every_hash else smallest(same)
    for name, now in _readable(run, hashed, wrong).items():
        if now.sha256 != listed[name].sha256:
            wrong[name] = "its SHA-256 differs from what was written"
    return [Damage(name, how) for name, how in sorted(wrong.items())]


def lost(run: Folder, marker: Mapping[str, Any]) -> list[Damage]:
    """What of `damage` a listing tells: files that are missing or of another size. Nothing of a run of many units in a
    bucket, whose listing is a request per 1,000 files."""
    if run.remote and FILES in _inline(marker):
        return []
    return [Damage(name, how) for name, how in sorted(_by_size(run, marker, ())[1].items())]


def _by_size(
    run: Folder, marker: Mapping[str, Any], leave_out: Sequence[str]
) -> tuple[dict[str, Written], dict[str, str]]:
    """The files that `_SUCCESS.json` lists, and what a listing says is wrong with some of them."""
    wrong = {}
    try:
        files = promised(run, marker)
    except UserError as error:
        files = {name: known for name, known in _inline(marker).items() if name != FILES}
        wrong[FILES] = error.message.removeprefix(f"{run.path(FILES)}").removeprefix(": ").lstrip()
    listed = {n: known for n, known in files.items() if n.partition("/")[0] not in leave_out}
    sizes = {file.name: file.size for file in run.files()} if listed else {}
    for name, known in listed.items():
        if name not in sizes:
            wrong[name] = "is missing"
        elif sizes[name] != known.bytes:
            wrong[name] = f"has {sizes[name]} bytes, {known.bytes} were written"
    return listed, wrong


def smallest(sizes: Mapping[str, int]) -> list[str]:
    """The smallest of some files, whose hashes a launch compares: so many and so large that it takes little time.

    Args:
        sizes: name -> bytes.
    """
    names = sorted(sizes, key=lambda name: (sizes[name], name))[:HASHED_FILES]
    total = 0
    for count, name in enumerate(names):
        total += sizes[name]
        if total > HASHED_BYTES:
            return names[:count]
    return names


def _readable(run: Folder, names: Iterable[str], wrong: dict[str, str]) -> dict[str, Written]:
    """Entries of the files that can be read; why the others cannot goes into `wrong`."""

    def one(name: str) -> Written | str:
        try:
            return _hashed(run, name)
        except UserError as error:
            return error.message.removeprefix(f"{run.path(name)}: ")

    chosen = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        results = dict(zip(chosen, pool.map(one, chosen), strict=True))
    wrong.update({name: result for name, result in results.items() if isinstance(result, str)})
    return {name: result for name, result in results.items() if isinstance(result, Written)}


def restore_run(run: Folder, kind: str, identity: str = "", exact: bool = True) -> dict[str, Any] | None:
    """Write `run.json` again from its copy in `_SUCCESS.json`, where it is missing or damaged and the copy is whole.

    Args:
        kind: of the run.
        identity: fingerprint that the run must have; empty: any.
        exact: also where `run.json` is sound and of the same run, but says something else.

    Returns:
        What it says now; None where nothing was to be done, or could be.
    """
    marker = read_marker(run)
    copy = (marker or {}).get("run")
    if marker is None or copy is None or copy["kind"] != kind or (identity and copy["fingerprint"] != identity):
        return None
    with suppress(ValueError, KeyError, TypeError, UserError):
        said = read_json(run.read(RUN))
        sound = runs.is_sound(said)
        ours = said["fingerprint"] == (identity or said["fingerprint"])
        if sound and ours and (not exact or said == copy or said["fingerprint"] != copy["fingerprint"]):
            return None
    clear(run, RUN)
    run.write(RUN, json.dumps(copy, indent=1).encode())
    return dict(copy)


def existing_or_copy(run: Folder, kind: str, beside: Collection[str] = ()) -> dict[str, Any] | None:
    """`runs.existing`, by the copy in `_SUCCESS.json` where `run.json` is missing or damaged: what a launch would go on
    with, without writing.

    Raises:
        UserError: as there.
    """
    try:
        return runs.existing(run, kind, beside)
    except UserError:
        copy = (read_marker(run) or {}).get("run")
        if copy is None or copy["kind"] != kind:
            raise
        return dict(copy)


def clear(run: Folder, name: str) -> None:
    """Make room for a file: delete it, or the empty folder that has its name.

    Raises:
        UserError: a folder with something in it, which a person put there.
    """
    if run.remote or not os.path.isdir(run.path(name)):
        run.delete(name)
        return
    try:
        os.rmdir(run.path(name))
    except OSError as error:
        raise UserError(
            f"{run.path(name)} is a folder, where the run has a file.",
            "Move it away and start the same command again.",
        ) from error
