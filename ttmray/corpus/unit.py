"""A unit: a few whole tracks that travel through the pipeline and are committed as one.

Plain data without Ray. `rows` holds one record per outcome (a clip, or a track that gave no clip), `clips`
holds arrays whose first axis runs over the rows that are still `ok`, in row order, and `texts` holds arrays
over `caption_ids`. `to_table` and `from_table` are the one wire format between processes: one Arrow row,
JSON for structure and one binary column for each array, so nothing is pickled and Ray can neither split
nor merge a unit.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ttmray.errors import ClipError
from ttmray.json_text import read_json

OK = "ok"
REJECTED = "rejected"
FAILED = "failed"
Times = dict[str, float]
"""What a stage took and did: `wall_s` and `cpu_s` (of its process); `clips` that it worked on; `rows_in` (of the first
stage: tracks) and `rows_out` that are ok; rows that it turned into `rejected` and `failed` ones; of the first stage of
a process `waited_s`, which the unit spent on its way from the process before; `gpu_s`, of `wall_s` what a process with
a GPU spent on a stage with models."""


@dataclass
class Unit:
    """See the module docstring.

    Attributes:
        name: `u000012`, also the stem of the files that it is committed as.
        tracks: plan rows of its tracks.
        rows: index rows so far; every row has `key`, `track_id`, `segment` and `status`.
        clips: arrays over the ok rows, e.g. `mix` (n, 2, samples) float32.
        caption_ids: captions whose text features this unit stores.
        texts: arrays over `caption_ids`.
        timing: stage -> its `Times`.
        track_audio: whole tracks (2, samples) that never leave the process (separation of whole tracks).
        handed_on: when the last process was done with it, as of `time.time`; 0: none was.
    """

    name: str
    tracks: list[dict[str, Any]]
    rows: list[dict[str, Any]] = field(default_factory=list)
    clips: dict[str, np.ndarray] = field(default_factory=dict)
    caption_ids: list[str] = field(default_factory=list)
    texts: dict[str, np.ndarray] = field(default_factory=dict)
    timing: dict[str, Times] = field(default_factory=dict)
    track_audio: dict[str, np.ndarray] = field(default_factory=dict)
    handed_on: float = 0.0

    def ok_rows(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["status"] == OK]

    def drop(self, errors: dict[int, ClipError], stage: str) -> None:
        """Turn ok rows (by their position among the ok rows) into quarantined ones and drop their arrays."""
        if not errors:
            return
        ok = self.ok_rows()
        for position, error in errors.items():
            ok[position].update(status=error.status, stage=stage, reason=error.reason, message=error.message)
        keep = np.array([position for position in range(len(ok)) if position not in errors], dtype=np.int64)
        self.clips = {name: array[keep] for name, array in self.clips.items()}

    def keep(self, names: Collection[str]) -> None:
        """Let go of all arrays but those of these names: of `clips`, or `texts` or `track_audio` as a whole."""
        self.clips = {name: array for name, array in self.clips.items() if name in names}
        if "track_audio" not in names:
            self.track_audio = {}
        if "texts" not in names:
            self.texts, self.caption_ids = {}, []

    def one_by_one(self, stage: str, work: Callable[[int], Any]) -> list[Any]:
        """Apply `work` to every ok row by position; a ClipError quarantines that row only.

        Returns the results of the rows that stay ok.
        """
        results, errors = [], {}
        for position in range(len(self.ok_rows())):
            try:
                results.append(work(position))
            except ClipError as error:
                errors[position] = error
        self.drop(errors, stage)
        return results

    def timed(self) -> Callable[["Unit"], Times]:
        """Begin to measure a stage; what is returned says what it took, of the unit after it."""
        wall, cpu, before = time.perf_counter(), time.process_time(), self._ended()
        came = before[OK] if self.rows else len(self.tracks)

        def read(after: "Unit") -> Times:
            ended = after._ended()
            return {
                "wall_s": time.perf_counter() - wall,
                "cpu_s": time.process_time() - cpu,
                "clips": max(before[OK], ended[OK]),
                "rows_in": came,
                "rows_out": ended[OK],
                **{status: ended[status] - before[status] for status in (REJECTED, FAILED)},
            }

        return read

    def _ended(self) -> Counter[str]:
        return Counter(row["status"] for row in self.rows)

    def part(self, track_ids: set[str], keys: set[str] | None = None) -> "Unit":
        """The sub-unit of some tracks, or of some ok clips, for running suspects alone."""
        ok = self.ok_rows()
        keep = [i for i, row in enumerate(ok) if row["track_id"] in track_ids and (keys is None or row["key"] in keys)]
        return Unit(
            name=self.name,
            tracks=[track for track in self.tracks if track["track_id"] in track_ids],
            rows=[dict(ok[i]) for i in keep],
            clips={name: array[keep] for name, array in self.clips.items()},
        )

    def told(self) -> "Unit":
        """What is still to be said of a committed unit: how its rows ended, and times. It is small: Ray keeps it with
        the driver, where the loss of a machine cannot reach it."""
        rows = [{name: row[name] for name in ("key", "segment", "status", "stage", "message")} for row in self.rows]
        return Unit(self.name, [], rows, timing=self.timing)

    def to_table(self) -> pa.Table:
        """One Arrow row: `header` (JSON) and one large_binary column per array."""
        assert not self.track_audio, "whole tracks must not leave their process"
        arrays = {f"clips.{name}": array for name, array in self.clips.items()}
        arrays |= {f"texts.{name}": array for name, array in self.texts.items()}
        header = {
            "name": self.name,
            "tracks": self.tracks,
            "rows": self.rows,
            "caption_ids": self.caption_ids,
            "timing": self.timing,
            "handed_on": self.handed_on,
            "arrays": {name: [array.dtype.str, list(array.shape)] for name, array in arrays.items()},
        }
        columns = {"header": pa.array([json.dumps(header)], pa.large_string())}
        for name, array in arrays.items():
            columns[name] = _binary(np.ascontiguousarray(array))
        return pa.table(columns)

    @classmethod
    def from_table(cls, table: pa.Table) -> "Unit":
        """Inverse of `to_table`. Arrays are read-only views of the Arrow buffers."""
        header = read_json(table["header"][0].as_py())
        unit = cls(
            name=header["name"],
            tracks=header["tracks"],
            rows=header["rows"],
            caption_ids=header["caption_ids"],
            timing=header["timing"],
            handed_on=header["handed_on"],
        )
        for name, (dtype, shape) in header["arrays"].items():
            buffer = table[name][0].as_buffer()
            kind, _, short = name.partition(".")
            getattr(unit, kind)[short] = np.frombuffer(buffer, dtype=dtype).reshape(shape)
        return unit


def _binary(array: np.ndarray) -> pa.Array:
    data = pa.py_buffer(array.reshape(-1).view(np.uint8)) if array.size else pa.py_buffer(b"")
    offsets = pa.py_buffer(np.array([0, array.nbytes], dtype=np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def merge(whole: Unit, parts: list[Unit]) -> Unit:
    """Put sub-units, which ran alone, back into `whole`, in their original order.

    Rows of `whole` that were not ok stay; rows of the parts replace the ok ones by key or, where a part
    decoded a track, are appended. The parts' arrays are concatenated in order.
    """
    done = [row for row in whole.rows if row["status"] != OK]
    rows = [*done, *(row for part in parts for row in part.rows)]
    order = {track["track_id"]: i for i, track in enumerate(whole.tracks)}
    filled = [part for part in parts if part.ok_rows()]
    names = filled[0].clips.keys() if filled else (parts[0].clips.keys() if parts else ())
    # positions before sorting, so that arrays follow their rows
    ok = [(order[row["track_id"]], row["segment"], i) for i, row in enumerate(r for p in parts for r in p.ok_rows())]
    permutation = [i for _, _, i in sorted(ok)]
    clips = (
        {name: np.concatenate([part.clips[name] for part in filled])[permutation] for name in names} if filled else {}
    )
    if not filled and parts:
        clips = parts[0].clips
    rows.sort(key=lambda row: (order[row["track_id"]], row["segment"]))
    return Unit(
        name=whole.name,
        tracks=whole.tracks,
        rows=rows,
        clips=clips,
        caption_ids=whole.caption_ids,
        texts=whole.texts,
        timing=add_times([whole.timing, *(part.timing for part in parts)]),
        track_audio=whole.track_audio,
        handed_on=whole.handed_on,
    )


def add_times(timings: Iterable[Mapping[str, Times]]) -> dict[str, Times]:
    """Stage -> the sums of its `Times`."""
    sums: dict[str, Times] = {}
    for timing in timings:
        for stage, times in timing.items():
            total = sums.setdefault(stage, {})
            for name, value in times.items():
                total[name] = total.get(name, 0) + value
    return sums
