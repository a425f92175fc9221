"""The end of a run: rows against the plan, statistics against numpy, and what is swept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttmray.corpus import index, shards
from ttmray.corpus.finalise import (
    check_rows,
    differing_tracks,
    finalise,
    latent_statistics,
    summary_lines,
    sweep,
)
from ttmray.corpus.look import stats
from ttmray.corpus.plan import SCHEMA, Plan
from ttmray.corpus.scores import reward_statistics
from ttmray.corpus.unit import OK
from ttmray.errors import UserError
from ttmray.storage import Folder

DESCRIBED = {"protocol_id": "debug/test", "note": "", "fingerprint": "0"}


def plan_of(**clips: int) -> Plan:
    rows = [{"track_id": name, "clips": count, "unit": "u000000", "size": 1} for name, count in clips.items()]
    return Plan(pa.Table.from_pylist(rows, schema=SCHEMA), "songs")


def table_of(*keys: str, **columns: Any) -> pa.Table:
    rows = []
    for key in keys:
        track, _, segment = key.rpartition("_")
        row = {"key": key, "track_id": track or key, "segment": int(segment) if track else -1, "status": OK}
        rows.append(row | {name: values[len(rows)] for name, values in columns.items()})
    return pa.Table.from_pylist(rows, schema=index.SCHEMA)


def test_rows_that_match_the_plan_are_no_problem():
    assert check_rows(table_of("a_0", "a_1", "b"), plan_of(a=2, b=1)) == []
    assert check_rows(table_of("a_0", "a_1"), plan_of(a=9)) == [], "clip counts are expectations"


ROWS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(-1, 3)), min_size=1, max_size=9)


@given(rows=ROWS, planned=st.dictionaries(st.sampled_from("abcd"), st.integers(0, 3), min_size=1))
def test_rows_are_checked_as_a_loop_over_them_would(rows, planned):
    keys = [f"{track}_{segment}" if segment >= 0 else track for track, segment in rows]
    problems = [f"{key} has {keys.count(key)} rows" for key in dict.fromkeys(keys) if keys.count(key) > 1]
    problems += [f"{track} is planned and has no row" for track in planned if track not in dict(rows)]
    problems += [f"{track} has rows and is not planned" for track in dict(rows) if track not in planned]
    for track in dict(rows):
        segments = sorted(segment for of, segment in rows if of == track)
        if segments not in ([-1], list(range(len(segments)))):
            problems.append(f"{track} has segments {segments}")
    assert check_rows(table_of(*keys), plan_of(**planned)) == problems
    clips = {track: sum(of == track and segment >= 0 for of, segment in rows) for track in planned}
    differing = [
        (one["track_id"], one["expected"], one["found"])
        for one in differing_tracks(table_of(*keys), plan_of(**planned))
    ]
    assert differing == [(track, count, clips[track]) for track, count in planned.items() if count != clips[track]]


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (("a_0", "a_0", "b_0"), "a_0 has 2 rows"),
        (("a_0",), "b is planned and has no row"),
        (("a_0", "b_0", "c_0"), "c has rows and is not planned"),
        (("a_0", "a_2", "b_0"), "a has segments [0, 2]"),
        (("a_1", "b_0"), "a has segments [1]"),
        (("a", "a_0", "b_0"), "a has segments [-1, 0]"),
    ],
)
def test_rows_that_do_not_match_the_plan_are_named(keys, problem):
    assert problem in check_rows(table_of(*keys), plan_of(a=2, b=1))


def test_tracks_that_gave_other_clips_than_expected_are_listed_with_the_reason():
    table = table_of("a_0", "b", "c_0", reason=["", "not_audio", ""], message=["", "no header", ""])
    assert differing_tracks(table, plan_of(a=2, b=1, c=1)) == [
        {"track_id": "a", "expected": 2, "found": 1, "why": "the header's duration was an estimate"},
        {"track_id": "b", "expected": 1, "found": 0, "why": "not_audio: no header"},
    ]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_latent_statistics_of_units_are_those_of_all_latents_together(sizes, seed):
    random = np.random.default_rng(seed)
    means = [(random.standard_normal((n, 6, 3)) * 2 + 1).astype(np.float16) for n in sizes]
    stds = [random.uniform(0.1, 1, (n, 6, 3)).astype(np.float16) for n in sizes]
    metadata = [{"latents": {"train": index.latent_sums(m, s)}} for m, s in zip(means, stds, strict=True)]
    statistics = latent_statistics(json.loads(json.dumps(metadata)))["train"]
    flat = np.concatenate(means).astype(np.float64).reshape(-1, 3)
    noise = np.concatenate(stds).astype(np.float64).reshape(-1, 3)
    assert statistics["frames"] == len(flat)
    np.testing.assert_allclose(statistics["mean"], flat.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(statistics["std_of_means"], flat.std(0), rtol=1e-9, atol=1e-9)
    samples = np.sqrt(flat.var(0) + (noise**2).mean(0))
    np.testing.assert_allclose(statistics["std_of_samples"], samples, rtol=1e-9, atol=1e-9)


def test_the_saved_latent_statistics_are_those_of_the_latents_in_the_shards(finished_run):
    run = Folder.at(str(finished_run))
    by_split: dict[str, list[np.ndarray]] = {}
    for entry in run.files("shards"):
        for _, members in shards.read_samples(run.read(f"shards/{entry.name}"), entry.name):
            by_split.setdefault(members["json"]["split"], []).append(members["latent_mean.npy"].astype(np.float64))
    saved = json.loads(run.read("stats/latents.json"))
    assert saved.keys() == by_split.keys()
    for split, latents in by_split.items():
        flat = np.concatenate(latents)
        np.testing.assert_allclose(saved[split]["mean"], flat.mean(0), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(saved[split]["std_of_means"], flat.std(0), rtol=1e-9, atol=1e-9)


def test_stats_of_a_finished_run_read_no_unit(run, capsys):
    (run / "_SUCCESS.json").rename(run / "aside")
    assert stats(str(run)) == 0  # as of a growing run: of all units
    of_units = capsys.readouterr().out
    (run / "aside").rename(run / "_SUCCESS.json")
    for file in (run / "index").iterdir():
        file.unlink()
    assert stats(str(run)) == 0
    assert capsys.readouterr().out.endswith(of_units)


def test_reward_statistics_are_those_of_numpy_per_split():
    random = np.random.default_rng(0)
    values = {name: random.standard_normal(5) for name in ("reward_score", "instrumental_reward_score")}
    table = table_of(
        "a_0", "a_1", "b_0", "c_0", "d_0",
        split=["train", "train", "train", "test", "train"], status=[OK, OK, OK, OK, "failed"],
        track_reward_score=[0.0] * 5, **values,
    )  # fmt: skip
    statistics = reward_statistics(table)
    train = values["reward_score"][:3]
    assert statistics["train"]["clips"] == 3
    assert statistics["train"]["reward_score"] == {
        "mean": pytest.approx(train.mean()),
        "std": pytest.approx(train.std(ddof=1)),
        "p5": pytest.approx(np.percentile(train, 5)),
        "p95": pytest.approx(np.percentile(train, 95)),
        "max": train.max(),
    }
    assert statistics["test"]["instrumental_reward_score"]["std"] == 0.0


def test_a_corpus_without_ok_clips_has_empty_statistics():
    assert reward_statistics(index.SCHEMA.empty_table()) == {}
    assert latent_statistics([]) == {}


def test_finishing_without_all_units_names_one_and_writes_nothing(run, make_config, songs):
    (run / "index/u000001.parquet").unlink()
    (run / "_SUCCESS.json").unlink()
    (run / "index.parquet").unlink()
    folder = Folder.at(str(run))
    with pytest.raises(UserError, match=r"1 units are not committed, e\.g\. u000001"):
        finalise(folder, Plan.load(folder), DESCRIBED, 0.0)
    assert not folder.exists("_SUCCESS.json")
    assert not folder.exists("index.parquet")


def test_finishing_rows_that_do_not_match_the_plan_names_them_and_keeps_everything(run, make_config, songs):
    (run / "index/u000001.parquet").write_bytes((run / "index/u000000.parquet").read_bytes())
    (run / "shards/stray.tar").write_bytes(b"")
    (run / "_SUCCESS.json").unlink()
    folder = Folder.at(str(run))
    with pytest.raises(UserError, match="tide_0 has 2 rows"):
        finalise(folder, Plan.load(folder), DESCRIBED, 0.0)
    assert not folder.exists("_SUCCESS.json")
    assert folder.exists("shards/stray.tar")


def test_files_that_no_index_describes_are_swept_and_nothing_else(run):
    folder = Folder.at(str(run))
    before = {entry.name for entry in folder.files()}
    for name in ("shards/u000000-000000000000.tar", "captions/old.safetensors", "attempts/u000000.all.0"):
        folder.write(name, b"late")
    (run / "shards/.tmp-killed").write_bytes(b"half")
    metadata = [data for _, data in index.read_units(folder, index.committed_units(folder))]
    described = {name for data in metadata for name in data["files"]}
    assert sweep(folder, described) == 4
    assert {entry.name for entry in folder.files()} == before
    assert not (run / "shards/.tmp-killed").exists()
    assert sweep(folder, described) == 0


def test_counts_of_the_summary_add_up(finished_run):
    summary = json.loads((finished_run / "_SUCCESS.json").read_text())["summary"]
    rows = summary["rows"]
    assert rows == {"total": 6, "ok": 4, "rejected": 1, "failed": 1}
    assert sum(reason["count"] for reason in summary["reasons"]) == rows["rejected"] + rows["failed"]
    assert {reason["reason"] for reason in summary["reasons"]} == {"not_audio", "silent"}
    assert sum(summary["splits"].values()) == rows["ok"]
    assert (summary["clips_expected"], summary["clips_found"]) == (6, 5)
    assert [track["track_id"] for track in summary["expected_and_found_differ"]] == ["broken"]
    files = [*finished_run.glob("shards/*"), *finished_run.glob("captions/*")]
    assert summary["bytes"] == sum(file.stat().st_size for file in files)
    assert summary["captions"] == 3


def test_the_summary_for_people_names_the_numbers_and_where_things_lie(finished_run: Path):
    summary = json.loads((finished_run / "summary.json").read_text())
    text = "\n".join(summary_lines(summary, Folder.at(str(finished_run))))
    for part in ("4 clips ok, 1 rejected, 1 failed of 5 tracks", "not_audio x 1", "untrained", str(finished_run)):
        assert part in text
    assert text.splitlines()[0] in (finished_run / "summary.md").read_text()
