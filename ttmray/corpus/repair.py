"""Damage of a corpus or pool: found at every launch, and made again by the job that made it in the first place.

A unit whose index file, shard or captions are not what was committed is forgotten: its index file is deleted, so that
the job makes the unit once more. Everything else (`plan.*`, merged index, statistics, summary) follows from the units
and the catalogue, and is written again by the end of the job.
"""

import re
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from ttmray import inventory, runs
from ttmray.console import console
from ttmray.corpus import index, shards
from ttmray.corpus.plan import PLAN_FILE, Plan
from ttmray.errors import UserError
from ttmray.inventory import Damage, restore_run
from ttmray.runs import RUN, SUCCESS
from ttmray.storage import Folder

_OF_UNIT = re.compile(rf"(?:{index.INDEX}/([^/]+)\.parquet|(?:{shards.SHARDS}|{shards.CAPTIONS})/([^/]+)-[^/-]+)")


def existing_run(run: Folder, kind: str, beside: Collection[str]) -> dict[str, Any] | None:
    """`runs.existing`, after `run.json` was written again from its copy where it was lost.

    Returns:
        None, too, where the copy is lost as well, and units say which run they are of: see `take_back`.

    Raises:
        UserError: as there.
    """
    if restore_run(run, kind) is not None:
        console.print(f"{RUN} is missing or damaged; it is made again", style="yellow")
    try:
        return runs.existing(run, kind, beside)
    except UserError:
        if runs.sound(run) or not _run_of_units(run):
            raise
        return None


def take_back(run: Folder, described: dict[str, Any], existing: dict[str, Any] | None) -> dict[str, Any] | None:
    """`run.json` of the run that the command describes; written again where it and its copy are lost, or those of
    another run, and units say that they are of this one.

    Args:
        existing: of `existing_run`.

    Returns:
        None in a new folder; `existing` where another run was there before.

    Raises:
        UserError: nothing but its units says what run it is, and they are of another one.
    """
    restored = existing and restore_run(run, described["kind"], described["fingerprint"])
    if restored or (existing and existing["fingerprint"] == described["fingerprint"]):
        return restored or existing
    if not (said := _run_of_units(run)):
        return existing
    if said != described["fingerprint"]:
        if existing:
            return existing
        raise UserError(
            f"{run} belongs to another run: {RUN} and its copy are lost, and its units are not of this run.",
            "Choose a new output folder, or restore the old settings and inputs to go on with this one.",
        )
    console.print(f"{RUN} is lost, and its copy; all units are of this run, so it is made again", style="yellow")
    inventory.clear(run, RUN)
    runs.write(run, described)
    return described


def _run_of_units(run: Folder) -> str:
    """Fingerprint of the run that most of the first units name; empty where none does, as older versions did not."""
    said = Counter[str]()
    for name in index.committed_units(run)[: index.BLOCK]:
        with suppress(UserError):  # a damaged one, of which `forget_damaged` speaks
            said.update(metadata["run"] for _, metadata in index.read_units(run, [name]) if "run" in metadata)
    return said.most_common(1)[0][0] if said else ""


def forget_damaged(run: Folder, plan: Plan, fingerprint: str, everything: bool = False) -> None:
    """Forget the units that are damaged, and that the run was finished where anything is; says what.

    Of a finished run the sizes of all files and the hashes of the smallest are compared with `_SUCCESS.json`. Of an
    unfinished one every index file is read, and its unit's files must have the sizes that it says; and the hashes, too,
    the smallest, where the run was at its end, and what that has noted is damaged or gone.

    Args:
        plan: of the run, as its command makes it.
        fingerprint: of the run.
        everything: compare every hash, and have the end of the job done once more.

    Raises:
        UserError: a folder with something in it has the name of a file.
    """
    marker = inventory.read_marker(run)
    sealed = marker is not None and marker.get("fingerprint") == fingerprint and "files" in marker
    damaged = inventory.damage(run, marker, everything) if marker is not None and sealed else []
    unlisted = any(problem.name == inventory.FILES for problem in damaged)
    if everything or not sealed or unlisted:
        known = {problem.name for problem in damaged}
        lost = unlisted or (not sealed and (run.exists(SUCCESS) or run.exists(index.MERGED)))
        units_damage = _unit_damage(run, plan, fingerprint, everything, lost)
        damaged += [problem for problem in units_damage if problem.name not in known]
    try:
        Plan.load(run)
    except UserError as error:
        if run.exists(PLAN_FILE) and PLAN_FILE not in {problem.name for problem in damaged}:
            damaged.append(Damage(PLAN_FILE, error.message.removeprefix(f"{run.path(PLAN_FILE)} ")))
    units = set()
    for problem in damaged:
        console.print(f"{problem}; it is made again", style="yellow")
        if match := _OF_UNIT.match(problem.name):
            units.add(match[1] or match[2])
            if match[2]:
                inventory.clear(run, problem.name)
        else:
            inventory.clear(run, problem.name)
    for name in sorted(units):
        inventory.clear(run, f"{index.INDEX}/{name}.parquet")
    if run.exists(SUCCESS) and (damaged or everything or not sealed):
        inventory.clear(run, SUCCESS)  # last: whoever is killed before finds the same damage again


def _unit_damage(run: Folder, plan: Plan, fingerprint: str, every_hash: bool, small_hashes: bool) -> list[Damage]:
    """Committed units that do not fit the plan, or whose files are not those that their index files describe.

    Args:
        every_hash, small_hashes: compare the hashes of all files, or of the smallest; else sizes alone.
    """
    sizes = {
        f"{folder}/{listed.name}": listed.size
        for folder in (shards.SHARDS, shards.CAPTIONS)
        for listed in run.files(folder)
    }
    wrong = []
    promised: dict[str, str] = {}
    bytes_of: dict[str, int] = {}
    for name in index.committed_units(run):
        file = f"{index.INDEX}/{name}.parquet"
        try:
            rows, metadata = index.read_units(run, [name])[0]
        except UserError as error:
            wrong.append(Damage(file, error.message.removeprefix(f"{run.path(file)} ")))
            continue
        if metadata.get("run", fingerprint) != fingerprint:
            wrong.append(Damage(file, "is of another run"))
        elif set(plan.of([name]).table["track_id"].to_pylist()) != set(rows["track_id"].to_pylist()):
            wrong.append(Damage(file, "its tracks are not those that the plan has in this unit"))
        for path, facts in metadata["files"].items():
            if sizes.get(path) != facts["bytes"]:
                wrong.append(Damage(path, f"has {sizes.get(path, 'no')} bytes, {facts['bytes']} were written"))
            else:
                promised[path], bytes_of[path] = facts["sha256"], facts["bytes"]
    if every_hash or small_hashes:
        hashes = inventory.entries(run, promised if every_hash else inventory.smallest(bytes_of))
        wrong += [
            Damage(path, "its SHA-256 differs from the index")
            for path, now in hashes.items()
            if now.sha256 != promised[path]
        ]
    return wrong
