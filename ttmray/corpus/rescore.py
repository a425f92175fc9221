"""Rewards of a finished run by another head, from the embeddings in its shards: no audio is read, no encoder loaded.

`ttmray corpus rescore` writes `scores/<name>/`: a part per `UNITS_PER_PART` units, whose file, named by its hash, is
its commit as an index file is that of its unit, and in the end one table in the order of the index
(`corpus/scores.py`), statistics and `_SUCCESS.json`. Resume is relaunch. The numbers are those that a corpus job with
this head would have made, to the bit on a CPU.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ttmray import cost, inventory, runs
from ttmray.cluster import ActorsConfig, each
from ttmray.config import Config, Location, execution
from ttmray.console import console, meter
from ttmray.corpus import index, scores, shards
from ttmray.corpus.unit import OK
from ttmray.errors import EXIT_OK, UserError
from ttmray.models import NotFiniteOutput
from ttmray.models.bundle import open_bundle
from ttmray.models.plans import show_plan
from ttmray.models.protocol import Protocol
from ttmray.models.reward_head import RewardHead, open_head, require_same_encoders, with_head
from ttmray.runs import RUN, SUCCESS
from ttmray.storage import Folder, parquet_table

if TYPE_CHECKING:
    from ttmray.models.tunejury import TuneJury

PARTS = "parts"
UNITS_PER_PART = 64
"""About 2,000 clips: seconds of work, and few files for a large corpus."""
COLUMNS = ("key", "track_id", "shard", "unit", "caption_id", "caption", "caption_file")


class RescoreConfig(Config):
    """`ttmray corpus rescore`."""

    corpus: Location = execution()
    """Run folder of a finished corpus or pool, local or s3://."""
    head: Location = execution()
    """Weights of the head, or the run folder of `train-ranker`."""
    name: str = execution(min_length=1)
    """Of the table."""
    text: Literal["empty", "caption"] | None = None
    """What the head sees as text; null: what the rewards of the corpus saw."""
    runtime: ActorsConfig = execution(ActorsConfig())
    """Where, and on how many workers."""


class Portion(NamedTuple):
    """What one call scores: ok rows of some units in the order of the index, and the files of their captions."""

    name: str
    rows: pa.Table
    captions: tuple[str, ...]


def rescore(config: RescoreConfig, *, plan_only: bool = False) -> int:
    """Write, or go on with, a table of scores; returns the exit code.

    Args:
        plan_only: say what would be done, and stop.

    Raises:
        UserError: no finished run, a head that does not fit its embeddings, damaged shards, or a name that is taken.
    """
    run, head = Folder.at(config.corpus), open_head(config.head)
    corpus = runs.read(run, runs.kind_of(run, runs.KINDS_OF_CORPUS))
    if not inventory.finished(run):
        raise UserError(f"{run} is not finished.", "Finish it first: start its command again.")
    require_same_encoders(head, corpus["identity"].get("bundle") or {}, str(run))
    out = run.sub(f"{scores.SCORES}/{scores.check_name(config.name)}")
    protocol = _protocol(corpus, config.text, head)
    rows = index.read_index(run, [*COLUMNS, "status"])
    rows = rows.filter(pc.equal(rows["status"], OK)).select(COLUMNS)
    if plan_only:
        return _show_plan(run, out, rows, protocol, _describe(config, corpus, head, protocol, rows))
    if not out.exists(RUN) and rows.num_rows:
        _try(run, head, rows)
    _claim(out, config, corpus, head, protocol, rows)
    if not _forget_damaged(out):
        _sweep(out)
        console.print(f"nothing to do: {out} is finished, {rows.num_rows} clips are scored", markup=False)
        return EXIT_OK
    parts = list(_parts(run, rows, protocol.text == "caption"))
    written = _written(out)
    todo = [part for part in parts if part.name not in written]
    if len(todo) < len(parts):
        console.print(f"resuming: {len(parts) - len(todo)} of {len(parts)} parts are there", markup=False)
    make = partial(PartScorer, run.uri, out.uri, head.location, protocol.text, config.runtime.device)
    with cost.account(out):
        with meter("clips", sum(part.rows.num_rows for part in todo)) as progress:
            for count in each(make, todo, config.runtime):
                progress.advance(count)
        _finish(run, out, parts, corpus, head)
    return EXIT_OK


