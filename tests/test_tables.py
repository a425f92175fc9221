"""One reader for the tables of users: each kind of reader takes the same formats."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ttmray.corpus.captions import load_captions
from ttmray.errors import UserError
from ttmray.evaluation.compare import read_scores
from ttmray.generation.prompts import read_prompts
from ttmray.tables import read_rows, read_table
from ttmray.training.clips import read_keys

ROW = {"id": "t1", "prompt": "a flute", "caption": "a flute", "key": "t1_0", "weight": "0.5", "reward": "1.5"}
TEXT = {
    "t.csv": ",".join(ROW) + "\n" + ",".join(ROW.values()) + "\n",
    "semicolons.csv": "\ufeff" + ";".join(name.upper() for name in ROW) + "\r\n" + ";".join(ROW.values()) + "\r\n",
    "t.TSV": "\t".join(ROW) + "\n" + "\t".join(ROW.values()) + "\n",
    "t.json": json.dumps([ROW]),
    "t.jsonl": "\n" + json.dumps(ROW) + "\n",
}
TABLES = {name: text.encode() for name, text in TEXT.items()}
TABLES |= {f"{name}.gz": gzip.compress(data) for name, data in TABLES.items()}


@pytest.mark.parametrize("name", [*TABLES, "t.parquet"])
def test_captions_prompts_keys_scores_and_rows_are_read_from_every_format(tmp_path, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist([ROW]), path)
    else:
        path.write_bytes(TABLES[name])
    assert load_captions(str(path)) == {"t1": "a flute"}
    assert [(prompt.id, prompt.text) for prompt in read_prompts(str(path))] == [("t1", "a flute")]
    assert read_keys(str(path)) == {"t1_0": 0.5}
    assert [(score.metric, score.value) for score in read_scores(str(path))[0]] == [("reward", 1.5)]
    ((place, row),) = read_rows(str(path), ROW.keys())
    assert row == ROW
    assert place.startswith(f"{path}, ")


def test_keys_that_look_like_numbers_stay_text(tmp_path):
    (tmp_path / "k.csv").write_text("key,weight\n007,1\n08,2\n")
    assert read_keys(str(tmp_path / "k.csv")) == {"007": 1.0, "08": 2.0}


def test_other_columns_of_a_parquet_file_are_not_read_where_only_known_ones_count(tmp_path):
    table = pa.table({"key": ["a"], "Other": [[1.0]]})
    pq.write_table(table, tmp_path / "t.parquet")
    read = read_table(str(tmp_path / "t.parquet"), ("key",), only_known=True)
    assert (read.columns, read.header, len(read)) == ({"key": ["a"]}, ["key", "Other"], 1)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("t.csv", b"a,b\n1\n", "line 2: 1 cells, fewer cells"),
        ("t.csv", b"a,b\n1,2,3\n", "line 2: 3 cells, more cells"),
        ("t.csv", b"a,A\n1,2\n", "two columns called 'a'"),
        ("t.jsonl", b'{"a": 1}\n\n{"a"\n', "line 3: "),
        ("t.jsonl", b'{"a": 1}\n\n[1]\n', "line 3: not an object"),
        ("t.json.gz", b"[]", "not a whole gzip file"),
        ("t.txt", b"a\n", "not a table"),
    ],
)
def test_a_damaged_table_is_one_message_with_the_place(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        read_rows(str(tmp_path / name), ("a", "b"))
    assert name in caught.value.message


def test_a_parquet_table_whose_column_names_are_no_text_is_refused(tmp_path):
    file = tmp_path / "captions.parquet"
    pq.write_table(pa.table({"path": ["a"], "café": ["b"]}), file, store_schema=False)
    file.write_bytes(file.read_bytes().replace("café".encode(), b"caf\xf3("))
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read_table(str(file), known=("path",))


def test_rows_without_any_known_column_are_rows(tmp_path):
    pq.write_table(pa.table({"else": ["a", "b"]}), tmp_path / "prompts.parquet")
    table = read_table(str(tmp_path / "prompts.parquet"), known=("prompt",), only_known=True)
    assert list(table.rows()) == [{}, {}]
    with pytest.raises(UserError):
        read_prompts(str(tmp_path / "prompts.parquet"))
