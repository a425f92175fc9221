"""Splits, units and the numbers that follow from them."""

import hashlib
import json
import re
import time
from dataclasses import replace
from itertools import groupby

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttmray.audio.io import write_audio
from ttmray.corpus.catalogue import Catalogue, build_catalogue, track_ids
from ttmray.corpus.config import CorpusConfig, SplitConfig
from ttmray.corpus.plan import (
    MAX_UNIT_DECODED_BYTES,
    MAX_UNIT_TRACKS,
    TFLOP_PER_CLIP,
    Plan,
    assign_splits,
    build_plan,
    derived_numbers,
    pack_units,
    plan_difference,
)
from ttmray.corpus.plan_lines import plan_lines
from ttmray.corpus.track import Track
from ttmray.errors import UserError
from ttmray.storage import Folder

NO_SPLITS = {"validation": 0, "test": 0}


def config(**fields) -> CorpusConfig:
    return CorpusConfig(**{"input": "in", "output": "out", "bundle": "debug", "splits": NO_SPLITS, **fields})


def catalogue_of(tracks: list[Track]) -> Catalogue:
    return Catalogue(Folder("/songs"), tracks, {})


def some_tracks(count: int, **fields) -> list[Track]:
    return [
        Track(**{"track_id": f"t{i}", "path": f"{i}.mp3", "size": 100 + i, "duration_s": 30.0, **fields})
        for i in range(count)
    ]


def rows_of(plan: Plan) -> list[dict]:
    return plan.table.to_pylist()


def numbers_of(plan: Plan, config: CorpusConfig, **options) -> dict[str, object]:
    return {name: value for name, value, _ in derived_numbers(plan, config, **options)}


# --- splits


ids = st.lists(st.text("abcdef0123456789", min_size=1, max_size=6), min_size=1, max_size=60, unique=True)


@given(ids, st.integers(0, 9), st.integers(0, 9), st.integers(0, 3))
def test_splits_have_the_asked_sizes_or_are_refused(names, validation, test, seed):
    tracks = [Track(track_id=name, path=name) for name in names]
    asked = SplitConfig(validation=validation, test=test, seed=seed)
    if validation + test > len(names) / 2:
        with pytest.raises(UserError, match=r"splits\.validation"):
            assign_splits(tracks, asked)
        return
    splits = assign_splits(tracks, asked)
    assert (splits.count("validation"), splits.count("test")) == (validation, test)
    assert splits.count("train") == len(names) - validation - test


@given(ids, st.integers(0, 5), st.integers(0, 5), st.data())
def test_an_added_track_moves_at_most_one_other_and_only_into_train(names, validation, test, data):
    added = data.draw(st.sampled_from(names))
    asked = SplitConfig(validation=validation, test=test)
    tracks = [Track(track_id=name, path=name) for name in names]
    before = [track for track in tracks if track.track_id != added]
    if validation + test > len(before) / 2:
        return
    old = dict(zip([t.track_id for t in before], assign_splits(before, asked), strict=True))
    new = dict(zip(names, assign_splits(tracks, asked), strict=True))
    moved = [(old[name], new[name]) for name in old if old[name] != new[name]]
    assert moved in ([], [(new[added], "train")])


def test_the_order_of_the_catalogue_does_not_matter_to_splits_and_the_seed_does():
    tracks = some_tracks(100)
    asked = SplitConfig(validation=20, test=20)
    assert assign_splits(tracks[::-1], asked)[::-1] == assign_splits(tracks, asked)
    assert assign_splits(tracks, asked.model_copy(update={"seed": 1})) != assign_splits(tracks, asked)


def test_rejected_tracks_have_a_split_and_do_not_count():
    tracks = some_tracks(100)
    tracks[::2] = [replace(track, status="rejected", reason="duplicate") for track in tracks[::2]]
    splits = assign_splits(tracks, SplitConfig(validation=10, test=10))
    usable = [split for split, track in zip(splits, tracks, strict=True) if track.status == "ok"]
    assert (usable.count("validation"), usable.count("test"), usable.count("train")) == (10, 10, 30)


