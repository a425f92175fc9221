"""Buckets: the storage rules, a whole job from bucket to bucket, and buckets that cannot be read.

The object store is moto's server, spoken to over HTTP through s3fs as in production.
"""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from ttmray.cli import main
from ttmray.corpus import index, pipeline
from ttmray.corpus.catalogue import build_catalogue
from ttmray.corpus.config import CatalogueConfig
from ttmray.corpus.job import score_corpus
from ttmray.corpus.plan import Plan
from ttmray.corpus.verify import problems
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from ttmray.storage import Folder, read_file


def upload(songs, bucket: str) -> Folder:
    folder = Folder.at(f"{bucket}/in/songs")
    for path in songs.rglob("*"):
        if path.is_file():
            folder.write(str(path.relative_to(songs)), path.read_bytes())
    return folder


def test_a_bucket_keeps_the_rules_of_a_folder(bucket):
    folder = Folder.at(f"{bucket}/run/")
    assert folder.files() == []
    folder.write("a/b.bin", b"old")
    folder.write("a/b.bin", b"new")
    folder.write("a/.tmp-1", b"half")
    folder.write("c", b"12345")
    assert folder.read("a/b.bin") == read_file(f"{bucket}/run/a/b.bin") == b"new"
    assert [(entry.name, entry.size) for entry in folder.files()] == [("a/b.bin", 3), ("c", 5)]
    assert [entry.name for entry in folder.files("a")] == ["b.bin"]
    with folder.open("c") as file:
        assert file.seek(2) == 2
        assert file.read(2) == b"34"
    assert folder.create("c", b"again") is False
    assert folder.read("c") == b"12345"
    folder.delete("c")
    folder.delete("c")
    assert not folder.exists("c")
    assert folder.sweep_temporary() == 0
    for name in ("absent", "../in/secret"):
        with pytest.raises(UserError):
            folder.read(name)


def test_keys_with_empty_parts_are_rows_of_the_quarantine_and_collide_with_nothing(bucket):
    folder = Folder.at(f"{bucket}/odd")
    fs, root = folder._filesystem()
    odd = ["d//x.wav", "/x.wav", "d/../x.wav", "d/./x.wav"]
    for i, name in enumerate(["d/x.wav", "x.wav", *odd]):
        fs.call_s3("put_object", Bucket=root.split("/")[0], Key=f"odd/{name}", Body=b"1" * (i + 1))
    tracks = build_catalogue(folder.uri, CatalogueConfig()).tracks
    assert sorted(track.path for track in tracks if track.status == "ok") == ["d/x.wav", "x.wav"]
    assert sorted(track.path for track in tracks if track.reason == "bad_name") == sorted(odd)
    assert len({track.track_id for track in tracks}) == 6
    assert {track.size for track in tracks if track.status == "ok"} == {1, 2}
    assert all(track.version for track in tracks)


def test_of_eight_threads_that_create_one_object_exactly_one_wins(bucket):
    folder = Folder.at(f"{bucket}/run")
    for attempt in range(5):
        barrier = Barrier(8)

        def create(writer: int, barrier: Barrier = barrier, name: str = f"index/{attempt}") -> bool:
            barrier.wait()
            return folder.create(name, bytes([writer]))

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, range(8)))
        assert won.count(True) == 1
        assert folder.read(f"index/{attempt}") == bytes([won.index(True)])


def test_a_job_from_bucket_to_bucket_gives_the_index_of_a_local_one(songs, finished_run, make_config, bucket, capsys):
    source = upload(songs, bucket)
    config = make_config(source, f"{bucket}/runs/one")
    assert score_corpus(config) == EXIT_OK
    run, local = Folder.at(config.output), Folder.at(str(finished_run))
    assert index.read_index(run).equals(index.read_index(local))
    assert Plan.load(run).identity() == Plan.load(local).identity()
    shards = {entry.name: local.read(f"shards/{entry.name}") for entry in local.files("shards")}
    assert {entry.name: run.read(f"shards/{entry.name}") for entry in run.files("shards")} == shards
    assert list(problems(run)) == []
    assert main(["status", config.output]) == EXIT_OK
    run.delete("_SUCCESS.json")
    run.delete("index/u000001.parquet")
    run.write("shards/u000001-000000000000.tar", b"of a late writer")
    assert score_corpus(config) == EXIT_OK
    assert "2 of 3 units are committed" in capsys.readouterr().out
    assert index.read_index(run).equals(index.read_index(local))
    assert {entry.name for entry in run.files("shards")} == shards.keys()


