"""Parts: what is done is found again by who made it."""

import pyarrow as pa
import pytest

from ttmray.errors import UserError
from ttmray.parts import digests, read_parts, write_part
from ttmray.storage import Folder


def rows(folder: Folder, made_by: str) -> list[int]:
    return [row for part in read_parts(folder, "p", made_by, lambda table: table["x"].to_pylist()) for row in part]


def test_parts_of_one_maker_are_read_and_those_of_others_passed_over(tmp_path):
    folder = Folder.at(str(tmp_path))
    assert rows(folder, "me") == []
    for maker, x in (("me", 1), ("me", 2), ("me", 2), ("you", 3)):
        write_part(folder, "p/", pa.table({"x": [x]}), maker, [x])
    assert sorted(rows(folder, "me")) == [1, 2]
    assert rows(folder, "you") == [3]


@pytest.mark.parametrize("damage", ["cut", "no maker", "no column"])
def test_a_damaged_part_is_named_with_the_way_out(tmp_path, damage):
    folder = Folder.at(str(tmp_path))
    write_part(folder, "p/", pa.table({"x" if damage != "no column" else "y": [1]}), "me", [1])
    name = f"p/{folder.files('p')[0].name}"
    if damage == "cut":
        folder.write(name, folder.read(name)[:-9])
    elif damage == "no maker":
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"x": [1]}), folder.path(name))
    with pytest.raises(UserError, match="is damaged") as caught:
        rows(folder, "me")
    assert name in caught.value.message
    assert "Delete" in caught.value.hint


def test_digests_are_of_the_bytes_and_unreadable_files_have_their_reason(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(b"same")
    paths = [str(tmp_path / name) for name in "abc"]
    known, failed = digests(paths)
    assert known[paths[0]] == known[paths[1]] != ""
    assert list(failed) == [paths[2]]
    assert "not found" in failed[paths[2]]
