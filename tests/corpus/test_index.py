"""The index files: reproducible bytes, damage that is noticed, and sums for latent statistics."""

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttmray.corpus import index
from ttmray.errors import UserError
from ttmray.storage import Folder

METADATA = {"unit": "u000000", "files": {}, "latents": {"train": {"count": 1, "sum": [0.1]}}}


def rows(count: int) -> list[dict[str, Any]]:
    track = {"track_id": "t", "split": "train", "caption": "é", "caption_id": "0" * 16, "path": "t.mp3"}
    made = []
    for i in range(count):
        row = index.new_row(track, "u000000", "debug")
        made.append(row | {"key": f"t_{i}", "segment": i, "reward_score": 0.1 * i, "sample_rate": 44100})
    return made


def test_a_new_row_has_every_column_and_knows_its_track():
    (row,) = rows(1)
    assert list(row) == index.SCHEMA.names
    assert (row["track_id"], row["source"], row["caption"], row["unit"]) == ("t", "t.mp3", "é", "u000000")
    assert row["clap_score"] is None


def test_the_same_rows_give_the_same_bytes_and_come_back():
    data = index.to_bytes(rows(3), METADATA)
    assert index.to_bytes(rows(3), json.loads(json.dumps(METADATA))) == data
    table, metadata = index.from_bytes(data, "u000000.parquet")
    assert table.to_pylist() == rows(3)
    assert metadata == METADATA
    assert table.schema.remove_metadata().equals(index.SCHEMA)


def test_pandas_reads_an_index_file_without_our_help(tmp_path):
    pandas = pytest.importorskip("pandas")
    (tmp_path / "u.parquet").write_bytes(index.to_bytes(rows(3), METADATA))
    frame = pandas.read_parquet(tmp_path / "u.parquet")
    assert frame["key"].tolist() == ["t_0", "t_1", "t_2"]
    assert frame["reward_score"].mean() == pytest.approx(0.1)


def test_no_rows_are_an_index_too():
    table, _ = index.from_bytes(index.to_bytes([], METADATA), "u")
    assert table.num_rows == 0


def test_nan_never_enters_the_index():
    bad = rows(1)
    bad[0]["reward_score"] = float("nan")
    with pytest.raises(AssertionError, match="t_0: reward_score is NaN"):
        index.to_bytes(bad, METADATA)


def test_a_parquet_file_of_someone_else_is_refused(tmp_path):
    pq.write_table(index.SCHEMA.empty_table(), tmp_path / "no-metadata.parquet")
    pq.write_table(index.SCHEMA.empty_table().select(["key"]), tmp_path / "columns.parquet")
    for file in tmp_path.iterdir():
        with pytest.raises(UserError, match=file.name):
            index.from_bytes(file.read_bytes(), file.name)


WHOLE = index.to_bytes(rows(5), METADATA)


@given(st.integers(0, len(WHOLE) - 1))
def test_a_cut_index_file_is_one_message(length):
    with pytest.raises(UserError, match=r"u\.parquet is not a readable index file") as caught:
        index.from_bytes(WHOLE[:length], "u.parquet")
    assert "start the same command again" in caught.value.hint


def test_a_column_whose_name_has_changed_is_damage_and_one_from_outside_is_none():
    place = WHOLE.rindex(b"latent_mean_at")
    damaged = WHOLE.replace(b"latent_mean_at", b"matent_mean_at")
    assert place > 0
    with pytest.raises(UserError, match="nobody wrote the columns matent_mean_at"):
        index.from_bytes(damaged, "u.parquet")
    whole = index.to_bytes([{**row, "brightness": 0.5} for row in rows(2)], {"files": {}}, {"brightness": pa.float64()})
    assert index.from_bytes(whole, "u.parquet")[0]["brightness"].to_pylist() == [0.5, 0.5]


@settings(max_examples=300)
@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_a_changed_byte_never_gives_anything_but_rows_or_a_message(position, change):
    damaged = bytearray(WHOLE)
    damaged[position] ^= change
    try:
        table, _ = index.from_bytes(bytes(damaged), "u.parquet")
    except UserError:
        return
    assert table.schema.names == index.SCHEMA.names
    assert all(row.keys() == set(index.SCHEMA.names) for row in table.to_pylist())


@settings(max_examples=300)
@given(st.data())
def test_a_changed_byte_of_the_pages_never_gives_other_numbers(data):
    footer = int.from_bytes(WHOLE[-8:-4], "little")
    position = data.draw(st.integers(4, len(WHOLE) - footer - 9))
    damaged = bytearray(WHOLE)
    damaged[position] ^= data.draw(st.integers(1, 255))
    try:
        table, _ = index.from_bytes(bytes(damaged), "u.parquet")
    except UserError:
        return
    assert table.to_pylist() == rows(5)


