"""Which tracks a folder, a bucket or a table gives."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ttmray.corpus.catalogue import SAFE_ID, build_catalogue, track_ids
from ttmray.corpus.config import CatalogueConfig, CorpusConfig
from ttmray.corpus.job import score_corpus
from ttmray.corpus.plan import build_plan
from ttmray.errors import UserError
from ttmray.storage import Folder
from ttmray.synth.songs import write_demo_songs


def put(folder: Path, **files: bytes) -> str:
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(folder)


def table(folder: Path, text: str, name: str = "t.csv") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_folder_is_listed_by_extension_without_hidden_files(tmp_path):
    put(tmp_path, b_dot_MP3=b"1", a__x_dot_flac=b"22", notes_dot_txt=b"", _dot_hidden_dot_mp3=b"3", README=b"")
    put(tmp_path / ".cache", y_dot_mp3=b"4")
    put(tmp_path, **{"_dot_tmp-0_dot_mp3": b"5"})
    catalogue = build_catalogue(str(tmp_path), CatalogueConfig())
    assert [(t.path, t.size) for t in catalogue.tracks] == [("a/x.flac", 2), ("b.MP3", 1)]
    assert (catalogue.report["other_files"], catalogue.report["other_extensions"]) == (2, "(none) 1, .txt 1")
    assert catalogue.root == Folder.at(str(tmp_path))


def test_the_demo_songs_give_one_duplicate_and_their_captions(tmp_path):
    paths = write_demo_songs(tmp_path)
    catalogue = build_catalogue(str(tmp_path), CatalogueConfig())
    assert [t.path for t in catalogue.tracks] == [p.relative_to(tmp_path).as_posix() for p in paths]
    rejected = [t for t in catalogue.tracks if t.status == "rejected"]
    assert [(t.track_id, t.reason, t.message) for t in rejected] == [
        ("night_drive_copy", "duplicate", "same bytes as night_drive")
    ]
    assert [t.track_id for t in catalogue.tracks if not t.caption] == ["first_light"]
    assert catalogue.report["captions_unmatched"] == 1
    accented = next(t for t in catalogue.tracks if "plage" in t.path)
    assert accented.track_id.startswith("Ete-a-la-plage-ete-2-")
    assert SAFE_ID.fullmatch(accented.track_id)


def test_duplicates_can_be_kept(tmp_path):
    folder = put(tmp_path, a_dot_mp3=b"same", b_dot_mp3=b"same")
    catalogue = build_catalogue(folder, CatalogueConfig(duplicates="keep"))
    assert [t.status for t in catalogue.tracks] == ["ok", "ok"]
    assert "hashed_bytes" not in catalogue.report


def test_only_files_of_equal_size_are_read_and_the_whole_only_where_heads_agree(tmp_path):
    head = b"h" * 65536
    put(tmp_path, a_dot_wav=head + b"1", b_dot_wav=head + b"2", c_dot_wav=head + b"1", d_dot_wav=b"x" * 65537)
    put(tmp_path, alone_dot_wav=b"y" * 99, empty1_dot_wav=b"", empty2_dot_wav=b"")
    catalogue = build_catalogue(str(tmp_path), CatalogueConfig())
    assert [t.track_id for t in catalogue.tracks if t.reason == "duplicate"] == ["c"]
    assert catalogue.report["hashed_bytes"] == 4 * 65536 + 3 * 65537


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_stays_for_the_decoder_to_report(tmp_path):
    folder = put(tmp_path, a_dot_mp3=b"same", b_dot_mp3=b"same")
    (tmp_path / "b.mp3").chmod(0)
    catalogue = build_catalogue(folder, CatalogueConfig())
    assert [t.status for t in catalogue.tracks] == ["ok", "ok"]
    assert catalogue.report["not_compared"] == 1


@pytest.fixture
def locked(monkeypatch):
    """Makes folders that cannot be listed, also for root, who runs tests in containers."""
    names = set()
    scandir = os.scandir

    def refuse(path="."):
        if os.path.basename(path) in names:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    return names.add


def test_a_folder_that_cannot_be_read_is_a_row_and_the_others_are_planned(tmp_path, locked, make_config, capsys):
    folder = put(tmp_path / "in", a__01_dot_wav=b"1", secret__02_dot_wav=b"22", _dot_git__x_dot_wav=b"333")
    put(tmp_path / "in", b__deep__03_dot_wav=b"4444")
    for name in ("secret", "deep", ".git"):
        locked(name)
    catalogue = build_catalogue(folder, CatalogueConfig())
    rows = {track.path: (track.status, track.reason) for track in catalogue.tracks}
    assert rows == {
        "a/01.wav": ("ok", ""),
        "b/deep": ("rejected", "unreadable_folder"),
        "secret": ("rejected", "unreadable_folder"),
    }
    assert "2 folders cannot be read: b/deep (Permission denied), secret" in catalogue.report["warning, folders"]
    assert len({track.track_id for track in catalogue.tracks}) == 3
    config = make_config(folder, tmp_path / "run", "splits.validation=0", "splits.test=0")
    assert score_corpus(config, plan_only=True) == 0
    assert "2 folders cannot be read" in capsys.readouterr().out


def test_a_folder_without_any_readable_part_is_one_message(tmp_path, locked):
    folder = put(tmp_path / "in", secret__02_dot_wav=b"22")
    locked("secret")
    with pytest.raises(UserError, match="1 folders cannot be read: secret"):
        build_catalogue(folder, CatalogueConfig())
    locked("in")
    with pytest.raises(UserError, match="permission denied"):
        build_catalogue(folder, CatalogueConfig())


def test_rows_of_a_table_say_that_their_folder_cannot_be_read(tmp_path, locked):
    put(tmp_path, a__01_dot_wav=b"1", secret__02_dot_wav=b"22")
    (tmp_path / "tracks.csv").write_text("path\na/01.wav\nsecret/02.wav\na/03.wav\n")
    locked("secret")
    catalogue = build_catalogue(str(tmp_path / "tracks.csv"), CatalogueConfig())
    assert [(t.path, t.reason) for t in catalogue.tracks] == [
        ("a/01.wav", ""),
        ("a/03.wav", "missing"),
        ("secret/02.wav", "unreadable_folder"),
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root looks at every file")
def test_files_that_can_be_listed_and_not_looked_at_are_not_passed_over(tmp_path):
    folder = put(tmp_path / "in", a__01_dot_wav=b"1", b__02_dot_wav=b"22")
    (tmp_path / "in/b").chmod(0o444)
    try:
        tracks = build_catalogue(folder, CatalogueConfig()).tracks
    finally:
        (tmp_path / "in/b").chmod(0o755)
    assert [(t.path, t.size) for t in tracks] == [("a/01.wav", 1), ("b/02.wav", -1)]


def test_excluded_tracks_are_rejected_and_unmatched_ids_counted(tmp_path):
    folder = put(tmp_path / "in", a_dot_mp3=b"1", b_dot_mp3=b"22")
    listed = tmp_path / "exclude.txt"
    listed.write_text("# evaluation references\n\nb  # a copy\nnot-here\n")
    catalogue = build_catalogue(folder, CatalogueConfig(exclude=str(listed)))
    assert [(t.track_id, t.reason) for t in catalogue.tracks] == [("a", ""), ("b", "excluded")]
    assert (catalogue.report["excluded"], catalogue.report["exclude_unmatched"]) == (1, 1)


def test_no_copy_of_an_excluded_track_enters_the_corpus(tmp_path):
    folder = put(tmp_path / "in", a_dot_mp3=b"same", b_dot_mp3=b"same", c_dot_mp3=b"same")
    (tmp_path / "exclude.txt").write_text("b\n")
    catalogue = build_catalogue(folder, CatalogueConfig(exclude=str(tmp_path / "exclude.txt")))
    assert [t.reason for t in catalogue.tracks] == ["duplicate", "excluded", "duplicate"]
    assert catalogue.tracks[0].message == "same bytes as b, which is excluded"


def test_the_limit_takes_the_first_tracks_and_leaves_their_ids(tmp_path):
    folder = put(tmp_path, a__01_dot_mp3=b"1", b__01_dot_mp3=b"22", c_dot_mp3=b"333")
    whole, few = (build_catalogue(folder, CatalogueConfig(limit=limit)).tracks for limit in (None, 1))
    assert few == whole[:1]


@pytest.mark.parametrize(
    ("files", "named"),
    [({}, "it is empty"), ({"cover_dot_jpg": b"", "song_dot_mid": b""}, "only other files (.jpg 1, .mid 1)")],
)
def test_a_folder_without_audio_says_what_was_searched_and_found(tmp_path, files, named):
    with pytest.raises(UserError) as caught:
        build_catalogue(put(tmp_path, **files), CatalogueConfig())
    assert named in caught.value.message
    assert ".aac, .flac, .m4a, .mp3, .ogg, .opus, .wav, .wma" in caught.value.hint


def test_a_missing_folder_and_a_file_that_is_no_table_are_named(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        build_catalogue(str(tmp_path / "nowhere"), CatalogueConfig())
    with pytest.raises(UserError, match="neither a folder nor a table"):
        build_catalogue(put(tmp_path, a_dot_mp3=b"") + "/a.mp3", CatalogueConfig())


ODD_NAMES = [b"caf\xe9.mp3", b"line\nbreak.mp3", b"tab\tstop.mp3", b"back\\slash.mp3", b"a\x1b[31m.wav"]


def test_names_that_no_table_can_hold_are_rows_of_the_quarantine_and_all_of_them(tmp_path):
    put(tmp_path, a_dot_mp3=b"1", b_dot_mp3=b"22")
    plain = build_catalogue(str(tmp_path), CatalogueConfig()).tracks
    for i, name in enumerate(ODD_NAMES):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes(b"1" * (i + 3))
    catalogue = build_catalogue(str(tmp_path), CatalogueConfig())
    bad = [track for track in catalogue.tracks if track.reason == "bad_name"]
    assert [track for track in catalogue.tracks if track.status == "ok"] == plain  # ids and order are as before
    assert len(bad) == catalogue.report["bad_name"] == len(ODD_NAMES)
    assert len({track.track_id.lower() for track in catalogue.tracks}) == len(ODD_NAMES) + 2
    for track in bad:
        assert track.path.isprintable()
        assert track.path.encode()
        assert SAFE_ID.fullmatch(track.track_id)
        assert "not valid Unicode" in track.message or "safe relative path" in track.message


def test_a_broken_link_is_a_track_that_decoding_finds_missing(tmp_path):
    put(tmp_path, a_dot_mp3=b"1")
    (tmp_path / "gone.mp3").symlink_to(tmp_path / "nowhere.mp3")
    tracks = build_catalogue(str(tmp_path), CatalogueConfig()).tracks
    assert [(track.path, track.size) for track in tracks] == [("a.mp3", 1), ("gone.mp3", -1)]


def test_bad_paths_of_a_table_are_rows_of_the_quarantine_with_their_line(tmp_path):
    put(tmp_path, a_dot_mp3=b"1")
    source = table(tmp_path, "path\na.mp3\n../b.mp3\n/etc/c.mp3\nd//e.mp3\n")
    tracks = {track.path: track for track in build_catalogue(source, CatalogueConfig()).tracks}
    assert tracks.pop("a.mp3").status == "ok"
    assert [track.reason for track in tracks.values()] == ["bad_name"] * 3
    assert "t.csv, line 3: '../b.mp3'" in tracks["../b.mp3"].message


def test_a_table_is_joined_with_one_listing_of_its_folder(tmp_path):
    put(tmp_path, **{"14__214_dot_mp3": b"12345"})
    source = table(
        tmp_path,
        "Path,Duration,ARTIST_ID,album_id,caption,id\n./15/215.mp3,3.5,ar2,al2,,x\n14/214.mp3,,ar1,al1,A  song,y\n",
    )
    catalogue = build_catalogue(source, CatalogueConfig())
    first, second = catalogue.tracks
    assert (first.track_id, first.size, first.caption, first.artist_id) == ("214", 5, "A song", "ar1")
    assert first.duration_s != first.duration_s
    assert (second.status, second.reason, second.size, second.duration_s) == ("rejected", "missing", -1, 3.5)
    assert (catalogue.report["ok"], catalogue.report["missing"]) == (1, 1)


def test_a_table_whose_audio_is_elsewhere_is_planned_alone_and_says_so(tmp_path):
    source = table(tmp_path, "path,duration\na.mp3,30\n")
    for root in (None, str(tmp_path / "nowhere")):
        catalogue = build_catalogue(source, CatalogueConfig(audio_root=root))
        assert [(t.status, t.size) for t in catalogue.tracks] == [("ok", -1)]
        assert f"audio not found under {root or tmp_path}" in catalogue.report["audio"]


def test_captions_of_which_none_joins_are_an_error_and_few_a_warning_with_the_numbers(tmp_path):
    folder = put(tmp_path / "in", a_dot_mp3=b"1", b_dot_mp3=b"22", c_dot_mp3=b"333")
    captions = table(tmp_path, "path,caption\nx.mp3,one\ny.mp3,two\n", "other.csv")
    with pytest.raises(UserError, match="none of 2 captions belongs to one of 3 tracks") as caught:
        build_catalogue(folder, CatalogueConfig(captions=captions))
    assert "'x'" in caught.value.message
    captions = table(tmp_path, "path,caption\nx.mp3,one\na.mp3,two\n", "other.csv")
    report = build_catalogue(folder, CatalogueConfig(captions=captions)).report
    assert "2 of 3 tracks have none" in report["warning, captions"]
    assert "1 of 2 captions fit no track" in report["warning, captions"]
    captions = table(tmp_path, "path,caption\na.mp3,one\nb.mp3,two\nc.mp3,three\n", "other.csv")
    assert "warning, captions" not in build_catalogue(folder, CatalogueConfig(captions=captions)).report


def test_captions_can_be_replaced_or_left_out(tmp_path):
    source = table(tmp_path, "path,caption\na.mp3,from the table\n")
    other = table(tmp_path, "path,caption\nx/a.mp3,from the file\n", "other.csv")
    captions = {
        choice: build_catalogue(source, CatalogueConfig(captions=choice)).tracks[0].caption
        for choice in ("auto", other, None)
    }
    assert captions == {"auto": "from the table", other: "from the file", None: ""}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("file,duration\na.mp3,1\n", "no column `path`; it has file, duration"),
        ("path\n", "holds no tracks"),
        ("path\n../b.mp3\nc//d.mp3\n", "line 2: '../b.mp3'"),
        ("path\n/etc/b.mp3\n", "line 2: '/etc/b.mp3'"),
        ("path,caption\n,x\n", "line 2: ''"),
        ("path\na.mp3\n./a.mp3\n", "line 3: a.mp3 is also in line 2"),
        ("path,duration\na.mp3,1:30\n", "line 2: the duration '1:30'"),
        ("path,duration\na.mp3,-4\n", "line 2: the duration '-4'"),
        ("path,duration\na.mp3,inf\n", "line 2: the duration 'inf'"),
    ],
)
def test_a_bad_row_is_one_message_with_file_and_line(tmp_path, text, named):
    with pytest.raises(UserError) as caught:
        build_catalogue(table(tmp_path, text), CatalogueConfig())
    assert named in caught.value.message
    assert "t.csv" in caught.value.message


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1), unique=True))
@example(["a", "A", "a.b", "\u00e9", "e\u0301", "-x", "x" * 65, "x" * 64, "a b", "a_b", ".."])
def test_track_ids_are_safe_unique_and_independent_of_each_other(stems):
    paths = [f"album/{stem}.mp3" for stem in stems]
    ids = track_ids(paths)
    assert all(SAFE_ID.fullmatch(track_id) for track_id in ids)
    assert len({track_id.lower() for track_id in ids}) == len(ids)
    assert dict(zip(paths[::-1], track_ids(paths[::-1]), strict=True)) == dict(zip(paths, ids, strict=True))
    for stem, track_id in zip(stems, ids, strict=True):
        if SAFE_ID.fullmatch(stem) and [s.lower() for s in stems].count(stem.lower()) == 1:
            assert track_id == stem or f"{stem}-".lower() in track_id.lower()


def test_one_file_name_in_every_album_still_gives_unique_ids():
    ids = track_ids([f"album {n}/01 Intro.mp3" for n in range(20000)])
    assert len(set(ids)) == 20000
    assert all(track_id.startswith("01-Intro-") for track_id in ids)


def test_an_id_that_looks_like_another_tracks_made_up_id_is_told_apart():
    made_up = track_ids(["a b.mp3"])[0]
    ids = track_ids(["a b.mp3", f"{made_up}.mp3"])
    assert len(set(ids)) == 2


def test_a_bucket_is_listed_probed_and_compared_like_a_folder(tmp_path, bucket):
    write_demo_songs(tmp_path)
    songs = Folder.at(f"{bucket}/demo")
    for entry in Folder.at(str(tmp_path)).files():
        songs.write(entry.name, (tmp_path / entry.name).read_bytes())
    config = {"output": str(tmp_path / "out"), "splits": {"validation": 1, "test": 1}}
    plans = []
    for source in (str(tmp_path), songs.uri):
        corpus = CorpusConfig(input=source, **config)
        plans.append(build_plan(build_catalogue(source, corpus.catalogue), corpus))
    local, remote = plans
    assert remote.root == f"{bucket}/demo"
    assert remote.identity() == local.identity()
    assert remote.table.column("clips").equals(local.table.column("clips"))
    with pytest.raises(UserError, match="no-such-bucket"):
        build_catalogue("s3://no-such-bucket/x", CatalogueConfig())
    with pytest.raises(UserError, match="holds no audio"):
        build_catalogue(f"{bucket}/elsewhere", CatalogueConfig())


def test_planning_does_not_load_torch_or_ray():
    code = "import sys, ttmray.corpus.plan; sys.exit(bool({'torch', 'ray'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
