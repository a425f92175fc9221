"""`ttmray status`: how far a run of any kind or a chain is, from plain files, while it runs or after it stopped."""

import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from ttmray import cost, inventory, runs
from ttmray.console import console
from ttmray.errors import EXIT_OK, UserError
from ttmray.runs import RUN, SUCCESS
from ttmray.storage import Folder

STEPS = "steps"
"""Folder of a chain with a record per step."""
LOG = "metrics.jsonl"
NUMBERS = ("loss", "lr", "samples_per_s")


def status(folder: str) -> int:
    """Print how far a run is, at which rate, when it should end, and where and why it stopped.

    Raises:
        UserError: the folder holds no run.
    """
    run = Folder.at(folder)
    if not run.exists(RUN) and not run.exists(SUCCESS):
        if records := sorted(entry.name for entry in run.sub(STEPS).files(sizes=False)):
            return _chain(run, records)
        raise UserError(f"{run} is no run: it has no {RUN}.", "Give the output folder of a command.")
    kind = inventory.kind_of(run)
    done = inventory.finished(run)
    if kind in runs.KINDS_OF_CORPUS:
        from ttmray.corpus import look

        look.status(folder)
    else:
        console.print(f"{run}: {kind}, {'finished' if done else 'not finished'}", markup=False)
        if kind == "generate":
            console.print(f"  {_clips(run)}", markup=False)
        if row := last_row(run):
            console.print(f"  {_progress(row)}", markup=False)
        if run.exists(SUCCESS) and not done:
            console.print(f"  {inventory.marker_problem(run)}", style="yellow", markup=False)
        if not done:
            console.print("  the same command goes on with it, unless it is still running")
    for line in _cost_lines(run):
        console.print(f"  {line}", markup=False)
    return EXIT_OK


def last_row(run: Folder) -> dict[str, Any]:
    """The last whole line of a training's log; empty where there is none."""
    if not run.exists(LOG):
        return {}
    for line in reversed(run.read(LOG).decode(errors="replace").splitlines()):
        try:
            row = json.loads(line)
        except ValueError:  # what a killed process left half-written
            continue
        if isinstance(row, dict) and "step" in row:
            return row
    return {}


def _progress(row: dict[str, Any]) -> str:
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


def _cost_lines(run: Folder) -> list[str]:
    if not run.exists(cost.COST):
        return []
    fields = cost.read(run)
    lines = [f"cost so far: {cost.said(run)}"]
    if (noted := fields.get("noted")) is not None:
        ago = timedelta(seconds=round(max(0.0, time.time() - noted)))
        lines.append(f"last written {datetime.fromtimestamp(noted, UTC):%Y-%m-%d %H:%M:%S} UTC, {ago} ago")
    if fields.get("stopped"):
        lines.append(f"stopped: {fields['stopped']}")
    return lines


def _chain(root: Folder, records: list[str]) -> int:
    console.print(f"{root}: a chain of steps", markup=False)
    for name in records:
        try:
            record = json.loads(root.sub(STEPS).read(name))
            state = "done" if record["done"] else "begun"
            text = f"{state}, {record['seconds'] / 3600:.3f} h in {record['launches']} launches"
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{root.sub(STEPS).path(name)} is no record of a step.",
                "Delete it: the step then finds out what is done.",
            ) from error
        console.print(f"  {name.removesuffix('.json')}: {text}", markup=False)
    console.print("the same command goes on with what is not done", markup=False)
    return EXIT_OK
