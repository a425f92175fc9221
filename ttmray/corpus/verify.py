"""`ttmray corpus verify`: does the corpus hold what its index says? Reads every byte once, changes nothing."""

import hashlib
import io
import json
from collections.abc import Callable, Generator, Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ttmray import inventory, runs
from ttmray.corpus import index, scores, shards
from ttmray.corpus.finalise import check_rows
from ttmray.corpus.guard import ATTEMPTS
from ttmray.corpus.plan import Plan
from ttmray.corpus.unit import OK
from ttmray.corpus.upgrade import lacking_places, latent_places
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
    blocks = index.RowBlocks()
    read: list[dict[str, Any]] = []
    latents: dict[str, dict[str, int]] = {}
    indexed: set[str] = set()
    captions: set[str] = set()
    shapes: dict[str, tuple[Any, ...]] = {}
    for name in committed:
        try:
            rows, metadata = index.read_units(run, [name])[0]
            blocks.add(rows)
            indexed.update(metadata["files"])
            read.append(metadata)
            yield from _unit_problems(run, rows, metadata, captions, shapes, latents)
        except UserError as error:
            yield f"unit {name}: {error.message}"
    table = blocks.table()
    if not missing:
        yield from check_rows(table, plan)
    clips = table.filter(pc.equal(table["status"], OK)).select(["caption_id", "caption"]).to_pylist()
    needed = {row["caption_id"] for row in clips if row["caption"]}
    yield from (f"caption {caption_id} has no text features" for caption_id in sorted(needed - captions))
    done = inventory.finished(run)
    for folder in (shards.SHARDS, shards.CAPTIONS, ATTEMPTS):
        for entry in run.files(folder, sizes=False):
            if f"{folder}/{entry.name}" not in indexed and done:
                yield f"{folder}/{entry.name} belongs to no committed unit"
    if not done:
        yield inventory.marker_problem(run)
        return
    try:
        merged = index.read_merged(run, table.column_names)
        if not merged.drop_columns(index.PLACES).equals(table.drop_columns(index.PLACES)):
            yield f"{index.MERGED} differs from the units' index files"
        else:
            yield from _place_problems(run, merged, index.with_text_places(table, read), latents)
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


def _place_problems(
    run: Folder, merged: pa.Table, units: pa.Table, latents: dict[str, dict[str, int]]
) -> Iterator[str]:
    """The merged index must say where latents and text features lie, by the headers of the files.

    Args:
        units: the rows of all units, with the places of text features by the files' headers.
        latents: those of the latents, per key.
    """
    ok = pc.equal(merged["status"], OK)
    if lacking := lacking_places(merged):
        yield f"{index.MERGED} does not say where {lacking} clips lie: ttmray corpus upgrade {run}"
        return
    rows = merged.filter(ok).select(["key", *index.PLACES]).to_pylist()
    texts = units.filter(ok).select(index.TEXT_PLACES).to_pylist()
    for row, text in zip(rows, texts, strict=True):
        really = latents.get(row["key"], {}) | text
        if wrong := sorted(name for name, place in really.items() if row[name] != place):
            yield f"{index.MERGED}: {row['key']}: {wrong[0]} is {row[wrong[0]]}, the file has {really[wrong[0]]}"


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


def _unit_problems(
    run: Folder,
    rows: pa.Table,
    metadata: dict[str, Any],
    captions: set[str],
    shapes: dict[str, tuple[Any, ...]],
    latents: dict[str, dict[str, int]],
) -> Iterator[str]:
    """What is wrong with a unit; notes what its files really hold in `captions`, `shapes`, `latents` and `metadata`."""
    expected: dict[str, set[str]] = {}
    scored: set[str] = set()
    for row in rows.select(["key", "status", "shard", "reward_score"]).to_pylist():
        if row["status"] == OK:
            expected.setdefault(row["shard"], set()).add(row["key"])
            scored |= {row["key"]} if row["reward_score"] is not None else set()
    yield from (f"{shard} is in the index and not described" for shard in expected.keys() - metadata["files"].keys())
    for name, facts in metadata["files"].items():
        try:
            data = run.read(name)
        except UserError as error:
            yield error.message
            continue
        if len(data) != facts["bytes"] or hashlib.sha256(data).hexdigest() != facts["sha256"]:
            yield f"{name}: size or SHA-256 differs from the index"
            continue
        if name.startswith(shards.CAPTIONS):
            features = shards.read_captions(run, name)
            captions.update(features)
            facts.update(_read_places(shards.text_places, data))
            if len(features) != facts["captions"]:
                yield f"{name}: {len(features)} captions, the index says {facts['captions']}"
            for caption_id, arrays in features.items():
                yield from _array_problems(name, caption_id, arrays, shapes)
            continue
        latents.update(_read_places(latent_places, data))
        keys = set()
        for key, sample in shards.read_samples(data, name):
            keys.add(key)
            arrays = {kind: value for kind, value in sample.items() if isinstance(value, np.ndarray)}
            needed = {"json", "latent_mean.npy", "latent_std.npy"}
            needed |= {"clap_audio.npy", "mert.npy"} if key in scored else set()  # latents of others have no rewards
            missing = needed - sample.keys()
            yield from (f"{name}: {key} has no {kind}" for kind in sorted(missing))
            yield from _array_problems(name, key, arrays, shapes)
        if keys != expected.get(name, set()) or len(keys) != facts["clips"]:
            yield f"{name}: holds {len(keys)} clips, the index has {len(expected.get(name, ()))}"


def _read_places(find: Callable[[BinaryIO], dict[str, Any]], data: bytes) -> dict[str, Any]:
    """Places by the headers of a file; none where its arrays are of another kind, which is told of the arrays."""
    try:
        return find(io.BytesIO(data))
    except ValueError:
        return {}


def _array_problems(
    file: str, key: str, arrays: dict[str, np.ndarray], shapes: dict[str, tuple[Any, ...]]
) -> Iterator[str]:
    """Shapes and types must be the same all over the corpus, and every number finite."""
    for kind, array in arrays.items():
        signature = (array.shape, str(array.dtype))
        if shapes.setdefault(kind, signature) != signature:
            yield f"{file}: {key}.{kind} is {signature}, elsewhere {shapes[kind]}"
        if not np.isfinite(array).all():
            yield f"{file}: {key}.{kind} is not finite"