@pytest.mark.parametrize(
    ("address", "words"), [("s3://no-such-bucket/songs", "no-such-bucket"), ("/empty", "no audio")]
)
def test_a_bucket_without_songs_is_one_message(bucket, address, words, tmp_path, capsys):
    address = address if "://" in address else bucket + address
    assert main(["plan", "--set", f"input={address}", "--set", f"output={tmp_path}/run"]) == EXIT_BAD_INPUT
    text = capsys.readouterr().err
    assert text.startswith("error:")
    assert words in text
    assert "Traceback" not in text


def test_an_object_store_that_does_not_answer_is_one_message(bucket, monkeypatch):
    from s3fs import S3FileSystem

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port: nobody listens there
    monkeypatch.setenv("TTMRAY_STORE_PATIENCE_S", "1")
    monkeypatch.setattr(S3FileSystem, "_cache", {})  # instances remember their endpoint
    with pytest.raises(UserError) as caught:
        build_catalogue(f"{bucket}/songs", CatalogueConfig())
    assert f"{bucket}/songs" in caught.value.message
    assert "AWS_ENDPOINT_URL" in caught.value.hint


def test_an_output_bucket_that_does_not_exist_stops_the_job_before_any_work(songs, make_config, bucket):
    with pytest.raises(UserError, match="no-such-bucket"):
        score_corpus(make_config(songs, "s3://no-such-bucket/run"))


def test_songs_may_come_from_a_bucket_by_a_local_table(songs, bucket, tmp_path):
    upload(songs, bucket)
    (tmp_path / "tracks.csv").write_text("path,caption\nkite.wav,A kite.\n")
    config = CatalogueConfig(audio_root=f"{bucket}/in/songs")
    catalogue = build_catalogue(str(tmp_path / "tracks.csv"), config)
    assert [(t.track_id, t.status, t.caption) for t in catalogue.tracks] == [("kite", "ok", "A kite.")]
    assert catalogue.tracks[0].size == (songs / "kite.wav").stat().st_size


def test_bytes_and_version_of_an_object_belong_together(bucket, monkeypatch):
    """Of an object that is replaced between the question for its version and the reading, both are the new one's."""
    folder = Folder.at(f"{bucket}/songs")
    folder.write("a.wav", b"old" * 1000)
    (before,) = folder.files()
    assert folder.read_as("a.wav") == (b"old" * 1000, before.version)
    open_file, opened = Folder.open, []

    def replaced_meanwhile(self, name, *options):
        file = open_file(self, name, *options)
        assert file.details["ETag"]  # asked for, and the bytes are not there yet
        if not opened:
            folder.write(name, b"new" * 1000)
        opened.append(name)
        return file

    monkeypatch.setattr(Folder, "open", replaced_meanwhile)
    data, version = folder.read_as("a.wav")
    assert (data, version) == (b"new" * 1000, folder.files()[0].version)
    assert version != before.version
    assert len(opened) == 2


def test_an_object_replaced_by_one_of_equal_size_is_not_taken_for_the_planned_one(
    bucket, songs, make_config, tmp_path, monkeypatch
):
    folder = upload(songs, bucket)
    kite = folder.read("kite.wav")
    config = make_config(folder.uri, tmp_path / "run", "max_failures=2")
    run_local = pipeline.run_local

    def replace_first(job, units, done):
        folder.write("kite.wav", kite[:-100] + bytes(100))
        run_local(job, units, done)

    monkeypatch.setattr(pipeline, "run_local", replace_first)
    assert score_corpus(config) == EXIT_OK
    rows = {row["source"]: row for row in index.read_index(Folder.at(config.output)).to_pylist()}
    assert (rows["kite.wav"]["status"], rows["kite.wav"]["reason"]) == ("failed", "changed")
    assert rows["wave.ogg"]["status"] == "ok"
    monkeypatch.undo()
    assert score_corpus(config, retry_failed=True) == EXIT_OK  # the way out
    rows = {row["source"]: row for row in index.read_index(Folder.at(config.output)).to_pylist()}
    assert rows["kite.wav"]["status"] == "ok"
