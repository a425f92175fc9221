"""Run folders: `run.json` says what decides a run's results, so that a command goes on with its own and no other."""

import json
import os
import platform
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from ttmray import __version__
from ttmray.config import Config, differences, fingerprint
from ttmray.errors import UserError
from ttmray.json_text import as_read, read_json
from ttmray.storage import Folder, refuse_vanishing

RUN, SUCCESS = "run.json", "_SUCCESS.json"
KINDS_OF_CORPUS = ("corpus", "pool")
"""A pool is a corpus, too."""
OTHER_BUNDLE = ("bundle.name:", "config.bundle:")
LONGEST = 240
"""Characters of a difference that are shown."""


def describe(kind: str, what: Any, config: Config, libraries: Sequence[str], **more: Any) -> dict[str, Any]:
    """What `run.json` holds.

    Args:
        kind: of the run.
        what: its identity: everything that decides its results, as plain data.
        config: for people.
        libraries: whose versions are noted.
        more: further facts.
    """
    identity = as_read(what)
    return {
        "kind": kind,
        "fingerprint": fingerprint(identity),
        "identity": identity,
        **more,
        "config": config.model_dump(mode="json"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"ttmray": __version__, "python": platform.python_version()}
        | {name: metadata.version(name) for name in libraries},
    }


def require_folder(run: Folder) -> None:
    """See that a local folder is there.

    Raises:
        UserError: it is not, or is a file.
    """
    if not run.remote and not os.path.isdir(run.uri):
        what = "is a file" if os.path.exists(run.uri) else "is not there"
        raise UserError(f"{run} {what}.", "Give the output folder of a command.")


def note_of(run: Folder) -> str:
    """What people must know about the numbers of a run: of its bundle; empty where there is nothing to say.

    Raises:
        UserError: there is no run, or it is damaged.
    """
    try:
        return str(read_json(run.read(RUN)).get("note") or "")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{run.path(RUN)} describes no run.", "Restore it.") from error


def kind_of(run: Folder, known: Sequence[str]) -> str:
    """Which of some kinds of run `run.json` speaks of; the first where it says nothing, as its reader then explains."""
    try:
        kind = str(read_json(run.read(RUN))["kind"])
    except (UserError, ValueError, KeyError, TypeError):
        return known[0]
    return kind if kind in known else known[0]


def is_sound(record: dict[str, Any]) -> bool:
    """Whether the fingerprint in `run.json` is that of the identity in it."""
    return bool(record["fingerprint"] == fingerprint(record["identity"]))


def sound(run: Folder) -> bool:
    """Whether `run.json` is there and describes a run."""
    try:
        return is_sound(read_json(run.read(RUN)))
    except (UserError, ValueError, KeyError, TypeError):
        return False


def write(run: Folder, described: dict[str, Any]) -> bool:
    """Write `run.json` unless there is one; whether it was written."""
    return run.create(RUN, json.dumps(described, indent=1).encode())


def read(run: Folder, kind: str) -> dict[str, Any]:
    """`run.json` of a run of that kind.

    Raises:
        UserError: there is none, it is damaged, or the run is of another kind.
    """
    if not run.exists(RUN):
        raise UserError(f"{run} is no {kind} run: it has no {RUN}.", "Give the output folder of such a run.")
    try:
        record: dict[str, Any] = read_json(run.read(RUN))
        other, whole = record["kind"], is_sound(record)
    except (ValueError, KeyError, TypeError):
        other, whole = kind, False
    if other != kind:
        raise UserError(f"{run} holds a run of kind {other}, not {kind}.", "Choose another folder.")
    if not whole:
        raise UserError(f"{run.path(RUN)} describes no {kind} run.", "Restore it, or choose an empty or new folder.")
    return record


def existing(run: Folder, kind: str, beside: Collection[str] = ()) -> dict[str, Any] | None:
    """`run.json` of a run of that kind that was started before; None in a new folder.

    Args:
        beside: files that may lie in a folder before it.

    Raises:
        UserError: the folder holds another kind of run, or something else, or Ray deletes it after this job.
    """
    refuse_vanishing(run.uri)
    if run.exists(RUN):
        return read(run, kind)
    strange = [entry.name for entry in run.files(sizes=False) if entry.name not in beside]
    if strange:
        raise UserError(
            f"{run} is no {kind} run: it holds {strange[0]}{' and more' if len(strange) > 1 else ''} but no {RUN}.",
            "Choose an empty or new folder.",
        )
    return None


def refuse_another(
    run: Folder,
    old: dict[str, Any],
    new: dict[str, Any],
    more: Sequence[str] = (),
    covered: tuple[str, ...] = (),
    way_out: str = "",
    choose: str = "Choose a new output folder",
) -> None:
    """Let only the same run go on.

    Args:
        old, new: `run.json` as it is, and as the command would write it.
        more: further differences, in words.
        covered: starts of lines that `more` says better.
        way_out: a further one, as a sentence.
        choose: how another run gets a place of its own.

    Raises:
        UserError: another identity; every difference is named.
    """
    if old["fingerprint"] == new["fingerprint"]:
        return
    lines = differences(old["identity"], new["identity"])
    named = [line for line in lines if line.startswith(OTHER_BUNDLE)]
    if named:  # every hash of another bundle is another
        lines = [line for line in lines if not line.startswith(("bundle.", "protocol")) or line in named]
    if more and covered:
        lines = [line for line in lines if not line.startswith(covered)]
    lines = [line if len(line) <= LONGEST else f"{line[:LONGEST]} ..." for line in lines]
    lines.sort(key=lambda line: not line.startswith("config."))  # what the user has typed comes first
    raise UserError(
        f"{run} belongs to another run:\n    " + "\n    ".join([*lines, *more]),
        f"{choose}, or restore the old settings and inputs to go on with this one. {way_out}".strip(),
    )
