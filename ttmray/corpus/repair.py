"""Damage of a corpus or pool: found at every launch, and made again by the job that made it in the first place.

A unit whose index file, shard or captions are not what was committed is forgotten: its index file is deleted, so that
the job makes the unit once more. Everything else (`plan.*`, merged index, statistics, summary) follows from the units
and the catalogue, and is written again by the end of the job.
"""

import re
from collections.abc import Collection
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

    Raises:
        UserError: as there.
    """
    if restore_run(run, kind) is not None:
        console.print(f"{RUN} is missing or damaged; it is made again", style="yellow")
    return runs.existing(run, kind, beside)


def forget_damaged(run: Folder, plan: Plan, fingerprint: str, everything: bool = False) -> None:
    """Forget the units that are damaged, and that the run was finished where anything is; says what.

    Of a finished run the sizes of all files and the hashes of the smallest are compared with `_SUCCESS.json`. Of an
    unfinished one every index file is read, and its unit's files must have the sizes that it says; and the hashes, too,
    the smallest, where what the end of the run has noted is itself damaged.

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
        lost = unlisted or (not sealed and run.exists(SUCCESS))
        damaged += [problem for problem in _unit_damage(run, plan, everything, lost) if problem.name not in known]
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


def _unit_damage(run: Folder, plan: Plan, every_hash: bool, small_hashes: bool) -> list[Damage]:
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
        if set(plan.of([name]).table["track_id"].to_pylist()) != set(rows["track_id"].to_pylist()):
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