@given(st.lists(st.integers(0, 12), min_size=20, max_size=60), st.integers(0, 4), st.integers(0, 4))
def test_artists_stay_together_and_counts_are_reached_with_whole_ones(artists, validation, test):
    tracks = [
        Track(track_id=f"t{i}", path=f"{i}", artist_id=f"a{artist}" if artist else "")
        for i, artist in enumerate(artists)
    ]
    largest = max([artists.count(artist) for artist in set(artists) - {0}], default=1)
    try:
        splits = assign_splits(tracks, SplitConfig(validation=validation, test=test, group_by_artist=True))
    except UserError:
        assert validation + test + 2 * (largest - 1) > len(tracks) / 2
        return
    for artist in set(artists) - {0}:
        assert len({split for split, of in zip(splits, artists, strict=True) if of == artist}) == 1
    for split, asked in (("validation", validation), ("test", test)):
        assert asked <= splits.count(split) <= max(0, asked + largest - 1) or asked == 0 == splits.count(split)


def test_too_large_splits_name_the_fields_and_a_way_out():
    with pytest.raises(UserError) as caught:
        assign_splits(some_tracks(15), SplitConfig())
    assert "splits.validation=200" in caught.value.message
    assert "400 of 15" in caught.value.message
    assert "--set splits.validation=1 --set splits.test=1" in caught.value.hint
    assert assign_splits([], SplitConfig(validation=0, test=0)) == []


# --- units


sizes = st.sampled_from([0.0, 1e6, 5e7, MAX_UNIT_DECODED_BYTES, 1e9])


@given(st.integers(1, 32).flatmap(lambda m: st.tuples(
    st.just(m), st.lists(st.tuples(st.one_of(st.just(0), st.integers(0, m)), sizes), max_size=300))))  # fmt: skip
def test_units_hold_whole_tracks_in_order_within_the_bounds_and_are_filled(case):
    unit_clips, tracks = case
    units = pack_units([clips for clips, _ in tracks], [size for _, size in tracks], unit_clips)
    assert units == sorted(units)
    packed = [(name, [tracks[i] for i, _ in members]) for name, members in groupby(enumerate(units), lambda x: x[1])]
    assert [name for name, _ in packed] == [f"u{n:06d}" for n in range(len(packed))]
    assert [track for _, members in packed for track in members] == tracks
    loads = [(sum(c for c, _ in m), sum(s for _, s in m), len(m)) for _, m in packed]
    for clips, size, count in loads:
        assert clips <= unit_clips
        assert size <= MAX_UNIT_DECODED_BYTES or count == 1
        assert count <= MAX_UNIT_TRACKS
    for (clips, size, count), (_, following) in zip(loads, packed[1:], strict=False):
        next_clips, next_size = following[0]
        assert clips + next_clips > unit_clips or size + next_size > MAX_UNIT_DECODED_BYTES or count == MAX_UNIT_TRACKS


def test_whole_track_separation_bounds_the_decoded_bytes_of_a_unit():
    tracks = some_tracks(8, duration_s=100.0)  # 35 MB decoded each
    by_clip = build_plan(catalogue_of(tracks), config(segments={"max_clips": 2}))
    by_track = build_plan(catalogue_of(tracks), config(segments={"max_clips": 2}, separation={"scope": "track"}))
    assert [len(rows) for _, rows in by_clip.units()] == [8]
    assert [len(rows) for _, rows in by_track.units()] == [3, 3, 2]


# --- plans


def test_rows_follow_the_catalogue_with_clips_splits_and_caption_owners():
    tracks = [
        Track(
            track_id="a",
            path="a.mp3",
            size=1,
            duration_s=60.0,
            caption="x",
            status="rejected",
            reason="excluded",
        ),
        Track(track_id="b", path="b.mp3", size=2, duration_s=4.9, caption="x", artist_id="ar", album_id="al"),
        Track(track_id="c", path="c.mp3", size=3, duration_s=5.0, caption="y"),
        Track(track_id="d", path="d.mp3", size=4, duration_s=19.9, caption="x"),
        Track(track_id="e", path="e.mp3", size=5, duration_s=20.0, caption="é"),
        Track(track_id="f", path="f.mp3", size=-1, caption=""),
        Track(track_id="g", path="g.mp3", size=-1, duration_s=1e12, caption=""),
    ]
    plan = build_plan(catalogue_of(tracks), config())
    rows = rows_of(plan)
    assert [row["track_id"] for row in rows] == list("abcdefg")
    assert [row["clips"] for row in rows] == [0, 0, 1, 1, 2, 10, 10]
    assert [row["caption_owner"] for row in rows] == [False, True, True, False, True, True, False]
    assert rows[4]["caption_id"] == hashlib.sha256("é".encode()).hexdigest()[:16]
    assert rows[0]["caption_id"] == rows[1]["caption_id"] != rows[2]["caption_id"]
    assert (rows[0]["status"], rows[0]["reason"], rows[1]["artist_id"]) == ("rejected", "excluded", "ar")
    assert [row["unit"] for row in rows] == ["u000000"] * 7
    assert plan.root == "/songs"


