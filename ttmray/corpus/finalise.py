"""The end of a corpus run, without Ray: merge the index, check that everything adds up, statistics, clean up."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ttmray import cost
from ttmray.corpus import index, shards, unit_log
from ttmray.corpus.guard import ATTEMPTS
from ttmray.corpus.plan import PLAN_FILES, Plan
from ttmray.corpus.scores import REWARDS, reward_statistics
from ttmray.corpus.unit import FAILED, OK, REJECTED, Times
from ttmray.corpus.upgrade import located
from ttmray.errors import UserError
from ttmray.inventory import Written, entries, entry, seal
from ttmray.runs import RUN
from ttmray.storage import Folder

LATENTS = "stats/latents.json"
"""What `latent_statistics` says of a finished run."""
OF_UNITS = (index.INDEX, shards.SHARDS, shards.CAPTIONS)
"""Folders with files of units."""
_KINDS = ("wall", "cpu")


class More(Protocol):
    """What a run has beside a corpus."""

    def columns(self, rows: pa.Table) -> pa.Table:
        """Rows of some units with further columns."""

    def facts(self, totals: "Totals") -> dict[str, Any]:
        """Further facts of the summary, asked for after all columns: `of` is what its tracks are called, and `lines`
        are for people."""


def finalise(
    run: Folder,
    plan: Plan,
    described: dict[str, Any],
    seconds: float,
    more: More | None = None,
) -> dict[str, Any]:
    """Merge, check and sum up a run whose units are all committed; `_SUCCESS.json` is written last.

    Rows pass through block by block: what stays of a clip are its scores and the compressed bytes of its row.

    Args:
        seconds: wall time of this launch.
        more: what the run has beside a corpus.

    Raises:
        UserError: when rows and plan do not add up, naming the units.
    """
    names = plan.unit_names()
    committed = set(index.committed_units(run))
    missing = [name for name in names if name not in committed]
    if missing:
        raise UserError(f"{len(missing)} units are not committed, e.g. {missing[0]}.", "Start the same command again.")
    totals, merged, texts = Totals(), index.Merging(), index.TextPlaces()
    for rows, metadata in index.blocks(run, names):
        totals.add(rows, metadata, plan.of([data["name"] for data in metadata]))
        if not totals.problems:
            rows = located(run, rows, metadata, texts)
            merged.add(rows if more is None else more.columns(rows))
    if problems := totals.problems or list(totals.twice(run, names)):
        raise UserError("the index does not match the plan:\n    " + "\n    ".join(problems[:20]))
    facts = {} if more is None else more.facts(totals)
    rewards, files = totals.rewards(), totals.files

    def write(name: str, data: bytes) -> None:
        run.write(name, data)
        files[name] = entry(data)

    write(index.MERGED, merged.bytes())
    write(LATENTS, json.dumps(totals.latents.statistics(), indent=1).encode())
    # conditioning on z-scores needs mean and std
    scored = {"protocol": described["protocol_id"], "splits": rewards, "note": described["note"]}
    write("stats/rewards.json", json.dumps(scored, indent=1).encode())
    swept, log = sweep(run, files), unit_log.gather(run, names)
    summary = {
        "rows": {"total": totals.rows.total()} | {s: totals.rows[s] for s in (OK, REJECTED, FAILED)},
        "reasons": totals.reasons(),
        "tracks": len(plan.table),
        "clips_expected": plan.expected_clips(),
        "clips_found": totals.clips,
        "expected_and_found_differ": totals.differ,
        "splits": dict(sorted(totals.splits.items())),
        "units": len(names),
        "bytes": totals.bytes,
        "captions": totals.captions,
        "rewards": rewards,
        "protocol": described["protocol_id"],
        "note": described["note"],
        "swept_files": swept,
        "launch_seconds": round(seconds, 1),
        "stages": _stage_rates(log),
        "gpus": _gpu_use(log, cost.so_far(run)["gpu_seconds"]),
        **facts,
    }
    write("summary.json", json.dumps(summary, indent=1).encode())
    markdown = [f"# {described['kind'].capitalize()}", "", *(f"- {line}" for line in summary_lines(summary, run))]
    write("summary.md", ("\n".join(markdown) + "\n").encode())
    files |= entries(run, [name for name in (RUN, *PLAN_FILES) if run.exists(name)])
    seal(run, described, {"summary": summary}, files, aside=OF_UNITS)
    return summary


class Totals:
    """What is true of a whole run, from its rows as they come.

    Attributes:
        problems: where rows and plan do not add up.
        rows: by status.
        clips: rows that are clips.
        splits: ok rows by split.
        differ: see `differing_tracks`.
        files: of the units, as they were committed.
        bytes, captions: of files.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.rows, self.splits, self._bad = Counter[str](), Counter[str](), Counter[tuple[str, str, str]]()
        self.clips, self.bytes, self.captions = 0, 0, 0
        self.differ: list[dict[str, Any]] = []
        self.files: dict[str, Written] = {}
        self.latents = LatentSums()
        self._scores: list[pa.Table] = []
        self._keys: list[np.ndarray] = []

    def add(self, rows: pa.Table, metadata: Sequence[Mapping[str, Any]], plan: Plan) -> None:
        """Take the rows of some units.

        Args:
            metadata: of the units.
            plan: of their tracks.
        """
        self.problems += check_rows(rows, plan)
        self.differ += differing_tracks(rows, plan)
        self.rows.update(rows["status"].to_pylist())
        self.clips += pc.sum(pc.greater_equal(rows["segment"], 0)).as_py() or 0
        self._keys.append(np.fromiter(map(hash, rows["key"].to_pylist()), np.int64, rows.num_rows))
        ok = rows.filter(pc.equal(rows["status"], OK))
        self.splits.update(ok["split"].to_pylist())
        self._scores.append(ok.select(["status", "split", *REWARDS]).combine_chunks())
        bad = rows.filter(pc.not_equal(rows["status"], OK))
        self._bad.update(zip(*(bad[name].to_pylist() for name in ("status", "stage", "reason")), strict=True))
        for unit in metadata:
            self.latents.add(unit["latents"])
            self.files[f"{index.INDEX}/{unit['name']}.parquet"] = unit["entry"]
            for name, facts in unit["files"].items():
                self.files[name] = Written(facts["bytes"], facts["sha256"])
                self.bytes += facts["bytes"]
                self.captions += facts.get("captions", 0)

    def twice(self, run: Folder, names: Sequence[str]) -> Iterator[str]:
        """Keys that units of different blocks share: of tracks `a` and `a_1`, say. Few runs have any, and only of those
        the rows are read again."""
        hashes, counts = np.unique(np.concatenate([np.empty(0, np.int64), *self._keys]), return_counts=True)
        suspects = set(hashes[counts > 1].tolist())
        if not suspects:
            return
        keys = (key for rows, _ in index.blocks(run, names) for key in rows["key"].to_pylist())
        for key, count in Counter(key for key in keys if hash(key) in suspects).items():
            if count > 1:
                yield f"{key} has {count} rows"

    def rewards(self) -> dict[str, Any]:
        """See `reward_statistics`."""
        return reward_statistics(pa.concat_tables(self._scores)) if self._scores else {}

    def reasons(self) -> list[dict[str, Any]]:
        """How many rows that are not ok have which reason."""
        return [
            {"status": status, "stage": stage, "reason": reason, "count": count}
            for (status, stage, reason), count in sorted(self._bad.items())
        ]