def _protocol(corpus: dict[str, Any], text: Literal["empty", "caption"] | None, head: RewardHead) -> Protocol:
    """The corpus's, but for head and text."""
    how = corpus["identity"]["protocol"]
    if isinstance(how, dict):
        fields = how | {"hashes": tuple((str(name), str(value)) for name, value in how["hashes"])}
        protocol = Protocol(**fields)
    else:  # pools hold its id
        protocol = open_bundle(corpus["config"]["bundle"]).protocol(corpus["config"]["reward_text"])
        if protocol.id() != how:
            raise UserError(f"its rewards were made by {how}, this bundle's are {protocol.id()}.", "Make it again.")
    return with_head(protocol if text is None else replace(protocol, text=text), head)


def _try(run: Folder, head: RewardHead, rows: pa.Table) -> None:
    """Score one clip, so that a wrong head takes no name.

    Raises:
        UserError: no head, one of other widths, or one whose scores are no numbers.
    """
    first = rows.slice(0, 1)
    PartScorer(run.uri, run.uri, head.location, "empty", "cpu").score(first, str(first["shard"][0]), {})


def _note(corpus: dict[str, Any]) -> str:
    """What people must know about rewards from a corpus's embeddings: the same as about its own."""
    return str(corpus.get("note") or "")


def _show_plan(run: Folder, out: Folder, rows: pa.Table, protocol: Protocol, described: dict[str, Any]) -> int:
    if (old := inventory.existing_or_copy(out, "scores")) is not None:
        runs.refuse_another(out, old, described, choose=_choose(out))
    parts = list(_parts(run, rows, protocol.text == "caption"))
    names = {entry.name.rpartition("-")[0] for entry in out.files(PARTS, sizes=False)}
    todo = 0 if inventory.finished(out) else sum(part.rows.num_rows for part in parts if part.name not in names)
    show = [
        ("clips", f"{todo:,} to score of {rows.num_rows:,}", "from the embeddings in the shards, no audio is read"),
        ("scores by", described["protocol_id"], described["note"]),
    ]
    why = "reading the shards takes the time, not the head"
    return show_plan(show, out, todo, None, ActorsConfig(), why)


def _choose(out: Folder) -> str:
    return f"Choose another name, or delete {out} so that the table is made anew"


def _describe(
    config: RescoreConfig, corpus: dict[str, Any], head: RewardHead, protocol: Protocol, rows: pa.Table
) -> dict[str, Any]:
    clips = hashlib.sha256()
    for column in ("key", "shard"):  # names of shards carry hashes
        clips.update("\n".join(rows[column].to_pylist()).encode())
    what = {"corpus": corpus["fingerprint"], "clips": clips.hexdigest(), "head": head.id, "protocol": asdict(protocol)}
    bundle = corpus["protocol_id"].partition("/")[0]
    return runs.describe(
        "scores",
        what,
        config,
        ("torch", "numpy"),
        protocol_id=f"{bundle}/{protocol.id()}",
        head=head.sha256,
        note=_note(corpus),
    )


def _claim(
    out: Folder, config: RescoreConfig, corpus: dict[str, Any], head: RewardHead, protocol: Protocol, rows: pa.Table
) -> None:
    """Write `run.json` of the table, or see that it describes the same one."""
    described = _describe(config, corpus, head, protocol, rows)
    old = inventory.restore_run(out, "scores") or runs.existing(out, "scores")
    if old is None and runs.write(out, described):
        return
    runs.refuse_another(out, old or runs.read(out, "scores"), described, choose=_choose(out))


def _forget_damaged(out: Folder) -> bool:
    """Whether the table is still to be made: what is damaged is said and deleted, and the parts are gone by its end."""
    marker = inventory.read_marker(out)
    damaged = inventory.damage(out, marker, every_hash=True) if marker is not None and "files" in marker else []
    for problem in damaged:
        console.print(f"{out.path(problem.name)} {problem.how}; the table is made again", markup=False)
        if problem.name != RUN:
            inventory.clear(out, problem.name)
    if out.exists(SUCCESS) and (damaged or marker is None):
        inventory.clear(out, SUCCESS)
        marker = None
    return marker is None


