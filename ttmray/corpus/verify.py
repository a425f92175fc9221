"""`ttmray corpus verify`: does the corpus hold what its index says? Reads every byte once, changes nothing."""

import hashlib
import json
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ttmray import inventory, runs
from ttmray.corpus import index, scores, shards
from ttmray.corpus.finalise import check_rows
from ttmray.corpus.guard import ATTEMPTS
from ttmray.corpus.plan import Plan
from ttmray.corpus.unit import OK
from ttmray.corpus.upgrade import lacking_places
from ttmray.corpus.verify_units import Checked, Shapes, check_units, other_shapes
from ttmray.errors import UserError
from ttmray.runs import KINDS_OF_CORPUS as KINDS
from ttmray.runs import RUN, SUCCESS
from ttmray.storage import Folder


def problems(run: Folder) -> Iterator[str]:
    """Everything that is wrong, one line each; nothing when the corpus is sound.

    Checks: every planned unit is committed and rows match the plan; every file has the recorded size and
    SHA-256; every tar opens and holds exactly the clips of its rows; every array has the shape and type of
    its kind and is finite; every caption of a clip has its text features; no files that no index describes; the merged
    index equals the units' rows, and says of latents and text features where in the files they really lie.
    """
    damaged = yield from _damage(run)
    try:
        plan = Plan.load(run)
    except UserError as error:
        yield error.message
        return
    names = [name for name, _ in plan.units()]
    committed = index.committed_units(run)
    missing = set(names) - set(committed)
    yield from (f"unit {name} is not committed" for name in names if name in missing)
    unplanned = set(committed) - set(names)
    yield from (f"unit {name} is committed and not planned" for name in committed if name in unplanned)
    rows, latents = list[pa.Table](), [Checked().latents]
    files: dict[str, dict[str, Any]] = {}
    captions: set[str] = set()
    shapes: Shapes = {}
    for block in check_units(run, committed):
        yield from block.problems
        yield from other_shapes(shapes, block.shapes)
        rows += [block.rows] if block.rows.num_rows else []  # one without any readable unit has no further columns
        latents.append(block.latents)
        files |= block.files
        captions |= block.captions
    table = pa.concat_tables(rows) if rows else index.SCHEMA.empty_table()
    if not missing:
        yield from check_rows(table, plan)
    captioned = pc.and_(pc.equal(table["status"], OK), pc.fill_null(pc.not_equal(table["caption"], ""), False))
    needed = set(table.filter(captioned)["caption_id"].unique().to_pylist())
    yield from (f"caption {caption_id} has no text features" for caption_id in sorted(needed - captions))
    done = inventory.finished(run)
    for folder in (shards.SHARDS, shards.CAPTIONS, ATTEMPTS):
        for entry in run.files(folder, sizes=False):
            if f"{folder}/{entry.name}" not in files and done:
                yield f"{folder}/{entry.name} belongs to no committed unit"
    if not done:
        yield inventory.marker_problem(run)
        return
    try:
        merged = index.read_merged(run, table.column_names)
        if not merged.drop_columns(index.PLACES).equals(table.drop_columns(index.PLACES)):
            yield f"{index.MERGED} differs from the units' index files"
        else:
            texts = index.with_text_places(table, [{"files": files}])
            yield from _place_problems(run, merged, texts, pa.concat_tables(latents))
    except UserError as error:
        if index.MERGED not in damaged:
            yield error.message
    for name in scores.begun_tables(run):
        yield from table_problems(run, name, table)


def _damage(run: Folder) -> Generator[str, None, set[str]]:
    """What is wrong with `run.json`, and with the files that `_SUCCESS.json` lists beside shards and captions, which
    are read anyway; returns the names of the latter."""
    marker = inventory.read_marker(run)
    said: dict[str, Any] | None = None
    try:
        said = runs.read(run, runs.kind_of(run, KINDS))
    except UserError as error:
        yield error.message
    if marker is None:
        return set()
    if said is not None and marker.get("fingerprint", said["fingerprint"]) != said["fingerprint"]:
        yield f"{RUN} and {SUCCESS} are of two runs"
        return set()
    damaged = inventory.damage(run, marker, every_hash=True, leave_out=(shards.SHARDS, shards.CAPTIONS))
    yield from map(str, damaged)
    return {problem.name for problem in damaged}


def _place_problems(run: Folder, merged: pa.Table, texts: pa.Table, latents: pa.Table) -> Iterator[str]:
    """The merged index must say where latents and text features lie, by the headers of the files.

    Args:
        texts: the rows of all units, with the places of text features by the files' headers.
        latents: `key` and the places of latents, by the headers of the shards.
    """
    ok = pc.equal(merged["status"], OK)
    if lacking := lacking_places(merged):
        yield f"{index.MERGED} does not say where {lacking} clips lie: ttmray corpus upgrade {run.typed}"
        return
    rows, texts = merged.filter(ok).select(["key", *index.PLACES]), texts.filter(ok)
    of = pc.index_in(rows["key"].combine_chunks(), latents["key"].combine_chunks())
    really = {name: latents[name].combine_chunks().take(of) for name in index.LATENT_PLACES}  # null: no such clip
    really |= {name: texts[name].combine_chunks() for name in index.TEXT_PLACES}
    told: set[int] = set()
    for name, places in sorted(really.items()):
        same = pc.equal(rows[name].combine_chunks(), places)
        expected = pc.is_valid(places) if name in index.LATENT_PLACES else pa.scalar(True)
        wrong = pc.and_(expected, pc.invert(pc.fill_null(same, False)))
        for i in pc.indices_nonzero(wrong).to_pylist():
            if i not in told:
                told.add(i)
                row = rows.slice(i, 1).to_pylist()[0]
                yield f"{index.MERGED}: {row['key']}: {name} is {row[name]}, the file has {places[i].as_py()}"


def table_problems(run: Folder, name: str, rows: pa.Table | None = None) -> Iterator[str]:
    """A finished table of scores must be the bytes that its success marker names, of the run's clips of now, and
    finite.

    Args:
        rows: of the run's units; default: they are read.
    """
    if rows is None:
        rows = index.read_index(run)
    place = f"{scores.SCORES}/{name}"
    where = run.sub(place)
    if not where.exists(SUCCESS) and not where.exists(scores.TABLE):
        return  # in the making: nobody reads it
    if problem := inventory.marker_problem(where):
        yield f"{place}/{problem}. {scores.again(run, name)}"
        return
    for damage in inventory.damage(where, inventory.read_marker(where) or {}, every_hash=True):
        if damage.name != scores.TABLE:
            yield f"{place}/{damage}. {scores.again(run, name)}"
    try:
        promised = json.loads(run.read(f"{place}/{SUCCESS}"))["summary"]["sha256"]
        if hashlib.sha256(run.read(f"{place}/{scores.TABLE}")).hexdigest() != promised:
            yield f"{place}/{scores.TABLE}: SHA-256 differs from {SUCCESS}. {scores.again(run, name)}"
            return
        columns = [f"{name}/{column}" for column in scores.REWARDS]
        scored = scores.with_columns(run, rows.select(["key", "status", "shard"]), columns)
        ok = scored.filter(pc.equal(scored["status"], OK))
        for column in columns:
            if not np.isfinite(ok[column].to_numpy()).all():
                yield f"{place}: {column} is not finite. {scores.again(run, name)}"
    except (ValueError, KeyError, TypeError) as error:
        yield f"{place}/{SUCCESS} is damaged: {error!r}. {scores.again(run, name)}"
    except UserError as error:
        yield f"{error.message} {error.hint}"
