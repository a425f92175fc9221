"""The job from start to end: resume by relaunch, what is refused, what is retried."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ttmray import cost
from ttmray.config import load_config
from ttmray.corpus import index, pipeline
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.job import ABORT_AFTER, score_corpus
from ttmray.errors import EXIT_OK, EXIT_TOO_MANY_FAILURES, UserError
from ttmray.generation.pool_worker import CandidatesConfig
from ttmray.storage import Folder


def rows(run: Path | str) -> list[dict[str, object]]:
    return index.read_index(Folder.at(str(run))).to_pylist()


def snapshot(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


@pytest.fixture
def own_songs(songs, tmp_path) -> Path:
    """A copy of the songs to change; the whole path differs."""
    return Path(shutil.copytree(songs, tmp_path / "moved/songs"))


def test_a_run_writes_the_tree_that_the_documentation_shows(finished_run):
    names = {entry.name for entry in Folder.at(str(finished_run)).files()}
    once = {"run.json", "plan.parquet", "plan.json", "plan.md", "index.parquet", "summary.json", "summary.md"}
    once |= {"_SUCCESS.json", "cost.json", "units.jsonl", "stats/latents.json", "stats/rewards.json"}
    assert once <= names
    assert {name.split("/")[0] for name in names - once} == {"shards", "captions", "index"}
    described = json.loads((finished_run / "run.json").read_text())
    assert described["kind"] == "corpus"
    assert {"torch", "ray", "python", "ttmray"} <= described["versions"].keys()


def test_a_second_launch_processes_nothing_says_so_and_does_not_start_ray(songs, run, make_config, tmp_path):
    config = make_config(songs, run, "runtime.runner=ray")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    before = snapshot(run)
    code = (
        "import sys; from ttmray.cli import main; "
        f"code = main(['score-corpus', '--config', {str(tmp_path / 'c.yaml')!r}]); "
        "print(sorted({'ray', 'torch', 'transformers', 'demucs'} & sys.modules.keys())); sys.exit(code)"
    )
    launched = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert launched.stdout.splitlines()[-1] == "[]"
    assert "0 clips to process" in launched.stdout
    assert snapshot(run) == before


def test_an_interrupted_run_goes_on_where_it_was(songs, finished_run, make_config, tmp_path, monkeypatch):
    config = make_config(songs, tmp_path / "run")
    run_local = pipeline.run_local

    def interrupted(job, units, done):
        def stop(unit):
            done(unit)
            raise KeyboardInterrupt

        run_local(job, units, stop)

    monkeypatch.setattr(pipeline, "run_local", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score_corpus(config)
    run = Folder.at(config.output)
    assert index.committed_units(run) == ["u000000"]
    assert not run.exists("_SUCCESS.json")
    first, before = run.read("index/u000000.parquet"), cost.read(run)

    processed = []

    def watched(job, units, done):
        run_local(job, units, lambda unit: (processed.append(unit.name), done(unit)))

    monkeypatch.setattr(pipeline, "run_local", watched)
    assert score_corpus(config) == EXIT_OK
    assert processed == ["u000001", "u000002"]
    assert run.read("index/u000000.parquet") == first
    after = cost.read(run)
    assert (0 < before["seconds"] < after["seconds"], after["gpu_seconds"]) == (True, 0)
    assert rows(config.output) == rows(finished_run)


def test_a_run_that_died_before_its_end_is_finished_without_processing(songs, run, finished_run, make_config, capsys):
    for name in ("_SUCCESS.json", "index.parquet", "summary.json"):
        (run / name).unlink()
    (run / "shards/u000000-000000000000.tar").write_bytes(b"of a late writer")
    assert score_corpus(make_config(songs, run)) == EXIT_OK
    assert "0 clips processed" in capsys.readouterr().out
    assert rows(run) == rows(finished_run)
    assert {p.name for p in run.glob("shards/*")} == {p.name for p in finished_run.glob("shards/*")}


def test_songs_that_moved_to_another_folder_are_the_same_songs(own_songs, run, make_config):
    (run / "index/u000001.parquet").unlink()
    (run / "_SUCCESS.json").unlink()
    assert score_corpus(make_config(own_songs, run)) == EXIT_OK
    assert len(rows(run)) == 6


def test_a_table_that_moved_with_its_songs_is_the_same_even_where_a_song_is_missing(songs, make_config, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        shutil.copy(songs / "kite.wav", tmp_path / folder / "kite.wav")
        (tmp_path / folder / "tracks.csv").write_text("path,duration\nkite.wav,6\nlost.wav,7\n")
    sets = ("splits.validation=0", "splits.test=0")
    assert score_corpus(make_config(tmp_path / "one/tracks.csv", tmp_path / "run", *sets)) == EXIT_OK
    assert score_corpus(make_config(tmp_path / "two/tracks.csv", tmp_path / "run", *sets)) == EXIT_OK
    assert [row["reason"] for row in rows(tmp_path / "run")] == ["", "missing"]


def test_a_changed_song_is_refused_and_named(own_songs, run, make_config):
    with open(own_songs / "kite.wav", "ab") as file:
        file.write(b"\0" * 1000)
    before = snapshot(run)
    with pytest.raises(UserError, match="belongs to another run") as caught:
        score_corpus(make_config(own_songs, run))
    assert "1 track with another size: kite" in caught.value.message
    assert snapshot(run) == before


def test_a_song_replaced_by_one_of_equal_size_is_said_at_the_next_launch(own_songs, make_config, tmp_path, capsys):
    config = make_config(own_songs, tmp_path / "run")
    assert score_corpus(config) == EXIT_OK
    capsys.readouterr()
    assert score_corpus(config) == EXIT_OK
    assert "changed since" not in capsys.readouterr().out
    song = own_songs / "kite.wav"
    song.write_bytes(song.read_bytes()[:-100] + bytes(100))
    assert score_corpus(config) == EXIT_OK
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 track changed since the run was planned" in shown
    assert "kite" in shown


def test_songs_that_cannot_be_used_by_their_name_are_rows_and_the_job_goes_on(own_songs, make_config, tmp_path):
    names = [b"caf\xe9.wav", b"line\nbreak.wav", b"back\\slash.wav"]
    for name in names:
        shutil.copy(own_songs / "kite.wav", bytes(own_songs) + b"/" + name)
    (own_songs / "lost.wav").symlink_to(own_songs / "nowhere.wav")
    assert score_corpus(make_config(own_songs, tmp_path / "run", "max_failures=2")) == EXIT_OK
    found = rows(tmp_path / "run")
    bad = [row for row in found if row["reason"] == "bad_name"]
    assert len(bad) == len(names)
    assert {(row["status"], row["segment"]) for row in bad} == {("rejected", -1)}
    assert [row["source"] for row in found if row["reason"] == "unreadable"] == ["lost.wav"]
    assert "ok" in {row["status"] for row in found if row["source"] == "kite.wav"}


def test_a_table_without_any_of_its_songs_is_planned_and_not_run(make_config, tmp_path):
    (tmp_path / "t.csv").write_text("path,duration\na.mp3,30\nb.mp3,30\nc.mp3,30\nd.mp3,30\n")
    config = make_config(tmp_path / "t.csv", tmp_path / "run")
    assert score_corpus(config, plan_only=True) == EXIT_OK
    with pytest.raises(UserError, match="no file of the 4 tracks") as caught:
        score_corpus(config)
    assert "audio_root" in caught.value.hint


def test_an_added_song_and_a_changed_caption_are_refused_and_named(own_songs, run, make_config):
    shutil.copy(own_songs / "wave.ogg", own_songs / "zebra.ogg")
    text = (own_songs / "captions.json").read_text()
    (own_songs / "captions.json").write_text(text.replace("A kite.", "Two kites."))
    with pytest.raises(UserError) as caught:
        score_corpus(make_config(own_songs, run))
    assert "1 track added: zebra" in caught.value.message
    assert "another caption: kite ('A kite.' -> 'Two kites.')" in caught.value.message


@pytest.mark.parametrize("setting", ["silence_dbfs=-70", "bundle=debug-wide", "separation.scope=track"])
def test_other_settings_are_refused_with_the_field_and_both_values(songs, run, make_config, setting):
    before = snapshot(run)
    field, _, value = setting.partition("=")
    with pytest.raises(UserError, match="belongs to another run") as caught:
        score_corpus(make_config(songs, run, setting))
    assert f"config.{field}: " in caught.value.message
    assert value in caught.value.message
    assert snapshot(run) == before


def test_planning_with_other_settings_does_not_touch_a_run(songs, run, make_config):
    before = snapshot(run)
    with pytest.raises(UserError, match=r"config\.segments\.max_clips: 2 -> 1"):
        score_corpus(make_config(songs, run, "segments.max_clips=1"), plan_only=True)
    assert snapshot(run) == before
    assert score_corpus(make_config(songs, run), plan_only=True) == EXIT_OK
    assert snapshot(run) == before


def test_clips_are_as_long_as_the_bundle_knows_them_where_nobody_says(tmp_path):
    usual = [f"input={tmp_path}", f"output={tmp_path}/run"]
    for sets, clip_s, min_s in (
        ([], 5.0, 5.0),
        (["bundle=debug"], 10.0, 5.0),
        (["segments.clip_s=8"], 8.0, 5.0),
        (["segments.min_s=2"], 5.0, 2.0),
    ):
        segments = load_config(CorpusConfig, None, [*usual, *sets]).segments
        assert (segments.clip_s, segments.min_s) == (clip_s, min_s)
        pool = load_config(CandidatesConfig, None, ["prompts=x", *(one for one in sets if "bundle" in one)])
        assert pool.pad_to == (441_000 if "bundle=debug" in sets else 220_500)


def test_the_plan_warns_of_clips_that_the_bundle_does_not_know(songs, make_config, tmp_path, capsys):
    for bundle, told in (("micro", True), ("debug", False)):
        sets = (f"bundle={bundle}", "segments.clip_s=10", "separation.scope=none")
        config = make_config(songs, tmp_path / bundle, *sets)
        assert score_corpus(config, plan_only=True) == 0
        assert ("knows clips of 5 s: --set segments.clip_s=5" in capsys.readouterr().out) == told


def test_planning_into_a_folder_of_something_else_is_refused(songs, make_config, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"holds thesis\.tex"):
        score_corpus(make_config(songs, tmp_path), plan_only=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_other_workers_batches_and_devices_go_on_with_the_same_run(songs, run, make_config):
    (run / "index/u000001.parquet").unlink()
    sets = ("runtime.batch=3", "runtime.fuse=none", "runtime.device=cpu", "max_failures=100%")
    assert score_corpus(make_config(songs, run, *sets)) == EXIT_OK


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"kind": "training", "fingerprint": "0"}'])
def test_a_run_file_of_something_else_is_one_message(songs, make_config, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json"):
        score_corpus(make_config(songs, tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_more_failures_than_allowed_is_another_exit_code_also_later(songs, run, make_config):
    assert score_corpus(make_config(songs, run, "max_failures=0")) == EXIT_TOO_MANY_FAILURES
    assert score_corpus(make_config(songs, run, "max_failures=10%")) == EXIT_TOO_MANY_FAILURES
    assert score_corpus(make_config(songs, run, "max_failures=17%")) == EXIT_OK


def test_failed_rows_are_retried_when_asked_and_only_their_units(songs, make_config, tmp_path):
    """The song cannot be opened at first, as on a network disk that is away for a while."""
    own = Path(shutil.copytree(songs, tmp_path / "songs"))
    good = (own / "kite.wav").read_bytes()
    (own / "kite.wav").write_bytes(b"\0" * len(good))
    config = make_config(own, tmp_path / "run", "max_failures=2")
    assert score_corpus(config) == EXIT_OK
    assert [row["key"] for row in rows(config.output) if row["status"] == "failed"] == ["broken", "kite"]
    untouched = (tmp_path / "run/index/u000000.parquet").stat().st_mtime_ns
    (own / "kite.wav").write_bytes(good)
    assert score_corpus(config) == EXIT_OK
    assert [row["key"] for row in rows(config.output) if row["status"] == "failed"] == ["broken", "kite"]
    assert score_corpus(config, retry_failed=True) == EXIT_OK
    assert [row["key"] for row in rows(config.output) if row["status"] == "failed"] == ["broken"]
    assert "kite_0" in [row["key"] for row in rows(config.output)]
    assert (tmp_path / "run/index/u000000.parquet").stat().st_mtime_ns == untouched


def test_a_job_in_which_nearly_everything_fails_stops_early(make_config, tmp_path):
    folder = tmp_path / "songs"
    folder.mkdir()
    for i in range(ABORT_AFTER + 40):
        (folder / f"{i:03}.mp3").write_text(f"no music {i}")
    config = make_config(folder, tmp_path / "run", "unit_clips=32")
    with pytest.raises(UserError, match="rows failed, so the job stopped") as caught:
        score_corpus(config)
    assert "not_audio" in caught.value.message or "cannot be decoded" in caught.value.message
    assert "--retry-failed" in caught.value.hint
    assert ABORT_AFTER <= len(rows(config.output)) < ABORT_AFTER + 40
    assert not Folder.at(config.output).exists("_SUCCESS.json")


def test_a_corpus_of_broken_files_only_is_finished_with_a_full_quarantine(make_config, tmp_path):
    folder = tmp_path / "songs"
    folder.mkdir()
    (folder / "a.mp3").write_text("no music")
    (folder / "b.wav").write_bytes(b"")
    config = make_config(folder, tmp_path / "run", "splits.validation=0", "splits.test=0")
    assert score_corpus(config) == EXIT_TOO_MANY_FAILURES
    assert [row["reason"] for row in rows(config.output)] == ["not_audio", "empty_file"]
    assert not (tmp_path / "run/shards").exists()
