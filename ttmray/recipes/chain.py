"""Steps that follow each other in one run folder: skipped when done, timed, shown on one page.

`steps/<name>.json` says with what a step was last run, whether that ended well, and what all its launches cost.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from ttmray import cost, pages
from ttmray.cluster import alone
from ttmray.config import ConfigT, load_config
from ttmray.console import console
from ttmray.errors import EXIT_OK, UserError
from ttmray.inventory import damage, kind_of, read_marker
from ttmray.json_text import read_json
from ttmray.recipes.chain_plan import Step, StepCost, show_plan, write_plan, write_steps
from ttmray.recipes.needs import refuse_missing, without_devices
from ttmray.recipes.result_page import chain_values
from ttmray.runs import RUN, SUCCESS
from ttmray.storage import Folder

PAPER_GPU_HOURS = 40
"""On an RTX A5000: ranker, supervised training, expert iteration and CRPO (III-D). Stage 1 alone is 32."""


def run_chain(
    root: Folder,
    steps: Sequence[Step],
    prints: Mapping[str, str],
    *,
    first: str | None = None,
    last: str | None = None,
    plan_only: bool = False,
    about: Sequence[str] = (),
) -> int:
    """Run the steps that are not done, in order; returns the exit code of the first that does not end well, else 0.

    Args:
        prints: step -> fingerprint of all that its result depends on.
        first: step to start with; those before it must be done, with whatever settings.
        last: step to end with.
        plan_only: print the steps and their states, look at what they need, and stop.
        about: lines on what the chain does; a plan has them in its file.

    Raises:
        UserError: unknown steps, a missing result before `first`, anything that a step to do needs and that is not
            there (before any step starts, all of it at once), and what the jobs raise.
    """
    names = [step.name for step in steps]
    for flag, name in (("--from", first), ("--until", last)):
        if name is not None and name not in names:
            raise UserError(f"{flag} {name}: there is no such step.", f"Steps of this config: {', '.join(names)}.")
    start, stop = names.index(first or names[0]), names.index(last or names[-1])
    if root.exists(RUN):
        raise UserError(f"{root} is a run of kind {kind_of(root)}, no chain.", "Choose another output.")
    if not root.remote and os.path.isfile(root.uri):
        raise UserError(f"{root} is a file, not a folder.", "Choose another output.")
    if start > stop:
        raise UserError(f"--from {first} comes after --until {last}.", f"Their order is: {', '.join(names)}.")
    text = show_plan(_rows(root, steps, prints), about) if plan_only else b""
    for step in steps[:start]:
        missing = [name for name in step.makes if not root.exists(name)]
        if missing:
            raise UserError(f"--from {first}: step {step.name} is not done: {missing[0]} is missing.", "Start earlier.")
    todo = [step for step in steps[start : stop + 1] if not is_done(root, step, prints[step.name])]
    needs = {step.name: step.needs for step in todo}
    refuse_missing(without_devices(needs) if plan_only else needs)
    if plan_only:
        write_plan(root, text)
        return EXIT_OK
    for line in about:
        console.print(line)
    write_steps(root, steps)
    try:
        for step in todo:
            console.rule(f"{step.name} ({names.index(step.name) + 1} of {len(names)})")
            code = _run(root, step, prints[step.name])
            if code != EXIT_OK:
                console.print(f"step {step.name} ended with exit code {code}, and the chain with it", style="red")
                return code
    finally:
        _write_page(root, steps, prints)
    if not todo:
        console.print(f"nothing to do: all {stop - start + 1} steps are done")
    console.print(_table(root, steps, prints))
    console.print(f"open {root.path('index.html')}", markup=False)
    return EXIT_OK


def _write_page(root: Folder, steps: Sequence[Step], prints: Mapping[str, str]) -> None:
    """The result page. What keeps it from being made is said, and hides no step's own end."""
    try:
        write_page(root, steps, prints)
    except Exception as error:  # of files that a step has left in whatever state
        console.print(f"no page was made: {error}", style="yellow", markup=False)


def _spent(row: StepCost) -> tuple[str, str]:
    """Wall seconds and GPU-hours; dashes for what has not begun."""
    return ("–", "–") if row.state == "to do" else (f"{row.seconds:.1f}", f"{row.gpu_hours:.2f}")


def is_done(root: Folder, step: Step, made_with: str) -> bool:
    """Whether the step ended well with this fingerprint, and what it made is there."""
    record = step_record(root, step.name)
    return record["done"] and record["fingerprint"] == made_with and all(_sound(root, name) for name in step.makes)


def _sound(root: Folder, name: str) -> bool:
    """Whether a file that a step made is there; a success marker with its run's files as it says (`inventory.damage`):
    else the step runs once more, which makes them again."""
    if not root.exists(name) or name.rpartition("/")[2] != SUCCESS:
        return root.exists(name)
    run = root.sub(name.rpartition("/")[0])
    marker = read_marker(run)
    return marker is not None and not damage(run, marker)