def check_rows(table: pa.Table, plan: Plan) -> list[str]:
    """What is wrong: keys twice, planned tracks without rows, rows of unknown tracks, gaps in segments."""
    keys = _grouped(table, "key", [([], "count_all")])
    twice = keys.filter(pc.greater(keys["count_all"], 1)).to_pylist()
    problems = [f"{row['key']} has {row['count_all']} rows" for row in twice]
    kinds = [("segment", kind) for kind in ("min", "max", "count", "count_distinct")]
    tracks = _grouped(table, "track_id", kinds)
    planned = plan.table["track_id"]
    absent = planned.filter(pc.invert(pc.is_in(planned, tracks["track_id"].combine_chunks()))).to_pylist()
    problems += [f"{track} is planned and has no row" for track in absent]
    known = pc.is_in(tracks["track_id"], planned.combine_chunks())
    problems += [
        f"{track} has rows and is not planned" for track in tracks.filter(pc.invert(known))["track_id"].to_pylist()
    ]
    first, last, count, distinct = (tracks[f"segment_{kind}"] for _, kind in kinds)
    none = pc.and_(pc.equal(last, -1), pc.equal(count, 1))
    some = pc.and_(pc.equal(first, 0), pc.equal(last, pc.subtract(count, 1)))
    right = pc.or_(none, pc.and_(some, pc.equal(distinct, count)))
    for track in tracks.filter(pc.invert(pc.fill_null(right, False)))["track_id"].to_pylist():
        numbers = table.filter(pc.equal(table["track_id"], track))["segment"].to_pylist()
        problems.append(f"{track} has segments {sorted(numbers)}")
    return problems


