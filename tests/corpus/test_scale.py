"""What holds for runs of any size: rows pass block by block, and a look at a run in a bucket is few requests."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import unruly_store
from synthetic_corpus import write_random_corpus

from ttmray import inventory
from ttmray.cli import main
from ttmray.corpus import finalise, index, verify_units
from ttmray.corpus.job import ToDo
from ttmray.corpus.plan import SCHEMA, Plan
from ttmray.corpus.repair import forget_damaged
from ttmray.corpus.verify import problems
from ttmray.errors import UserError
from ttmray.storage import Folder

SMALL: dict[str, Any] = {"clips_per_track": 2, "unit_clips": 2, "latent": (4, 2), "text": (3, 8)}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[unruly_store.Store]:
    from s3fs import S3FileSystem

    with unruly_store.serving() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        yield store
        S3FileSystem.clear_instance_cache()


def finalised(run: Folder) -> dict[str, object]:
    finalise.finalise(run, Plan.load(run), json.loads(run.read("run.json")), 0.0)
    summary = json.loads(run.read("summary.json"))
    return summary | {name: json.loads(run.read(f"stats/{name}.json")) for name in ("latents", "rewards")}


def test_the_end_of_a_run_is_the_same_whatever_passes_at_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder.at(str(run))
    whole, rows = finalised(folder), index.read_merged(folder)
    monkeypatch.setattr(index, "BLOCK", 1)
    monkeypatch.setattr(index, "GROUP_ROWS", 2)
    assert finalised(folder) == whole
    assert pq.ParquetFile(run / "index.parquet").num_row_groups == 3
    assert index.read_merged(folder).equals(rows)
    assert list(problems(folder)) == []


@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_the_merged_index_is_read_in_parts_of_any_size(run: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    folder = Folder.at(str(run))
    rows = index.read_merged(folder)
    monkeypatch.setattr(index, "GROUP_ROWS", 3)
    merged, parts = index.MergedRows(folder), list[pa.Table]()
    while (part := merged.take(step, rows.column_names)).num_rows:
        parts.append(part)
    merged.close()
    assert [part.num_rows for part in parts[:-1]] == [step] * (len(parts) - 1)
    assert pa.concat_tables(parts).equals(rows)


def test_a_damaged_merged_index_is_one_message_in_whatever_part(run: Path) -> None:
    folder, data = Folder.at(str(run)), (run / "index.parquet").read_bytes()
    for broken in (b"", data[:100], data[:60] + bytes([data[60] ^ 255]) + data[61:]):
        (run / "index.parquet").write_bytes(broken)
        with pytest.raises(UserError, match=r"index\.parquet is not a readable index file"):
            index.MergedRows(folder).take(99, index.SCHEMA.names)


def test_rows_of_one_key_in_units_far_apart_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clip 1 of the track `a`, and the track `a_1` that gave no clip."""
    run = Folder.at(str(tmp_path))
    plan = [{"unit": "u0", "track_id": "a"}, {"unit": "u1", "track_id": "b"}, {"unit": "u2", "track_id": "a_1"}]
    rows = [[("a_0", 0), ("a_1", 1)], [("b_0", 0)], [("a_1", -1)]]
    for track, keys in zip(plan, rows, strict=True):
        none = dict.fromkeys(index.SCHEMA.names) | {"status": "failed", "stage": "decode", "reason": "x"}
        of_unit = [none | {"key": key, "segment": at, "track_id": track["track_id"]} for key, at in keys]
        metadata = {"unit": track["unit"], "files": {}, "latents": {}}
        run.write(f"index/{track['unit']}.parquet", index.to_bytes(of_unit, metadata))
    monkeypatch.setattr(index, "BLOCK", 1)
    described = {"kind": "corpus", "fingerprint": "0", "protocol_id": "", "note": ""}
    planned = Plan(pa.Table.from_pylist([{"clips": 1} | track for track in plan], schema=SCHEMA), "")
    with pytest.raises(UserError, match="a_1 has 2 rows"):
        finalise.finalise(run, planned, described, 0.0)
    assert not run.exists("index.parquet")


def test_units_of_a_plan_are_made_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan.load(write_random_corpus(str(tmp_path), tracks=7, committed=0, **{**SMALL, "unit_clips": 4}))
    assert plan.unit_names() == ["u000000", "u000001", "u000002", "u000003"]
    rows = plan.table.to_pylist()
    for size in (1, 3, 99):
        monkeypatch.setattr("ttmray.corpus.plan.BLOCK", size)
        assert [(name, tracks) for name, tracks in plan.units()] == [
            (name, [row for row in rows if row["unit"] == name]) for name in plan.unit_names()
        ]
    todo = ToDo(plan, ["u000001", "u000003"])
    assert len(todo) == 2
    assert [unit.name for unit in todo] == [todo[0].name, todo[-1].name] == ["u000001", "u000003"]
    assert [unit.tracks for unit in todo[1:]] == [rows[6:]]
    assert plan.of(["u000003", "unknown", "u000000"]).table.to_pylist() == [rows[6], rows[0], rows[1]]


