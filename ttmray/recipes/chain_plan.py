"""The steps of a chain and their plan: ten lines on the console, all of it in `plan.md`; `chain.json` names the steps
for `ttmray status`."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ttmray import inventory
from ttmray.config import Config
from ttmray.console import console
from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.recipes.needs import Need
from ttmray.runs import SUCCESS
from ttmray.storage import Folder

STEPS_FILE, PLAN_FILE = "chain.json", "plan.md"
SHOWN = 6
"""Steps on the console."""
UNKNOWN = "not known"


@dataclass(frozen=True)
class Step:
    """A step of a chain.

    Attributes:
        config: of its job.
        run: the job; goes on where it was and returns its exit code.
        makes: files below the run folder that are there when it is done.
        after: steps whose results it takes.
        page: what people should open, below the run folder.
        in_paper: whether its cost is part of what the paper reports.
        needs: what must be there from outside of the run folder.
    """

    name: str
    config: Config
    run: Callable[[], int]
    makes: tuple[str, ...]
    after: tuple[str, ...] = ()
    page: str = ""
    in_paper: bool = False
    needs: tuple[Need, ...] = ()


class StepCost(NamedTuple):
    """What a step has cost so far: all its launches, killed ones included."""

    step: Step
    state: str
    seconds: float
    gpu_hours: float


def write_steps(root: Folder, steps: Sequence[Step]) -> None:
    """Write the names of the steps in their order, each with the folder of its job below `root`, where it has one, and
    with the files that it makes."""
    listed = [{"name": step.name, "folder": _folder(root, step), "makes": list(step.makes)} for step in steps]
    data = json.dumps({"steps": listed}, indent=1).encode()
    if not root.exists(STEPS_FILE) or root.read(STEPS_FILE) != data:
        root.write(STEPS_FILE, data)


def _folder(root: Folder, step: Step) -> str:
    output = str(getattr(step.config, "output", ""))
    if output.startswith(f"{root.uri}/"):
        return output.removeprefix(f"{root.uri}/")
    return step.makes[0].rpartition("/")[0] if step.makes else ""


def read_steps(root: Folder) -> list[dict[str, Any]] | None:
    """`name`, `folder` and `makes` of the steps in order; None where no chain has said them. Chains of earlier
    versions did not say what a step makes.

    Raises:
        UserError: the file is damaged.
    """
    if not root.exists(STEPS_FILE):
        return None
    try:
        steps = [
            {"name": str(one["name"]), "folder": str(one["folder"]), "makes": [str(n) for n in one.get("makes", ())]}
            for one in _listed(root)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{root.path(STEPS_FILE)} is damaged.", "Delete it: the next launch of the chain writes it."
        ) from error
    return steps


def absent(root: Folder, step: Mapping[str, Any]) -> list[str]:
    """What is not there of all that a step makes; of a step that does not say what, its folder where nothing is in it.

    Args:
        step: of `read_steps`.
    """
    if step["makes"] or not step["folder"]:
        return [name for name in step["makes"] if not root.exists(name)]
    return [] if root.files(step["folder"], sizes=False) else [step["folder"]]


def lost(root: Folder, step: Mapping[str, Any]) -> list[str]:
    """`absent`, and by names and sizes what is gone of the files that its run has noted, a line each."""
    wrong = {name: "is missing" for name in absent(root, step)}
    run = root.sub(step["folder"]) if step["folder"] else root
    if (marker := inventory.read_marker(run)) is not None:
        wrong |= {f"{step['folder']}/{name}": how for name, how in inventory.lost(run, marker)}
    elif run.exists(SUCCESS):
        wrong[f"{step['folder']}/{SUCCESS}"] = "is damaged"
    return [f"{name} {how}" for name, how in wrong.items()]


def _listed(root: Folder) -> list[Any]:
    return list(read_json(root.read(STEPS_FILE))["steps"])


def show_plan(rows: Sequence[StepCost], about: Sequence[str]) -> bytes:
    """Say which steps are to be done and how long they take here; returns all of it, for `plan.md`.

    Args:
        about: what else there is to know of the plan.
    """
    todo = [row for row in rows if row.state != "done"]
    from ttmray.recipes.estimates import estimates  # it knows models; `ttmray status` reads steps without them

    taken, why = estimates({row.step.name: row.step.config for row in todo})
    lines = [(row.step.name, _state(row), taken.get(row.step.name, UNKNOWN)) for row in todo]
    done = f"{len(rows) - len(todo)} of {len(rows)} steps are done"
    console.print(f"{done}; time here: {why or UNKNOWN}" if todo else f"{done}, nothing is to do")
    width = max((len(name) for name, _, _ in lines[:SHOWN]), default=0)
    for name, state, time in lines[:SHOWN]:
        console.print(f"  {name:<{width}}  {state}, {time}")
    if len(lines) > SHOWN:
        console.print(f"  and {len(lines) - SHOWN} more")
    table = ["| step | state | time here |", "|---|---|---|"]
    table += [f"| {row.step.name} | {_state(row)} | {_time(row, taken)} |" for row in rows]
    text = ["# Plan", "", *(f"{line}\n" for line in about), *table, "", *([f"Time here: {why}."] if why else [])]
    return ("\n".join(text).rstrip() + "\n").encode()


def write_plan(root: Folder, text: bytes) -> None:
    """Write `plan.md` and say where it is."""
    root.write(PLAN_FILE, text)
    console.print(f"all steps: {root.path(PLAN_FILE)}")


def _state(row: StepCost) -> str:
    return f"{row.state}, {row.seconds:.3g} s so far" if row.seconds and row.state == "begun" else row.state


def _time(row: StepCost, taken: dict[str, str]) -> str:
    return "" if row.state == "done" else taken.get(row.step.name, UNKNOWN)
