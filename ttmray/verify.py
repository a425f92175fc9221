"""`ttmray verify`: is a run of any kind what was written? Reads every byte once, changes nothing."""

import json
from collections.abc import Iterator

from rich.markup import escape

from ttmray import inventory, runs
from ttmray.console import console
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from ttmray.runs import RUN, SUCCESS
from ttmray.storage import Folder

CHECKPOINTS, SNAPSHOTS = "checkpoints", "ema"


def verify(folder: str) -> int:
    """Check a run; exit code 2 when anything is wrong.

    Raises:
        UserError: the folder holds no run.
    """
    run = Folder.at(folder)
    if _kind(run) in runs.KINDS_OF_CORPUS:
        from ttmray.corpus import look

        return look.verify(folder)
    lines = list(problems(run))
    for line in lines:
        console.print(f"[red]{escape(line)}[/red]")
    console.print(f"{run}: {len(lines) or 'no'} problems", markup=False)
    if lines:
        console.print(
            "  Start the same command again: it makes again what is damaged, and says what it cannot.", markup=False
        )
    return EXIT_BAD_INPUT if lines else EXIT_OK


def problems(run: Folder) -> Iterator[str]:
    """Everything that is wrong with a run of any kind but a corpus (`corpus/verify.py`), one line each: its files by
    `_SUCCESS.json`, its checkpoints and the clips of its manifest by the hashes that they carry.

    Raises:
        UserError: the folder holds no run.
    """
    kind = _kind(run)
    try:
        runs.read(run, kind)
    except UserError as error:
        yield error.message
    if kind == "generate":
        yield from _clip_problems(run)
    if problem := inventory.marker_problem(run):
        yield problem
    elif marker := inventory.read_marker(run):
        yield from map(str, inventory.damage(run, marker, every_hash=True))
    yield from _snapshot_problems(run)
    if run.files(CHECKPOINTS, sizes=False):
        from ttmray.training import checkpoint

        for name in checkpoint.committed(run.sub(CHECKPOINTS)):
            try:
                checkpoint.verify(run.sub(CHECKPOINTS).sub(name))
            except UserError as error:
                yield error.message


def _snapshot_problems(run: Folder) -> Iterator[str]:
    """Averages that are not what was written, by the hashes that they carry."""
    from ttmray.training.tensors import unpack

    snapshots = run.sub(SNAPSHOTS)
    for name in (file.name for file in snapshots.files(sizes=False) if file.name.endswith(".safetensors")):
        try:
            unpack(snapshots.read(name), snapshots.path(name))
        except UserError as error:
            yield error.message


def _kind(run: Folder) -> str:
    """Kind of a run, by `run.json` or the copy of it in `_SUCCESS.json`."""
    if not run.exists(RUN) and not run.exists(SUCCESS):
        raise UserError(f"{run} is no run: it has no {RUN}.", "Give the output folder of a command.")
    try:
        return str(json.loads(run.read(RUN))["kind"])
    except (UserError, ValueError, KeyError, TypeError):
        return str((inventory.read_marker(run) or {}).get("run", {}).get("kind", "corpus"))


def _clip_problems(run: Folder) -> Iterator[str]:
    """Clips of a generation run that are not what their rows say."""
    from ttmray.generation import manifest

    try:
        rows = manifest.read_rows(run)
    except UserError as error:
        yield error.message
        return
    ok = [row for row in rows.values() if row["status"] == manifest.OK]
    whole = manifest.intact(run, ok)
    yield from (f"{row['file']} is missing or damaged" for row in ok if row["name"] not in whole)