@pytest.mark.parametrize("look", [lambda run: list(problems(run)), finalised])
def test_what_is_true_of_the_whole_is_found_out_once_and_not_for_every_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[Folder], object]
) -> None:
    """Else the end of a run and its check take the square of its size."""
    counts, whole = list[Counter[str]](), [(Plan, "unit_names"), (index, "committed_units"), (Folder, "files")]
    for tracks in (3, 12):
        run, seen = write_random_corpus(str(tmp_path / str(tracks)), tracks=tracks, **SMALL), Counter[str]()

        def counted(act: Callable[..., Any], name: str, seen: Counter[str]) -> Callable[..., Any]:
            def acting(*args: Any, **more: Any) -> Any:
                seen[name] += 1
                return act(*args, **more)

            return acting

        with monkeypatch.context() as patch:
            for of, name, value in ((index, "BLOCK", 1), (verify_units, "BLOCK", 1), (verify_units, "ALONE", 99)):
                patch.setattr(of, name, value)
            for of, name in whole:
                patch.setattr(of, name, counted(getattr(of, name), name, seen))
            look(run)
        counts.append(seen)
    assert counts[0] == counts[1]
    assert counts[0]["committed_units"] > 0


@pytest.fixture
def listed_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """A finished run whose units' files are too many for its marker."""
    monkeypatch.setattr(inventory, "MANY", 5)
    return write_random_corpus(str(tmp_path / "run"), tracks=6, **SMALL)


def test_files_of_many_units_are_listed_beside_the_marker(listed_aside: Folder) -> None:
    marker = inventory.read_marker(listed_aside)
    assert marker is not None
    assert not any(name.startswith(("shards", "index/", "captions")) for name in marker["files"])
    present = {file.name for file in listed_aside.files()} - {"_SUCCESS.json", "_FILES.parquet", "units.jsonl"}
    files = inventory.promised(listed_aside, marker)
    assert files.keys() == present
    assert files == inventory.entries(listed_aside, present)
    assert inventory.damage(listed_aside, marker, every_hash=True) == []
    assert list(problems(listed_aside)) == []


def test_damage_of_what_is_listed_beside_the_marker_is_found(listed_aside: Folder) -> None:
    shard = f"shards/{listed_aside.files('shards')[2].name}"
    listed_aside.write(shard, listed_aside.read(shard)[:-1] + b"x")
    marker = inventory.read_marker(listed_aside)
    assert marker is not None
    assert [one.name for one in inventory.damage(listed_aside, marker, every_hash=True)] == [shard]


@pytest.mark.parametrize("table", [None, b"", b"no table"])
def test_a_lost_list_of_files_costs_a_look_at_every_unit_and_is_made_again(
    listed_aside: Folder, table: bytes | None
) -> None:
    run, plan = listed_aside, Plan.load(listed_aside)
    if table is None:
        run.delete(inventory.FILES)
    else:
        run.write(inventory.FILES, table)
    shard, other = (f"shards/{run.files('shards')[i].name}" for i in (2, 4))
    run.delete(shard)
    run.write(other, run.read(other)[:-1] + b"x")  # of the same size
    assert any(line.startswith(inventory.FILES) for line in problems(run))
    described = json.loads(run.read("run.json"))
    forget_damaged(run, plan, described["fingerprint"])
    assert index.committed_units(run) == ["u000000", "u000001", "u000003", "u000005"]
    assert not run.exists("_SUCCESS.json")


def test_looks_at_a_run_in_a_bucket_are_few_requests_however_many_its_units(
    store: unruly_store.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "MANY", 20)
    counts: dict[str, list[int]] = {}
    for tracks in (3, 24):
        run = write_random_corpus(f"s3://bucket/run{tracks}", tracks=tracks, **SMALL)
        for command in (["status"], ["corpus", "stats"]):
            store.requests.clear()
            assert main([*command, run.uri]) == 0
            counts.setdefault(command[-1], []).append(len(store.requests))
    few, many = counts["status"]
    assert many <= few <= 16  # of few files it says which are gone, by one more request
    assert counts["stats"][0] == counts["stats"][1] <= 24


def test_a_look_at_a_growing_run_in_a_bucket_lists_its_units_and_reads_none(store: unruly_store.Store) -> None:
    store.page = 50
    run = write_random_corpus("s3://bucket/run", tracks=120, committed=110, **SMALL)
    lines = [
        json.dumps({"unit": name, "at": 1.0, "since": 0.0, "clips": 2, "rows": {"ok": 2}, "stages": {}})
        for name in index.committed_units(run)
    ]
    run.write("log/1.jsonl", ("\n".join(lines) + "\n").encode())
    store.requests.clear()
    assert main(["status", run.uri]) == 0
    assert not any("index/u" in request for request in store.requests)
    assert len(store.requests) <= 30


def test_the_driver_keeps_little_of_a_row(tmp_path: Path) -> None:
    """Bytes of what `Totals` and `Merging` hold, which are what a run's size costs at its end."""
    run = write_random_corpus(str(tmp_path), tracks=40, **SMALL)
    rows, metadata = index.read_together(run, index.committed_units(run))
    many = pa.concat_tables([rows] * 50).combine_chunks()
    totals, merging = finalise.Totals(), index.Merging()
    totals.add(many, metadata, Plan.load(run))
    merging.add(many)
    held = sum(part.nbytes for part in totals._scores) + sum(keys.nbytes for keys in totals._keys)
    assert held / many.num_rows < 60
    assert np.concatenate(totals._keys).shape == (many.num_rows,)