def differing_tracks(table: pa.Table, plan: Plan) -> list[dict[str, Any]]:
    """Tracks whose clips differ from the plan's expectation, each with its recorded reason."""
    clip = pc.greater_equal(table["segment"], 0)
    clips = _grouped(table.filter(clip), "track_id", [([], "count_all")])
    of = pc.index_in(plan.table["track_id"].combine_chunks(), clips["track_id"].combine_chunks())
    counts = pc.fill_null(clips["count_all"].combine_chunks().take(of), 0)
    differ = pc.not_equal(plan.table["clips"].combine_chunks(), counts)
    without = table.filter(pc.invert(clip)).select(["track_id", "reason", "message"]).to_pylist()
    why = {row["track_id"]: f"{row['reason']}: {row['message']}" for row in without}
    return [
        {
            "track_id": track,
            "expected": expected,
            "found": count,
            "why": why.get(track, "the header's duration was an estimate"),
        }
        for track, expected, count in zip(
            plan.table["track_id"].filter(differ).to_pylist(),
            plan.table["clips"].filter(differ).to_pylist(),
            counts.filter(differ).to_pylist(),
            strict=True,
        )
    ]


def _grouped(table: pa.Table, by: str, of: list[tuple[Any, str]]) -> pa.Table:
    """Groups in the order in which they appear. A row of Python objects per clip would take ten times the memory."""
    return table.group_by(by, use_threads=False).aggregate(of)