def test_only_the_columns_that_are_named_are_read(tmp_path):
    run = Folder.at(str(tmp_path))
    run.write("index/u000000.parquet", index.to_bytes(rows(2), METADATA))
    assert index.read_index(run, ["unit", "key"]).column_names == ["unit", "key"]
    run.write("index.parquet", index.to_bytes(rows(2), METADATA))
    assert index.read_index(run, ["unit", "key"]).to_pydict() == {"unit": ["u000000"] * 2, "key": ["t_0", "t_1"]}
    with pytest.raises(UserError, match=r"index\.parquet is not a readable index file"):
        index.read_index(run, ["nothing"])


def test_an_index_file_of_an_older_version_has_empty_places():
    table, metadata = index.from_bytes(WHOLE, "u")
    older = table.drop_columns(index.PLACES).replace_schema_metadata({index.METADATA_KEY: json.dumps(metadata)})
    again, _ = index.from_bytes(index.parquet_bytes(older), "u")
    assert again.equals(table)


def test_rows_learn_where_their_captions_lie_from_whatever_unit_holds_them():
    table, _ = index.from_bytes(WHOLE, "u")
    owner = {"files": {"captions/u7.safetensors": {"shape": [3, 8], "places": {"0" * 16: [100, 20]}}}}
    another = {"shape": [3, 8], "places": {"1": [9, 9]}}
    other = {"files": {"shards/u.tar": {"clips": 1}, "captions/u.safetensors": another}}
    for order in ([owner, other], [other, owner]):
        row = index.with_text_places(table, order).to_pylist()[3]
        assert [row[name] for name in index.TEXT_PLACES] == ["captions/u7.safetensors", 100, 20, 3, 8]
    assert index.with_text_places(table, [other]).equals(table)


def test_committed_units_are_those_with_an_index_file(tmp_path):
    run = Folder.at(str(tmp_path))
    assert index.committed_units(run) == []
    assert index.read_index(run).num_rows == 0
    for name, count in (("u000001", 2), ("u000000", 1)):
        run.write(f"index/{name}.parquet", index.to_bytes(rows(count), METADATA))
    run.write("index/.tmp-1", b"half a file")
    run.write("shards/u000002.tar", b"")
    assert index.committed_units(run) == ["u000000", "u000001"]
    assert [table.num_rows for table, _ in index.read_units(run, ["u000001", "u000000"])] == [2, 1]
    assert index.read_index(run)["key"].to_pylist() == ["t_0", "t_0", "t_1"]


def test_a_damaged_merged_index_is_one_message(tmp_path):
    run = Folder.at(str(tmp_path))
    run.write("index.parquet", WHOLE[:100])
    with pytest.raises(UserError, match=r"index\.parquet"):
        index.read_index(run)


def test_latent_sums_are_those_of_numpy():
    random = np.random.default_rng(0)
    mean = random.standard_normal((3, 7, 4)).astype(np.float16)
    std = random.random((3, 7, 4)).astype(np.float16)
    sums = index.latent_sums(mean, std)
    assert sums["count"] == 21
    flat = mean.astype(np.float64).reshape(-1, 4)
    np.testing.assert_allclose(sums["sum"], flat.sum(0), rtol=1e-14)
    np.testing.assert_allclose(sums["sum_of_squares"], (flat**2).sum(0), rtol=1e-14)
    np.testing.assert_allclose(sums["sum_of_variances"], (std.astype(np.float64) ** 2).sum((0, 1)), rtol=1e-14)


def test_rows_of_many_units_are_joined_block_by_block(finished_run, monkeypatch):
    run = Folder.at(str(finished_run))
    names = index.committed_units(run)
    assert len(names) == 3
    monkeypatch.setattr(index, "BLOCK", 2)
    rows, metadata = index.read_together(run, names)
    units = index.read_units(run, names)
    assert rows.equals(pa.concat_tables([table for table, _ in units]))
    assert rows["key"].num_chunks == 2
    assert metadata == [data for _, data in units]
    assert index.read_together(run, [])[0].equals(index.SCHEMA.empty_table())


def test_a_column_of_another_type_is_damage_in_every_way_of_reading(tmp_path):
    table, _ = index.from_bytes(WHOLE, "u")
    other = table.set_column(table.schema.get_field_index("sha256"), "sha256", table["sha256"].cast(pa.binary()))
    run = Folder.at(str(tmp_path))
    run.write(index.MERGED, index.parquet_bytes(other))
    with pytest.raises(UserError, match="column sha256 is binary, not string"):
        index.read_merged(run)
    with pytest.raises(UserError, match="column sha256 is binary, not string"):
        index.MergedRows(run).take(2, ["key", "sha256"])
    metadata = pq.read_table(io.BytesIO(WHOLE)).schema.metadata
    with pytest.raises(UserError, match="column sha256 is binary, not string"):
        index.from_bytes(index.parquet_bytes(other.replace_schema_metadata(metadata)), "u")
