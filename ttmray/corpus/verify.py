"""`ttmray corpus verify`: does the corpus hold what its index says? Reads every byte once, changes nothing."""

import hashlib
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
from ttmray.json_text import read_json
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
    damaged, fingerprint = yield from _damage(run)
    try:
        plan = Plan.load(run)
    except UserError as error:
        yield error.message
        return
    names, committed = plan.unit_names(), index.committed_units(run)
    missing, unplanned = set(names) - set(committed), set(committed) - set(names)
    yield from (f"unit {name} is not committed" for name in names if name in missing)
    yield from (f"unit {name} is committed and not planned" for name in committed if name in unplanned)
    done, whole, shapes, described = inventory.finished(run), Whole(run), Shapes(), set[str]()
    needed, captions = set[str](), set[str]()
    for units, block in check_units(run, committed, fingerprint):
        yield from block.problems
        yield from other_shapes(shapes, block.shapes)
        if not missing:
            yield from check_rows(block.rows, plan.of(units))
        described |= block.files.keys()
        needed |= _captioned(block.rows)
        captions |= block.captions
        if done:
            whole.compare(block)
    yield from (f"caption {caption_id} has no text features" for caption_id in sorted(needed - captions))
    for folder in (shards.SHARDS, shards.CAPTIONS, ATTEMPTS):
        for entry in run.files(folder, sizes=False):
            if f"{folder}/{entry.name}" not in described and done:
                yield f"{folder}/{entry.name} belongs to no committed unit"
    if not done:
        yield inventory.marker_problem(run)
        return
    yield from whole.problems(known=index.MERGED in damaged)
    for name in scores.begun_tables(run):
        yield from table_problems(run, name)


def _captioned(rows: pa.Table) -> set[str]:
    """Ids of the captions that ok clips have."""
    captioned = pc.and_(pc.equal(rows["status"], OK), pc.fill_null(pc.not_equal(rows["caption"], ""), False))
    return set(rows.filter(captioned)["caption_id"].unique().to_pylist())


class Whole:
    """The merged index against what units and their files really hold, block by block."""

    def __init__(self, run: Folder) -> None:
        self._run = run
        self._merged: index.MergedRows | None = None
        self._unreadable: UserError | None = None
        self._differs, self._lacking = False, 0
        self._texts, self._places = index.TextPlaces(), list[str]()

    def compare(self, block: Checked) -> None:
        """The next rows of the merged index with those of some units."""
        self._texts.note(block.files)
        if self._differs or self._unreadable is not None or not block.rows.num_rows:
            return
        try:
            self._merged = self._merged or index.MergedRows(self._run)
            merged = self._merged.take(block.rows.num_rows, block.rows.column_names)
        except UserError as error:
            self._unreadable = error
            return
        rows = block.rows.drop_columns(index.PLACES)
        self._differs = not merged.drop_columns(index.PLACES).equals(rows)
        if not self._differs:
            self._lacking += lacking_places(merged)
            self._places += _place_problems(merged, self._texts.fill(block.rows), block.latents)

    def problems(self, known: bool) -> Iterator[str]:
        """What is wrong, after all units.

        Args:
            known: that the file is damaged was said.
        """
        try:
            self._merged = self._merged or index.MergedRows(self._run)
            self._differs |= self._merged.take(1, ["key"]).num_rows > 0
            self._merged.close()
        except UserError as error:
            self._unreadable = self._unreadable or error
        if self._unreadable is not None:
            yield from () if known else (self._unreadable.message,)
        elif self._differs:
            yield f"{index.MERGED} differs from the units' index files"
        elif self._lacking:
            yield f"{index.MERGED} does not say where {self._lacking} clips lie: ttmray corpus upgrade {self._run}"
        else:
            yield from self._places


def _damage(run: Folder) -> Generator[str, None, tuple[set[str], str]]:
    """What is wrong with `run.json`, and with the files that `_SUCCESS.json` lists beside shards and captions, which
    are read anyway; returns the names of the latter, and the fingerprint of the run (empty: not known)."""
    marker = inventory.read_marker(run)
    said: dict[str, Any] | None = None
    try:
        said = runs.read(run, runs.kind_of(run, KINDS))
    except UserError as error:
        yield error.message
    fingerprint = "" if said is None else str(said["fingerprint"])
    if marker is None:
        return set(), fingerprint
    if said is not None and marker.get("fingerprint", said["fingerprint"]) != said["fingerprint"]:
        yield f"{RUN} and {SUCCESS} are of two runs"
        return set(), fingerprint
    damaged = inventory.damage(run, marker, every_hash=True, leave_out=(shards.SHARDS, shards.CAPTIONS))
    yield from map(str, damaged)
    return {problem.name for problem in damaged}, fingerprint


def _place_problems(merged: pa.Table, texts: pa.Table, latents: pa.Table) -> Iterator[str]:
    """Rows of the merged index must say where latents and text features lie, by the headers of the files.

    Args:
        texts: the same rows, with the places of text features by the files' headers.
        latents: `key` and the places of latents, by the headers of the shards.
    """
    ok = pc.equal(merged["status"], OK)
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


def table_problems(run: Folder, name: str) -> Iterator[str]:
    """A finished table of scores must be the bytes that its success marker names, of the run's clips of now, and
    finite."""
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
        promised = read_json(run.read(f"{place}/{SUCCESS}"))["summary"]["sha256"]
        if hashlib.sha256(run.read(f"{place}/{scores.TABLE}")).hexdigest() != promised:
            yield f"{place}/{scores.TABLE}: SHA-256 differs from {SUCCESS}. {scores.again(run, name)}"
            return
        columns = [f"{name}/{column}" for column in scores.REWARDS]
        scored = scores.with_columns(run, index.read_index(run, ["key", "status", "shard"]), columns)
        ok = scored.filter(pc.equal(scored["status"], OK))
        for column in columns:
            if not np.isfinite(ok[column].to_numpy()).all():
                yield f"{place}: {column} is not finite. {scores.again(run, name)}"
    except (ValueError, KeyError, TypeError) as error:
        yield f"{place}/{SUCCESS} is damaged: {error!r}. {scores.again(run, name)}"
    except UserError as error:
        yield f"{error.message} {error.hint}"
