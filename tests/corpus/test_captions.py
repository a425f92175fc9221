"""Tables of captions, and joining them to tracks."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttmray.corpus.captions import captions_of, find_captions, join, load_captions, read_table
from ttmray.corpus.catalogue import track_ids
from ttmray.corpus.track import Track
from ttmray.errors import UserError
from ttmray.storage import Folder
from ttmray.tables import is_table

ROWS = [
    {"path": "14/214.mp3", "caption": "Loud punk."},
    {"path": "15/215.mp3", "caption": 'A "metal", song.'},
]
EXPECTED = {"14/214": "Loud punk.", "15/215": 'A "metal", song.'}


def tracks_at(*paths: str) -> list[Track]:
    return [Track(track_id=i, path=p) for i, p in zip(track_ids(paths), paths, strict=True)]


def write(path: Path, text: str) -> str:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


CSV = 'path,caption\n14/214.mp3,Loud punk.\n15/215.mp3,"A ""metal"", song."\n'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.json", json.dumps(ROWS)),
        ("c.jsonl", "\n".join(json.dumps(row) for row in ROWS) + "\n\n"),
        ("c.csv", CSV),
        ("c.csv.gz", CSV),
        ("c.TSV", CSV.replace(".mp3,", ".mp3\t").replace("path,", "Path\t")),
        ("c.json.gz", json.dumps(ROWS)),
        ("bom.csv", "\ufeff" + CSV.replace("\n", "\r\n")),
    ],
)
def test_every_text_format_gives_the_same_captions(tmp_path, name, text):
    assert load_captions(write(tmp_path / name, text)) == EXPECTED


def test_parquet_gives_the_same_captions_whatever_its_other_columns(tmp_path):
    table = pa.Table.from_pylist([{**row, "embedding": [1.0, 2.0]} for row in ROWS])
    pq.write_table(table, tmp_path / "c.parquet")
    assert load_captions(str(tmp_path / "c.parquet")) == EXPECTED


def test_an_id_column_serves_where_there_is_no_path(tmp_path):
    source = write(tmp_path / "c.csv", "ID,Caption\n214,Loud punk.\n")
    tracks, report = join(tracks_at("14/214.mp3"), load_captions(source))
    assert tracks[0].caption == "Loud punk."
    assert report["captions_unmatched"] == 0


def test_numbers_as_ids_in_json_are_ids(tmp_path):
    assert load_captions(write(tmp_path / "c.json", '[{"id": 214, "caption": "x"}]')) == {"214": "x"}


def test_white_space_is_all_that_changes_in_a_caption(tmp_path):
    rows = [
        {"path": "a.mp3", "caption": "  One\ttwo\n\n three,  ÜNICODE  "},
        {"path": "b.mp3", "caption": "\n"},
    ]
    assert load_captions(write(tmp_path / "c.json", json.dumps(rows))) == {"a": "One two three, ÜNICODE"}


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        ("c.csv", b"path,caption\na.mp3,one\na.mp3,two\n", "'a'"),
        ("c.csv", b"path,caption\na.mp3,one,two\n", "line 2: 3 cells"),
        ("c.csv", b'path,caption\na.mp3,"one" two\n', "line 2"),
        ("c.csv", b'path,caption\na.mp3,"one\nb.mp3,two\n', "line 3"),
        ("c.csv", b"path,caption\na.mp3,one\nb.mp3,caf\xe9\n", "line 3: not UTF-8"),
        ("c.csv", b"path,text\na.mp3,one\n", "path, text"),
        ("c.csv", b"caption\none\n", "no captions"),
        ("c.csv", b"", "no captions"),
        ("c.csv", b"path,caption\n,one\n", "line 2: a caption without path"),
        ("c.csv", b"path,caption,Caption\na,b,c\n", "two columns called 'caption'"),
        ("c.csv.gz", b"path,caption\n", "not a whole gzip"),
        ("c.csv.gz", gzip.compress(b"path,caption\n" * 99, mtime=0)[:-9], "not a whole gzip"),
        ("c.json", b'{"path": "a.mp3"}', "dict"),
        ("c.json", b'["a.mp3"]', "item 1"),
        ("c.json", b"[{]", "not valid JSON"),
        ("c.json", b'[{"path": "a", "caption": ["x"]}]', "item 1: ['x'] is a list"),
        ("c.json", b'[{"path": "a", "caption": "\\ud800"}]', "item 1"),
        ("c.jsonl", b'{"path": "a", "caption": "x"}\n{"path"\n', "line 2"),
        ("c.parquet", b"PAR1 or not", "Parquet"),
        ("c.txt", b"a\tb\n", "not a table"),
    ],
)
def test_a_bad_table_is_one_message_that_names_file_and_place(tmp_path, name, data, named):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        load_captions(str(tmp_path / name))
    assert named in caught.value.message
    assert name in caught.value.message
    assert caught.value.hint


def test_an_absent_table_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.csv"):
        load_captions(str(tmp_path / "nowhere.csv"))


def test_rows_may_have_any_number_of_tags_as_in_mtg_jamendo(tmp_path):
    text = "TRACK_ID\tPATH\tDURATION\tTAGS\nt1\t14/214.mp3\t12.5\tgenre---punk\tmood---loud\nt2\t15/215.mp3\t9\n"
    table = read_table(write(tmp_path / "t.tsv", text))
    assert table.columns["path"] == ["14/214.mp3", "15/215.mp3"]
    assert table.columns["duration_s"] == ["12.5", "9"]


def test_captions_come_before_tracks_and_only_the_root_counts(tmp_path):
    write(tmp_path / "tracks.csv", "path,caption\na.mp3,from tracks\n")
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep/captions.csv", "path,caption\na.mp3,from below\n")
    folder = Folder.at(str(tmp_path))

    def found() -> dict[str, str]:
        table, passed = find_captions(folder, [entry.name for entry in folder.files()])
        assert table is not None
        assert passed == []
        return captions_of(table)

    assert found() == {"a": "from tracks"}
    write(tmp_path / "Captions.json", '[{"path": "a.mp3", "caption": "from captions"}]')
    assert found() == {"a": "from captions"}


def test_a_table_without_captions_is_passed_over(tmp_path):
    write(tmp_path / "tracks.tsv", "path\tduration\na.mp3\t3\n")
    assert find_captions(Folder.at(str(tmp_path)), ["tracks.tsv", "a.mp3"]) == (None, [])
    write(tmp_path / "captions.csv", "a.mp3,A song without a header\n")
    table, (passed,) = find_captions(Folder.at(str(tmp_path)), ["tracks.tsv", "captions.csv"])
    assert table is None
    assert "captions.csv is not used: it has a.mp3, A song without a header" in passed


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_other_separators_of_a_csv_are_seen_by_its_header(tmp_path, delimiter):
    write(tmp_path / "c.csv", delimiter.join(["path", "caption"]) + "\n" + delimiter.join(["a.mp3", "a song"]) + "\n")
    assert load_captions(str(tmp_path / "c.csv")) == {"a": "a song"}


@pytest.mark.parametrize(
    ("path", "song"),
    [
        ("C:\\music\\Op. 9 No. 2.mp3", "music/Op. 9 No. 2.mp3"),
        ("Op. 9 No. 2", "music/Op. 9 No. 2.wav"),
        ("v1.2", "v1.2.mp3"),
    ],
)
def test_dots_and_windows_separators_do_not_move_a_caption_to_another_song(tmp_path, path, song):
    (tmp_path / "c.jsonl").write_text(json.dumps({"path": path, "caption": "mine"}) + "\n")
    others = tracks_at("v1.mp3", "music/Op. 9 No.mp3", "Op.flac")
    joined, _ = join([*tracks_at(song), *others], load_captions(str(tmp_path / "c.jsonl")))
    assert [track.caption for track in joined] == ["mine", "", "", ""]


def test_leading_folders_and_extensions_need_not_agree():
    joined, report = join(tracks_at("00/900100.flac"), {"tracks/00/900100": "x"})
    assert joined[0].caption == "x"
    assert report == {
        "captions_matched": 1,
        "tracks_without_caption": 0,
        "captions_unmatched": 0,
        "captions_ambiguous": 0,
    }


def test_the_longest_common_end_of_the_path_decides_between_equal_stems():
    joined, report = join(
        tracks_at("x/a/01.mp3", "x/b/01.mp3", "x/c/01.mp3"),
        {"a/01": "first", "b/01": "second", "lost": "third"},
    )
    assert [track.caption for track in joined] == ["first", "second", ""]
    assert (report["captions_matched"], report["tracks_without_caption"]) == (2, 1)
    assert (report["captions_unmatched"], report["captions_ambiguous"]) == (1, 0)


def test_what_stays_ambiguous_gets_no_caption_and_is_counted():
    joined, report = join(tracks_at("a/01.mp3", "b/01.mp3"), {"01": "whose?"})
    assert [track.caption for track in joined] == ["", ""]
    assert (report["captions_ambiguous"], report["captions_unmatched"]) == (2, 1)


def test_two_captions_that_fit_equally_well_are_ambiguous_unless_they_agree():
    assert join(tracks_at("01.mp3"), {"a/01": "x", "b/01": "y"})[1]["captions_ambiguous"] == 1
    assert join(tracks_at("01.mp3"), {"a/01": "x", "b/01": "x"})[0][0].caption == "x"


def test_two_formats_of_one_song_share_its_caption():
    joined, _ = join(tracks_at("a/01.mp3", "a/01.flac"), {"a/01": "x"})
    assert [track.caption for track in joined] == ["x", "x"]


def test_the_id_of_a_track_with_an_unsafe_name_works_as_key():
    track = tracks_at("été.mp3")[0]
    assert join([track], {track.track_id: "x"})[0][0].caption == "x"


parts = st.sampled_from(["a", "b", "01", "02"])
paths = st.lists(st.lists(parts, min_size=1, max_size=3).map("/".join), max_size=12, unique=True)


@given(paths, paths)
def test_counts_of_a_join_add_up_and_exact_paths_always_match(track_paths, keys):
    captions = {key: f"caption of {key}" for key in keys}
    joined, report = join(tracks_at(*[f"{path}.mp3" for path in track_paths]), captions)
    assert report["captions_matched"] + report["tracks_without_caption"] == len(track_paths)
    used = {track.caption for track in joined} - {""}
    assert report["captions_unmatched"] == len(keys) - len(used)
    for path, track in zip(track_paths, joined, strict=True):
        if path in captions:
            assert track.caption == captions[path]


def test_real_track_table_joins_all_its_tracks(data_dir):
    captions = load_captions(str(data_dir / "tracks" / "tracks.csv"))
    names = [entry.name for entry in Folder.at(str(data_dir / "tracks")).files() if entry.name.endswith(".mp3")]
    _, report = join(tracks_at(*names), captions)
    assert (report["captions_matched"], report["captions_unmatched"]) == (15, 0)


def test_names_of_tables_are_known_by_their_extension():
    assert all(map(is_table, ["a.csv", "A.TSV.GZ", "s3://b/x.parquet", "x.jsonl.gz"]))
    assert not any(map(is_table, ["songs", "s3://b/songs", "x.parquet.gz", "x.tar.gz", "csv"]))