def latent_statistics(metadata: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """`LatentSums.statistics` of the units that some metadata is of."""
    sums = LatentSums()
    for unit in metadata:
        sums.add(unit["latents"])
    return sums.statistics()


class LatentSums:
    """Sums over units, per split and channel, from which the statistics of latents follow."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, Any]] = {}

    def add(self, latents: Mapping[str, Mapping[str, Any]]) -> None:
        """Take those of a unit: split -> `index.latent_sums`."""
        for split, part in latents.items():
            begin = {"count": 0, "sum": 0.0, "sum_of_squares": 0.0, "sum_of_variances": 0.0}
            total = self._of.setdefault(split, begin)
            total["count"] += part["count"]
            for name in ("sum", "sum_of_squares", "sum_of_variances"):
                total[name] = total[name] + np.array(part[name])

    def statistics(self) -> dict[str, Any]:
        """Per split and channel: mean, std of the posterior means, and std of posterior samples.

        A sample is mean + std * noise, so its variance is the variance of the means plus the mean variance.
        Training normalises samples; which of the two the paper's statistics are is not known.
        """
        statistics = {}
        for split, total in sorted(self._of.items()):
            mean = total["sum"] / total["count"]
            variance = np.maximum(total["sum_of_squares"] / total["count"] - mean**2, 0.0)
            statistics[split] = {
                "frames": total["count"],
                "mean": mean.tolist(),
                "std_of_means": np.sqrt(variance).tolist(),
                "std_of_samples": np.sqrt(variance + total["sum_of_variances"] / total["count"]).tolist(),
            }
        return statistics


def sweep(run: Folder, described: Collection[str]) -> int:
    """Delete what no index describes: shards of late or killed writers, crash markers, temporary files.

    Args:
        described: names of the files that belong to units.
    """
    stray = [
        f"{folder}/{entry.name}"
        for folder in (shards.SHARDS, shards.CAPTIONS, ATTEMPTS)
        for entry in run.files(folder, sizes=False)
        if f"{folder}/{entry.name}" not in described
    ]
    for name in stray:
        run.delete(name)
    return len(stray) + run.sweep_temporary(older_than_s=0.0)


def summary_lines(summary: dict[str, Any], run: Folder) -> list[str]:
    """The summary for people."""
    rows, launch = summary["rows"], summary.get("this_launch")
    lines = [
        f"{rows[OK]} clips ok, {rows[REJECTED]} rejected, {rows[FAILED]} failed of {summary['tracks']} "
        f"{summary.get('of', 'tracks')}; "
        f"{summary['clips_expected']} clips expected, {summary['clips_found']} found",
    ]
    if launch is not None:
        lines.append(f"this launch: {launch['clips']} clips processed, {launch['failed']} failed")
    lines += [
        f"  {reason['status']} in {reason['stage']}: {reason['reason']} x {reason['count']}"
        for reason in summary["reasons"]
    ]
    lines += [
        f"  {stage}: {rate['wall_ms_per_clip']:.0f} ms per clip ({rate['cpu_ms_per_clip']:.0f} ms CPU)"
        + (f", {rate['queue']:.2g} units waiting for it" if "waited_s" in rate else "")
        for stage, rate in summary["stages"].items()
    ]
    if gpus := summary.get("gpus"):
        lines.append(f"  GPUs: at work for {100 * gpus['use']:.0f}% of the {gpus['held_s']:.0f} s that they were held")
    lines += [
        *summary.get("lines", ()),
        f"{summary['units']} units, {summary['bytes'] / 1e6:.1f} MB, splits {summary['splits']}",
        f"scores by {summary['protocol']}" + (f" ({summary['note']})" if summary["note"] else ""),
        f"index: {run.path('index.parquet')}; quarantine: ttmray corpus ls {run.typed} --status failed",
    ]
    return lines


def _stage_rates(log: unit_log.Gathered) -> dict[str, Times]:
    """Of every stage its times over all launches, what they are for a clip, and how many units waited for it and were
    in it on average: what units spend somewhere in a second is how many are there."""
    seconds = max(log.seconds, 1e-9)
    return {
        stage: {name: round(value, 3) for name, value in times.items()}
        | {f"{kind}_ms_per_clip": 1000 * times.get(f"{kind}_s", 0) / max(times.get("clips", 0), 1) for kind in _KINDS}
        | {"queue": round(times.get("waited_s", 0) / seconds, 3), "at_work": round(times.get("wall_s", 0) / seconds, 3)}
        for stage, times in log.stages.items()
    }


def _gpu_use(log: unit_log.Gathered, held_s: float) -> Times:
    """Seconds that GPUs were held, those in which the processes that hold them worked at stages with models, and the
    share of the two (above 1 where processes share a card); empty where none was held."""
    work_s = sum(times.get("gpu_s", 0) for times in log.stages.values())
    return {"held_s": round(held_s, 3), "work_s": round(work_s, 3), "use": round(work_s / held_s, 3)} if held_s else {}