def _parts(run: Folder, rows: pa.Table, with_text: bool) -> Iterator[Portion]:
    units = rows["unit"].combine_chunks().dictionary_encode()
    names, codes = units.dictionary.to_pylist(), units.indices.to_numpy()  # in the order of the index
    for first in range(0, len(names), UNITS_PER_PART):
        start, stop = np.searchsorted(codes, (first, first + UNITS_PER_PART))
        part = rows.slice(int(start), int(stop - start))
        owners = _caption_files(run, part) if with_text else []
        yield Portion(names[first], part, tuple(owners))


def _caption_files(run: Folder, rows: pa.Table) -> list[str]:
    """The files with the text features of the captions of some rows."""
    captioned = rows.filter(pc.fill_null(pc.not_equal(rows["caption"], ""), False))
    if captioned["caption_file"].null_count:
        raise UserError(
            f"{run} is of an older version: its index does not say where text features lie.",
            f"ttmray corpus upgrade {run}",
        )
    return sorted(captioned["caption_file"].unique().to_pylist())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _written(out: Folder) -> dict[str, bytes]:
    """Name of a part -> its bytes, of all that are there; those whose bytes are not what was written are said and
    deleted."""
    written: dict[str, bytes] = {}
    for entry in out.files(PARTS, sizes=False):
        file = f"{PARTS}/{entry.name}"
        name, _, digest = entry.name.removesuffix(".parquet").rpartition("-")
        data = out.read(file)
        if _digest(data) == digest:
            written[name] = data
        else:
            console.print(f"{out.path(file)} is damaged; it is made again", style="yellow", markup=False)
            out.delete(file)
    return written


def _sweep(out: Folder) -> None:
    """Delete parts, and what a kill has left; a finished table needs none of them."""
    for entry in out.files(PARTS, sizes=False):
        out.delete(f"{PARTS}/{entry.name}")
    out.sweep_temporary(older_than_s=0.0)


