"""Units: the wire format, dropping rows, taking parts and putting them back."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttmray.corpus.unit import FAILED, OK, REJECTED, Unit, add_times, merge
from ttmray.errors import ClipError


def clip_row(track: str, segment: int, status: str = OK) -> dict[str, Any]:
    key = track if segment < 0 else f"{track}_{segment}"
    return {"key": key, "track_id": track, "segment": segment, "status": status, "stage": "", "reason": ""}


def make_unit(statuses: list[list[str]]) -> Unit:
    """One track per list and one clip per status; an empty list is a track that gave no clip. Clip arrays hold
    the position of their row in the unit, so that an array in the wrong place shows."""
    rows = []
    for t, track in enumerate(statuses):
        rows += [clip_row(f"t{t}", s, status) for s, status in enumerate(track)] or [clip_row(f"t{t}", -1, FAILED)]
    numbers = np.array([i for i, row in enumerate(rows) if row["status"] == OK], np.float32)
    return Unit(
        name="u000007",
        tracks=[{"track_id": f"t{t}", "caption": "é"} for t in range(len(statuses))],
        rows=rows,
        clips={
            "wave": np.repeat(numbers[:, None, None], 6, axis=1).repeat(2, axis=2),
            "half": numbers.astype(np.float16),
        },
    )


units = st.lists(st.lists(st.sampled_from([OK, REJECTED, FAILED]), max_size=4), min_size=1, max_size=5).map(make_unit)


def same(a: Unit, b: Unit) -> bool:
    def arrays(unit: Unit) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        both = unit.clips | {f"text {name}": array for name, array in unit.texts.items()}
        return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in both.items()}

    fields = ("name", "tracks", "rows", "caption_ids", "timing", "handed_on")
    return all(getattr(a, f) == getattr(b, f) for f in fields) and arrays(a) == arrays(b)


@given(units)
def test_a_unit_survives_the_trip_through_arrow(unit):
    unit.caption_ids, unit.texts = ["b", "a"], {"t5": np.arange(12, dtype=np.float16).reshape(2, 3, 2)}
    unit.timing, unit.handed_on = {"decode": {"wall_s": 0.1, "cpu_s": 0.2, "clips": 3}}, 1.7e9
    table = unit.to_table()
    assert table.num_rows == 1
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert same(Unit.from_table(pa.ipc.open_stream(sink.getvalue()).read_all()), unit)


def test_a_unit_without_clips_keeps_its_shapes_on_the_way():
    unit = Unit("u0", [], clips={"mix": np.zeros((0, 2, 441_000), np.float32)})
    again = Unit.from_table(unit.to_table())
    assert again.clips["mix"].shape == (0, 2, 441_000)
    assert again.clips["mix"].dtype == np.float32


def test_an_array_that_is_not_contiguous_travels_as_it_looks():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(0, 2, 1)
    again = Unit.from_table(Unit("u0", [], clips={"a": array}).to_table())
    np.testing.assert_array_equal(again.clips["a"], array)


def test_dropping_rows_drops_their_arrays_and_keeps_the_others_in_place():
    unit = make_unit([[OK, REJECTED, OK], [OK]])
    unit.drop({1: ClipError("failed", "loud", "too loud")}, "measure")
    assert [row["status"] for row in unit.rows] == [OK, REJECTED, FAILED, OK]
    dropped = unit.rows[2]
    assert (dropped["stage"], dropped["reason"], dropped["message"]) == ("measure", "loud", "too loud")
    assert unit.clips["half"].tolist() == [0, 3]
    assert unit.clips["wave"].shape == (2, 6, 2)


def test_work_on_every_row_quarantines_only_those_that_raise():
    unit = make_unit([[OK, OK], [OK]])

    def work(position: int) -> int:
        if position == 1:
            raise ClipError("rejected", "silent", "")
        return position

    assert unit.one_by_one("measure", work) == [0, 2]
    assert [row["status"] for row in unit.rows] == [OK, REJECTED, OK]
    assert unit.clips["half"].tolist() == [0, 2]


def test_other_errors_of_the_work_come_through():
    unit = make_unit([[OK]])
    with pytest.raises(ZeroDivisionError):
        unit.one_by_one("measure", lambda _: 1 // 0)


def test_a_part_is_a_copy_of_some_ok_clips():
    unit = make_unit([[OK, REJECTED, OK], [OK], []])
    part = unit.part({"t0"}, {"t0_2"})
    assert [row["key"] for row in part.rows] == ["t0_2"]
    assert [track["track_id"] for track in part.tracks] == ["t0"]
    assert part.clips["half"].tolist() == [2]
    part.rows[0]["status"] = FAILED
    assert unit.rows[2]["status"] == OK
    assert [row["key"] for row in unit.part({"t0", "t1"}).rows] == ["t0_0", "t0_2", "t1_0"]


@given(units, st.data())
def test_parts_of_one_clip_each_come_back_together_in_their_original_order(unit, data):
    ok = unit.ok_rows()
    parts = [unit.part({row["track_id"]}, {row["key"]}) for row in ok]
    failing = data.draw(st.sets(st.sampled_from(range(len(ok))))) if ok else set()
    for i in failing:
        parts[i].drop({0: ClipError("failed", "killed", "")}, "separate")
    merged = merge(unit, data.draw(st.permutations(parts)))
    assert [row["key"] for row in merged.rows] == [row["key"] for row in unit.rows]
    survivors = [i for i in range(len(ok)) if i not in failing]
    assert [row["key"] for row in merged.ok_rows()] == [ok[i]["key"] for i in survivors]
    for name, array in unit.clips.items():
        if survivors:
            np.testing.assert_array_equal(merged.clips[name], array[survivors])
        else:
            assert all(len(array) == 0 for array in merged.clips.values())


@given(units, st.randoms(use_true_random=False))
def test_parts_that_decode_one_track_each_add_their_rows(unit, random):
    """What happens when decoding runs alone: the whole has no rows yet, each part brings those of its track."""
    whole = Unit(unit.name, unit.tracks)
    parts = []
    for track in unit.tracks:
        rows = [dict(row) for row in unit.rows if row["track_id"] == track["track_id"]]
        positions = [i for i, row in enumerate(unit.ok_rows()) if row["track_id"] == track["track_id"]]
        parts.append(Unit(unit.name, [track], rows, {name: array[positions] for name, array in unit.clips.items()}))
    random.shuffle(parts)
    merged = merge(whole, parts)
    assert merged.rows == unit.rows
    assert same(merged, unit)


def test_of_a_stage_the_time_and_the_rows_are_kept_that_came_went_and_ended():
    unit = make_unit([[OK, OK, OK]])
    read = unit.timed()
    sum(range(1000))
    unit.drop({0: ClipError(REJECTED, "silent", "no sound"), 2: ClipError(FAILED, "odd", "what is it")}, "score")
    times = read(unit)
    assert times.pop("wall_s") > 0
    assert times.pop("cpu_s") >= 0
    assert times == {"clips": 3, "rows_in": 3, "rows_out": 1, "rejected": 1, "failed": 1}


def test_into_the_first_stage_come_tracks():
    unit = make_unit([[OK, OK], [OK]])
    start = Unit(unit.name, unit.tracks)
    times = start.timed()(unit)
    assert (times["rows_in"], times["rows_out"], times["clips"]) == (2, 3, 3)


def test_times_of_parts_that_ran_alone_add_up():
    one, other = {"decode": {"wall_s": 1.0, "rows_in": 1}}, {"decode": {"rows_in": 1, "failed": 1}}
    assert add_times([one, other]) == {"decode": {"wall_s": 1.0, "rows_in": 2, "failed": 1}}
    assert one == {"decode": {"wall_s": 1.0, "rows_in": 1}}
