"""Damage of a corpus or pool: found at every launch, and made again by the job that made it in the first place.

A unit whose index file, shard or captions are not what was committed is forgotten: its index file is deleted, so that
the job makes the unit once more. Everything else (`plan.*`, merged index, statistics, summary) follows from the units
and the catalogue, and is written again by the end of the job.
"""

import re
from collections.abc import Collection
from typing import Any

from rich.markup import escape

from ttmray import inventory, runs
from ttmray.console import console
from ttmray.corpus import index, shards
from ttmray.corpus.plan import PLAN_FILE, Plan
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from ttmray.inventory import Damage, restore_run
from ttmray.runs import RUN, SUCCESS
from ttmray.storage import Folder

_OF_UNIT = re.compile(rf"(?:{index.INDEX}/([^/]+)\.parquet|(?:{shards.SHARDS}|{shards.CAPTIONS})/([^/]+)-[^/-]+)")


def repair(folder: str) -> int:
    """`ttmray corpus repair`: make again what is damaged or missing, with the settings in `run.json`.

    Every byte is read. The songs (or the checkpoint) must be where the run found them.

    Raises:
        UserError: no run of this kind, or what its command raises.
    """
    from ttmray.corpus.verify import problems

    run = Folder.at(folder)
    kind, config = _settings(run)
    before = list(problems(run))
    for line in before:
        console.print(f"[yellow]{escape(line)}[/yellow]")
    if not before:
        console.print(f"nothing to repair: {run} has no problems", markup=False)
        return EXIT_OK
    if kind == "pool":
        from ttmray.generation.pool import generate_pool
        from ttmray.generation.pool_worker import CandidatesConfig

        code = generate_pool(CandidatesConfig.model_validate(config | {"output": run.uri}), repair=True)
    else:
        from ttmray.corpus.config import CorpusConfig
        from ttmray.corpus.job import score_corpus

        code = score_corpus(CorpusConfig.model_validate(config | {"output": run.uri}), repair=True)
    after = list(problems(run))
    for line in after:
        console.print(f"[red]{escape(line)}[/red]")
    console.print(f"{run}: {len(before)} problems before, {len(after) or 'none'} now", markup=False)
    return EXIT_BAD_INPUT if after else code


def _settings(run: Folder) -> tuple[str, dict[str, object]]:
    """Kind and config of a run: by `run.json`, or by its copy in `_SUCCESS.json` where the plan speaks for that."""
    marker = inventory.read_marker(run) or {}
    candidates, problem = [], UserError(f"{run} is no corpus run: it has no {RUN}.", "Give the output folder of one.")
    for kind in ("corpus", "pool"):
        try:
            candidates.append(runs.read(run, kind))
        except UserError as error:
            if run.exists(RUN):
                problem = error
    candidates += [marker["run"]] if "run" in marker else []
    if not candidates:
        raise problem
    try:
        plan = Plan.load(run).identity()
    except UserError:
        plan = ""
    chosen = next((said for said in candidates if said["identity"].get("plan") == plan), candidates[0])
    return str(chosen["kind"]), dict(chosen["config"])


def existing_run(run: Folder, kind: str, beside: Collection[str]) -> dict[str, Any] | None:
    """`runs.existing`, after `run.json` was written again from its copy where it was lost.

    Raises:
        UserError: as there.
    """
    if restore_run(run, kind) is not None:
        console.print(f"[yellow]{RUN} is missing or damaged; it is made again[/yellow]")
    return runs.existing(run, kind, beside)


def forget_damaged(run: Folder, plan: Plan, fingerprint: str, everything: bool = False) -> None:
    """Forget the units that are damaged, and that the run was finished where anything is; says what.

    Of a finished run the sizes of all files and the hashes of the smallest are compared with `_SUCCESS.json`. Of an
    unfinished one every index file is read, and its unit's files must have the sizes that it says.

    Args:
        plan: of the run, as its command makes it.
        fingerprint: of the run.
        everything: compare every hash, and have the end of the job done once more.

    Raises:
        UserError: a folder with something in it has the name of a file.
    """
    marker = inventory.read_marker(run)
    sealed = marker is not None and marker.get("fingerprint") == fingerprint and "files" in marker
    found = inventory.damage(run, marker, everything) if marker is not None and sealed else []
    if everything or not sealed:
        known = {problem.name for problem in found}
        found += [problem for problem in _unit_damage(run, plan, everything) if problem.name not in known]
    try:
        Plan.load(run)
    except UserError as error:
        if run.exists(PLAN_FILE) and PLAN_FILE not in {problem.name for problem in found}:
            found.append(Damage(PLAN_FILE, error.message.removeprefix(f"{run.path(PLAN_FILE)} ")))
    units = set()
    for problem in found:
        console.print(f"[yellow]{escape(str(problem))}; it is made again[/yellow]")
        if match := _OF_UNIT.match(problem.name):
            units.add(match[1] or match[2])
            if match[2]:
                inventory.clear(run, problem.name)
        else:
            inventory.clear(run, problem.name)
    for name in sorted(units):
        inventory.clear(run, f"{index.INDEX}/{name}.parquet")
    if run.exists(SUCCESS) and (found or everything or not sealed):
        inventory.clear(run, SUCCESS)  # last: whoever is killed before finds the same damage again


def _unit_damage(run: Folder, plan: Plan, every_hash: bool) -> list[Damage]:
    """Committed units that do not fit the plan, or whose files are not those that their index files describe."""
    sizes = {
        f"{folder}/{listed.name}": listed.size
        for folder in (shards.SHARDS, shards.CAPTIONS)
        for listed in run.files(folder)
    }
    tracks = {name: {track["track_id"] for track in rows} for name, rows in plan.units()}
    wrong = []
    promised: dict[str, str] = {}
    for name in index.committed_units(run):
        file = f"{index.INDEX}/{name}.parquet"
        try:
            rows, metadata = index.read_units(run, [name])[0]
        except UserError as error:
            wrong.append(Damage(file, error.message.removeprefix(f"{run.path(file)} ")))
            continue
        if tracks.get(name) != set(rows["track_id"].to_pylist()):
            wrong.append(Damage(file, "its tracks are not those that the plan has in this unit"))
        for path, facts in metadata["files"].items():
            if sizes.get(path) != facts["bytes"]:
                wrong.append(Damage(path, f"has {sizes.get(path, 'no')} bytes, {facts['bytes']} were written"))
            else:
                promised[path] = facts["sha256"]
    if every_hash:
        hashes = inventory.entries(run, promised)
        wrong += [
            Damage(path, "its SHA-256 differs from the index")
            for path, digest in promised.items()
            if hashes[path].sha256 != digest
        ]
    return wrong