def test_every_track_is_in_exactly_one_unit_and_units_come_in_order():
    plan = build_plan(catalogue_of(some_tracks(200)), config(unit_clips=10))
    units = list(plan.units())
    assert [name for name, _ in units] == sorted({row["unit"] for row in rows_of(plan)})
    assert [row for _, rows in units for row in rows] == rows_of(plan)
    assert all(row["unit"] == name for name, rows in units for row in rows)


def test_headers_give_the_durations_that_a_listing_lacks(tmp_path):
    for name, rate, seconds in (("a.wav", 44100, 20.5), ("b.flac", 22050, 9.0), ("c.wav", 16000, 4.0)):
        tone = np.sin(np.arange(int(rate * seconds)) / 9)[None].astype(np.float32)
        write_audio(tmp_path / name, tone, rate, format=name.split(".")[1])
    (tmp_path / "d.mp3").write_bytes(b"this is no audio")
    (tmp_path / "e.mp3").write_bytes(b"")
    source = str(tmp_path)
    probed = config(input=source)
    rows = rows_of(build_plan(build_catalogue(source, probed.catalogue), probed))
    assert [row["clips"] for row in rows] == [2, 1, 0, 1, 1]
    assert [row["status"] for row in rows] == ["ok"] * 5
    assert [row["duration_s"] for row in rows[:3]] == [20.5, 9.0, 4.0]
    assert all(np.isnan(row["duration_s"]) for row in rows[3:])
    blind = config(input=source, catalogue={"probe": False})
    assert [row["clips"] for row in rows_of(build_plan(build_catalogue(source, blind.catalogue), blind))] == [10] * 5


def test_a_file_that_cannot_be_read_does_not_end_planning_while_others_can(tmp_path):
    for name in "abc":
        write_audio(tmp_path / f"{name}.wav", np.full((1, 44100 * 6), ord(name) / 1000, np.float32), 44100, "wav")
    catalogue = build_catalogue(str(tmp_path), config().catalogue)
    (tmp_path / "b.wav").unlink()
    plan = build_plan(catalogue, config())
    rows = rows_of(plan)
    assert [(row["status"], row["clips"]) for row in rows][1] == ("ok", 1)  # decoding says why
    assert rows[0]["duration_s"] > 0
    assert numbers_of(plan, config())["headers not readable"] == 1


