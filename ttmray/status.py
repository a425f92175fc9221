"""`ttmray status`: how far a run of any kind or a chain is, from plain files, while it runs or after it stopped."""

import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from ttmray import cost, inventory, runs
from ttmray.console import console
from ttmray.errors import EXIT_OK, UserError
from ttmray.json_text import read_json
from ttmray.recipes.chain_plan import STEPS_FILE, lost, read_steps
from ttmray.runs import RUN, SUCCESS, require_folder
from ttmray.storage import Folder

STEPS = "steps"
"""Folder of a chain with a record per step."""
LOG = "metrics.jsonl"
NUMBERS = ("loss", "lr", "samples_per_s")
LISTED = 20
"""Runs in a folder that is none itself, of which status tells."""
INDENT = "  "


def status(folder: str) -> int:
    """Print how far a run is, at which rate, when it should end, and where and why it stopped; of a folder that is no
    run the same of those in it.

    Raises:
        UserError: the folder holds no run.
    """
    root = Folder.at(folder)
    require_folder(root)
    if root.exists(RUN) or root.exists(SUCCESS):
        lines = run_lines(root)
    elif root.exists(STEPS_FILE) or root.files(STEPS, sizes=False):
        lines = _chain_lines(root)
    else:
        lines = _lines_of_others(root)
    for line in lines:
        console.print(line, markup=False)
    return EXIT_OK


def run_lines(run: Folder) -> Iterator[str]:
    """Lines about a run of any kind."""
    kind, marker = inventory.kind_of(run), inventory.read_marker(run)
    done = marker is not None
    yield f"{run}: {kind}, {'finished' if done else 'not finished'}"
    for line in _how_far(run, kind, done):
        yield f"{INDENT}{line}"
    if run.exists(SUCCESS) and not done:
        yield f"{INDENT}{inventory.marker_problem(run)}"
    if marker is not None and (gone := inventory.lost(run, marker)):
        more = f", and {len(gone) - 1} more" if len(gone) > 1 else ""
        yield f"{INDENT}{gone[0]}{more}: the same command makes it again"
    if not done:
        yield f"{INDENT}the same command goes on with it, unless it is still running"
    for line in _cost_lines(run, done):
        yield f"{INDENT}{line}"


def _how_far(run: Folder, kind: str, done: bool) -> Iterator[str]:
    if kind in runs.KINDS_OF_CORPUS:
        from ttmray.corpus import look

        yield from look.status_lines(run)
    if kind == "generate":
        yield _clips(run)
    if row := last_row(run):
        yield _progress(row)
    if kind == "expert-iteration" and not done:
        for phase in _runs_below(run):
            yield from (line.replace(f"{run}/", "") for line in run_lines(run.sub(phase)))


def last_row(run: Folder) -> dict[str, Any]:
    """The last whole line of a training's log about its updates, else the last of any; empty where there is none."""
    if not run.exists(LOG):
        return {}
    other: dict[str, Any] = {}
    for line in reversed(run.read(LOG).decode(errors="replace").splitlines()):
        try:
            row = read_json(line)
        except ValueError:  # what a killed process left half-written
            continue
        if isinstance(row, dict) and "step" in row:
            if "loss" in row:
                return row
            other = other or row
    return other


def _progress(row: Mapping[str, Any]) -> str:
    parts = [f"step {row['step']}"]
    parts += [f"{name} {row[name]:.4g}" for name in NUMBERS if isinstance(row.get(name), int | float)]
    if row.get("eta_s"):
        parts.append(f"{timedelta(seconds=round(row['eta_s']))} were left then")
    return ", ".join(parts)


def _clips(run: Folder) -> str:
    from ttmray.generation import manifest

    rows = manifest.read_rows(run).values()
    count = sum(row["status"] == manifest.OK for row in rows)
    return f"{count} clips ok, {len(rows) - count} failed"


def _cost_lines(run: Folder, done: bool) -> list[str]:
    if not run.exists(cost.COST):
        return []
    fields = cost.read(run)
    lines = [f"cost so far: {cost.said(run)}"]
    if not done and (counted := _counted(fields.get("progress"))) is not None:
        lines.append(counted)
    if (noted := fields.get("noted")) is not None:
        ago = timedelta(seconds=round(max(0.0, time.time() - noted)))
        lines.append(f"last written {datetime.fromtimestamp(noted, UTC):%Y-%m-%d %H:%M:%S} UTC, {ago} ago")
    if fields.get("stopped"):
        lines.append(f"stopped: {fields['stopped']}")
    return lines