class PartScorer:
    """The head in one process. A call scores the clips of a part, writes its file and returns how many there were."""

    def __init__(self, run: str, out: str, head: str, text: str, device: str) -> None:
        from ttmray.models import one_thread
        from ttmray.models.devices import resolve_device

        self.run, self.out, self.with_text = Folder(run), Folder(out), text == "caption"
        self.device = resolve_device(device)
        self.source = open_head(head)
        self.head: TuneJury | None = None  # whose widths are those of the first embeddings
        one_thread()

    def __call__(self, part: Portion) -> int:
        texts = self._texts(part)
        table = pa.concat_tables(
            self.score(part.rows.filter(pc.equal(part.rows["shard"], shard)), shard, texts)
            for shard in part.rows["shard"].unique().to_pylist()
        )
        data = index.parquet_bytes(table)
        self.out.create(f"{PARTS}/{part.name}-{_digest(data)}.parquet", data)
        return table.num_rows

    def _texts(self, part: Portion) -> dict[str, np.ndarray]:
        vectors: dict[str, np.ndarray] = {}
        for name in part.captions:
            for caption, features in shards.read_captions(self.run, name).items():
                vectors[caption] = features["clap_score"]
        return vectors

    def score(self, rows: pa.Table, shard: str, texts: dict[str, np.ndarray]) -> pa.Table:
        """Rows of `scores.SCHEMA` for the clips of a shard.

        Args:
            texts: caption id -> its CLAP vector (512,).

        Raises:
            UserError: a damaged shard, a head that does not fit, or scores that are no numbers.
        """
        clips = self._embeddings(rows, shard)
        clap = np.stack([clips[key][0] for key in rows["key"].to_pylist()])
        mert = np.stack([clips[key][1] for key in rows["key"].to_pylist()])
        text = None
        if self.with_text:
            none = np.zeros(clap.shape[2], np.float32)
            text = np.stack([texts[row["caption_id"]] if row["caption"] else none for row in rows.to_pylist()])
        if self.head is None:
            self.head = self.source.load((clap.shape[2], mert.shape[2], clap.shape[2]), self.device)
        try:
            mix = self.head.score(clap[:, 0], mert[:, 0], text).astype(np.float64)
            same = np.array_equal(clap[:, 0], clap[:, 1]) and np.array_equal(mert[:, 0], mert[:, 1])
            other = mix if same else self.head.score(clap[:, 1], mert[:, 1], text).astype(np.float64)
        except NotFiniteOutput as error:
            raise UserError(
                f"{self.source.location}: its scores of clips in {shard} are not finite.", "Train the head again."
            ) from error
        tracks = rows["track_id"].to_pylist()  # whole ones: a track is never divided between units
        of_track: dict[str, list[float]] = {}
        for track, value in zip(tracks, mix.tolist(), strict=True):
            of_track.setdefault(track, []).append(value)
        means = [float(np.mean(of_track[track])) for track in tracks]
        columns = [rows["key"].combine_chunks(), rows["shard"].combine_chunks(), mix, other, means]
        return pa.table(columns, schema=scores.SCHEMA)

    def _embeddings(self, rows: pa.Table, shard: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Key -> CLAP (2, 512) and MERT (2, H) of a shard whose bytes are those that its name promises."""
        data, where = self.run.read(shard), self.run.path(shard)
        if hashlib.sha256(data).hexdigest()[:12] != shard.rpartition("-")[2].removesuffix(".tar"):
            raise UserError(f"{where} is damaged: its hash is not that of its name.", shards.mend(self.run))
        embeddings = {}
        for key, sample in shards.read_samples(data, where, only=("clap_audio.npy", "mert.npy")):
            embeddings[key] = (np.atleast_2d(sample["clap_audio.npy"]), np.atleast_2d(sample["mert.npy"]))
        for key in rows["key"].to_pylist():
            if key not in embeddings:
                raise UserError(f"{where} is damaged: clip {key} is not there.", shards.mend(self.run))
        return embeddings


def _finish(run: Folder, out: Folder, parts: Sequence[Portion], corpus: dict[str, Any], head: RewardHead) -> None:
    """The table, its statistics and `_SUCCESS.json`; parts are then needed no more."""
    written = _written(out)
    if lost := [part.name for part in parts if part.name not in written]:
        raise UserError(f"{out.path(PARTS)}: {lost[0]} is gone or damaged.", "Start the same command again.")
    tables = [parquet_table(written[part.name]).cast(scores.SCHEMA) for part in parts]
    table = pa.concat_tables(tables) if tables else scores.SCHEMA.empty_table()
    data = index.parquet_bytes(table)
    out.write(scores.TABLE, data)
    rows = index.read_index(run, ["key", "status", "split"])
    rows = rows.filter(pc.equal(rows["status"], OK))
    if not rows["key"].combine_chunks().equals(table["key"].combine_chunks()):
        raise RuntimeError(f"{out}: the table's clips are not those of the index")
    for name in scores.REWARDS:
        rows = rows.append_column(name, table[name])
    described = runs.read(out, "scores")
    statistics = {"protocol": described["protocol_id"], "splits": scores.reward_statistics(rows), "note": _note(corpus)}
    files = inventory.entries(out, [RUN]) | {scores.TABLE: inventory.entry(data)}
    text = json.dumps(statistics, indent=1).encode()
    out.write("stats.json", text)
    files["stats.json"] = inventory.entry(text)
    summary = {"clips": table.num_rows, "sha256": hashlib.sha256(data).hexdigest(), "head": head.sha256, **statistics}
    inventory.seal(out, described, {"summary": summary}, files)
    _sweep(out)
    name = out.name
    console.print(
        f"{table.num_rows} clips scored by {described['protocol_id']}: {out.path(scores.TABLE)}", markup=False
    )
    for split, columns in statistics["splits"].items():
        numbers = columns["instrumental_reward_score"]
        line = ", ".join(f"{key} {numbers[key]:+.3f}" for key in ("mean", "std", "p5", "p95", "max"))
        console.print(f"  {split}: {columns['clips']} clips, instrumental reward {line}", markup=False)
    if note := _note(corpus):
        console.print(f"  {note}", markup=False)
    console.print(f"columns: {', '.join(f'{name}/{column}' for column in scores.REWARDS)}", markup=False)