def step_record(root: Folder, name: str) -> dict[str, Any]:
    """With what a step was last run, whether that ended well, and what all its launches have cost.

    Raises:
        UserError: its file is no record.
    """
    file = f"steps/{name}.json"
    empty = {"fingerprint": "", "done": False, "seconds": 0.0, "cpu_seconds": 0.0, "gpu_seconds": 0.0, "launches": 0}
    if not root.exists(file):
        return empty
    try:
        record = read_json(root.read(file))
        # records of older runs have no CPU seconds; one whose last launch was stopped says why
        if (record.keys() | {"cpu_seconds"}) - {"stopped"} == empty.keys():
            return empty | record
    except (ValueError, AttributeError):  # no JSON, or no object
        pass
    raise UserError(f"{root.path(file)} is no record of a step.", "Delete it: the step then finds out what is done.")


def _run(root: Folder, step: Step, made_with: str) -> int:
    file, record = f"steps/{step.name}.json", step_record(root, step.name)
    record |= {"fingerprint": made_with, "done": False, "launches": record["launches"] + 1}
    record.pop("stopped", None)
    root.write(file, json.dumps(record, indent=1).encode())
    with alone(), cost.account(root, file):
        try:
            code = step.run()
        except UserError as error:
            raise UserError(f"step {step.name}: {error.message}", error.hint) from error
    if code == EXIT_OK:
        missing = [name for name in step.makes if not root.exists(name)]
        if missing:
            raise RuntimeError(f"step {step.name} ended well, but {missing[0]} is missing")
        root.write(file, json.dumps(step_record(root, step.name) | {"done": True}, indent=1).encode())
    return code


def _rows(root: Folder, steps: Sequence[Step], prints: Mapping[str, str]) -> list[StepCost]:
    rows = []
    for step in steps:
        record = step_record(root, step.name)
        state = "done" if is_done(root, step, prints[step.name]) else "begun" if record["launches"] else "to do"
        rows.append(StepCost(step, state, record["seconds"], record["gpu_seconds"] / 3600))
    return rows


def _totals(rows: Sequence[StepCost]) -> str:
    gpu_hours, in_paper = sum(row.gpu_hours for row in rows), [row for row in rows if row.step.in_paper]
    text = f"{gpu_hours:.2f} GPU-hours in all"
    if not gpu_hours:
        text = f"{sum(row.seconds for row in rows) / 3600:.2f} hours in all, without a GPU"
    if in_paper:
        ours = f"{sum(row.gpu_hours for row in in_paper):.2f} of them for " if gpu_hours else "with "
        text += f", {ours}{', '.join(row.step.name for row in in_paper)}, which took the paper about "
        text += f"{PAPER_GPU_HOURS} GPU-hours (RTX A5000)"
    return text


def _table(root: Folder, steps: Sequence[Step], prints: Mapping[str, str]) -> Table:
    rows = _rows(root, steps, prints)
    table = Table("step", "state", "wall s", "GPU-hours", caption=_totals(rows))
    for row in rows:
        table.add_row(row.step.name, row.state, *_spent(row))
    return table


def write_page(root: Folder, steps: Sequence[Step], prints: Mapping[str, str]) -> None:
    """`summary.md` and `index.html`: every step with its state, its cost and what to open."""
    rows = _rows(root, steps, prints)
    cells = [
        (
            (row.step.name, row.state, *_spent(row)),
            row.step.page if row.step.page and root.exists(row.step.page) else "",
        )
        for row in rows
    ]
    values: dict[str, Any] = {
        "title": os.path.basename(root.uri),
        "header": ("step", "state", "wall s", "GPU-hours", "page"),
        "totals": _totals(rows),
        "note": "Wall time is that of all launches of a step. A GPU counts as long as a step holds it, busy or not.",
    }
    values |= chain_values(root, {step.name: step.config for step in steps})
    links = [(*texts, f"[{page}]({page})" if page else "") for texts, page in cells]
    root.write("summary.md", pages.render("chain.md.j2", rows=links, **values).encode())
    root.write("index.html", pages.render("chain.html.j2", rows=cells, **values).encode())


def fill(kind: type[ConfigT], name: str, section: Mapping[str, Any], links: Mapping[str, Any]) -> ConfigT:
    """The config of a step: its section, and where that says nothing what the chain fills in.

    Raises:
        UserError: for a section that is wrong, with its name.
    """
    if "output" in section:
        raise UserError(f"{name}.output: every step has its own folder below output.", "Leave it out.")
    known = {field: value for field, value in links.items() if field in kind.model_fields and value is not None}
    try:
        return load_config(kind, fields=merged(known, section), missing=f"`{{place}}: {{value}}` in section {name}")
    except UserError as error:
        raise UserError(f"section {name}: {error.message}", error.hint) from error


def merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Both, `high` where they differ; lists of mappings are merged item by item."""
    both = dict(low) | dict(high)
    for field in low.keys() & high.keys():
        a, b = low[field], high[field]
        if isinstance(a, dict) and isinstance(b, dict):
            both[field] = merged(a, b)
        elif isinstance(a, list) and isinstance(b, list) and len(a) == 1 and all(isinstance(one, dict) for one in b):
            both[field] = [merged(a[0], one) for one in b]
    return both