def _counted(progress: Any) -> str | None:
    """What a launch was counting when it last noted its cost, and how long the rest would have taken."""
    try:
        done, total, rate = int(progress["done"]), int(progress["total"]), float(progress["rate"])
        text = f"{progress['what']}: {done} of {total} of that launch"
        left = timedelta(seconds=round((total - done) / rate)) if rate > 0 else None
    except (KeyError, TypeError, ValueError, OverflowError):  # none, or of another version
        return None
    return text if left is None else f"{text}, {rate:.3g}/s, {left} were left then"


def _runs_below(root: Folder, signs: tuple[str, ...] = (RUN,)) -> list[str]:
    """Names of the folders below that hold a run, or another file that is a sign of one, in order."""
    names = (file.name.rpartition("/") for file in root.files(sizes=False))
    return sorted({folder for folder, _, name in names if folder and name in signs})


def _lines_of_others(root: Folder) -> Iterator[str]:
    """Of the runs in a folder.

    Raises:
        UserError: there are none.
    """
    names = _runs_below(root, (RUN, SUCCESS))
    outermost = [name for name in names if not any(name.startswith(f"{other}/") for other in names)]
    if not outermost:
        planned = root.exists("plan.md")
        raise UserError(
            f"{root} is no run: it has no {RUN}{', only a plan' if planned else ''}.",
            "Start its command without --plan-only." if planned else "Give the output folder of a command.",
        )
    yield f"{root}: no run itself, {len(outermost)} in it"
    for name in outermost[:LISTED]:
        yield from run_lines(root.sub(name))
    if len(outermost) > LISTED:
        yield f"and {len(outermost) - LISTED} more"


def _chain_lines(root: Folder) -> Iterator[str]:
    """Of every step, and of the run of one that is begun."""
    records = sorted(entry.name.removesuffix(".json") for entry in root.sub(STEPS).files(sizes=False))
    steps = read_steps(root) or [{"name": name, "folder": "", "makes": []} for name in records]
    states = {name: _record(root, name) for name in records}
    ended = [step for step in steps if step["name"] in states and states[step["name"]]["done"]]
    gone = {step["name"]: lines for step in ended if (lines := lost(root, step))}
    done = len(ended) - len(gone)
    yield f"{root}: a chain of {len(steps)} steps, {done} done"
    for step in steps:
        name, folder = step["name"], step["folder"]
        if name not in states:
            yield f"{INDENT}{name}: to do"
            continue
        record = states[name]
        state = "was done, and is gone" if name in gone else "done" if record["done"] else "begun"
        yield f"{INDENT}{name}: {state}, {record['seconds'] / 3600:.3g} h in {record['launches']} launches"
        if name in gone:
            yield from (f"{INDENT * 2}{line}" for line in gone[name][:LISTED])
            if len(gone[name]) > LISTED:
                yield f"{INDENT * 2}and {len(gone[name]) - LISTED} more"
        if record["done"]:
            continue
        if folder and (root.sub(folder).exists(RUN) or root.sub(folder).exists(SUCCESS)):
            yield from (f"{INDENT * 2}{line.replace(f'{root}/', '')}" for line in run_lines(root.sub(folder)))
        if record.get("stopped"):
            yield f"{INDENT * 2}stopped: {record['stopped']}"
    if done < len(steps):
        again = ["makes again what is gone"] if gone else []
        rest = ["goes on with what is not done"] if done + len(gone) < len(steps) else []
        yield f"the same command {' and '.join(again + rest)}"


def _record(root: Folder, name: str) -> dict[str, Any]:
    path = f"{STEPS}/{name}.json"
    try:
        record: dict[str, Any] = read_json(root.read(path))
        typed = {"seconds": float(record["seconds"]), "done": bool(record["done"]), "launches": int(record["launches"])}
        return record | typed
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{root.path(path)} is no record of a step.",
            "Delete it: the step then finds out what is done.",
        ) from error