def test_a_file_that_vanished_before_its_header_was_read_ends_planning_with_its_name(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    catalogue = build_catalogue(str(tmp_path), config().catalogue)
    (tmp_path / "a.wav").unlink()
    with pytest.raises(UserError, match=r"a\.wav: not found"):
        build_plan(catalogue, config())


def test_the_same_files_in_another_folder_are_the_same_plan(tmp_path):
    tone = np.sin(np.arange(44100 * 12) / 9)[None].astype(np.float32)
    plans = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write_audio(tmp_path / name / "a.flac", tone, 44100)
        corpus = config(input=str(tmp_path / name))
        plans.append(build_plan(build_catalogue(corpus.input, corpus.catalogue), corpus))
    here, there = plans
    assert here.root != there.root
    assert here.identity() == there.identity()
    assert plan_difference(here, there) == []


changes = {
    "track_id": ("other", "1 track added: other"),
    "path": ("elsewhere/1.mp3", "1 track with another path: t1 ('1.mp3' -> 'elsewhere/1.mp3')"),
    "size": (7, "1 track with another size: t1 (101 -> 7)"),
    "caption": ("a new one", "1 track with another caption: t1 ('' -> 'a new one')"),
    "status": ("rejected", "1 track with another status: t1 ('ok' -> 'rejected')"),
}


@pytest.mark.parametrize("field", changes)
def test_each_change_of_a_track_changes_the_identity_and_is_told(field):
    value, line = changes[field]
    tracks = some_tracks(5)
    old = build_plan(catalogue_of(tracks), config())
    new = build_plan(catalogue_of([tracks[0], replace(tracks[1], **{field: value}), *tracks[2:]]), config())
    assert old.identity() != new.identity()
    assert line in plan_difference(old, new)


def test_added_and_removed_tracks_other_units_and_another_order_are_told():
    tracks = some_tracks(9)
    whole = build_plan(catalogue_of(tracks), config())
    assert plan_difference(build_plan(catalogue_of(tracks[:1]), config()), whole) == [
        "8 tracks added: t1, t2, t3, t4, t5 and 3 more"
    ]
    assert plan_difference(whole, build_plan(catalogue_of(tracks[:8]), config())) == ["1 track removed: t8"]
    smaller = build_plan(catalogue_of(tracks), config(unit_clips=12))
    assert plan_difference(whole, smaller) == ["5 tracks in another unit: t4, t5, t6, t7, t8"]
    assert plan_difference(whole, build_plan(catalogue_of(tracks[::-1]), config())) == ["the order of the tracks"]


tracks_st = st.lists(
    st.builds(
        Track,
        track_id=st.just(""),
        path=st.text("abc", min_size=1).map(lambda stem: f"{stem}.mp3"),
        size=st.integers(-1, 2**40),
        duration_s=st.floats(0, 1e6),
        caption=st.sampled_from(["", "x", "a 'quoted' \"one\"", "é\u2028\U0001f3b5"]),
        status=st.sampled_from(["ok", "rejected"]),
    ),
    min_size=1,
    unique_by=lambda track: track.path,
)


@settings(max_examples=25)
@given(tracks_st)
def test_a_saved_plan_is_read_back_and_its_bytes_are_reproducible(tmp_path_factory, tracks):
    ids = track_ids([track.path for track in tracks])
    named = [replace(track, track_id=track_id) for track_id, track in zip(ids, tracks, strict=True)]
    plan = build_plan(catalogue_of(named), config())
    folder = Folder.at(str(tmp_path_factory.mktemp("plan")))
    plan.save(folder)
    first = folder.read("plan.parquet")
    loaded = Plan.load(folder)
    assert loaded.table.equals(plan.table)
    assert (loaded.root, loaded.identity()) == (plan.root, plan.identity())
    loaded.save(folder)
    assert folder.read("plan.parquet") == first


def test_a_damaged_foreign_or_edited_plan_is_refused(tmp_path):
    folder = Folder.at(str(tmp_path))
    plan = build_plan(catalogue_of(some_tracks(3)), config())
    with pytest.raises(UserError, match="not found"):
        Plan.load(folder)
    plan.save(folder)
    whole = folder.read("plan.parquet")
    folder.write("plan.parquet", whole[:-20])
    with pytest.raises(UserError, match="not readable"):
        Plan.load(folder)
    pq.write_table(plan.table, tmp_path / "plan.parquet")
    with pytest.raises(UserError, match="no plan of format"):
        Plan.load(folder)
    folder.write("plan.parquet", whole)
    metadata = pq.read_schema(tmp_path / "plan.parquet").metadata
    edited = plan.table.set_column(7, "caption", [["another"] * 3]).replace_schema_metadata(metadata)
    pq.write_table(edited, tmp_path / "plan.parquet")
    with pytest.raises(UserError, match="checksum"):
        Plan.load(folder)


# --- derived numbers


def test_numbers_of_a_small_plan_follow_from_it_by_hand():
    excluded = Track(track_id="r", path="r.mp3", size=50, duration_s=30.0, status="rejected", reason="excluded")
    tracks = [*some_tracks(4, duration_s=36.0, caption="x"), excluded]
    corpus = config(unit_clips=10)
    plan = build_plan(catalogue_of(tracks), corpus)
    numbers = numbers_of(plan, corpus)
    assert (numbers["tracks"], numbers["usable tracks"], numbers["rejected: excluded"]) == (5, 4, 1)
    assert (numbers["expected clips"], numbers["units"], numbers["clips per unit, most"]) == (12, 2, 9)
    assert (numbers["clips per unit, mean"], numbers["distinct captions"]) == (6.0, 1)
    assert (numbers["audio, h"], numbers["clips, h"]) == (0.04, 0.033)
    assert numbers["bytes read"] == 100 + 101 + 102 + 103
    assert numbers["bytes written, captions"] == 77 * 1024 * 2 + 2 * 512 * 4
    payload = 2 * 430 * 40 * 2 + 2 * 512 * 4 + 2 * 1024 * 4
    assert 12 * payload < numbers["bytes written, clips"] < 12 * (payload + 5 * 1536) + 2 * 10240
    teraflop = 12 * (0.761 + 2 * 0.031 + 2 * 0.59 + 0.116)
    assert numbers["models, PFLOP"] == pytest.approx(teraflop / 1000, abs=1e-3)


def test_clips_of_short_songs_are_no_more_hours_than_the_songs():
    short = [
        replace(track, duration_s=seconds) for track, seconds in zip(some_tracks(3), (6.0, 5.5, 14.0), strict=True)
    ]
    corpus = config(segments={"clip_s": 10, "min_s": 5})
    plan = build_plan(catalogue_of(short), corpus)
    numbers = numbers_of(plan, corpus)
    assert numbers["expected clips"] == 3
    assert numbers["clips, h"] == pytest.approx((6 + 5.5 + 10) / 3600, rel=0.02)
    assert numbers["clips, h"] < numbers["audio, h"]
    assert numbers["clap, PFLOP"] == pytest.approx(3 * 2 * 0.031 / 1000, rel=0.05), "models hear whole clips"


def test_hours_of_songs_whose_lengths_nobody_knows_are_not_given():
    plan = build_plan(catalogue_of(some_tracks(3, duration_s=None, size=-1)), config())
    lines = " ".join(plan_lines(derived_numbers(plan, config()), config(), "paper", True))
    assert "30 clips expected (of songs whose lengths are not known yet)" in lines
    assert "decoding unknown" in lines
    assert "0 h" not in lines


def test_thousands_of_hours_are_written_out():
    plan = build_plan(catalogue_of(some_tracks(30, duration_s=150 * 3600.0)), config())
    assert "h of 4,500 h)" in " ".join(plan_lines(derived_numbers(plan, config()), config(), "paper", True))


def test_no_work_that_is_to_do_takes_no_time():
    plan = build_plan(catalogue_of(some_tracks(1, duration_s=6.0)), config())
    numbers = numbers_of(plan, config())
    for name in ("audio, h", "clips, h", "decoding, core-h", "clap, PFLOP", "models, PFLOP", "models, accelerator-h"):
        assert numbers[name] > 0, name
    for known in (True, False):
        lines = plan_lines(derived_numbers(plan, config()), config(), "paper", known)
        assert len(lines) <= 8
        assert not re.search(r"\b0(\.0+)?\b (h|s|min|days|kB|MB)", " ".join(lines)), lines
    assert "models about" in plan_lines(derived_numbers(plan, config()), config(), "paper", True)[-1]
    assert "unknown, as FLOPs of bundle mine are" in lines_of_unknown(plan)


def lines_of_unknown(plan):
    return plan_lines(derived_numbers(plan, config()), config(), "mine", False)[-1]


def test_whole_track_separation_costs_the_separator_the_whole_track():
    plan = build_plan(catalogue_of(some_tracks(50, duration_s=600.0)), config())
    clip, track = (
        numbers_of(plan, config(separation={"scope": scope}))["separator, PFLOP"] for scope in ("clip", "track")
    )
    assert track == pytest.approx(6 * clip, rel=1e-2)


def test_the_costs_of_a_bundle_can_be_given():
    plan = build_plan(catalogue_of(some_tracks(50)), config())
    numbers = numbers_of(plan, config(), bundle_costs={"separator": 0.449})
    assert numbers["separator, PFLOP"] == pytest.approx(150 * 0.449 / 1000, abs=1e-3)
    assert not any(name.startswith("mert") for name in numbers)
    assert set(TFLOP_PER_CLIP) == {"separator", "clap", "mert", "vae_encoder"}


def test_every_number_has_a_reason_and_is_plain_json_even_when_nothing_is_known():
    for tracks in ([], some_tracks(3, size=-1, duration_s=float("nan")), some_tracks(2, status="rejected")):
        for name, value, reason in derived_numbers(build_plan(catalogue_of(tracks), config()), config()):
            assert name
            assert reason
            json.dumps(value, allow_nan=False)
    unknown = numbers_of(build_plan(catalogue_of(some_tracks(3, size=-1)), config()), config())
    assert unknown["bytes read"] == "unknown"


def test_golden_jamendo_catalogue_gives_its_known_tracks_and_clips_in_time(data_dir):
    source = str(data_dir / "jamendo" / "tracks.tsv.gz")
    corpus = CorpusConfig(input=source, output="out", bundle="debug")
    begin = time.process_time()
    plan = build_plan(build_catalogue(source, corpus.catalogue), corpus)
    numbers = numbers_of(plan, corpus)
    assert time.process_time() - begin < 5
    assert (numbers["tracks"], numbers["expected clips"]) == (55525, 537626)
    assert (numbers["validation tracks"], numbers["test tracks"], numbers["train tracks"]) == (
        200,
        200,
        55125,
    )
    assert numbers["clips per unit, most"] <= 32


def test_real_tracks_give_67_clips(data_dir):
    source = str(data_dir / "tracks")
    corpus = config(input=source)
    plan = build_plan(build_catalogue(source, corpus.catalogue), corpus)
    assert (plan.table.num_rows, numbers_of(plan, corpus)["expected clips"]) == (15, 67)
